"""What reading a published transformer at its default tap takes: parameters, seconds an image, peak memory.

    python examples/benchmarks/reading_cost.py --output model_cards/reading_cost.json
    python examples/benchmarks/reading_cost.py --output model_cards/reading_cost.json --cards model_cards

No weights can be downloaded everywhere, and time and memory do not depend on them: each transformer is built with
random ones, in bfloat16, as far as its default tap and no further, with its VAE encoder in float32, and reads one
image. The median of some runs after a first one. Each source runs in a process of its own; the largest, FLUX.1,
takes some 16 GB. With `--source` some alone are measured again. The second command measures nothing and puts the
figures into the cards that ask for them.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_aselect import ASelectConfig, DiTModel
from hf_aselect.checkpoints.atomic import whole_file

SD3_SIZES = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# The default of diffusers' class with what Sana's differs in.
VAE_DC = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
JOINT = {"prompt_embeds": [1, 333, 4096], "pooled_prompt_embeds": [1, 2048]}

# Of each source: the transformer's class and its configuration where it differs from diffusers' defaults, the VAE, the
# shapes of the empty prompt's embeddings, and pixels a side.
SOURCES = {
    "facebook/DiT-XL-2-256": (
        "DiTTransformer2DModel",
        {"num_embeds_ada_norm": 1000, "sample_size": 32},
        VAE,
        None,
        256,
    ),
    "facebook/DiT-XL-2-512": (
        "DiTTransformer2DModel",
        {"num_embeds_ada_norm": 1000, "sample_size": 64},
        VAE,
        None,
        512,
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "SD3Transformer2DModel",
        {**SD3_SIZES, "pos_embed_max_size": 192},
        VAE_16,
        JOINT,
        512,
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "SD3Transformer2DModel",
        {
            **SD3_SIZES,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
        VAE_16,
        JOINT,
        512,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        VAE_16,
        JOINT,
        512,
    ),
    "PixArt-alpha/PixArt-XL-2-512x512": (
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096},
        VAE,
        {"prompt_embeds": [1, 1, 4096]},
        512,
    ),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "use_additional_conditions": False},
        VAE,
        {"prompt_embeds": [1, 1, 4096]},
        512,
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        VAE_16,
        {"prompt_embeds": [1, 512, 4096], "pooled_prompt_embeds": [1, 768]},
        512,
    ),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": (
        "SanaTransformer2DModel",
        {"sample_size": 16},
        VAE_DC,
        {"prompt_embeds": [1, 1, 2304]},
        512,
    ),
    "Alpha-VLLM/Lumina-Image-2.0": (
        "Lumina2Transformer2DModel",
        {"cap_feat_dim": 2304},
        VAE_16,
        {"prompt_embeds": [1, 1, 2304]},
        512,
    ),
}


VAE_FLUX2 = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
}
VAE_WAN = {
    "_class_name": "AutoencoderKLWan",
    "dim_mult": [1, 2, 4, 4],
    "z_dim": 16,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
# Its fields have the same names.
VAE_QWEN = {**VAE_WAN, "_class_name": "AutoencoderKLQwenImage"}
# Sources whose sizes are in their cards, and no time.
UNTIMED = {
    "Qwen/Qwen-Image": ("QwenImageTransformer2DModel", {}, VAE_QWEN, {"prompt_embeds": [1, 5, 3584]}, 512),
    "Tongyi-MAI/Z-Image": (
        "ZImageTransformer2DModel",
        {"axes_lens": [1536, 512, 512]},
        VAE_16,
        {"prompt_embeds": [1, 8, 2560]},
        512,
    ),
    "fal/AuraFlow-v0.3": (
        "AuraFlowTransformer2DModel",
        {"pos_embed_max_size": 9216},
        VAE,
        {"prompt_embeds": [1, 256, 2048]},
        512,
    ),
    "zai-org/CogView4-6B": (
        "CogView4Transformer2DModel",
        {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
        VAE_16,
        {"prompt_embeds": [1, 16, 4096]},
        512,
    ),
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": (
        "HunyuanDiT2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "num_layers": 40,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },
        VAE,
        {
            "prompt_embeds": [1, 77, 1024],
            "prompt_mask": [1, 77],
            "prompt_embeds_2": [1, 256, 2048],
            "prompt_mask_2": [1, 256],
        },
        512,
    ),
    "Alpha-VLLM/Lumina-Next-SFT-diffusers": (
        "LuminaNextDiT2DModel",
        {"num_layers": 24, "num_kv_heads": 8},
        VAE,
        {"prompt_embeds": [1, 1, 2048]},
        512,
    ),
    "black-forest-labs/FLUX.2-klein-base-4B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        VAE_FLUX2,
        {"prompt_embeds": [1, 512, 7680]},
        512,
    ),
    "lodestones/Chroma1-HD": ("ChromaTransformer2DModel", {}, VAE_16, {"prompt_embeds": [1, 2, 4096]}, 512),
    "meituan-longcat/LongCat-Image": (
        "LongCatImageTransformer2DModel",
        {"num_layers": 10, "num_single_layers": 20},
        VAE_16,
        {"prompt_embeds": [1, 512, 3584]},
        512,
    ),
    "Photoroom/prx-512-t2i-sft": ("PRXTransformer2DModel", {}, VAE_16, {"prompt_embeds": [1, 1, 2304]}, 512),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        VAE_WAN,
        {"prompt_embeds": [1, 512, 4096]},
        512,
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (
        "WanTransformer3DModel",
        {},
        VAE_WAN,
        {"prompt_embeds": [1, 512, 4096]},
        512,
    ),
}


def whole_transformer(name: str) -> torch.nn.Module:
    """Return the whole transformer of a source, without data."""
    import diffusers

    class_name, sizes, *_ = {**SOURCES, **UNTIMED}[name]
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**sizes)


def cut(config: dict[str, object], block: int) -> dict[str, object]:
    """Return the configuration of a transformer that ends with a block."""
    if "num_single_layers" not in config:
        return {**config, "num_layers": block + 1}
    num_double = min(config["num_layers"], block + 1)
    return {**config, "num_layers": num_double, "num_single_layers": block + 1 - num_double}


def measure(name: str, num_runs: int) -> dict[str, object]:
    """Read one image with random weights; return what it took."""
    class_name, _, vae, prompt_shapes, image_size = SOURCES[name]
    whole = whole_transformer(name)
    full = {**whole.config, "_class_name": class_name}
    fields = {"vae": vae, "scheduler": FLOW, "prompt_shapes": prompt_shapes, "image_size": image_size, "timestep": 141}
    block = ASelectConfig(transformer=full, **fields).block
    config = ASelectConfig(transformer=cut(full, block), block=block, **fields)
    with torch.device("meta"):
        model = DiTModel(config)
    model.denoiser.to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(std=0.02)
    model.eval()
    pixel_values = torch.rand(1, 3, image_size, image_size) * 2 - 1
    seconds = []
    with torch.no_grad():
        for _ in range(num_runs + 1):
            started = time.monotonic()
            tokens = model(pixel_values).last_hidden_state
            seconds.append(time.monotonic() - started)
    unused = {id(p) for module in model.denoiser.unused_modules(block, config.feature) for p in module.parameters()}
    read = sum(p.numel() for p in model.denoiser.parameters() if id(p) not in unused)
    return {
        "parameters": sum(parameter.numel() for parameter in whole.parameters()),
        "blocks": ASelectConfig(transformer=full, **fields).num_hidden_layers,
        "block": block,
        "parameters_read": read,
        "image_size": image_size,
        "tokens": tokens.shape[1],
        "width": tokens.shape[2],
        "seconds": round(statistics.median(seconds[1:]), 2),
        "fastest": round(min(seconds[1:]), 2),
        "slowest": round(max(seconds[1:]), 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def size(name: str) -> dict[str, int]:
    """Return what is read of a source at its default tap, without reading it."""
    class_name, _, vae, prompt_shapes, image_size = UNTIMED[name]
    config = ASelectConfig(
        transformer={**whole_transformer(name).config, "_class_name": class_name},
        vae=vae,
        scheduler=FLOW,
        prompt_shapes=prompt_shapes,
        image_size=image_size,
        timestep=141,
    )
    with torch.device("meta"):
        model = DiTModel(config)
    unused = {id(each) for each in model.denoiser.unused_parameters(model.taps())}
    every = list(model.denoiser.parameters())
    return {
        "parameters": sum(each.numel() for each in every),
        "blocks": config.num_hidden_layers,
        "block": config.block,
        "parameters_read": sum(each.numel() for each in every if id(each) not in unused),
        "vae_parameters": sum(each.numel() for each in model.vae.parameters()),
        "image_size": image_size,
        "tokens": (image_size // config.patch_pixels) ** 2,
        "width": config.hidden_size,
    }


def size_table(names: list[str]) -> str:
    """Return the sizes of some sources as a Markdown table."""
    lines = [
        "| source | parameters | read for the default tap | in bfloat16 | VAE encoder, float32 | image | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        row = size(name)
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.0f} M, {row['blocks']} blocks "
            f"| {row['parameters_read'] / 1e6:,.0f} M, query of block {row['block']} "
            f"| {2 * row['parameters_read'] / 1e9:.1f} of {2 * row['parameters'] / 1e9:.1f} GB "
            f"| {4 * row['vae_parameters'] / 1e9:.2f} GB "
            f"| {row['image_size']} × {row['image_size']} | {row['tokens']:,} × {row['width']:,} |"
        )
    return "\n".join(lines)


def table(results: dict[str, dict[str, float]], names: list[str]) -> str:
    """Return the figures of some sources as a Markdown table."""
    lines = [
        "| source | parameters | read for the default tap | image | tokens | seconds an image | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        row = results[name]
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.0f} M, {row['blocks']} blocks "
            f"| {row['parameters_read'] / 1e6:,.0f} M, query of block {row['block']} "
            f"| {row['image_size']} × {row['image_size']} | {row['tokens']:,} × {row['width']:,} "
            f"| {row['seconds']:.1f} ({row['fastest']:.1f} to {row['slowest']:.1f}) "
            f"| {row['peak_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def fill_cards(results: dict[str, dict[str, float]], folder: Path) -> None:
    """Put the figures into the cards of a folder, between the marks that name the sources."""
    marks = re.compile(r"(<!-- reading_cost: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    note = (
        "\n\nRandom weights in bfloat16, the VAE encoder in float32, one image at a time on two CPU cores, the\n"
        "median of three runs (`examples/benchmarks/reading_cost.py`). What comes after the tap is never run; here\n"
        "it was not built either, while `from_pretrained` maps the whole checkpoint and reads it as it runs.\n"
    )
    size_marks = re.compile(r"(<!-- reading_size: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    size_note = (
        "\n\nSizes of diffusers' class (`examples/benchmarks/reading_cost.py`). No time was measured. What comes\n"
        "after the tap is never run, and `from_pretrained` maps the whole checkpoint and reads it as it runs.\n"
        "Activations come on top.\n"
    )
    for path in sorted(folder.glob("*/README.md")):
        text = path.read_text(encoding="utf-8")
        filled = marks.sub(lambda found: f"{found[1]}{table(results, found[2].split(', '))}{note}{found[3]}", text)
        filled = size_marks.sub(
            lambda found: f"{found[1]}{size_table(found[2].split(', '))}{size_note}{found[3]}", filled
        )
        if filled != text:
            with whole_file(path) as unfinished:
                unfinished.write_text(filled, encoding="utf-8")


def main() -> None:
    """Measure all sources, each in a process of its own; or fill the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--cards", type=Path, help="folder of cards to put the figures of --output into")
    parser.add_argument("--num_runs", type=int, default=3, help="runs to take the median of (%(default)s)")
    parser.add_argument("--source", nargs="*", default=list(SOURCES), help="which ones (all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.num_runs)))
        return
    if args.cards:
        fill_cards(json.loads(args.output.read_text(encoding="utf-8")), args.cards)
        return
    results: dict[str, object] = {}
    if args.output and args.output.is_file():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    results["machine"] = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    for name in args.source:
        command = [sys.executable, __file__, "--one", name, "--num_runs", str(args.num_runs)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            why = finished.stderr[-2000:] or "killed, as there is too little memory perhaps"
            raise RuntimeError(f"{name}: exit code {finished.returncode}: {why}")
        results[name] = json.loads(finished.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
        if args.output:
            with whole_file(args.output) as unfinished:
                unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
