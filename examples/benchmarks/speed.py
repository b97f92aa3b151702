"""What early exit, folding, half precision and cached features save, against diffusers' own forward.

    python examples/benchmarks/speed.py --output_dir speed

On two CPU cores with nothing else running it takes about 80 minutes, and 13 GB of disk under `--output_dir` meanwhile.
`--sizes S/2 B/2 --batches 1 8` takes a third; `--sections` measures a part again. On a CUDA device (`--device cuda`)
it measures with events, and memory by torch's count.

All DiTs have random weights and their real sizes, 32 × 32 latents of 4 channels, 256 tokens; features are the query of
the block at half depth, at timestep 121, with the null label. Ways of reading them:

- `diffusers`: the whole forward of `DiTTransformer2DModel` with a hook on the projection, which is what others do;
- `early exit`: this package, which stops at the tap;
- `folded`: `model.fold()`; with `eager` transformers' plain attention in place of its default kernel, with `onnx`
  exported and run by onnxruntime (on CPUs, with the `export` extra).

Times are medians of `--repetitions`, one of each way after the other, after one round that does not count; the least
and the greatest are saved, too. Peak memory is that of a process of its own, which loads a checkpoint of that way and
runs (Linux's `VmHWM`), less that of when it had imported the same and loaded nothing. Loading is that of a pipeline
(transformer, Stable Diffusion's VAE, scheduler) and of what it folds to, each time in a process of its own that has
imported all of diffusers that it needs; with files that the system has in memory or has been told to forget ("cold"),
until `from_pretrained` returns, and until each page of the weights was read once, as it maps files and reads little.
`text_loading` does the same for a pipeline that is told what to draw by a text encoder: PixArt-Sigma's transformer of
XL/2's size with T5-XXL, in bfloat16 (11 GB). What it folds to holds what the empty prompt adds, and no encoder.
`--sections read_outs` measures models that read the hidden states of all blocks, at one timestep and at three, as they
are and folded.
`speed.json` has everything, `speed.md` the tables, `speed.png` the image.
"""

import argparse
import ast
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

import hf_aselect
from hf_aselect import ASelectConfig, ASelectImageProcessor, DiTForImageClassification, DiTModel, cache_features
from hf_aselect.checkpoints.atomic import whole_file

sys.path.insert(0, str(Path(__file__).parent))

import conversion_cost

# Blocks, width and attention heads (arXiv 2212.09748, table 1).
SIZES = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}
TIMESTEP = 121
TEXT_BLOCK = 14  # of PixArt-Sigma's 28
WAYS = ("diffusers", "early exit", "folded", "folded onnx", "diffusers bf16", "folded bf16", "folded bf16 eager")
SECTIONS = (
    "import_seconds",
    "speeds",
    "matrix_share",
    "growth",
    "profile",
    "head_training",
    "checkpoints",
    "loading",
    "text_loading",
)
# Measured where it is asked for.
READ_OUTS = "read_outs"
SEVERAL = ([121], [21, 121, 521])  # timesteps of a read-out
GROWTH_SIZE = "B/2"
EPOCHS = 28
NUM_PICTURES = 64


