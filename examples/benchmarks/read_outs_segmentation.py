"""What several taps and timesteps are worth to a linear segmentation decoder in closed form.

    python examples/benchmarks/read_outs_segmentation.py --model_name_or_path dit-camvid-64-long \
        --train_file camvid/train.parquet --test_file camvid/test.parquet --ignore_index 11 \
        --class_names sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist \
        --output_dir segmentation

Images, crops, sizes and options are those of `segmentation.py`, and so is the timestep, which is selected without
labels. `fit_head` fits the linear decoder to one tap (the default one), to `hidden` of all blocks, and to that at
three timesteps (`timestep_set` of `read_outs.py`); on the DiT, and on one of random weights. Each is fitted twice:
with all pixels alike, and with classes that count the same (`balance_classes`), as the mean IoU counts them. A seed is
that of the noise, and of random weights. What random weights tell of is also read without what attention brings from
other tokens, without positions, and without both. Beside them are, of `segmentation.py`, the linear decoder trained by
gradient on one tap and the UNet that is trained whole; its runs in the same folder are used.

Each finished fit is a file in `OUTPUT_DIR/runs`, so that a run that was stopped resumes, and several processes may
share the work (`--part 0 2` and `--part 1 2`). `--summarize` writes `OUTPUT_DIR/read_outs.json` and
`read_outs.md` alone.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Array2D, Array3D, Dataset, Features, Value
from torch import Tensor
from transformers import HfArgumentParser, set_seed

from hf_aselect import DiTForSemanticSegmentation, TimestepSelection

sys.path.insert(0, str(Path(__file__).parent))

from read_outs import timestep_set
from segmentation import Benchmark, BenchmarkArguments, Job, collect, read_json, write_json

READ_OUTS = ("one tap", "all blocks", "all blocks, three timesteps")
# What is taken out of random weights, of which all blocks are read.
REMOVED = ("attention", "positions", "attention and positions")


class ReadOutBenchmark(Benchmark):
    """Read-outs under linear decoders in closed form."""

    def jobs(self) -> list[Job]:
        """Return what is trained by gradient, to compare with."""
        selected = self.selection()["timestep"]
        return [Job("linear", selected), Job("linear", selected, is_random=True), Job("unet", None)]

    def fields(self, read_out: str) -> dict[str, Any]:
        """Return the configuration of a read-out."""
        selection = TimestepSelection.from_dict(self.selection())
        if read_out == "one tap":
            return {"timestep": selection.timestep}
        num = 3 if read_out == "all blocks, three timesteps" else 1
        timesteps = timestep_set(self.load("linear").noise_schedule, selection, num)
        return {"timestep": timesteps, "block": "all", "feature": "hidden"}

    def fit_all(self) -> None:
        """Do this process' share of the fits that are not done."""
        every = [
            (read_out, is_random, is_balanced, removed, seed)
            for read_out in READ_OUTS
            for is_random in (False, True)
            for is_balanced in (False, True)
            for removed in ("", *(REMOVED if is_random and read_out == "all blocks" else ()))
            for seed in self.args.seeds
        ]
        number, count = self.args.part
        data: list[Dataset] = []
        for read_out, is_random, is_balanced, removed, seed in every[number::count]:
            words = [read_out.replace(",", ""), *["random"] * is_random, *["balanced"] * is_balanced]
            words = [word.replace(" ", "-") for word in (*words, *[f"without {removed}"] * bool(removed))]
            path = self.folder / "runs" / f"closed-form-{'-'.join(words)}-{seed}.json"
            if path.exists():
                continue
            data = data or [self.dataset(split) for split in ("train", "test")]
            set_seed(seed)
            fields = self.fields(read_out)
            model = self.load("linear", is_random=is_random, noise_seed=seed, **fields)
            remove(model, removed)
            started = time.monotonic()
            fit = model.fit_head(data[0], eval_dataset=data[1], balance_classes=is_balanced)
            timesteps = sorted({timestep for timestep, _, _ in model.config.read_outs()})
            figures = {
                "mean_iou": fit.evaluation["mean_iou"],
                "overall_accuracy": fit.evaluation["accuracy"],
                "strength": fit.strength,
                "seconds": round(time.monotonic() - started, 1),
                "width": model.config.feature_size,
            }
            kept = {"method": "closed form", "timestep": None, "is_random": is_random, "is_balanced": is_balanced}
            where = {"read_out": read_out, "removed": removed, "timesteps": timesteps, "seed": seed}
            write_json(path, {**kept, **where, **figures})
            print(f"{path.stem}: {100 * figures['mean_iou']:.2f}", flush=True)

    def dataset(self, split: str) -> Dataset:
        """Return pixel values and masks; crops of an image are views of it, which are held out together."""
        pixels, masks = self.batches(split)
        num_views = self.args.num_views if split == "train" else 1
        return dataset_of(pixels, masks, torch.arange(num_views).repeat_interleave(len(pixels) // num_views))


def remove(model: DiTForSemanticSegmentation, removed: str) -> None:
    """Take out of a DiT what one of `REMOVED` says."""
    transformer = model.backbone.denoiser.transformer
    with torch.no_grad():
        if "positions" in removed:
            # Not zeroed: for another grid than the pretraining's the table is computed again.
            transformer.pos_embed.pos_embed = None
        for block in transformer.transformer_blocks if "attention" in removed else ():
            for value in block.attn1.to_out[0].parameters():
                value.zero_()


def dataset_of(pixels: Tensor, masks: Tensor, views: Tensor) -> Dataset:
    """Return pixel values, (n, C, H, W), masks, (n, H, W), and numbers of views, (n,), as a dataset."""
    kinds = {
        "pixel_values": Array3D(tuple(pixels.shape[1:]), "float32"),
        "labels": Array2D(tuple(masks.shape[1:]), "int64"),
        "view": Value("int64"),
    }
    columns = {"pixel_values": pixels.numpy(), "labels": masks.numpy(), "view": views.numpy()}
    return Dataset.from_dict(columns, features=Features(kinds)).with_format("torch")


def table_of(runs: list[dict[str, Any]]) -> str:
    """Return the table of all read-outs, in Markdown."""
    lines = ["| linear decoder | read-out | width | mIoU, mean | seeds | pixels right |", "| --- |" + " --- |" * 5]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        weights = ["random weights"] * run["is_random"]
        if run.get("removed"):
            weights.append(f"without {run['removed']}")
        if run["method"] == "closed form":
            timesteps = ", ".join(map(str, run["timesteps"]))
            key = (
                "closed form, classes alike" if run["is_balanced"] else "closed form",
                ", ".join([run["read_out"].partition(",")[0], f"t = {timesteps}", *weights]),
                f"{run['width']:,}",
            )
        elif run["method"] == "unet":
            key = "UNet, trained whole", "pixels", ""
        else:
            key = "trained by gradient", ", ".join(["one tap", f"t = {run['timestep']}", *weights]), ""
        groups.setdefault(key, []).append(run)
    # The DiT first, then random weights; within these by the width that is read.
    for key, group in sorted(groups.items(), key=lambda each: (each[1][0]["is_random"], each[1][0].get("width", 0))):
        values = [100 * run["mean_iou"] for run in sorted(group, key=lambda run: run["seed"])]
        accuracy = statistics.mean(100 * run["overall_accuracy"] for run in group)
        seeds = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {' | '.join(key)} | {statistics.mean(values):.2f} | {seeds} | {accuracy:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    if not args.summarize:
        benchmark = ReadOutBenchmark(args)
        benchmark.fit_all()
        benchmark.run()
    content, folder = collect(args), Path(args.output_dir)
    wanted, selected = ("closed form", "linear", "unet"), read_json(folder / "selection.json")["timestep"]
    runs = [run for run in content["runs"] if run["method"] in wanted and run["timestep"] in (None, selected)]
    table = table_of(runs)
    write_json(folder / "read_outs.json", {**content, "runs": runs})
    (folder / "read_outs.md").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
