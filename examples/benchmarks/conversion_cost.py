"""What it takes to convert a full-size checkpoint: seconds, peak memory, bytes; and to classify an image with it.

    python examples/benchmarks/conversion_cost.py --work_dir /tmp/dit-xl --output cost.json
    python examples/benchmarks/conversion_cost.py --work_dir /tmp/pixart --pipeline pixart-sigma --output cost.json
    python examples/benchmarks/conversion_cost.py --work_dir /tmp/pt --pipeline dit-xl-pt --output cost.json

No weights can be downloaded everywhere, so a pipeline of the sizes of DiT-XL/2-256 (3.3 GB in float32) or PixArt-Sigma
with its text encoder T5-XXL (11 GB in bfloat16) gets random ones (seed 0) and is saved by diffusers itself. The pickle
of `dit-xl-pt`, 2.7 GB, is what the code of facebookresearch/DiT saves, with a VAE of diffusers beside it. Conversion
and classification run in processes of their own, whose peak memory is the kernel's count (`ru_maxrss`), mapped files
included.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def make_pipeline(folder: Path, name: str) -> None:
    """Save a pipeline of a published architecture with random weights."""
    import diffusers

    torch.manual_seed(0)
    # The sizes of stabilityai/sd-vae-ft-ema and of SDXL's VAE.
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215 if name.startswith("dit-xl") else 0.13025,
    )
    if name == "dit-xl-pt":
        vae.save_pretrained(folder / "vae")
        torch.save(research_weights(), folder / "dit-xl-2.pt")
        return
    if name == "dit-xl":
        transformer = diffusers.DiTTransformer2DModel(sample_size=32, num_embeds_ada_norm=1000)
        scheduler = diffusers.DDIMScheduler()
        diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(folder)
        return
    diffusers.PixArtSigmaPipeline(
        # As `PixArt-Sigma-XL-2-256x256`.
        transformer=diffusers.PixArtTransformer2DModel(sample_size=32, caption_channels=4096).to(torch.bfloat16),
        vae=vae,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=_t5_xxl(),
        tokenizer=_tokenizer(),
    ).save_pretrained(folder)


def research_weights() -> dict[str, torch.Tensor]:
    """Return random weights of DiT-XL/2 by the names of facebookresearch/DiT; positions are sines and cosines."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    width, depth = 1152, 28
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (2 * 2 * 8, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for block in range(depth):
        linears[f"blocks.{block}.attn.qkv"] = 3 * width, width
        linears[f"blocks.{block}.attn.proj"] = width, width
        linears[f"blocks.{block}.mlp.fc1"] = 4 * width, width
        linears[f"blocks.{block}.mlp.fc2"] = width, 4 * width
        linears[f"blocks.{block}.adaLN_modulation.1"] = 6 * width, width
    weights = {
        "pos_embed": get_2d_sincos_pos_embed(width, 16, output_type="pt")[None].float(),
        "x_embedder.proj.weight": torch.randn(width, 4, 2, 2) * 0.02,
        "x_embedder.proj.bias": torch.zeros(width),
        "y_embedder.embedding_table.weight": torch.randn(1001, width) * 0.02,
    }
    for name, shape in linears.items():
        weights[f"{name}.weight"] = torch.randn(shape) * 0.02
        weights[f"{name}.bias"] = torch.zeros(shape[0])
    return weights


def _t5_xxl() -> torch.nn.Module:
    """Return an encoder of T5-XXL's sizes in bfloat16, with random weights."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        encoder = T5EncoderModel(config).to(torch.bfloat16)
    encoder.to_empty(device="cpu")
    encoder.tie_weights()
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.02)
    return encoder


def _tokenizer() -> object:
    """Return a tokenizer of a few words that ends a text as T5's does."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def convert(source: Path, output: Path, dtype: str | None) -> dict[str, float]:
    """Convert, and return what it cost."""
    from hf_aselect import convert_diffusers, convert_research

    file = source / "dit-xl-2.pt"
    if file.is_file():
        options = {"layout": "dit", "vae": source / "vae", "allow_pickle": True}
        made = convert_research(file, output, dtype=dtype, **options)
    else:
        made = convert_diffusers(source, output, dtype=dtype)
    return {
        **({"source_bytes": file.stat().st_size} if file.is_file() else {}),
        "seconds": made.seconds,
        "parameters": made.num_parameters,
        "transformer_bytes": made.transformer_bytes,
        "vae_encoder_bytes": made.vae_encoder_bytes,
        "vae_decoder_bytes_dropped": made.vae_decoder_bytes,
        "text_encoder_bytes_dropped": made.text_encoder_bytes,
        "peak_bytes": peak_bytes(),
    }


def classify(source: Path) -> dict[str, float]:
    """Load a classifier and classify one image of 256 × 256; return what it cost."""
    from hf_aselect import ASelectImageProcessor, DiTForImageClassification

    started = time.monotonic()
    model = DiTForImageClassification.from_pretrained(source, timestep=121, num_labels=1000)
    loaded = time.monotonic()
    values = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    processor = ASelectImageProcessor.from_model_config(model.config)
    pixel_values = processor([Image.fromarray(values)], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values).logits
    if logits.shape != (1, 1000) or not bool(logits.isfinite().all()):
        raise RuntimeError(f"expected 1000 finite logits, got {logits.shape}")
    return {
        "load_seconds": round(loaded - started, 2),
        "classify_seconds": round(time.monotonic() - loaded, 2),
        "timestep_embedding": model.config.timestep_embedding,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Return the most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(*words: str) -> dict[str, float]:
    """Run a step of this script in a process of its own, and return what it says."""
    command = [sys.executable, __file__, "--step", *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Run all steps, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, help="folder for some 8 GB of checkpoints; those of before are used")
    parser.add_argument(
        "--pipeline", choices=("dit-xl", "pixart-sigma", "dit-xl-pt"), default="dit-xl", help="whose sizes"
    )
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, *words = args.step
        if step == "make":
            make_pipeline(Path(words[0]), words[1])
            print("{}")
        elif step == "convert":
            print(json.dumps(convert(Path(words[0]), Path(words[1]), words[2] if len(words) > 2 else None)))
        else:
            print(json.dumps(classify(Path(words[0]))))
        return
    if args.work_dir is None:
        parser.error("--work_dir is needed")
    source = args.work_dir / "pipeline"
    if not any((source / name).is_file() for name in ("model_index.json", "dit-xl-2.pt")):
        # Not here: a new process counts what its parent had in memory as its own peak.
        in_a_process("make", str(source), args.pipeline)
    results: dict[str, object] = {
        "pipeline": args.pipeline,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    # T5-XXL takes 19 GB in float32.
    for dtype in ("bfloat16",) if args.pipeline == "pixart-sigma" else (None, "bfloat16"):
        output = args.work_dir / f"converted-{dtype or 'float32'}"
        shutil.rmtree(output, ignore_errors=True)
        words = ["convert", str(source), str(output), *([dtype] if dtype else [])]
        results[f"convert_{dtype or 'float32'}"] = in_a_process(*words)
        results[f"classify_{dtype or 'float32'}"] = in_a_process("classify", str(output))
    if args.pipeline == "dit-xl":
        results["classify_from_the_pipeline"] = in_a_process("classify", str(source))
    text = json.dumps(results, indent=1)
    print(text)
    if args.output:
        temporary = args.output.with_name(f".{args.output.name}.incomplete")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.output)


if __name__ == "__main__":
    main()
