"""Where the time of training goes: waiting for data, and what a second process gives.

    python examples/benchmarks/training.py --output_dir training

Half an hour on two CPU cores with nothing else running. Random weights and images, a DiT-S/2 on 32 × 32
latents (images of 4 channels stand for them), read at block 4 of 12, the default:

- `waiting`: the shares of the time of a training from cached features (`cache_features`) in which batches are read and
  put together, and that passes between two steps, which has the trainer's own work there in it, too: for the attention
  head in batches of 16, and for linear heads, whose steps take milliseconds, in batches of 64;
- `processes`: images a second of one process on one thread, and of two on one thread each, over gloo: for a head on
  the frozen transformer, and for all weights, whose gradients are summed at each step.

Each is measured `--repetitions` times, turn by turn, after the first steps; figures are medians, with the least and
the greatest. Of a folder with results, parts that are not asked for (`--parts`) stay.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from PIL import Image as PILImage
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as host_logging

from hf_aselect import ASelectConfig, DiTForImageClassification, cache_features
from hf_aselect.checkpoints.atomic import whole_file

TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "out_channels": 8,
    "num_layers": 12,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
BATCH = 16
SKIPPED = 2  # first steps, which allocate
# Head, what is cached, images a step, passes: of short steps there are to be enough.
FROM_CACHE = {
    "attention head, tokens": ("attention", "tokens", BATCH, 1),
    "linear head, tokens": ("linear", "tokens", 4 * BATCH, 50),
    "linear head, their means": ("linear", "pooled", 4 * BATCH, 100),
}


class Clock(TrainerCallback):
    """Notes when steps begin and end, and how long reading took until then.

    Args:
        rows: What is read.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.read: list[float] = []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note that a batch is there."""
        self.begun.append(time.perf_counter())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note that a step is done."""
        self.ended.append(time.perf_counter())
        self.read.append(getattr(self.rows, "seconds", 0.0))

    def reading(self) -> float:
        """Return the share of the time in which batches are read and put together."""
        return (self.read[-1] - self.read[SKIPPED]) / (self.ended[-1] - self.ended[SKIPPED])

    def waiting(self) -> float:
        """Return the share of the time between two steps."""
        between = sum(
            begun - ended for ended, begun in zip(self.ended[SKIPPED:], self.begun[SKIPPED + 1 :], strict=False)
        )
        return between / (self.ended[-1] - self.ended[SKIPPED])

    def rate(self) -> float:
        """Return steps a second."""
        return (len(self.ended) - SKIPPED - 1) / (self.ended[-1] - self.ended[SKIPPED])


def build(channels: int, **fields: Any) -> DiTForImageClassification:
    """Return a classifier on a DiT-S/2 of random weights."""
    set_seed(0)
    transformer = {**TRANSFORMER, "in_channels": channels}
    return DiTForImageClassification(ASelectConfig(transformer=transformer, timestep=121, num_labels=10, **fields))


def train(model: DiTForImageClassification, rows: Any, num_steps: int, batch: int) -> Clock:
    """Train a model for some steps and return when they were."""
    clock = Clock(rows)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=batch,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = rows.collate if isinstance(rows, Timed) else default_data_collator
        Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    return clock


class Timed(torch.utils.data.Dataset):
    """Rows, and how long it takes to read them and put them together.

    Args:
        rows: A dataset of features.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.seconds = rows, 0.0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """Return rows."""
        begun = time.perf_counter()
        rows = self.rows.__getitems__(keys)
        self.seconds += time.perf_counter() - begun
        return rows

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch."""
        begun = time.perf_counter()
        batch = default_data_collator(rows)
        self.seconds += time.perf_counter() - begun
        return batch


