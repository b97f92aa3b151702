"""What a linear head should pool of its tokens: their mean, mean and deviation, or regions.

    python examples/benchmarks/pooling.py --name fashion-mnist-28 \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output model_cards/read-outs/pooling.json

Several read-outs of one pass at one timestep, each pooled in every way, under a linear head in closed form
(`fit_head`) that is fitted to all training images, and to few: of each class as many, drawn by five seeds. `--output`
holds every accuracy on the test images; a pair that is there already is measured again. `--summarize` prints
the table.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor

from hf_aselect import ASelectImageProcessor, DiTForImageClassification
from hf_aselect.demo.classification import draw_labels
from hf_aselect.model.heads import pooled_tokens

POOLINGS = ("mean", "mean_std", "regions")
# By name: the configuration's fields.
READ_OUTS: dict[str, dict[str, Any]] = {
    "default tap": {},
    "`hidden` of all blocks": {"block": "all", "feature": "hidden"},
    "`hidden` and `key` of two blocks": {"block": [2, 7], "feature": ["hidden", "key"]},
}


@torch.no_grad()
def read(model: DiTForImageClassification, pixels: Tensor) -> dict[str, Tensor]:
    """Return what each pooling leaves of the tokens of images, (n, S · D)."""
    grid, parts = model.config.token_grid, []
    for batch in pixels.split(50):
        tokens = model.extract_features(batch)
        parts.append([pooled_tokens(tokens, pooling, grid).flatten(1) for pooling in POOLINGS])
    return dict(zip(POOLINGS, map(torch.cat, zip(*parts, strict=True)), strict=True))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracies of each read-out and pooling, by the number of labels."""
    files = {"train": args.train_file, "test": args.test_file}
    splits = load_dataset("parquet", data_files=files)
    labels = {name: torch.tensor(split["label"][:]) for name, split in splits.items()}
    names = splits["train"].features["label"].names
    numbers = [*(num for num in args.num_labels if num < len(labels["train"])), len(labels["train"])]
    rows: dict[str, Any] = {}
    for read_out, fields in READ_OUTS.items():
        given = {"timestep": args.timestep, "num_labels": len(names), "head": "linear", "head_norm": False}
        given |= {"standardize_features": False, "zeroed_channels": [], **fields}
        features = {}
        for name, split in splits.items():
            model = DiTForImageClassification.from_pretrained(args.model_name_or_path, **given).eval()
            processor = ASelectImageProcessor.from_model_config(model.config)
            features[name] = read(model, processor(split["image"][:], return_tensors="pt").pixel_values)
        for pooling in POOLINGS:
            model = DiTForImageClassification.from_pretrained(args.model_name_or_path, pooling=pooling, **given)
            test = {"features": features["test"][pooling], "labels": labels["test"]}
            found: dict[str, list[float]] = {}
            for num in numbers:
                seeds = range(args.num_seeds if num < len(labels["train"]) else 1)
                for seed in seeds:
                    (drawn,) = draw_labels(labels["train"], num, 1, seed)
                    drawn = drawn if num < len(labels["train"]) else torch.arange(num)
                    train = {"features": features["train"][pooling][drawn], "labels": labels["train"][drawn]}
                    fit = model.fit_head(train, eval_dataset=test, allow_missing=True)
                    found.setdefault(str(num), []).append(round(fit.evaluation["accuracy"], 5))
            rows[f"{read_out}, {pooling}"] = {"width": model.config.pooled_size, "accuracies": found}
            print(f"{args.name}: {read_out}, {pooling}: {found}", flush=True)
    settings = {"timestep": args.timestep, "num_test": len(labels["test"]), "seeds": list(range(args.num_seeds))}
    return {"settings": settings, "rows": rows}


def table_of(pairs: dict[str, Any]) -> str:
    """Return the table of all pairs, in Markdown."""
    lines = ["| pair | read-out, pooling | width | labels: test accuracy, % |", "| --- | --- | --- | --- |"]
    for name, pair in pairs.items():
        for row, entry in pair["rows"].items():
            figures = []
            for num, values in entry["accuracies"].items():
                spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if values[1:] else ""
                figures.append(f"{int(num):,}: {100 * statistics.mean(values):.1f}{spread}")
            lines.append(f"| {name} | {row} | {entry['width']:,} | {'; '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file of all pairs")
    parser.add_argument("--name", help="name of the pair")
    parser.add_argument("--model_name_or_path", help="DiT")
    parser.add_argument("--train_file", help="parquet file of training images and labels")
    parser.add_argument("--test_file", help="parquet file of test images and labels")
    parser.add_argument("--timestep", type=int, default=35, help="timestep that is read")
    parser.add_argument("--num_labels", type=int, nargs="+", default=[100, 500], help="numbers of few labels")
    parser.add_argument("--num_seeds", type=int, default=5, help="draws of few labels")
    parser.add_argument("--summarize", action="store_true", help="only print the table")
    args = parser.parse_args()
    output = Path(args.output)
    pairs = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    if not args.summarize:
        names = ("name", "model_name_or_path", "train_file", "test_file")
        if missing := [f"--{name}" for name in names if not getattr(args, name)]:
            parser.error(f"give {', '.join(missing)}, or --summarize")
        pairs[args.name] = measure(args)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
    print(table_of(pairs), end="")


if __name__ == "__main__":
    main()
