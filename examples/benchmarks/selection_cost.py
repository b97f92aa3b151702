r"""What does a selection of the timestep cost, and does another seed select the same?

    python examples/benchmarks/selection_cost.py --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --image_file fashion-mnist/train.parquet --output_dir cost

Seconds and forward passes of the default selection (median of several), the choices of 20 seeds, each with other
noise and other images, and the memory that a selection takes with 64 and with 4,096 images, at 3 and at 20
timesteps. Memory is measured on Linux, each in a process of its own: how far the peak rises above what the process
held just before, after a first small selection. Everything is in `OUTPUT_DIR/cost.json`.
"""

import inspect
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import HfArgumentParser

from hf_aselect import DiTModel, select_timestep
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.selection.criteria import CRITERIA


@dataclass
class CostArguments:
    """Which model, which images, where to write."""

    model_name_or_path: str = field(metadata={"help": "The DiT."})
    image_file: str = field(metadata={"help": "Parquet file with images."})
    output_dir: str = field(metadata={"help": "Folder for cost.json."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    criterion: str | None = field(default=None, metadata={"help": "Criterion. Default: that of `select_timestep`."})
    num_seeds: int = field(default=20, metadata={"help": "Seeds of noise and images."})
    num_images: list[int] = field(
        default_factory=lambda: [64, 4096], metadata={"help": "Numbers of images whose peak memory is compared."}
    )
    num_timesteps: list[int] = field(
        default_factory=lambda: [3, 20], metadata={"help": "Numbers of timesteps whose peak memory is compared."}
    )
    measure: bool = field(
        default=False,
        metadata={"help": "Only print the memory that the first of both numbers take (used by itself)."},
    )


def load(args: CostArguments) -> tuple[DiTModel, Dataset, dict[str, Any]]:
    """Return the model, the images and the options of a selection."""
    model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0)
    images = load_dataset("parquet", data_files=args.image_file, split="train").select_columns([args.image_column])
    return model, images, {} if args.criterion is None else {"criterion": args.criterion}


def mebibytes(name: str) -> float:
    """Return a figure of this process's memory, such as VmRSS, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 2**10


def measure_memory(args: CostArguments) -> None:
    """Print as JSON how far the peak rises while some images are read at some timesteps."""
    count, num_timesteps = args.num_images[0], args.num_timesteps[0]
    model, images, options = load(args)
    if len(images) < count:
        raise ValueError(f"{args.image_file} has {len(images)} images, fewer than {count}.")
    criterion = CRITERIA[
        options.get("criterion") or inspect.signature(select_timestep).parameters["criterion"].default
    ]
    # All images in the first round, so that none are left out for a selection that is sure before.
    in_one_round = type("InOneRound", (type(criterion),), {"first_round": count})()
    # What the first pass allocates once is none of the images' or of the timesteps'.
    select_timestep(model, images, max_images=8, timesteps=[0, 500], **options)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here on
    before = mebibytes("VmRSS")
    record = select_timestep(
        model,
        images,
        timesteps=model.noise_schedule.even_timesteps(num_timesteps),
        max_images=count,
        criterion=in_one_round,
    )
    found = {"num_images": record.num_images, "num_timesteps": len(record.timesteps)}
    print(json.dumps({**found, "before_mib": before, "rise_mib": mebibytes("VmHWM") - before}))


def main() -> None:
    (args,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses()
    if args.measure:
        measure_memory(args)
        return
    model, images, options = load(args)
    grid = model.noise_schedule.even_timesteps()
    records = []
    for seed in range(args.num_seeds):
        model.config.noise_seed = seed
        records.append(select_timestep(model, images, seed=seed, **options))
    places = [grid.index(record.timestep) for record in records]
    centre = statistics.median_low(places)
    near = sum(abs(place - centre) <= 1 for place in places) / len(places)
    memory = []
    for count, timesteps in product(args.num_images, args.num_timesteps):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
        command += ["--num_images", str(count), "--num_timesteps", str(timesteps)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory.append(json.loads(output.splitlines()[-1]))
    result = {
        "criterion": records[0].criterion,
        "seconds": [record.seconds for record in records],
        "median_seconds": statistics.median(record.seconds for record in records),
        "num_forwards": [record.num_forwards for record in records],
        "num_images": [record.num_images for record in records],
        "timesteps": [record.timestep for record in records],
        "share_within_one_step_of_the_median": near,
        "memory": memory,
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "cost.json") as unfinished:
        unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