def waiting(num_pictures: int, num_repetitions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the shares of the time that trainings from cached features spend on reading and between steps."""
    values = np.random.default_rng(0).integers(0, 256, (num_pictures, 32, 32, 3), dtype=np.uint8)
    columns = {
        "image": [PILImage.fromarray(value) for value in values],
        "label": [i % 10 for i in range(num_pictures)],
    }
    pictures = Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(num_classes=10)))
    found: dict[str, dict[str, list[float]]] = {kind: {"reading": [], "between_steps": []} for kind in FROM_CACHE}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(num_repetitions):
            for kind, (head, what, batch, num_epochs) in FROM_CACHE.items():
                model = build(3, head=head)
                rows = Timed(cache_features(model, pictures, folder, what=what))
                clock = train(model, rows, num_epochs * num_pictures // batch, batch)
                found[kind]["reading"].append(clock.reading())
                found[kind]["between_steps"].append(clock.waiting())
    return {kind: {name: spread(values) for name, values in shares.items()} for kind, shares in found.items()}


def child(kind: str, num_steps: int) -> None:
    """Train in one of the processes; the first one prints images a second of all."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = build(4, freeze_backbone=kind == "head")
    pixels = torch.rand(64, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [{"pixel_values": value, "labels": index % 10} for index, value in enumerate(pixels)]
    clock = train(model, rows, num_steps, BATCH)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(world * BATCH * clock.rate()))


def ask(kind: str, num_processes: int, num_steps: int) -> float:
    """Return the images a second of a training in so many processes."""
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [*launcher, __file__, "--child", kind, "--num_steps", str(num_steps), "--output_dir", "unused"]
    # Of each process: torch's threads wait by spinning.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(json.loads(next(line for line in reversed(done.stdout.splitlines()) if line[:1].isdigit())))


def processes(kind: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return images a second of one process and of two, turn by turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repetitions):
        for number, values in rates.items():
            values.append(ask(kind, number, args.num_steps))
    per_core = [two / 2 / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "pictures_per_second_of_one": spread(rates[1]),
        "pictures_per_second_of_two": spread(rates[2]),
        "two_per_core": spread(per_core),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the least and the greatest."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "greatest": round(max(values), 4),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""

    def cell(found: dict[str, float], scale: float, places: int) -> str:
        middle, least, greatest = (f"{found[name] * scale:.{places}f}" for name in ("median", "least", "greatest"))
        return f"{middle} ({least} to {greatest})"

    lines = ["| training of a DiT-S/2 read at block 4 of 12 | median (least to greatest) |", "| --- | --- |"]
    lines += [
        f"| {kind} from the cache: {name.replace('_', ' ')}, % of the time | {cell(found, 100, 2)} |"
        for kind, shares in result.get("waiting", {}).items()
        for name, found in shares.items()
    ]
    names = {"head": "a head, the transformer frozen", "all": "all weights"}
    for kind, found in result.get("processes", {}).items():
        name = names[kind]
        lines += [
            f"| {name}: images/s, one process of one thread | {cell(found['pictures_per_second_of_one'], 1, 2)} |",
            f"| {name}: images/s, two processes of one each | {cell(found['pictures_per_second_of_two'], 1, 2)} |",
            f"| {name}: two processes, per core, against one | {cell(found['two_per_core'], 1, 2)} |",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--parts", nargs="+", default=["waiting", "processes"], choices=("waiting", "processes"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=12, help="steps of a training in processes")
    parser.add_argument("--num_pictures", type=int, default=128, help="images of a training from cached tokens")
    parser.add_argument("--child", choices=("head", "all"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    host_logging.set_verbosity_error()
    disable_progress_bars()
    if args.child:
        child(args.child, args.num_steps)
        return
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "training.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "waiting" in args.parts:
        result["waiting"] = waiting(args.num_pictures, args.repetitions)
    if "processes" in args.parts:
        result["processes"] = {kind: processes(kind, args) for kind in ("head", "all")}
    for part in args.parts:
        result.setdefault("measured", {})[part] = {"repetitions": args.repetitions, "torch": torch.__version__}
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
