"""Published results as commands: what a paper used is loaded, and what is measured stands beside what it says.

    python examples/benchmarks/published.py --list
    python examples/benchmarks/published.py --row ddae-cifar10 --output_dir runs/ddae-cifar10

Each row is measured four times: at the published timestep and at the selected one, with the published tap alone and
with a read-out of several blocks and features. The model is converted first (`convert_diffusers`), the data become
parquet files, and this repository's own scripts do the rest: `linear_probe.py` for DDAE's rows,
`train_image_classification.py --recipe attention_probe` for the paper's. Options that are not listed here go to them,
as `--num_train_epochs 1`. What is there already is not made again.

The rows need a GPU and gigabytes of weights; without network this says what it would load, and ends. Nothing of them
was measured for this repository. `--model`, `--train_file` and `--test_file` put something else in their place.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import DownloadMode, load_dataset
from datasets.exceptions import DatasetsError

from hf_aselect import convert_diffusers

SCRIPTS = Path(__file__).parents[1] / "image_classification"


@dataclass(frozen=True)
class Row:
    """What a published result used.

    Args:
        source: Where it is published.
        model: Id on the Hub of the diffusers pipeline.
        dataset: Id on the Hub of the images.
        columns: Columns of images and labels there.
        splits: Splits there that are trained and tested on.
        timestep: Noise level, 0 = least noise.
        block: Block, 0-based.
        feature: What is read there.
        read_out: Blocks and features of the read-out that is measured, too; no part of what was published.
        accuracy: What was published, in [0, 1].
        script: The script that trains the head, and its options.
        revision: Branch or commit of the model.
        dataset_revision: The same of the images.
        without: Parts of the text side that were left out.
        note: In what this differs from what was published.
    """

    source: str
    model: str
    dataset: str
    columns: tuple[str, str]
    splits: tuple[str, str]
    timestep: int
    block: int
    feature: str
    read_out: dict[str, Sequence[Any]]
    accuracy: float
    script: tuple[str, ...]
    revision: str | None = None
    dataset_revision: str | None = None
    without: tuple[str, ...] = ()
    note: str = ""


DIT: dict[str, Any] = {
    "source": "DDAE, arXiv 2303.09769, code of its authors",
    "model": "facebook/DiT-XL-2-256",
    # The main branch has pickles.
    "revision": "refs/pr/1",
    "block": 13,
    "feature": "hidden",
    "read_out": {"block": (9, 13, 17), "feature": ("hidden", "key")},
    "script": ("linear_probe.py",),
    "note": "There the linear layer is trained by SGD on augmented images; here on one view, by AdamW.",
}
SD3: dict[str, Any] = {
    "source": "A-SelecT, arXiv 2603.25758; accuracy as reported second-hand, settings of its authors' code",
    "model": "stabilityai/stable-diffusion-3-medium-diffusers",
    "without": ("text_encoder_3",),
    "timestep": 141,
    "block": 9,
    "feature": "query",
    "read_out": {"block": (6, 9, 12), "feature": ("query", "key")},
    "script": ("train_image_classification.py", "--recipe", "attention_probe", "--image_size", "512"),
    "note": "The paper selects a timestep for each data set and does not print it: 141 is what its code is set to.",
}
ROWS = {
    "ddae-cifar10": Row(
        dataset="uoft-cs/cifar10",
        columns=("img", "label"),
        splits=("train", "test"),
        timestep=121,
        accuracy=0.8573,
        **DIT,
    ),
    "ddae-tiny-imagenet": Row(
        dataset="zh-plus/tiny-imagenet",
        columns=("image", "label"),
        splits=("train", "valid"),
        timestep=81,
        accuracy=0.6657,
        **DIT,
    ),
    "a-select-flowers": Row(
        dataset="dpdl-benchmark/oxford_flowers102",
        columns=("image", "label"),
        splits=("train", "test"),
        accuracy=0.906,
        **SD3,
    ),
    "a-select-cars": Row(
        dataset="tanganke/stanford_cars",
        columns=("image", "label"),
        splits=("train", "test"),
        accuracy=0.861,
        **SD3,
    ),
}


@dataclass
class Measured:
    """What one of the four runs found.

    Args:
        timestep: Where the features were read.
        accuracy: On the test images, in [0, 1].
        where: What was read, in words.
    """

    timestep: Any
    accuracy: float
    where: str = field(default="")


def plan(name: str, row: Row) -> str:
    """Return what a row loads and does, in words."""
    blocks, features = (", ".join(map(str, row.read_out[each])) for each in ("block", "feature"))
    return "\n".join(
        [
            f"{name}: {row.accuracy:.2%} ({row.source})",
            f"  model     {row.model}, revision {row.revision or 'main'}"
            + (f", without {', '.join(row.without)}" if row.without else ""),
            f"  images    {row.dataset}, revision {row.dataset_revision or 'main'}, splits {' and '.join(row.splits)}",
            f"  tap       {row.feature} of block {row.block} at timestep {row.timestep}",
            f"  read-out  {features} of blocks {blocks}",
            f"  recipe    {' '.join(row.script)}",
            f"  note      {row.note}",
        ]
    )


def images_of(row: Row, output: Path) -> dict[str, Path]:
    """Return the parquet files of a row's images, with the columns `image` and `label`."""
    files = {name: output / "images" / f"{name}.parquet" for name in ("train", "test")}
    for split, path in zip(row.splits, files.values(), strict=True):
        if not path.exists():
            found = load_dataset(
                row.dataset,
                split=split,
                revision=row.dataset_revision,
                download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
            )
            named = dict(zip(row.columns, ("image", "label"), strict=True))
            found = found.select_columns(list(row.columns))
            found = found.rename_columns({old: new for old, new in named.items() if old != new})
            path.parent.mkdir(parents=True, exist_ok=True)
            found.to_parquet(path)
    return files


