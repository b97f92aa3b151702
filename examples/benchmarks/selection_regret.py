r"""How much accuracy does a criterion lose against trying every timestep? One (DiT, dataset) pair a run.

    python examples/benchmarks/selection_regret.py --name fashion-mnist-28 \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output_dir regret

The truth: a ridge classifier on mean-pooled tokens at every timestep of the grid, three blocks (the first, and those
at 3/8 and 6/8 of the depth) and four features; and a small attention head on the tokens of half of these taps, read
with the model's own noise and standardised as a model with `standardize_features` does it. With `--annotation_column`
the labels are those of the patches (the most frequent class of each) and both classify single tokens: segmentation.
Against it: each criterion of `select_timestep`, also on images that the DiT generates itself, three measures of the
self-supervised literature on the same features, fixed timesteps, and selections of the tap, too. A consensus knows
which head it selects for, so it selects for each and is held against that truth alone. `OUTPUT_DIR/NAME.json` holds
everything; with `--summarize` alone the tables over all pairs in OUTPUT_DIR are written to `table.md` and each pair is
drawn. The search is kept in `OUTPUT_DIR/NAME.search.npz` timestep by timestep: a run that was stopped goes on there.

Two losses are given. `loss`: the timestep that is best on one half of the test images against the selected one, both
on the other half, over 20 random halves: what an exhaustive search really buys. With `--num_attention_seeds` each head
is held against the timestep that is best for the heads of the other seeds, as a head's luck is not bought either.
`loss_to_maximum`: against the largest accuracy on all test images, which is lucky by as much as the largest of many
noisy numbers is.

With `--only_taps` only those taps are tried and selected for again; their rows take the place of those in
`OUTPUT_DIR/NAME.json`, if the linear classifier's accuracies are the same as there.
"""

import inspect
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from scipy.stats import spearmanr
from selection_tables import OWN, TAPS, Tap, summarize
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor, DiTModel, TimestepSelection, select_timestep
from hf_aselect.checkpoints.atomic import whole_file
from hf_aselect.model import noise_schedule
from hf_aselect.model.heads import AttentionHead
from hf_aselect.model.layouts import parse_tap_key
from hf_aselect.selection import accumulators
from hf_aselect.selection.criteria import HFR, Consensus, Criterion, SignalHFR
from hf_aselect.selection.standardization import TokenMoments, scale_and_shift

FEATURES = ("hidden", "query", "key", "value")
DEFAULT = inspect.signature(select_timestep).parameters["criterion"].default
# What the default was before: all timesteps are references, on a grid from a log-SNR of 14 to -14, and no regions.
FORMER = "consensus of all timesteps"
# The default, which is not told how many labelled images there will be.
UNTOLD = "consensus, number of labels unknown"
CRITERIA: dict[str, Criterion] = {
    "hfr": HFR(),
    "signal_hfr": SignalHFR(),
    FORMER: Consensus(region_weight=0.0),
    UNTOLD: Consensus(),
}
# The truths, and the head that each stands for.
HEADS = {"ridge": "linear", "attention": "attention"}
# The same attention head on tokens that are standardised by channel alone, as before standardisation by position.
PLAIN = "attention, by channel"
GUESSES = (0, 50, 100, 150, 261, 300)
MEASURES = ("RankMe", "alpha-ReQ", "LiDAR")
STRENGTHS = tuple(10.0**exponent for exponent in range(-2, 6))
NUM_HALVES = 20
OF_THE_SEARCH = (
    *("train_file", "test_file", "annotation_column", "ignore_index", "num_train", "num_draws", "num_test"),
    *("attention_features", "plain_features", "num_attention_train", "num_attention_seeds", "num_measured"),
)
# Of an attention head's training: as many steps from few images as from many.
BATCH_SIZE = 50
NUM_STEPS = 180
# With labels per patch an image is hundreds of examples.
DENSE_BATCH_SIZE = 8
UNLABELLED = 255

Hits = dict[tuple[str, Tap], np.ndarray]


