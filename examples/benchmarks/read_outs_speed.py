"""What several taps and timesteps cost against one, and what fitting a head in closed form costs.

    python examples/benchmarks/read_outs_speed.py --output read_outs.json

- `read_outs`: `hidden` of the deepest block, `hidden` of all blocks, and that at three timesteps, of a DiT-S/2 of
  random weights (32 × 32 latents, 256 tokens) and of the DiT that the package ships, in batches of 8.
- `fitting`: `fit_head` on means of tokens of 50,000 images, of width 1,024, in the form in which `cache_features`
  returns them; and on images, beside one pass that reads the same features and keeps nothing. It is the DiT that the
  package ships, read at all of its blocks (width 1,024).

What is compared takes turns, and ratios are those of each round, of which the median is taken. Seconds are those of
the wall clock and of the processor (of all threads together): beside other work only the latter say what something
costs. The file grows section by section, and its tables are printed; `--sections` measures some again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value, load_from_disk

import hf_aselect
from hf_aselect import ASelectImageProcessor, DiTForImageClassification, DiTModel
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.training.cached_features import CachedFeatures

sys.path.insert(0, str(Path(__file__).parent))

from speed import TIMESTEP, configuration, latents_of, machine, random_pictures

EMBEDDED = Path(hf_aselect.__file__).parent / "assets" / "fashion_mnist"
READ_OUTS: dict[str, dict[str, Any]] = {
    "deepest block": {"block": -1},
    "all blocks": {"block": "all"},
    "all blocks, three timesteps": {"block": "all", "timestep": [20, TIMESTEP, 400]},
}
SECTIONS = ("read_outs", "fitting")
NUM_CACHED = 50_000


def both_clocks(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Return seconds and processor seconds of each run, one after the other in every round; the first is left out.

    Beside other work the second are those that count.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            begun = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return {name: values[1:] for name, values in times.items()}


def row_of_clocks(values: list[tuple[float, float]], others: list[tuple[float, float]] | None) -> dict[str, float]:
    """Return medians, and how many times those of others they are: in each round, as machines change between them."""
    seconds, processor = zip(*values, strict=True)
    row = {
        "seconds": round(statistics.median(seconds), 4),
        "least": round(min(seconds), 4),
        "greatest": round(max(seconds), 4),
        "processor_seconds": round(statistics.median(processor), 4),
    }
    for place, name in enumerate(("times", "processor_times") if others else ()):
        ratios = [one[place] / other[place] for one, other in zip(values, others or [], strict=True)]
        row[name] = round(statistics.median(ratios), 3)
    return row


@torch.inference_mode()
def read_outs(size: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """Return seconds of one tap at the deepest block and of several taps and timesteps, in turns."""
    torch.manual_seed(0)
    if size == "embedded":
        model = DiTModel.from_pretrained(EMBEDDED, timestep=TIMESTEP, feature="hidden", zeroed_channels=[])
    else:
        model = DiTModel(configuration(size, feature="hidden")).eval()
    latents = latents_of(batch, model)
    runs = {name: partial(model.extract_features, latents=latents, **where) for name, where in READ_OUTS.items()}
    times, rows = both_clocks(runs, repetitions), []
    for name, values in times.items():
        row = {"size": size, "batch": batch, "read_out": name, **row_of_clocks(values, times["deepest block"])}
        rows.append(row)
        print(row, flush=True)
    return rows


def cached_means(num: int, width: int) -> Dataset:
    """Return random means of tokens with labels, as `cache_features(what="pooled")` returns them."""
    labels = torch.arange(num) % 10
    values = torch.randn(num, width, generator=torch.Generator().manual_seed(0)) + labels[:, None] / 10
    kinds = Features(features=Sequence(Value("float16"), length=width), label=ClassLabel(num_classes=10))
    columns = {"features": values.half().numpy(), "label": labels.numpy()}
    return Dataset.from_dict(columns, features=kinds)


def fitting(num_images: int, repetitions: int) -> list[dict[str, Any]]:
    """Return seconds of `fit_head` on cached features, on images, and of a pass that reads the same of the images."""
    where = {"timestep": 50, "block": "all", "feature": "hidden", "head": "linear", "num_labels": 10}
    model = DiTForImageClassification.from_pretrained(EMBEDDED, zeroed_channels=[], **where)
    width = model.config.feature_size
    with tempfile.TemporaryDirectory() as folder:
        cached_means(NUM_CACHED, width).save_to_disk(folder)
        cached = CachedFeatures.of(load_from_disk(folder))
        cached_times = both_clocks({"fit_head, cached means": partial(model.fit_head, cached)}, repetitions)
    images = random_pictures(num_images)
    processor = ASelectImageProcessor.from_model_config(model.config)

    @torch.no_grad()
    def one_pass() -> None:
        for batch in images.iter(32):
            pixels = processor(batch["image"], return_tensors="pt").pixel_values
            model.backbone.extract_features(pixels).mean(1)

    reading, rows = "one pass over images", []
    times = both_clocks({reading: one_pass, "fit_head, images": partial(model.fit_head, images)}, repetitions)
    times |= cached_times
    for name, values in times.items():
        is_cached = "cached" in name
        row = {"what": name, "images": NUM_CACHED if is_cached else num_images, "width": width}
        rows.append({**row, **row_of_clocks(values, None if is_cached else times[reading])})
        print(rows[-1], flush=True)
    return rows


def tables(result: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    heads = ["s (least to greatest)", "processor s", "times", "processor times"]

    def cells(row: dict[str, Any]) -> str:
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("times", "processor_times")]
        spread = f"{row['seconds']:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"
        return " | ".join([spread, f"{row['processor_seconds']:.2f}", *ratios])

    parts = []
    if "read_outs" in result:
        rows = [f"| {row['size']} | {row['read_out']} | {cells(row)} |" for row in result["read_outs"]]
        parts.append([f"| DiT | `hidden` of | {' | '.join(heads)} |", "| --- |" + " --- |" * 5, *rows])
    if "fitting" in result:
        rows = [f"| {row['what']} | {row['images']:,} | {cells(row)} |" for row in result["fitting"]]
        parts.append([f"| fitting a linear head | images | {' | '.join(heads)} |", "| --- |" + " --- |" * 5, *rows])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--num_images", type=int, default=10_000, help="images that a head is fitted on (%(default)s)")
    args = parser.parse_args()
    path = Path(args.output)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for section in args.sections:
        if section == "read_outs":
            rows = [row for size in ("S/2", "embedded") for row in read_outs(size, 8, args.repetitions)]
        else:
            rows = fitting(args.num_images, args.repetitions)
        result[section] = rows
        result.setdefault("measured", {})[section] = {**machine("cpu"), "repetitions": args.repetitions}
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    main()