def settings_of(row: Row) -> dict[str, dict[str, Sequence[Any]]]:
    """Return what the four runs read, by name: fields of the configuration."""
    tap = {"block": (row.block,), "feature": (row.feature,)}
    return {
        f"{where}, {when}": {"timestep": (timestep,), **read}
        for where, read in (("single tap", tap), ("read-out", row.read_out))
        for when, timestep in (("published timestep", row.timestep), ("selected timestep", "auto"))
    }


def measure(row: Row, fields: dict[str, Sequence[Any]], args: argparse.Namespace, output: Path) -> Measured:
    """Run a row's script on one setting, unless it was run before, and return what it found."""
    script, *options = row.script
    is_probe = script == "linear_probe.py"
    results = output / ("results.json" if is_probe else "eval_results.json")
    if not results.exists():
        words = ["--model_name_or_path", args.model, "--train_file", args.train_file, "--output_dir", output, *options]
        words += ["--test_file" if is_probe else "--validation_file", args.test_file, *args.options]
        for name, values in fields.items():
            words += [f"--{name}", *values]
        with patch.object(sys, "argv", [script, *map(str, words)]):
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    found = json.loads(results.read_text(encoding="utf-8"))
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    accuracy = found["test_accuracy" if is_probe else "eval_accuracy"]
    where = f"{', '.join(map(str, fields['feature']))} of {', '.join(map(str, fields['block']))}"
    return Measured(config["timestep"], accuracy, where)


def table_of(row: Row, measured: dict[str, Measured]) -> str:
    """Return a table of what was measured beside what was published."""
    lines = ["| what is read | where | timestep | measured | published |", "| --- | --- | --- | --- | --- |"]
    for name, found in measured.items():
        is_published = name == "single tap, published timestep"
        published = f"{row.accuracy:.2%}" if is_published or (row.model == SD3["model"] and "single" in name) else ""
        lines.append(f"| {name} | {found.where} | {found.timestep} | {found.accuracy:.2%} | {published} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what each row loads, and end")
    parser.add_argument("--row", choices=ROWS, help="the row to measure")
    parser.add_argument("--output_dir", type=Path, help="folder of model, images, heads and results")
    parser.add_argument("--model", help="a checkpoint in place of the row's")
    parser.add_argument("--train_file", help="parquet file with the columns image and label, in place of the row's")
    parser.add_argument("--test_file", help="the same of the test images")
    args, args.options = parser.parse_known_args()
    if args.list:
        print("\n\n".join(plan(name, row) for name, row in ROWS.items()))
        return
    if args.row is None or args.output_dir is None:
        parser.error("give --row and --output_dir, or --list")
    if (args.train_file is None) != (args.test_file is None):
        parser.error("give --train_file and --test_file, or neither")
    row = ROWS[args.row]
    print(plan(args.row, row), flush=True)
    try:
        if args.train_file is None:
            files = images_of(row, args.output_dir)
            args.train_file, args.test_file = files["train"], files["test"]
        if args.model is None:
            args.model = args.output_dir / "model"
            if not (args.model / "config.json").exists():
                convert_diffusers(row.model, args.model, revision=row.revision, without=row.without)
    except (DatasetsError, OSError) as error:  # of the Hub's client, too
        print(f"That could not be loaded, and nothing is measured: {' '.join(str(error).split())[:300]}")
        raise SystemExit(1) from error
    measured = {}
    for name, fields in settings_of(row).items():
        folder = args.output_dir / name.replace(", ", "-").replace(" ", "-")
        measured[name] = measure(row, fields, args, folder)
        print(f"{args.row}: {name}: {measured[name].accuracy:.2%} at {measured[name].timestep}", flush=True)
    kept = {"row": args.row, "published": row.accuracy, "measured": {k: vars(v) for k, v in measured.items()}}
    (args.output_dir / "published.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print(table_of(row, measured))


if __name__ == "__main__":
    main()