@dataclass
class BenchmarkArguments:
    """Which pair, how many images, where to write."""

    output_dir: str = field(metadata={"help": "Folder for NAME.json and, with --summarize, table.md."})
    name: str | None = field(default=None, metadata={"help": "Name of the pair."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The DiT."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and labels."})
    test_file: str | None = field(default=None, metadata={"help": "Parquet file with images and labels."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices."})
    annotation_column: str | None = field(
        default=None, metadata={"help": "Column with maps of class indices, 255 where there is none: segmentation."}
    )
    ignore_index: int = field(default=UNLABELLED, metadata={"help": "Class index that stands for no label."})
    num_train: int = field(default=1500, metadata={"help": "Images that a ridge classifier is fitted to."})
    num_draws: int = field(
        default=1,
        metadata={"help": "Draws of --num_train images, over which a ridge classifier is averaged."},
    )
    num_test: int = field(default=2500, metadata={"help": "Images that it is tried on."})
    attention_features: list[str] = field(
        default_factory=lambda: ["hidden", "query"],
        metadata={"help": "Features that an attention head is trained on, too; 'none' for no such head."},
    )
    plain_features: list[str] = field(
        default_factory=list,
        metadata={"help": "Those of them that it is also trained on without the mean of each position taken out."},
    )
    num_attention_train: int = field(default=1500, metadata={"help": "Images that the head is trained on."})
    num_attention_seeds: int = field(
        default=1,
        metadata={"help": "Attention heads, each with its own seed. With --num_draws, head k learns from draw k."},
    )
    only_taps: list[str] = field(
        default_factory=list, metadata={"help": "Only these, as 0.query; NAME.json keeps what it has of others."}
    )
    num_timesteps: int = field(default=20, metadata={"help": "Timesteps of the exhaustive search."})
    num_measured: int = field(default=128, metadata={"help": "Images for RankMe, alpha-ReQ and LiDAR."})
    batch_size: int = field(default=64, metadata={"help": "Images in one forward pass."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of the selections."})
    looked_at_once: bool = field(
        default=False, metadata={"help": "Whether nothing was developed with this pair in sight."}
    )
    own_pictures: bool = field(
        default=True, metadata={"help": "Also select on images that the DiT makes itself, which takes longest."}
    )
    consensus_only: bool = field(
        default=False,
        metadata={"help": "Only select by the default, and by it without the number of labels."},
    )
    search_only: bool = field(
        default=False, metadata={"help": "Only try each timestep; a run without it goes on from there."}
    )
    summarize: bool = field(default=False, metadata={"help": "Only write the table over all pairs."})


class Pair:
    """A DiT and a dataset: what every timestep and tap is worth, and what each way of selecting loses."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args = args
        self.model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0)
        self.head = self.model.config.head
        self.saved_seconds = 0.0  # that images of its own would have taken to make again
        self.make_own_pictures_once()
        self.processor = ASelectImageProcessor.from_model_config(self.model.config)
        # Selections and measures have the first draw alone.
        self.drawn = sample(args.train_file, args.num_train * args.num_draws)
        if args.num_draws > 1 and len(self.drawn) < args.num_train * args.num_draws:
            raise ValueError(
                f"--num_draws of --num_train images each are {args.num_train * args.num_draws} images, and "
                f"{args.train_file} has {len(self.drawn)}. Take fewer of either."
            )
        self.train = self.drawn.select(range(min(args.num_train, len(self.drawn))))
        self.test = sample(args.test_file, args.num_test)
        schedule = self.model.noise_schedule
        # The grid of a selection is within that of the search, so that every choice has its accuracy.
        self.grid = sorted({*schedule.even_timesteps(args.num_timesteps), *schedule.even_timesteps(), *GUESSES})
        blocks = sorted({share * self.model.config.num_hidden_layers // 8 for share in (0, 3, 6)})
        self.taps: list[Tap] = [(block, feature) for block in blocks for feature in FEATURES]
        if args.only_taps:
            self.taps = [parse_tap_key(key) for key in args.only_taps]
        self.attention_taps = [tap for tap in self.taps if tap[1] in args.attention_features]
        self.plain_taps = [tap for tap in self.attention_taps if tap[1] in args.plain_features]
        self.drawn_labels = self.read_labels(self.drawn)
        self.labels = [self.drawn_labels[: len(self.train)], self.read_labels(self.test)]

    @property
    def per_picture(self) -> bool:
        """Whether a label belongs to an image rather than to a patch."""
        return self.args.annotation_column is None

    @property
    def num_labelled(self) -> int | None:
        """Number of labelled images, which is not known of patches: as `hf-aselect fit` tells it."""
        return self.args.num_train if self.per_picture else None

    def pixel_values(self, rows: Dataset) -> Tensor:
        """Return images as (n, C, H, W)."""
        return self.processor(rows[self.args.image_column][:], return_tensors="pt").pixel_values

    def read_labels(self, rows: Dataset) -> np.ndarray:
        """Return the label of each image, (n,), or of each of its patches, (n, N)."""
        if self.per_picture:
            return np.array(rows[self.args.label_column][:])
        side = self.model.config.image_size
        cells = side // self.model.config.patch_pixels
        labels = []
        for annotation in rows[self.args.annotation_column][:]:
            # The same resizing and centre crop as the image's, without mixing classes.
            scale = side / min(annotation.size)
            width, height = (round(scale * size) for size in annotation.size)
            resized = np.array(annotation.resize((width, height), Image.Resampling.NEAREST))
            top, left = (height - side) // 2, (width - side) // 2
            square = resized[top : top + side, left : left + side].astype(np.int64)
            square[square == self.args.ignore_index] = UNLABELLED
            patches = square.reshape(cells, side // cells, cells, side // cells).swapaxes(1, 2).reshape(cells**2, -1)
            labels.append([np.bincount(patch).argmax() for patch in patches])
        return np.array(labels)

    @torch.no_grad()
    def tokens(self, latents: Tensor, timestep: int, noise: Tensor | None = None) -> dict[Tap, Tensor]:
        """Return tokens, (n, N, D), of each tap; with the model's own noise unless some is given."""
        parts: dict[Tap, list[Tensor]] = {tap: [] for tap in self.taps}
        for start in range(0, len(latents), self.args.batch_size):
            batch = latents[start : start + self.args.batch_size]
            timesteps = torch.full((len(batch),), timestep)
            if noise is None:
                noised = self.model.add_noise(batch, timestep)
            else:
                drawn = noise[start : start + self.args.batch_size]
                noised = self.model.noise_schedule.add_noise(batch, drawn, timesteps)
            for tap, tokens in self.model._read_taps(noised, timesteps, self.taps).items():
                # Whole tokens of thousands of images are kept only where a classifier reads them.
                keep = noise is None and (not self.per_picture or tap in self.attention_taps)
                parts[tap].append(tokens if keep else tokens.mean(1, keepdim=True))
        return {tap: torch.cat(values) for tap, values in parts.items()}

    def exhaustive_search(self) -> tuple[Hits, dict[str, dict[Tap, list[float]]], float]:
        """Return hits, (T, S, m), of each truth and tap, the literature's measures of each tap, and the seconds."""
        # A search of some taps leaves that of all of them.
        name = "-".join([self.args.name, *self.args.only_taps])
        path = Path(self.args.output_dir) / f"{name}.search.npz"
        # A search of other images or taps is another search.
        weights = sum(float(values.double().abs().sum()) for values in self.model.state_dict().values())
        given = {name: value for name, value in asdict(self.args).items() if name in OF_THE_SEARCH}
        settings = {**given, "taps": self.taps, "grid": self.grid, "weights": weights}
        done: dict[str, np.ndarray] = {"settings": np.array(json.dumps(settings))}
        if path.exists():
            with np.load(path) as stored:
                done = dict(stored) if str(stored["settings"]) == str(done["settings"]) else done
        train, test = (self.model.encode(self.pixel_values(rows)) for rows in (self.drawn, self.test))
        for timestep in tqdm(self.grid, desc="Trying each timestep"):
            if f"{timestep}/seconds" not in done:
                found = self.try_timestep(train, test, timestep)
                done.update({f"{timestep}/{name}": values for name, values in found.items()})
                with whole_file(path) as unfinished:
                    np.savez(unfinished, **done)

        def stacked(name: str, tap: Tap) -> np.ndarray:
            return np.stack([done[f"{timestep}/{name}/{tap[0]}/{tap[1]}"] for timestep in self.grid])

        hits = {("ridge", tap): stacked("ridge", tap)[:, None] for tap in self.taps}
        hits |= {("attention", tap): stacked("attention", tap) for tap in self.attention_taps}
        hits |= {(PLAIN, tap): stacked(PLAIN, tap) for tap in self.plain_taps}
        measures = {name: {tap: stacked(name, tap).tolist() for tap in self.taps} for name in MEASURES}
        # The median: other work on the machine may slow down some of them.
        seconds = float(np.median([done[f"{timestep}/seconds"] for timestep in self.grid])) * len(self.grid)
        return hits, measures, seconds

    def try_timestep(self, train: Tensor, test: Tensor, timestep: int) -> dict[str, np.ndarray]:
        """Return for each test image whether each tap's classifiers are right about it, and the measures."""
        generator = torch.Generator().manual_seed(0)
        measured = train[: len(self.train)][: self.args.num_measured]
        draws = [torch.randn(measured.shape, generator=generator) for _ in range(4)]
        started = time.monotonic()
        tokens = [self.tokens(latents, timestep) for latents in (train, test)]
        found: dict[str, np.ndarray] = {}
        for tap in self.taps:
            place = f"{tap[0]}/{tap[1]}"
            parts = [part[tap] for part in tokens]
            num_images = len(self.train)
            labels = np.split(self.drawn_labels, range(num_images, len(self.drawn), num_images))
            draws_of = list(zip(parts[0].split(num_images), labels, strict=True))
            found[f"ridge/{place}"] = np.mean(
                [ridge_hits(*draw, parts[1], self.labels[1]) for draw in draws_of], axis=0
            )
            ways = {"attention": tap in self.attention_taps, PLAIN: tap in self.plain_taps}
            for truth in (truth for truth, is_wanted in ways.items() if is_wanted):
                heads = []
                for seed in range(self.args.num_attention_seeds):
                    drawn, drawn_labels = draws_of[seed % len(draws_of)]
                    part = slice(self.args.num_attention_train)
                    standardized = standardize(drawn, parts[1], per_position=truth != PLAIN)
                    given = (standardized[0][part], drawn_labels[part], standardized[1], self.labels[1])
                    heads.append(head_hits(*given, seed=seed))
                found[f"{truth}/{place}"] = np.stack(heads)
            found[f"share/{place}"] = np.array(moments_of(draws_of[0][0]).share_between_images)
        # What the measures cost is no part of an exhaustive search.
        found["seconds"] = np.array(time.monotonic() - started)
        views = [self.tokens(measured, timestep, noise) for noise in draws]
        for tap in self.taps:
            own = tokens[0][tap][: len(measured)].mean(1).double().numpy()
            pooled = np.stack([view[tap][:, 0].double().numpy() for view in views])
            for name, value in (("RankMe", rank_me(own)), ("alpha-ReQ", alpha_req(own)), ("LiDAR", lidar(pooled))):
                found[f"{name}/{tap[0]}/{tap[1]}"] = np.array(value)
        return found

    def run(self) -> dict[str, Any]:
        """Return everything that is known of the pair in the end."""
        hits, measures, seconds = self.exhaustive_search()
        rows = []
        for tap in self.taps:
            accuracy = hits["ridge", tap].mean((1, 2))
            for name, values in measures.items():
                chosen = self.grid[int(np.argmax(values[tap]))]
                rows.append(self.row(name, tap, hits, chosen, spearmanr(values[tap], accuracy).statistic))
            for timestep in (*GUESSES, self.grid[len(self.grid) // 2]):
                name = f"t = {timestep}" if timestep in GUESSES else "middle of the grid"
                rows.append(self.row(name, tap, hits, timestep))
            rows.append(self.random_row(tap, hits))
        for tap in tqdm(self.taps, desc="Selecting"):
            others = () if self.args.consensus_only else CRITERIA
            ways: list[tuple[str, str | None]] = [(name, None) for name in others if name not in (FORMER, UNTOLD)]
            beside = UNTOLD if self.args.consensus_only else FORMER
            ways += [(name, truth) for name in (beside, DEFAULT) for truth in HEADS if (truth, tap) in hits]
            for name, truth in ways:
                rows += [self.selection_row(name, tap, hits, seed, truth) for seed in self.args.seeds]
                if name in ("signal_hfr", DEFAULT) and self.args.own_pictures:
                    rows.append(self.selection_row(name, tap, hits, self.args.seeds[0], truth, generated=True))
            if self.per_picture and not self.args.consensus_only:
                rows.append(self.selection_row("probe", tap, hits, self.args.seeds[0]))
        for truth in dict.fromkeys(truth for truth, _ in hits if truth in HEADS):
            # Of a part of the taps the best is not the best of the search.
            rows += [] if self.args.only_taps else self.tap_rows(truth, hits)
        return {
            "arguments": asdict(self.args),
            "timesteps": self.grid,
            "log_snr": self.model.noise_schedule.log_snr(torch.tensor(self.grid)).tolist(),
            "accuracy": [
                {"truth": truth, "block": tap[0], "feature": tap[1], "accuracies": values.mean((1, 2)).tolist()}
                for (truth, tap), values in hits.items()
            ],
            "search": {
                "num_forwards": len(self.grid) * (len(self.train) + len(self.test)),
                "seconds": seconds,
            },
            "rows": rows,
        }

    def selection_row(
        self, name: str, tap: Tap, hits: Hits, seed: int, truth: str | None = None, generated: bool = False
    ) -> dict[str, Any]:
        """Return what one selection lost and cost; where it was made for a truth's head, by that truth alone."""
        images = None if generated else self.train.select_columns([self.args.image_column])
        # A segmenter has no such head.
        self.model.config.head = HEADS[truth] if truth and self.per_picture else self.head
        with as_before() if name == FORMER else nullcontext():
            record = select_timestep(
                self.model,
                images,
                criterion=CRITERIA.get(name, name),
                block=tap[0],
                feature=tap[1],
                labels=self.labels[0] if name == "probe" else None,
                seed=seed,
                num_train_images=None if name == UNTOLD else self.num_labelled,
            )
        places = [self.nearest(timestep) for timestep in record.timesteps]
        correlation = spearmanr(record.scores, hits[truth or "ridge", tap].mean((1, 2))[places]).statistic
        if name == "probe":
            name = f"probe, {record.num_images} labels"
        name += OWN if generated else ""
        timestep = self.grid[self.nearest(record.timestep)]
        row = self.row(name, tap, hits, timestep, correlation, [truth] if truth else HEADS)
        return {**row, **self.cost(record), "seed": seed}

    def nearest(self, timestep: int) -> int:
        """Return the place in the grid of a timestep: itself, but for one of a former grid."""
        log_snr = self.model.noise_schedule.log_snr
        return int((log_snr(torch.tensor(self.grid)) - log_snr(timestep)).abs().argmin())

    def cost(self, record: TimestepSelection) -> dict[str, Any]:
        """Return what a selection cost, and how sure it is."""
        names = ("num_images", "num_forwards", "seconds", "confidence", "share_between_images")
        cost = {name: getattr(record, name) for name in names}
        if record.pictures == "generated":
            cost["seconds"] += self.saved_seconds
        return {**cost, "is_warned": bool(record.warnings)}

    def tap_rows(self, truth: str, hits: Hits) -> list[dict[str, Any]]:
        """Return what selecting the tap, too, loses against the best tap and timestep of the whole search.

        Of all taps that have this truth: without labels, by the probe, and with the default tap.
        """
        taps = [tap for tap in self.taps if (truth, tap) in hits]
        blocks, features = (list(dict.fromkeys(part)) for part in zip(*taps, strict=True))
        every = np.concatenate([hits[truth, tap] for tap in taps])
        config = self.model.config
        config.head = HEADS[truth] if self.per_picture else self.head
        images = self.train.select_columns([self.args.image_column])
        default = {"block": [config.block_index()], "feature": [config.feature]}
        search: dict[str, Any] = {"block": blocks, "feature": features}
        ways: dict[str, dict[str, Any]] = {"consensus": search, "default tap": default}
        if self.per_picture and not self.args.consensus_only:
            ways["probe"] = {**search, "criterion": "probe", "labels": self.labels[0]}
        rows = []
        for name, options in ways.items():
            for seed in self.args.seeds:
                record = select_timestep(self.model, images, seed=seed, num_train_images=self.num_labelled, **options)
                tap = (record.block, record.feature)
                place = taps.index(tap) * len(self.grid) + self.nearest(record.timestep)
                found = {"criterion": TAPS + name, "truth": truth, "block": tap[0], "feature": tap[1], "seed": seed}
                rows.append(
                    {**found, "timestep": record.timestep, "tap_loss": loss(every, place), **self.cost(record)}
                )
        return rows

    def make_own_pictures_once(self) -> None:
        """Let the DiT keep the images that it makes: each tap asks for the same, and they take longest."""
        generate = self.model.generate_latents
        kept: dict[str, tuple[Tensor, float]] = {}

        def generate_latents(*args: Any, **options: Any) -> Tensor:
            asked = str((args, options))
            self.saved_seconds = 0.0
            if asked in kept:
                latents, self.saved_seconds = kept[asked]
                return latents
            started = time.monotonic()
            latents = generate(*args, **options)
            kept[asked] = latents, time.monotonic() - started
            return latents

        self.model.generate_latents = generate_latents

    def row(
        self,
        name: str,
        tap: Tap,
        hits: Hits,
        timestep: int,
        correlation: float | None = None,
        truths: Iterable[str] = ("ridge", "attention"),
    ) -> dict[str, Any]:
        """Return what selecting a timestep loses at a tap, in points, by each truth."""
        row: dict[str, Any] = {"criterion": name, "block": tap[0], "feature": tap[1], "timestep": timestep}
        place = self.grid.index(timestep)
        for truth in truths:
            prefix = "attention_" if truth == "attention" else ""
            if (truth, tap) in hits:
                values = hits[truth, tap]
                row[f"{prefix}loss"] = loss(values, place)
                accuracy = values.mean((1, 2))
                row[f"{prefix}loss_to_maximum"] = 100 * float(accuracy.max() - accuracy[place])
        row["rank_correlation"] = None if correlation is None else float(correlation)
        return row

    def random_row(self, tap: Tap, hits: Hits) -> dict[str, Any]:
        """Return the mean loss over the grid."""
        every = [self.row("random t", tap, hits, timestep) for timestep in self.grid]
        means = {name: float(np.mean([row[name] for row in every])) for name in every[0] if "loss" in name}
        return {**every[0], **means, "timestep": None}


@contextmanager
def as_before() -> Iterator[None]:
    """Let a consensus take all timesteps as references, and grids go further."""
    names: tuple[tuple[Any, str, Any], ...] = (
        (accumulators, "reference_range", lambda *_: (-np.inf, np.inf)),
        (noise_schedule, "MAX_LOG_SNR", 14.0),
    )
    with ExitStack() as stack:
        for module, name, value in names:
            stack.enter_context(patch.object(module, name, value))
        yield


def sample(path: str, size: int) -> Dataset:
    """Return a random part of a parquet file, the same each time."""
    rows = load_dataset("parquet", data_files=path, split="train")
    return rows.shuffle(seed=0).select(range(min(size, len(rows))))


def ridge_hits(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray) -> np.ndarray:
    """Return for each test image whether a ridge classifier on standardised features is right about it.

    With labels per patch, (n, N), the classifier reads tokens and the share of the labelled ones that it is right
    about is returned.
    """
    if train_labels.ndim == 1:
        train, test = train.mean(1, keepdim=True), test.mean(1, keepdim=True)
    features = [part.flatten(0, 1).double().numpy() for part in (train, test)]
    known = train_labels.ravel() != UNLABELLED
    scaler = StandardScaler().fit(features[0][known])
    classifier = RidgeClassifierCV(alphas=STRENGTHS)
    classifier.fit(scaler.transform(features[0][known]), train_labels.ravel()[known])
    right = classifier.predict(scaler.transform(features[1])) == test_labels.ravel()
    right, known = right.reshape(len(test), -1), (test_labels != UNLABELLED).reshape(len(test), -1)
    return (right & known).sum(1) / known.sum(1)


def moments_of(tokens: Tensor) -> TokenMoments:
    """Return the moments of the first images' tokens: as many as a selection looks at."""
    moments = TokenMoments.from_origin(tokens[0])
    for part in tokens[:256].split(64):
        moments.add(part)
    return moments


def standardize(train: Tensor, test: Tensor, per_position: bool) -> tuple[Tensor, Tensor]:
    """Return tokens, (n, N, D), standardised as a model does it, or by channel alone."""
    if per_position:
        scale, shift = scale_and_shift(moments_of(train))
    else:
        deviation, mean = torch.std_mean(train, dim=(0, 1))
        scale, shift = 1 / deviation, -mean / deviation
    return train * scale + shift, test * scale + shift


class DenseHead(AttentionHead):
    """The attention head's block with a classifier of each token, for labels per patch."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (B, K, N), of tokens, (B, N, D)."""
        logits: Tensor = self.output_projection(self.blocks[0](self.input_projection(tokens)))
        return logits.transpose(1, 2)


def head_hits(
    train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Return for each test image whether a small attention head, trained for 180 steps or more, is right about it.

    With labels per patch, (n, N), each token is classified and the share of the labelled ones that the head is right
    about is returned.
    """
    kind = AttentionHead if train_labels.ndim == 1 else DenseHead
    known = torch.from_numpy(test_labels != UNLABELLED)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        num_classes = int(train_labels[train_labels != UNLABELLED].max()) + 1
        head = kind(train.shape[-1], num_classes, 64, 1, 8, 4)
        for weight in head.parameters():
            if weight.ndim == 2:
                nn.init.xavier_uniform_(weight)
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.05)
        size = min(BATCH_SIZE, -(-len(train) // 4)) if train_labels.ndim == 1 else DENSE_BATCH_SIZE
        epochs = max(6 if train_labels.ndim == 1 else 1, -(-NUM_STEPS // -(-len(train) // size)))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(train) // size))
        labels = torch.from_numpy(train_labels)
        for _ in range(epochs):
            for chosen in torch.randperm(len(train)).split(size):
                optimizer.zero_grad()
                logits = head(train[chosen])
                nn.functional.cross_entropy(logits, labels[chosen], ignore_index=UNLABELLED).backward()
                optimizer.step()
                scheduler.step()
    with torch.no_grad():
        predictions = torch.cat([head(part).argmax(1) for part in test.split(500)])
    right = ((predictions == torch.from_numpy(test_labels)) & known).reshape(len(test), -1).sum(1)
    return (right / known.reshape(len(test), -1).sum(1)).double().numpy()


def loss(hits: np.ndarray, place: int) -> float:
    """Return how many points the best timestep of one half of the images gains over `place` on the other half.

    Args:
        hits: Whether a classifier of each timestep and seed is right about each image, (T, S, m). The best timestep
            for a seed is that of the other seeds, if there are any.
        place: Which timestep was selected.
    """
    losses = []
    num_seeds = hits.shape[1]
    for shuffle in range(NUM_HALVES):
        order = np.random.default_rng(shuffle).permutation(hits.shape[2])
        half = len(order) // 2
        accuracy, others = hits[:, :, order[half:]].mean(2), hits[:, :, order[:half]].mean(2)  # (T, S)
        for seed in range(num_seeds):
            best = others[:, [each for each in range(num_seeds) if each != seed or num_seeds == 1]].mean(1).argmax()
            losses.append(float(accuracy[best, seed] - accuracy[place, seed]))
    return 100 * float(np.mean(losses))


def known_results(path: Path, taps: list[Tap]) -> dict[str, Any]:
    """Return a pair's results, which those of some taps are to replace.

    Raises:
        ValueError: If there are none, or none of one of the taps.
    """
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"accuracy": []}
    have = {(row["block"], row["feature"]) for row in known["accuracy"]}
    if missing := [tap for tap in taps if tap not in have]:
        raise ValueError(f"--only_taps replaces results, and {path} has none of {missing}. Run it without first.")
    return known


def updated(known: dict[str, Any], found: dict[str, Any], taps: list[Tap]) -> dict[str, Any]:
    """Return a pair's results with those of some taps replaced, by what was found again.

    Raises:
        ValueError: If the linear classifier found something else before: of another DiT, or other images.
    """

    def linear(results: dict[str, Any]) -> dict[Tap, list[float]]:
        rows = [row for row in results["accuracy"] if row["truth"] == "ridge"]
        return {(row["block"], row["feature"]): row["accuracies"] for row in rows}

    before, now = linear(known), linear(found)
    if known["timesteps"] != found["timesteps"] or any(before[tap] != now[tap] for tap in taps):
        raise ValueError(f"The linear classifier's accuracies at {taps} differ from those of before: another search.")
    for name, kind in (("accuracy", "truth"), ("rows", "criterion")):
        again = {(row["block"], row["feature"], row[kind]) for row in found[name]}
        kept = [row for row in known[name] if (row["block"], row["feature"], row.get(kind)) not in again]
        known[name] = kept + found[name]
    known["again"] = [*known.get("again", []), found["arguments"]]
    return known


def rank_me(features: np.ndarray) -> float:
    """Return the exponential of the singular values' entropy (RankMe, arXiv 2210.02885)."""
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alpha_req(features: np.ndarray) -> float:
    """Return minus the distance of the eigenvalues' power-law exponent from 1 (alpha-ReQ, NeurIPS 2022)."""
    centred = features - features.mean(0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    # The first ones stand apart and the last ones are noise, as in the paper's fit.
    ranks = np.arange(3, max(6, min(100, len(values) // 2)))
    slope = np.polyfit(np.log(ranks + 1), np.log(values[ranks] + 1e-20), 1)[0]
    return -abs(-float(slope) - 1)


def lidar(views: np.ndarray) -> float:
    """Return the rank of the between-image scatter, whitened by that of noise draws (LiDAR, arXiv 2312.04000)."""
    centres = views.mean(0)  # (n, D)
    between = np.cov(centres.T)
    rest = (views - centres).reshape(-1, views.shape[-1])
    within = rest.T @ rest / len(rest) + 1e-4 * np.eye(views.shape[-1])
    inverse = np.linalg.inv(np.linalg.cholesky(within))
    values = np.clip(np.linalg.eigvalsh(inverse @ between @ inverse.T), 0, None)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not args.summarize:
        if None in (args.name, args.model_name_or_path, args.train_file, args.test_file):
            raise ValueError("Give --name, --model_name_or_path, --train_file and --test_file, or --summarize alone.")
        pair = Pair(args)
        if args.search_only:
            pair.exhaustive_search()
            return
        path = output / f"{args.name}.json"
        known = known_results(path, pair.taps) if args.only_taps else None
        found = pair.run()
        write(path, json.dumps(updated(known, found, pair.taps) if known else found, indent=1))
    table = summarize(output)
    write(output / "table.md", table)
    print(table)


if __name__ == "__main__":
    main()
