r"""How much accuracy does a criterion lose against trying every timestep? One (DiT, dataset) pair a run.

    python examples/benchmarks/selection_regret.py --name fashion-mnist-28 \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output_dir regret

The truth: a ridge classifier on mean-pooled tokens at every timestep of the grid, every third block and four features;
and a small attention head on the tokens of some of these taps. With `--annotation_column` the labels are those of the
patches (the most frequent class of each) and the classifier reads single tokens: segmentation.
Against it: each criterion of `select_timestep`, also on pictures that the DiT makes itself, three measures of the
self-supervised literature on the same features, and the guesses that people make. A consensus knows which head it
chooses for, so it chooses for each and is held against that truth alone. `OUTPUT_DIR/NAME.json` holds
everything; with `--summarize` alone the table over all pairs in OUTPUT_DIR is written to `table.md` and each pair is
drawn. The search is kept in `OUTPUT_DIR/NAME.search.npz` timestep by timestep: a run that was stopped goes on there.

Two losses are given. `loss`: the timestep that is best on one half of the test pictures against the chosen one, both
on the other half, over 20 random halves: what an exhaustive search really buys. `loss_to_maximum`: against the largest
accuracy on all test pictures, which is lucky by as much as the largest of many noisy numbers is.
"""

import inspect
import json
import os
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
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor, DiTModel, TimestepSelection, select_timestep
from hf_aselect.model import noise_schedule
from hf_aselect.model.heads import AttentionHead
from hf_aselect.selection import accumulators
from hf_aselect.selection.criteria import HFR, Consensus, Criterion, SignalHFR
from hf_aselect.selection.standardization import TokenMoments, scale_and_shift

FEATURES = ("hidden", "query", "key", "value")
DEFAULT = inspect.signature(select_timestep).parameters["criterion"].default
# What the default was before: all timesteps are references, on a grid from a log-SNR of 14 to -14.
FORMER = "consensus of all timesteps"
CRITERIA: dict[str, Criterion] = {"hfr": HFR(), "signal_hfr": SignalHFR(), FORMER: Consensus()}
TAPS = "tap and timestep: "
# The truths, and the head that each stands for.
HEADS = {"ridge": "linear", "attention": "attention"}
# The same attention head on tokens that are standardised by channel alone, as before standardisation by position.
PLAIN = "attention, by channel"
OWN = ", own pictures"
GUESSES = (0, 50, 100, 150, 261, 300)
MEASURES = ("RankMe", "alpha-ReQ", "LiDAR")
STRENGTHS = tuple(10.0**exponent for exponent in range(-2, 6))
NUM_HALVES = 20
OF_THE_SEARCH = (
    *("train_file", "test_file", "annotation_column", "ignore_index", "num_train", "num_test", "attention_features"),
    *("plain_features", "num_attention_train", "num_measured"),
)
BATCH_SIZE = 50  # of an attention head's training
NUM_STEPS = 180
COLUMNS = (
    *("criterion", "mean", "worst", "inside pairs, mean", "inside taps, mean", "to the maximum, mean", "worst"),
    *("attention head, mean", "worst", "rank correlation", "forward passes", "seconds"),
)
UNLABELLED = 255

Tap = tuple[int, str]
Place = tuple[str, int, str]  # pair, block, feature
Hits = dict[tuple[str, Tap], np.ndarray]


