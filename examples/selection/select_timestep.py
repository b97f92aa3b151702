r"""Select the timestep at which to read a diffusion transformer, and plot the criterion over all timesteps.

On the images that the package ships, from the root of the repository (seconds on two CPU cores):

    python examples/selection/select_timestep.py --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --images src/hf_aselect/assets/fashion_mnist/train.parquet --output_dir report

`--output_dir` ends with `selection.json`, the whole record, and `timestep_curve.png`. With labels, for example
`--criterion probe --label_column label --block auto --feature auto`, blocks and features are compared, too, and drawn
as a heat map. `model.apply_selection(selection)` makes a model use what was selected.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_aselect import DiTModel, select_timestep
from hf_aselect.images.sources import read_images


@dataclass
class SelectionArguments:
    """The model, the images, and how to select."""

    model_name_or_path: str = field(metadata={"help": "hf_aselect checkpoint, or a folder saved by diffusers."})
    images: str = field(metadata={"help": "Folder of images, parquet file, or Hub dataset."})
    output_dir: str = field(metadata={"help": "Folder for the record and the plot."})
    criterion: str = field(default="consensus", metadata={"help": "consensus, signal_hfr, hfr, probe or patch_probe."})
    head: str = field(default="attention", metadata={"help": "Head to select for: attention or linear."})
    block: list[str] | None = field(
        default=None, metadata={"help": ("One or several blocks, or auto (default: the model's).")}
    )
    feature: list[str] | None = field(
        default=None, metadata={"help": "One or several features, or auto (default: the model's)."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column with class indices or masks."})
    num_timesteps: int = field(default=1, metadata={"help": "Number of complementary timesteps to select."})
    max_images: int = field(default=256, metadata={"help": "Maximum number of images."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample, the bootstrap and the noise."})


def main() -> None:
    (args,) = HfArgumentParser(SelectionArguments).parse_args_into_dataclasses()
    rows = read_images(args.images, args.split)
    taps = {}
    if args.block is not None:
        taps["block"] = "auto" if args.block == ["auto"] else [int(block) for block in args.block]
    if args.feature is not None:
        taps["feature"] = "auto" if args.feature == ["auto"] else args.feature
    # Any integer will do here: it only keeps `from_pretrained` from selecting a timestep itself.
    model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0, head=args.head)
    selection = select_timestep(
        model,
        rows.select_columns([args.image_column]),
        criterion=args.criterion,
        labels=None if args.label_column is None else rows[args.label_column][:],
        num_timesteps=args.num_timesteps,
        max_images=args.max_images,
        seed=args.seed,
        **taps,
    )
    for warning in selection.warnings:
        print(f"Warning: {warning}")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = output / "selection.json"
    record.write_text(json.dumps(selection.to_dict(), indent=1), encoding="utf-8")
    plots = []
    try:
        plots = selection.plot(output / "timestep_curve.png")
    except ImportError as error:
        print(f"Warning: There is no plot of the curve. {error}")
    where = f"{selection.feature} of block {selection.block}, confidence {selection.confidence:.2f}"
    written = ", ".join(map(str, [record, *plots]))
    print(f"Timestep {', '.join(map(str, selection.selected))} for {where}. Saved {written}.")


if __name__ == "__main__":
    main()