def configuration(size: str, channels: int = 4, latents: int = 32, **fields: Any) -> ASelectConfig:
    """Return the configuration of a DiT of a size, read at half depth."""
    depth, width, heads = SIZES[size]
    transformer = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": depth,
        "sample_size": latents,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    return ASelectConfig(transformer=transformer, **{"timestep": TIMESTEP, "block": depth // 2, **fields})


def way_of(model: DiTModel, way: str) -> Callable[[Tensor], Tensor]:
    """Return what reads features of clean latents in one of `WAYS`."""
    if way.startswith("folded"):
        model = model.fold()
        if way.endswith("eager"):
            model.set_attn_implementation("eager")
        if way.endswith("onnx"):
            return through_onnxruntime(model)
    if "bf16" in way:
        # A copy of its own: the others compute in float32.
        model = model.to(torch.bfloat16) if way.startswith("folded") else _copy(model).to(torch.bfloat16)
    if not way.startswith("diffusers"):
        return lambda latents: model.extract_features(latents=latents)
    transformer, read = model.denoiser.transformer, []
    projection = transformer.transformer_blocks[model.config.block_index()].attn1.to_q
    # The last one only: early exit reads the same model, and takes nothing out.
    projection.register_forward_hook(lambda _module, _inputs, output: read.__setitem__(slice(None), [output]))

    def whole(latents: Tensor) -> Tensor:
        noised = model.add_noise(latents, TIMESTEP).to(model.dtype)
        size = (noised.shape[0],)
        timesteps = torch.full(size, TIMESTEP, device=noised.device)
        transformer(noised, timestep=timesteps, class_labels=torch.full(size, 1000, device=noised.device))
        return read.pop()

    return whole


class LastHiddenState(nn.Module):
    """What is exported: tokens of clean latents."""

    def __init__(self, model: DiTModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        """Return tokens (B, N, D) of latents (B, C, h, w)."""
        tokens: Tensor = self.model(latents=latents).last_hidden_state
        return tokens


def through_onnxruntime(folded: DiTModel) -> Callable[[Tensor], Tensor]:
    """Return what reads features of a folded model by onnxruntime, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Waiting threads of it would take the processor from the ways whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        torch.onnx.export(
            LastHiddenState(folded).eval(),
            (latents_of(2, folded),),
            path,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["latents"],
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda latents: torch.from_numpy(session.run(None, {"latents": latents.numpy()})[0])


def _copy(model: DiTModel) -> DiTModel:
    made = DiTModel(model.config).eval().to(model.device)
    made.load_state_dict(model.state_dict())
    return made


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Return how long one call takes."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


def rounds(runs: dict[str, Callable[[], object]], repetitions: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the milliseconds of each run, one after the other in every round; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            times[name].append(milliseconds(run, device))
    return {name: values[1:] for name, values in times.items()}


def medians(runs: dict[str, Callable[[], object]], repetitions: int, device: str = "cpu") -> dict[str, float]:
    """Return the median milliseconds of each run."""
    return {name: statistics.median(values) for name, values in rounds(runs, repetitions, device).items()}


def ways_on(device: str) -> list[str]:
    """Return the ways that a device knows."""
    has_onnx = device == "cpu" and importlib.util.find_spec("onnxruntime") is not None
    return [way for way in WAYS if has_onnx or not way.endswith("onnx")]


def latents_of(batch: int, model: DiTModel, seed: int = 0) -> Tensor:
    """Return random clean latents."""
    side, channels = model.config.image_height_width[0], model.config.num_channels
    values = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return values.to(model.device)


@torch.inference_mode()
def speeds(size: str, batches: list[int], repetitions: int, device: str) -> list[dict[str, Any]]:
    """Return milliseconds of each way at each batch size, and that all give the same tokens."""
    torch.manual_seed(0)
    model = DiTModel(configuration(size)).eval().to(device)
    ways = {way: way_of(model, way) for way in ways_on(device)}
    rows = []
    for batch in batches:
        latents = latents_of(batch, model)
        tokens = {way: read(latents).double() for way, read in ways.items()}
        expected = tokens["diffusers"]
        runs = {way: partial(read, latents) for way, read in ways.items()}
        times = rounds(runs, repetitions, device)
        whole = statistics.median(times["diffusers"])
        for way, values in times.items():
            value = statistics.median(values)
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "way": way,
                    "milliseconds": round(value, 2),
                    "least": round(min(values), 2),
                    "greatest": round(max(values), 2),
                    "pictures_per_second": round(1000 * batch / value, 3),
                    "times_as_fast": round(whole / value, 3),
                    "relative_difference": float((tokens[way] - expected).norm() / expected.norm()),
                }
            )
            print(f"{size} batch {batch}: {way}: {value:.1f} ms, {whole / value:.2f} times", flush=True)
    return rows


@torch.inference_mode()
def read_outs(size: str, batches: list[int], repetitions: int, device: str) -> list[dict[str, Any]]:
    """Return parameters and milliseconds of models that read all blocks, as they are and folded."""
    rows = []
    for timesteps in SEVERAL:
        torch.manual_seed(0)
        fields = {"timestep": timesteps, "block": "all", "feature": "hidden", "zeroed_channels": []}
        model = DiTModel(configuration(size, **fields)).eval().to(device)
        models = {"early exit": model, "folded": model.fold()}
        for batch in batches:
            latents = latents_of(batch, model)
            tokens = {way: each.extract_features(latents=latents).double() for way, each in models.items()}
            difference = float((tokens["folded"] - tokens["early exit"]).norm() / tokens["early exit"].norm())
            runs: dict[str, Callable[[], object]] = {
                way: partial(each.extract_features, latents=latents) for way, each in models.items()
            }
            times = rounds(runs, repetitions, device)
            for way, values in times.items():
                row = {"size": size, "timesteps": len(timesteps), "batch": batch, "way": way}
                row["parameters"] = sum(each.numel() for each in models[way].parameters())
                row["milliseconds"] = round(statistics.median(values), 2)
                row["least"], row["greatest"] = round(min(values), 2), round(max(values), 2)
                row["times_as_fast"] = round(statistics.median(times["early exit"]) / statistics.median(values), 3)
                rows.append({**row, "relative_difference": difference if way == "folded" else 0.0})
                print(rows[-1], flush=True)
    return rows


def matrix_share(size: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """Return the share of the machine's matrix-multiplication peak that the folded model reaches.

    The peak is that of the model's own linear layers, each alone and in the same dtype: their operations by their
    time. The model's operations are those of its linear layers and of the two products of attention.
    """
    rows = []
    for way, dtype in (
        ("folded", torch.float32),
        ("folded bf16", torch.bfloat16),
        ("folded bf16 eager", torch.bfloat16),
    ):
        torch.manual_seed(0)
        model = DiTModel(configuration(size)).eval()
        read = way_of(model, way)
        latents = latents_of(batch, model)
        num_tokens = batch * (model.config.image_height_width[0] // 2) ** 2
        layers = [layer for layer in model.fold().to(dtype).denoiser.modules() if isinstance(layer, nn.Linear)]
        kinds = {(layer.in_features, layer.out_features): layer for layer in layers}
        inputs = {kind: torch.randn(num_tokens, kind[0], dtype=dtype) for kind in kinds}
        with torch.inference_mode():
            runs: dict[Any, Callable[[], object]] = {kind: partial(kinds[kind], inputs[kind]) for kind in kinds}
            runs["model"] = partial(read, latents)
            times = medians(runs, repetitions)
        operations = sum(2 * num_tokens * layer.in_features * layer.out_features for layer in layers)
        alone = sum(times[layer.in_features, layer.out_features] for layer in layers)
        width, length = model.config.hidden_size, num_tokens // batch
        attention = 4 * batch * length**2 * width * model.config.block_index()
        rows.append(
            {
                "size": size,
                "batch": batch,
                "way": way,
                "peak_gflops": round(operations / alone / 1e6, 1),
                "reached_gflops": round((operations + attention) / times["model"] / 1e6, 1),
                "share_of_peak": round((operations + attention) / times["model"] / (operations / alone), 3),
                "share_of_time_in_linear_layers": round(alone / times["model"], 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def growth(repetitions: int, device: str) -> list[dict[str, Any]]:
    """Return milliseconds of a folded DiT at batch 4 over the tokens of an image, and over the blocks that run."""
    rows = []
    for what, values in (("tokens", (16, 32, 64)), ("blocks", (3, 6, 9, 11))):
        runs, models = {}, {}
        for value in values:
            fields = {"latents": value} if what == "tokens" else {"block": value}
            torch.manual_seed(0)
            model = DiTModel(configuration(GROWTH_SIZE, **fields)).eval().to(device)
            models[value] = model.fold()
            latents = latents_of(4, model)
            runs[str(value)] = partial(models[value].extract_features, latents=latents)
        times = medians(runs, repetitions, device)
        for value in values:
            number = (value // 2) ** 2 if what == "tokens" else value
            rows.append({"what": what, "number": number, "milliseconds": round(times[str(value)], 2)})
    return rows


@torch.inference_mode()
def profile(device: str) -> list[dict[str, Any]]:
    """Return which operations of a folded DiT take the time, at batch 8."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = DiTModel(configuration(GROWTH_SIZE)).eval().fold().to(device, dtype)
        latents = latents_of(8, model)
        model.extract_features(latents=latents)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(3):
                model.extract_features(latents=latents)
        name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
        total = sum(getattr(event, name) for event in events)
        for event in events[:7]:
            share = round(getattr(event, name) / total, 4)
            rows.append({"dtype": str(dtype).removeprefix("torch."), "operation": event.key, "share": share})
    return rows


def save_checkpoints(size: str, folder: Path) -> dict[str, dict[str, int]]:
    """Save a DiT as diffusers saves it, and its folded forms; return parameters and bytes of each."""
    torch.manual_seed(0)
    model = DiTModel(configuration(size)).eval()
    model.denoiser.transformer.save_pretrained(folder / "diffusers")
    shallow = configuration(size, block=13, feature="hidden") if size == "XL/2" else None
    saved = {"folded": model.fold()}
    saved["folded bf16"] = model.fold().to(torch.bfloat16)
    if shallow is not None:
        model.config.block, model.config.feature = shallow.block, shallow.feature
        saved["folded at block 13"] = model.fold()
        saved["folded at block 13 bf16"] = model.fold().to(torch.bfloat16)
    sizes = {"diffusers": {"parameters": sum(one.numel() for one in model.denoiser.parameters())}}
    for name, folded in saved.items():
        folded.save_pretrained(folder / name)
        sizes[name] = {"parameters": folded.num_parameters()}
    for name, row in sizes.items():
        row["bytes"] = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
    return sizes


def peak_bytes() -> int:
    """Return the most memory that this process has held: not `ru_maxrss`, which begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def load(folder: str, way: str) -> Any:
    """Return the model of a checkpoint that `save_checkpoints` wrote."""
    if way == "diffusers":
        return diffusers.DiTTransformer2DModel.from_pretrained(Path(folder) / "diffusers").eval()
    if way.startswith("folded"):
        dtype = torch.bfloat16 if "bf16" in way else torch.float32
        return DiTModel.from_pretrained(Path(folder) / way, dtype=dtype)
    fields = {"timestep": TIMESTEP, "block": transformer_depth(folder) // 2}
    return DiTModel.from_pretrained(Path(folder) / "diffusers", scheduler={"_class_name": "DDPMScheduler"}, **fields)


def child(task: str, folder: str, way: str, numbers: list[int]) -> None:
    """Load a checkpoint, or load one and run it in batches; print seconds or bytes as JSON."""
    if task == "load":
        print(json.dumps(seconds_to_load(Path(folder) / way)))
        return
    before = peak_bytes()
    model, peaks = load(folder, way), []
    with torch.inference_mode():
        for batch in numbers:
            latents = torch.randn(batch, 4, 32, 32)
            if way == "diffusers":
                labels = torch.full((batch,), 1000)
                model(latents, timestep=torch.full((batch,), TIMESTEP), class_labels=labels)
            else:
                model.extract_features(latents=latents)
            peaks.append(peak_bytes() - before)
    print(json.dumps(peaks))


def transformer_depth(folder: str) -> int:
    """Return the number of blocks of a saved DiT."""
    return int(json.loads((Path(folder) / "diffusers" / "config.json").read_text())["num_layers"])


def ask_child(task: str, folder: Path, way: str, numbers: Sequence[int] = ()) -> Any:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", task, "--folder", str(folder), "--way", way]
    command += ["--output_dir", "unused", "--numbers", *map(str, numbers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_to_load(folder: Path) -> dict[str, float]:
    """Return the seconds that a pipeline, or a model of ours, takes to load, and until all its weights were read."""
    is_pipeline = (folder / "model_index.json").exists()
    kind: Any = diffusers.DiffusionPipeline if is_pipeline else DiTModel
    # Whoever loads a VAE or a text encoder imports it; here both sides did before.
    _ = diffusers.DiTPipeline, diffusers.PixArtSigmaPipeline, diffusers.AutoencoderKL, transformers.T5EncoderModel
    # Of ours the configuration tells it; diffusers would make float32 of what was saved in bfloat16.
    options = {"torch_dtype": torch.bfloat16} if (folder / "text_encoder").exists() else {}
    begun = time.perf_counter()
    loaded = kind.from_pretrained(folder, **options)
    returned = time.perf_counter()
    for module in loaded.components.values() if is_pipeline else [loaded]:
        for weights in module.parameters() if isinstance(module, nn.Module) else []:
            weights.detach().reshape(-1)[:: 4096 // weights.element_size()].sum()
    return {"returned": returned - begun, "read": time.perf_counter() - begun}


def forget(folder: Path) -> None:
    """Tell the system to drop what it holds of a folder's weights, so that they are read from the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_pipeline(size: str, folder: Path) -> None:
    """Save a pipeline of a DiT with Stable Diffusion's VAE, and its folded forms."""
    torch.manual_seed(0)
    transformer = DiTModel(configuration(size)).denoiser.transformer
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(num_train_timesteps=1000))
    pipeline.save_pretrained(folder / "pipeline")
    model = DiTModel.from_pretrained(folder / "pipeline", timestep=TIMESTEP, block=SIZES[size][0] // 2)
    model.fold().save_pretrained(folder / "folded")
    model.fold().to(torch.bfloat16).save_pretrained(folder / "folded bf16")


def save_text_pipeline(folder: Path) -> None:
    """Save a pipeline with a text encoder as published ones are, in bfloat16, and what it folds to."""
    conversion_cost.make_pipeline(folder / "pipeline", "pixart-sigma")
    model = DiTModel.from_pretrained(folder / "pipeline", timestep=TIMESTEP, block=TEXT_BLOCK, dtype=torch.bfloat16)
    model.fold().save_pretrained(folder / "folded bf16")


def loading(what: str, ways: Sequence[str], repetitions: int, folder: Path) -> list[dict[str, Any]]:
    """Return the seconds that a pipeline and its folded forms take to load."""
    rows = []
    for cold in (False, True) if hasattr(os, "posix_fadvise") else (False,):
        times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(repetitions + 1):
            for way in ways:
                if cold:
                    forget(folder / way)
                times[way].append(ask_child("load", folder, way))
        for way in ways:
            row: dict[str, Any] = {"size": what, "way": way, "cold": cold}
            for name in ("returned", "read"):
                values = [one[name] for one in times[way][1:]]
                row[name] = round(statistics.median(values), 4)
                row[f"{name}_least"], row[f"{name}_greatest"] = round(min(values), 4), round(max(values), 4)
                whole = statistics.median(one[name] for one in times["pipeline"][1:])
                row[f"{name}_times_as_fast"] = round(whole / statistics.median(values), 3)
            row["megabytes"] = round(sum(path.stat().st_size for path in (folder / way).rglob("*.safetensors")) / 1e6)
            rows.append(row)
            print(row, flush=True)
    return rows


def checkpoints(size: str, batches: list[int], folder: Path) -> list[dict[str, Any]]:
    """Return parameters, bytes and peak memory of each way's checkpoint."""
    saved = save_checkpoints(size, folder)
    rows = []
    for way in [*saved, "early exit"]:
        peaks = ask_child("memory", folder, way, sorted(batches)) if "block 13" not in way else []
        rows.append(
            {
                "size": size,
                "way": way,
                **saved.get(way, saved["diffusers"]),
                "peak_gigabytes": {
                    str(batch): round(peak / 1e9, 3) for batch, peak in zip(sorted(batches), peaks, strict=False)
                },
            }
        )
        print(rows[-1], flush=True)
    return rows


def device_memory(size: str, batches: list[int]) -> list[dict[str, Any]]:
    """Return the peak memory of each way on a CUDA device, by torch's count."""
    rows = []
    for way in ways_on("cuda"):
        torch.manual_seed(0)
        model = DiTModel(configuration(size)).eval().to("cuda")
        read = way_of(model, way)
        latents = {batch: latents_of(batch, model) for batch in batches}
        if way != "diffusers" and way != "early exit":
            del model
        peaks = {}
        with torch.inference_mode():
            for batch in sorted(batches):
                torch.cuda.reset_peak_memory_stats()
                read(latents[batch])
                peaks[str(batch)] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        rows.append({"size": size, "way": way, "peak_gigabytes": peaks})
    return rows


def random_pictures(num: int) -> Dataset:
    """Return random colour images of 32 × 32 in ten classes."""
    values = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(value) for value in values], "label": [index % 10 for index in range(num)]}
    return Dataset.from_dict(rows, features=Features(image=Image(), label=ClassLabel(num_classes=10)))


def train_seconds(model: DiTForImageClassification, rows: Dataset, folder: Path, device: str) -> float:
    """Return the seconds that 28 epochs of the plain Trainer take."""
    args = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=0,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
    begun = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begun


def head_training(folder: Path, device: str, repetitions: int) -> list[dict[str, Any]]:
    """Return seconds of 28 epochs of training a head on DiT-S/2 from images, and from cached features."""
    pictures = random_pictures(NUM_PICTURES)
    heads = {
        "linear": ("pooled", {}),
        "attention": ("tokens", {"head_hidden_size": 128, "head_num_layers": 1, "head_num_attention_heads": 4}),
    }
    rows = []
    for head, (what, fields) in heads.items():
        config = configuration("S/2", channels=3, head=head, num_labels=10, **fields)
        times: dict[str, list[float]] = {"without": [], "with": []}
        for repetition in range(repetitions):
            torch.manual_seed(0)
            model = DiTForImageClassification(config).to(device)
            processor = ASelectImageProcessor.from_model_config(config)

            def transform(batch: dict[str, list[Any]], processor: Any = processor) -> dict[str, Any]:
                pixels = processor(batch["image"], return_tensors="pt").pixel_values
                return {"pixel_values": pixels, "labels": batch["label"]}

            times["without"].append(train_seconds(model, pictures.with_transform(transform), folder / "out", device))
            begun = time.perf_counter()
            cached = cache_features(model, pictures, folder / f"cache-{head}-{repetition}", what=what)
            caching = time.perf_counter() - begun
            times["with"].append(caching + train_seconds(model, cached, folder / "out", device))
        without, with_cache = (statistics.median(times[name]) for name in ("without", "with"))
        rows.append(
            {
                "head": head,
                "what": what,
                "pictures": NUM_PICTURES,
                "epochs": EPOCHS,
                "seconds_without": round(without, 2),
                "seconds_with": round(with_cache, 2),
                "times_as_fast": round(without / with_cache, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def names_taken_of_the_host() -> dict[str, set[str]]:
    """Return the names that the package's modules take from transformers when they are imported, by module."""
    names: dict[str, set[str]] = {}
    loaded = {Path(str(module.__file__)) for name, module in sys.modules.items() if name.startswith("hf_aselect.")}
    for path in [Path(hf_aselect.__file__), *loaded]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    return names


def import_seconds(repetitions: int) -> dict[str, float]:
    """Return the seconds of `import hf_aselect`, and of torch, transformers and the names of it that it takes."""
    lines = ["import torch, transformers"]
    lines += [
        f"from {module} import {', '.join(sorted(names))}" for module, names in names_taken_of_the_host().items()
    ]
    codes = {"host": "; ".join(lines), "hf_aselect": "import hf_aselect"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repetitions + 1):
        for name, code in codes.items():
            timed = f"import time; begun = time.perf_counter(); {code}; print(time.perf_counter() - begun)"
            done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True)
            times[name].append(float(done.stdout.split()[-1]))
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}
    return {**medians, "ratio": round(medians["hf_aselect"] / medians["host"], 3)}


def tables(result: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines = ["| DiT | batch | way | ms (least to greatest) | images/s | times diffusers |", "| --- |" + " --- |" * 5]
    for row in result["speeds"]:
        lines.append(
            f"| {row['size']} | {row['batch']} | {row['way']} | {row['milliseconds']:.0f} ({row['least']:.0f} to "
            f"{row['greatest']:.0f}) | {row['pictures_per_second']:.2f} | {row['times_as_fast']:.2f} |"
        )
    lines += [
        "",
        "| DiT | checkpoint | parameters | MB | peak GB by batch |",
        "| --- |" + " --- |" * 4,
    ]
    for row in result["checkpoints"]:
        peaks = ", ".join(f"{batch}: {peak:.2f}" for batch, peak in row["peak_gigabytes"].items())
        count, size = (
            f"{row[name] / scale:,.1f}{unit}" if name in row else ""
            for name, scale, unit in (("parameters", 1e6, " M"), ("bytes", 1e6, ""))
        )
        lines.append(f"| {row['size']} | {row['way']} | {count} | {size} | {peaks} |")
    if loadings := result["loading"] + result["text_loading"]:
        lines += ["", "| DiT | loading | files | returned | weights read | times |", "| --- |" + " --- |" * 5]
    for row in loadings:
        lines.append(
            f"| {row['size']} | {row['way']} | {'cold' if row['cold'] else 'in memory'} | {row['returned']:.2f} s | "
            f"{row['read']:.2f} s ({row['read_least']:.2f} to {row['read_greatest']:.2f}) | "
            f"{row['read_times_as_fast']:.1f} |"
        )
    lines += ["", "| DiT | batch | way | share of the peak | in linear layers |", "| --- | --- | --- | --- | --- |"]
    for row in result["matrix_share"]:
        lines.append(
            f"| {row['size']} | {row['batch']} | {row['way']} | {row['share_of_peak']:.0%} of "
            f"{row['peak_gflops']:.0f} GFLOP/s | {row['share_of_time_in_linear_layers']:.0%} |"
        )
    lines += ["", "| head, 28 epochs | without a cache | with one | times |", "| --- | --- | --- | --- |"]
    for row in result["head_training"]:
        lines.append(
            f"| {row['head']}, {row['what']} | {row['seconds_without']:.1f} s | {row['seconds_with']:.1f} s | "
            f"{row['times_as_fast']:.1f} |"
        )
    lines += ["", f"| growth of {GROWTH_SIZE}, folded, batch 4 | | ms |", "| --- | --- | --- |"]
    lines += [f"| {row['what']} | {row['number']} | {row['milliseconds']:.0f} |" for row in result["growth"]]
    lines += [
        "",
        f"| operation of {GROWTH_SIZE}, folded, batch 8 | dtype | share of the time |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{row['operation']}` | {row['dtype']} | {row['share']:.1%} |" for row in result["profile"]]
    imports = result["import_seconds"]
    lines += ["", f"`import hf_aselect` takes {imports['ratio']:.2f} times as long as its imports "]
    lines[-1] += f"from other libraries alone ({imports['hf_aselect']:.2f} s, {imports['host']:.2f} s)."
    return "\n".join(lines) + "\n"


def read_out_table(rows: list[dict[str, Any]]) -> str:
    """Return the results of `read_outs` as a Markdown table."""
    lines = ["| DiT, all blocks | timesteps | batch | way | parameters | ms (least to greatest) | times as it is |"]
    lines.append("| --- |" + " --- |" * 6)
    for row in rows:
        words = (
            f"| {row['size']} | {row['timesteps']} | {row['batch']} | {row['way']} | {row['parameters'] / 1e6:,.1f} M"
        )
        times = f"{row['milliseconds']:.0f} ({row['least']:.0f} to {row['greatest']:.0f}) | {row['times_as_fast']:.2f}"
        lines.append(f"{words} | {times} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw images per second by size and way at the middle batch size."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in result["speeds"]})
    batch = batches[len(batches) // 2]
    measured = {row["way"] for row in result["speeds"]}
    ways = [way for way in ("diffusers", "early exit", "folded", "folded onnx", "folded bf16") if way in measured]
    hatches, greys = ["", "//", "..", "oo", "xx"], ["0.25", "0.5", "0.65", "0.75", "0.9"]
    width = 0.8 / len(ways)
    sizes = list(dict.fromkeys(row["size"] for row in result["speeds"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, way in enumerate(ways):
        found = {row["size"]: row for row in result["speeds"] if row["way"] == way and row["batch"] == batch}
        places = [place + width * (number - (len(ways) - 1) / 2) for place in range(len(sizes))]
        bars = axes.bar(
            places,
            [found[size]["pictures_per_second"] for size in sizes],
            width=width,
            label=way,
            color=greys[number],
            hatch=hatches[number],
            edgecolor="black",
        )
        axes.bar_label(bars, [f"{found[size]['times_as_fast']:.1f}×" for size in sizes], fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [f"DiT-{size}" for size in sizes])
    axes.set_ylabel(f"images per second, batch {batch}")
    axes.set_title(f"Features at half depth, {result['machine']['device']}")
    axes.legend(ncols=3, fontsize=9, loc="upper right")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 2)
    figure.savefig(path, dpi=170)


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = f"{models[0]}, {name}" if models else name
    return {
        "device": name,
        "system": platform.system(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=(*SECTIONS, READ_OUTS),
        help="measure these again, and keep the others of the folder (all but read_outs)",
    )
    parser.add_argument("--child", choices=("load", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    if args.child:
        child(args.child, args.folder, args.way, args.numbers)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sizes, batches, repetitions, device = args.sizes, args.batches, args.repetitions, args.device
    is_cpu = device == "cpu"

    def of_checkpoints() -> list[dict[str, Any]]:
        if not is_cpu:
            return [row for size in sizes for row in device_memory(size, batches)]
        rows = []
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=output) as scratch:
                rows += checkpoints(size, batches, Path(scratch))
        return rows

    def of_loading() -> list[dict[str, Any]]:
        rows = []
        for size in sizes if is_cpu else ():
            with tempfile.TemporaryDirectory(dir=output) as scratch:
                save_pipeline(size, Path(scratch))
                rows += loading(size, ("pipeline", "folded", "folded bf16"), repetitions, Path(scratch))
        return rows

    def of_text_loading() -> list[dict[str, Any]]:
        if not is_cpu:
            return []
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            save_text_pipeline(Path(scratch))
            return loading("PixArt-Sigma, T5-XXL", ("pipeline", "folded bf16"), repetitions, Path(scratch))

    def of_training() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            return head_training(Path(scratch), device, repetitions)

    measure: dict[str, Callable[[], Any]] = {
        "import_seconds": lambda: import_seconds(repetitions),
        "speeds": lambda: [row for size in sizes for row in speeds(size, batches, repetitions, device)],
        READ_OUTS: lambda: [row for size in sizes for row in read_outs(size, batches, repetitions, device)],
        "matrix_share": lambda: (
            [row for size in sizes for row in matrix_share(size, 8, repetitions)] if is_cpu else []
        ),
        "growth": lambda: growth(repetitions, device),
        "profile": lambda: profile(device),
        "head_training": of_training,
        "checkpoints": of_checkpoints,
        "loading": of_loading,
        "text_loading": of_text_loading,
    }
    path = output / "speed.json"
    result = json.loads(path.read_text()) if args.sections and path.exists() else {}
    result |= {"machine": machine(device), "repetitions": repetitions}
    for section in args.sections or SECTIONS:
        result[section] = measure[section]()
        result.setdefault("measured", {})[section] = {**machine(device), "repetitions": repetitions}
        # Each as it is ready: all of them take most of an hour.
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if READ_OUTS in (args.sections or ()):
        print(read_out_table(result[READ_OUTS]))
    if all(section in result for section in SECTIONS):
        (output / "speed.md").write_text(tables(result), encoding="utf-8")
        draw(result, output / "speed.png")
        print(tables(result))
    print(f"Saved {', '.join(str(each) for each in sorted(output.glob('speed.*')))}.")


if __name__ == "__main__":
    main()