@dataclass
class BenchmarkArguments:
    """Which pair, how many pictures, where to write."""

    output_dir: str = field(metadata={"help": "Folder for NAME.json and, with --summarize, table.md."})
    name: str | None = field(default=None, metadata={"help": "Name of the pair."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The DiT."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with pictures and labels."})
    test_file: str | None = field(default=None, metadata={"help": "Parquet file with pictures and labels."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices."})
    annotation_column: str | None = field(
        default=None, metadata={"help": "Column with maps of class indices, 255 where there is none: segmentation."}
    )
    ignore_index: int = field(default=UNLABELLED, metadata={"help": "Class index that stands for no label."})
    num_train: int = field(default=3000, metadata={"help": "Pictures that a ridge classifier is fitted to."})
    num_test: int = field(default=6000, metadata={"help": "Pictures that it is tried on."})
    attention_features: list[str] = field(
        default_factory=lambda: ["hidden", "query"],
        metadata={"help": "Features that an attention head is trained on, too; 'none' for no such head."},
    )
    plain_features: list[str] = field(
        default_factory=lambda: ["query"],
        metadata={"help": "Those of them that it is also trained on without the mean of each position taken out."},
    )
    num_attention_train: int = field(default=1500, metadata={"help": "Pictures that the head is trained on."})
    num_timesteps: int = field(default=20, metadata={"help": "Timesteps of the exhaustive search."})
    num_measured: int = field(default=256, metadata={"help": "Pictures for RankMe, alpha-ReQ and LiDAR."})
    batch_size: int = field(default=64, metadata={"help": "Pictures in one forward pass."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of the selections."})
    looked_at_once: bool = field(
        default=False, metadata={"help": "Whether nothing was developed with this pair in sight."}
    )
    own_pictures: bool = field(
        default=True, metadata={"help": "Also select on pictures that the DiT makes itself, which takes longest."}
    )
    search_only: bool = field(
        default=False, metadata={"help": "Only try each timestep; a run without it goes on from there."}
    )
    summarize: bool = field(default=False, metadata={"help": "Only write the table over all pairs."})


class Pair:
    """A DiT and a dataset: what every timestep and tap is worth, and what each way of choosing loses."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args = args
        self.model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0)
        self.head = self.model.config.head
        self.saved_seconds = 0.0  # that pictures of its own would have taken to make again
        self.make_own_pictures_once()
        self.processor = ASelectImageProcessor.from_model_config(self.model.config)
        self.train = sample(args.train_file, args.num_train)
        self.test = sample(args.test_file, args.num_test)
        schedule = self.model.noise_schedule
        # The grid of a selection is within that of the search, so that every choice has its accuracy.
        self.grid = sorted({*schedule.even_timesteps(args.num_timesteps), *schedule.even_timesteps(), *GUESSES})
        blocks = sorted({share * self.model.config.num_hidden_layers // 8 for share in (0, 3, 6)})
        self.taps: list[Tap] = [(block, feature) for block in blocks for feature in FEATURES]
        self.attention_taps = [tap for tap in self.taps if tap[1] in args.attention_features]
        self.plain_taps = [tap for tap in self.attention_taps if tap[1] in args.plain_features]
        self.labels = [self.read_labels(rows) for rows in (self.train, self.test)]

    @property
    def per_picture(self) -> bool:
        """Whether a label belongs to a picture rather than to a patch."""
        return self.args.annotation_column is None

    def pixel_values(self, rows: Dataset) -> Tensor:
        """Return pictures as (n, C, H, W)."""
        return self.processor(rows[self.args.image_column][:], return_tensors="pt").pixel_values

    def read_labels(self, rows: Dataset) -> np.ndarray:
        """Return the label of each picture, (n,), or of each of its patches, (n, N)."""
        if self.per_picture:
            return np.array(rows[self.args.label_column][:])
        side = self.model.config.image_size
        cells = side // self.model.config.patch_pixels
        labels = []
        for annotation in rows[self.args.annotation_column][:]:
            # The same resizing and centre crop as the picture's, without mixing classes.
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
                # Whole tokens of thousands of pictures are kept only where a classifier reads them.
                keep = noise is None and (not self.per_picture or tap in self.attention_taps)
                parts[tap].append(tokens if keep else tokens.mean(1, keepdim=True))
        return {tap: torch.cat(values) for tap, values in parts.items()}

    def exhaustive_search(self) -> tuple[Hits, dict[str, dict[Tap, list[float]]], float]:
        """Return hits, (T, m), of each truth and tap, the literature's measures of each tap, and the seconds."""
        path = Path(self.args.output_dir) / f"{self.args.name}.search.npz"
        # A search of other pictures or taps is another search.
        weights = sum(float(values.double().abs().sum()) for values in self.model.state_dict().values())
        given = {name: value for name, value in asdict(self.args).items() if name in OF_THE_SEARCH}
        settings = {**given, "taps": self.taps, "grid": self.grid, "weights": weights}
        done: dict[str, np.ndarray] = {"settings": np.array(json.dumps(settings))}
        if path.exists():
            with np.load(path) as stored:
                done = dict(stored) if str(stored["settings"]) == str(done["settings"]) else done
        train, test = self.model.encode(self.pixel_values(self.train)), self.model.encode(self.pixel_values(self.test))
        for timestep in tqdm(self.grid, desc="Trying each timestep"):
            if f"{timestep}/seconds" not in done:
                found = self.try_timestep(train, test, timestep)
                done.update({f"{timestep}/{name}": values for name, values in found.items()})
                temporary = path.with_name(f".{path.stem}.incomplete.npz")
                np.savez(temporary, **done)
                os.replace(temporary, path)

        def stacked(name: str, tap: Tap) -> np.ndarray:
            return np.stack([done[f"{timestep}/{name}/{tap[0]}/{tap[1]}"] for timestep in self.grid])

        hits = {("ridge", tap): stacked("ridge", tap) for tap in self.taps}
        hits |= {("attention", tap): stacked("attention", tap) for tap in self.attention_taps}
        hits |= {(PLAIN, tap): stacked(PLAIN, tap) for tap in self.plain_taps}
        measures = {name: {tap: stacked(name, tap).tolist() for tap in self.taps} for name in MEASURES}
        # The median: other work on the machine may slow down some of them.
        seconds = float(np.median([done[f"{timestep}/seconds"] for timestep in self.grid])) * len(self.grid)
        return hits, measures, seconds

    def try_timestep(self, train: Tensor, test: Tensor, timestep: int) -> dict[str, np.ndarray]:
        """Return for each test picture whether each tap's classifiers are right about it, and the measures."""
        generator = torch.Generator().manual_seed(0)
        measured = train[: self.args.num_measured]
        draws = [torch.randn(measured.shape, generator=generator) for _ in range(4)]
        started = time.monotonic()
        tokens = [self.tokens(latents, timestep) for latents in (train, test)]
        found: dict[str, np.ndarray] = {}
        for tap in self.taps:
            place = f"{tap[0]}/{tap[1]}"
            parts = [part[tap] for part in tokens]
            found[f"ridge/{place}"] = ridge_hits(parts[0], self.labels[0], parts[1], self.labels[1])
            ways = {"attention": tap in self.attention_taps, PLAIN: tap in self.plain_taps}
            for truth in (truth for truth, is_wanted in ways.items() if is_wanted):
                part = slice(self.args.num_attention_train)
                standardized = standardize(*parts, per_position=truth != PLAIN)
                found[f"{truth}/{place}"] = head_hits(
                    standardized[0][part], self.labels[0][part], standardized[1], self.labels[1]
                )
            found[f"share/{place}"] = np.array(moments_of(parts[0]).share_between_images)
        # What the measures cost is no part of an exhaustive search.
        found["seconds"] = np.array(time.monotonic() - started)
        views = [self.tokens(measured, timestep, noise) for noise in draws]
        for tap in self.taps:
            own = tokens[0][tap][: self.args.num_measured].mean(1).double().numpy()
            pooled = np.stack([view[tap][:, 0].double().numpy() for view in views])
            for name, value in (("RankMe", rank_me(own)), ("alpha-ReQ", alpha_req(own)), ("LiDAR", lidar(pooled))):
                found[f"{name}/{tap[0]}/{tap[1]}"] = np.array(value)
        return found

    def run(self) -> dict[str, Any]:
        """Return everything that is known of the pair in the end."""
        hits, measures, seconds = self.exhaustive_search()
        rows = []
        for tap in self.taps:
            accuracy = hits["ridge", tap].mean(1)
            for name, values in measures.items():
                chosen = self.grid[int(np.argmax(values[tap]))]
                rows.append(self.row(name, tap, hits, chosen, spearmanr(values[tap], accuracy).statistic))
            for timestep in (*GUESSES, self.grid[len(self.grid) // 2]):
                name = f"t = {timestep}" if timestep in GUESSES else "middle of the grid"
                rows.append(self.row(name, tap, hits, timestep))
            rows.append(self.random_row(tap, hits))
        for tap in tqdm(self.taps, desc="Selecting"):
            ways: list[tuple[str, str | None]] = [(name, None) for name in CRITERIA if name != FORMER]
            ways += [(name, truth) for name in (FORMER, DEFAULT) for truth in HEADS if (truth, tap) in hits]
            for name, truth in ways:
                rows += [self.selection_row(name, tap, hits, seed, truth) for seed in self.args.seeds]
                if name in ("signal_hfr", DEFAULT) and self.args.own_pictures:
                    rows.append(self.selection_row(name, tap, hits, self.args.seeds[0], truth, generated=True))
            if self.per_picture:
                rows.append(self.selection_row("probe", tap, hits, self.args.seeds[0]))
        for truth in HEADS:
            rows += self.tap_rows(truth, hits)
        return {
            "arguments": asdict(self.args),
            "timesteps": self.grid,
            "log_snr": self.model.noise_schedule.log_snr(torch.tensor(self.grid)).tolist(),
            "accuracy": [
                {"truth": truth, "block": tap[0], "feature": tap[1], "accuracies": values.mean(1).tolist()}
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
            )
        places = [self.nearest(timestep) for timestep in record.timesteps]
        correlation = spearmanr(record.scores, hits[truth or "ridge", tap].mean(1)[places]).statistic
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
        if self.per_picture:
            ways["probe"] = {**search, "criterion": "probe", "labels": self.labels[0]}
        rows = []
        for name, options in ways.items():
            for seed in self.args.seeds:
                record = select_timestep(self.model, images, seed=seed, **options)
                tap = (record.block, record.feature)
                place = taps.index(tap) * len(self.grid) + self.nearest(record.timestep)
                found = {"criterion": TAPS + name, "truth": truth, "block": tap[0], "feature": tap[1], "seed": seed}
                rows.append(
                    {**found, "timestep": record.timestep, "tap_loss": loss(every, place), **self.cost(record)}
                )
        return rows

    def make_own_pictures_once(self) -> None:
        """Let the DiT keep the pictures that it makes: each tap asks for the same, and they take longest."""
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
        """Return what choosing a timestep loses at a tap, in points, by each truth."""
        row: dict[str, Any] = {"criterion": name, "block": tap[0], "feature": tap[1], "timestep": timestep}
        place = self.grid.index(timestep)
        for truth in truths:
            prefix = "attention_" if truth == "attention" else ""
            if (truth, tap) in hits:
                values = hits[truth, tap]
                row[f"{prefix}loss"] = loss(values, place)
                row[f"{prefix}loss_to_maximum"] = 100 * float(values.mean(1).max() - values.mean(1)[place])
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
    names = ((accumulators, "REFERENCE_LOG_SNR", (-np.inf, np.inf)), (noise_schedule, "MAX_LOG_SNR", 14.0))
    with ExitStack() as stack:
        for module, name, value in names:
            stack.enter_context(patch.object(module, name, value))
        yield


def sample(path: str, size: int) -> Dataset:
    """Return a random part of a parquet file, the same each time."""
    rows = load_dataset("parquet", data_files=path, split="train")
    return rows.shuffle(seed=0).select(range(min(size, len(rows))))


def ridge_hits(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray) -> np.ndarray:
    """Return for each test picture whether a ridge classifier on standardised features is right about it.

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
        logits: Tensor = self.classifier(self.blocks[0](self.input_projection(tokens)))
        return logits.transpose(1, 2)


def head_hits(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray) -> np.ndarray:
    """Return for each test picture whether a small attention head, trained for 6 epochs, is right about it.

    With labels per patch, (n, N), each token is classified and the share of the labelled ones that the head is right
    about is returned.
    """
    kind = AttentionHead if train_labels.ndim == 1 else DenseHead
    known = torch.from_numpy(test_labels != UNLABELLED)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        num_classes = int(train_labels[train_labels != UNLABELLED].max()) + 1
        head = kind(train.shape[-1], num_classes, 64, 1, 8, 4)
        for weight in head.parameters():
            if weight.ndim == 2:
                nn.init.xavier_uniform_(weight)
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.05)
        # As many steps from few images as from many.
        size = min(BATCH_SIZE, -(-len(train) // 4))
        epochs = max(6, -(-NUM_STEPS // -(-len(train) // size)))
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
    """Return how many points the choice of one half of the pictures gains over `place` on the other half."""
    losses = []
    for seed in range(NUM_HALVES):
        order = np.random.default_rng(seed).permutation(hits.shape[1])
        half = len(order) // 2
        best = int(hits[:, order[:half]].mean(1).argmax())
        losses.append(float(hits[best, order[half:]].mean() - hits[place, order[half:]].mean()))
    return 100 * float(np.mean(losses))


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
    """Return the rank of the between-picture scatter, whitened by that of noise draws (LiDAR, arXiv 2312.04000)."""
    centres = views.mean(0)  # (n, D)
    between = np.cov(centres.T)
    rest = (views - centres).reshape(-1, views.shape[-1])
    within = rest.T @ rest / len(rest) + 1e-4 * np.eye(views.shape[-1])
    inverse = np.linalg.inv(np.linalg.cholesky(within))
    values = np.clip(np.linalg.eigvalsh(inverse @ between @ inverse.T), 0, None)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def summarize(folder: Path) -> str:
    """Return tables over the results in a folder: what each way of choosing loses, and what own pictures change."""
    pairs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not pairs:
        raise ValueError(f"There are no results in {str(folder)!r}; run the benchmark on some pairs first.")
    for name, pair in pairs.items():
        draw(pair, folder / f"{name}.png")
    rows = [{**row, "pair": name, "search": pair["search"]} for name, pair in pairs.items() for row in pair["rows"]]
    names = list(dict.fromkeys(row["criterion"] for row in rows))
    names.sort(key=lambda name: float(mean_and_worst("loss", [row for row in rows if row["criterion"] == name])[0]))
    inside = places_inside(pairs)
    inside_pairs = [name for name, pair in pairs.items() if (name, *best_tap(pair)) in inside]
    tables = (
        overall_table(names, rows, inside, inside_pairs),
        table_by_pair(names, rows, pairs, inside),
        table_by_confidence(rows),
        table_of_own_pictures(rows, pairs) if any(OWN in name for name in names) else [],
    )
    return "\n\n".join("\n".join(table) for table in tables if table) + "\n"


def overall_table(
    names: list[str], rows: list[dict[str, Any]], inside: set[Place], inside_pairs: list[str]
) -> list[str]:
    """Return a Markdown table of losses over all pairs and taps, by each truth, and of costs."""
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    lines = [
        f"Accuracy points lost over {len(pairs)} pairs ({', '.join(pairs)}) and all of their taps, each of which "
        "counts once. Inside: a best timestep that is 1 point above t = 0 and above the noisy end of the grid, as on "
        f"{len(inside)} taps, among them the best of all taps of {', '.join(inside_pairs) or 'no pair'}. "
        "Passes are a share of the "
        "exhaustive search's, the rank correlation is over the timesteps that were read.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    for name in names:
        own = [row for row in rows if row["criterion"] == name]
        peaked = [row for row in own if place_of(row) in inside]
        # Two curves have no rank correlation where one of them is level.
        correlations = [row["rank_correlation"] for row in own if row["rank_correlation"] is not None]
        correlations = [value for value in correlations if np.isfinite(value)]
        measured = [row for row in own if "num_forwards" in row]
        # A search for this tap alone has as many passes as one for all of them, but fits fewer classifiers.
        passes = sum(row["num_forwards"] for row in measured)
        searched = sum(row["search"]["num_forwards"] for row in measured)
        cells = [
            name,
            *mean_and_worst("loss", own),
            mean_and_worst("loss", [row for row in own if row["pair"] in inside_pairs])[0],
            mean_and_worst("loss", peaked)[0],
            *mean_and_worst("loss_to_maximum", own),
            *mean_and_worst("attention_loss", own),
            f"{np.mean(correlations):.2f}" if correlations else "",
            f"1/{searched / passes:.0f}" if measured else "",
            f"{np.mean([row['seconds'] for row in measured]):.1f}" if measured else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_by_pair(
    names: list[str], rows: list[dict[str, Any]], pairs: dict[str, dict[str, Any]], inside: set[Place]
) -> list[str]:
    """Return a Markdown table of mean and worst loss by pair, and on how many taps the best t lies inside."""
    counts = [sum(place[0] == pair for place in inside) for pair in pairs]
    totals = [sum(curve["truth"] == "ridge" for curve in pair["accuracy"]) for pair in pairs.values()]
    lines = [
        "Mean (worst) loss by pair.",
        "",
        f"| criterion | {' | '.join(pairs)} |",
        f"| --- |{' --- |' * len(pairs)}",
        f"| best inside | {' | '.join(f'{n} of {m} taps' for n, m in zip(counts, totals, strict=True))} |",
        f"| best of all taps | {' | '.join(map(describe_best, pairs.values()))} |",
        f"| search, passes | {' | '.join(str(pair['search']['num_forwards']) for pair in pairs.values())} |",
        f"| search, seconds | {' | '.join(format(pair['search']['seconds'], '.0f') for pair in pairs.values())} |",
    ]
    for name in names:
        cells = [name]
        for pair in pairs:
            losses = values_of("loss", [row for row in rows if row["pair"] == pair], name)
            cells.append(f"{np.mean(losses):.2f} ({max(losses):.2f})" if losses else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_by_confidence(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of the losses of choices that were sure and of those that were not."""
    lines = [
        "Choices by the confidence that they came with: those below 0.95 are warned of.",
        "",
        "| criterion | 0.95 and more: choices | mean | worst | below: choices | mean | worst |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["criterion"] for row in rows if "confidence" in row):
        cells = [name]
        for sure in (True, False):
            of_them = [r for r in rows if r["criterion"] == name and (r["confidence"] >= 0.95) == sure]
            losses = values_of("loss", of_them)
            cells += [str(len(losses)), *((f"{np.mean(losses):.2f}", f"{max(losses):.2f}") if losses else ("", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_own_pictures(rows: list[dict[str, Any]], pairs: dict[str, dict[str, Any]]) -> list[str]:
    """Return a Markdown table of what changes where the DiT makes the pictures itself."""
    lines = [
        "Pictures that the DiT makes itself against given ones (same criterion, tap and seed): how many steps of the "
        "grid apart the choices are, and how many points more are lost.",
        "",
        f"| criterion | {' | '.join(pairs)} |",
        f"| --- |{' --- |' * len(pairs)}",
    ]
    for name in dict.fromkeys(row["criterion"] for row in rows if row["criterion"].endswith(OWN)):
        for key, truth in (("loss", ""), ("attention_loss", ", attention head")):
            cells = []
            for pair, result in pairs.items():
                of_pair = [row for row in rows if row["pair"] == pair and "seed" in row and key in row]
                given = {
                    (place_of(row), row["seed"]): row for row in of_pair if row["criterion"] == name.removesuffix(OWN)
                }
                both = [(row, given[place_of(row), row["seed"]]) for row in of_pair if row["criterion"] == name]
                place = result["timesteps"].index
                steps = [abs(place(own["timestep"]) - place(real["timestep"])) for own, real in both]
                more = [own[key] - real[key] for own, real in both]
                cells.append(f"{np.mean(steps):.1f} steps, {np.mean(more):+.2f} points" if both else "")
            lines.append(f"| {' | '.join([name.removesuffix(OWN) + truth, *cells])} |")
    return lines


def values_of(key: str, rows: list[dict[str, Any]], name: str | None = None) -> list[float]:
    """Return a figure of the rows that have it, or of those of one way of choosing."""
    return [row[key] for row in rows if key in row and name in (None, row["criterion"])]


def place_of(row: dict[str, Any]) -> Place:
    """Return the pair and tap that a row belongs to."""
    return row["pair"], row["block"], row["feature"]


def places_inside(pairs: dict[str, dict[str, Any]]) -> set[Place]:
    """Return where the ridge classifier's best timestep is 1 point above both ends of the grid."""
    inside = set()
    for name, pair in pairs.items():
        for curve in pair["accuracy"]:
            values = curve["accuracies"]
            if curve["truth"] == "ridge" and max(values) >= max(values[0], values[-1]) + 0.01:
                inside.add((name, curve["block"], curve["feature"]))
    return inside


def curve_of(pair: dict[str, Any], tap: Tap) -> list[float]:
    """Return the ridge classifier's accuracy at each timestep of a tap."""
    curves = [each for each in pair["accuracy"] if each["truth"] == "ridge"]
    found: list[float] = next(each["accuracies"] for each in curves if (each["block"], each["feature"]) == tap)
    return found


def best_tap(pair: dict[str, Any]) -> Tap:
    """Return where the exhaustive search finds the ridge classifier's largest accuracy."""
    best = max((each for each in pair["accuracy"] if each["truth"] == "ridge"), key=lambda e: max(e["accuracies"]))
    return best["block"], best["feature"]


def describe_best(pair: dict[str, Any]) -> str:
    """Return the exhaustive search's best timestep, and how far it is above both ends of its tap's curve."""
    values = 100 * np.array(curve_of(pair, best_tap(pair)))
    best = int(values.argmax())
    return f"t = {pair['timesteps'][best]}: {values[best] - values[0]:+.1f}, {values[best] - values[-1]:+.1f} points"


def mean_and_worst(key: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Return two cells of a table, empty where there is nothing; each tap counts once, however many seeds it has."""
    by_place: dict[Place, list[float]] = {}
    for row in rows:
        if key in row:
            by_place.setdefault(place_of(row), []).append(row[key])
    if not by_place:
        return "", ""
    return f"{np.mean([np.mean(losses) for losses in by_place.values()]):.2f}", f"{max(values_of(key, rows)):.2f}"


def draw(pair: dict[str, Any], path: Path) -> None:
    """Draw the accuracy at each timestep, tap by tap, and where the default criterion's choices lie."""
    curves = pair["accuracy"]
    taps = list(dict.fromkeys((curve["block"], curve["feature"]) for curve in curves))
    blocks, features = sorted({block for block, _ in taps}), list(dict.fromkeys(feature for _, feature in taps))
    figure = Figure(figsize=(3 * len(features), 2.2 * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), len(features), squeeze=False, sharex=True)
    ratios = 10 * np.log10(np.e) * np.array(pair["log_snr"])  # decibels
    styles = {
        "ridge": ("#0072b2", "-", "o", "linear classifier"),
        "attention": ("#d55e00", "--", "s", "attention head"),
    }
    for block, feature in taps:
        axis = axes[blocks.index(block), features.index(feature)]
        for curve in curves:
            if (curve["block"], curve["feature"]) == (block, feature):
                color, line, marker, label = styles[curve["truth"]]
                accuracies = 100 * np.array(curve["accuracies"])
                axis.plot(ratios, accuracies, color=color, linestyle=line, marker=marker, markersize=3, label=label)
        chosen = [row for row in pair["rows"] if (row["block"], row["feature"]) == (block, feature)]
        chosen = [row for row in chosen if row["criterion"] == DEFAULT]
        for key, (color, _, _, label) in zip(("loss", "attention_loss"), styles.values(), strict=True):
            for timestep in {row["timestep"] for row in chosen if key in row}:
                place = ratios[pair["timesteps"].index(timestep)]
                axis.axvline(place, color=color, linestyle=":", label=f"chosen for the {label}: t = {timestep}")
        axis.set_title(f"block {block}, {feature}", fontsize=9)
        axis.grid(alpha=0.3)
    # From clean to noisy, as t runs.
    axes[0, 0].invert_xaxis()
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("signal-to-noise ratio (dB)")
    # Not every tap has an attention head.
    drawn = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    shown = {label.split(": t")[0]: handle for handle, label in drawn}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), fontsize=9)
    figure.savefig(path, dpi=100)


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
        write(output / f"{args.name}.json", json.dumps(pair.run(), indent=1))
    table = summarize(output)
    write(output / "table.md", table)
    print(table)


if __name__ == "__main__":
    main()
