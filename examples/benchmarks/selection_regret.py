r"""How much accuracy does a criterion lose against trying every timestep? One (DiT, dataset) pair a run.

    python examples/benchmarks/selection_regret.py --name fashion-mnist-28 \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output_dir regret

The truth: a ridge classifier on mean-pooled tokens at every timestep of the grid, every third block and four features.
Against it: each criterion of `select_timestep`, three measures of the self-supervised literature on the same features,
and the guesses that people make. `OUTPUT_DIR/NAME.json` holds everything; with `--summarize` alone the table over all
pairs in OUTPUT_DIR is written to `table.md`.

Two losses are given. `loss`: the timestep that is best on one half of the test pictures against the chosen one, both
on the other half, over 20 random halves: what an exhaustive search really buys. `loss_to_maximum`: against the largest
accuracy on all test pictures, which is lucky by as much as the largest of many noisy numbers is.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor, DiTModel, select_timestep

FEATURES = ("hidden", "query", "key", "value")
CRITERIA = ("hfr", "signal_hfr", "consensus")
GUESSES = (0, 50, 100, 150, 261)
STRENGTHS = tuple(10.0**exponent for exponent in range(-2, 6))
NUM_HALVES = 20

Tap = tuple[int, str]


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
    num_train: int = field(default=3000, metadata={"help": "Pictures that a ridge classifier is fitted to."})
    num_test: int = field(default=3000, metadata={"help": "Pictures that it is tried on."})
    num_timesteps: int = field(default=40, metadata={"help": "Timesteps of the exhaustive search."})
    num_measured: int = field(default=256, metadata={"help": "Pictures for RankMe, alpha-ReQ and LiDAR."})
    batch_size: int = field(default=64, metadata={"help": "Pictures in one forward pass."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the selections."})
    summarize: bool = field(default=False, metadata={"help": "Only write the table over all pairs."})


class Pair:
    """A DiT and a dataset: what every timestep and tap is worth, and what each way of choosing loses."""

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args = args
        self.model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0)
        self.processor = ASelectImageProcessor.from_model_config(self.model.config)
        self.train = sample(args.train_file, args.num_train)
        self.test = sample(args.test_file, args.num_test)
        schedule = self.model.noise_schedule
        # The grid of a selection is within that of the search, so that every choice has its accuracy.
        self.grid = sorted({*schedule.even_timesteps(args.num_timesteps), *schedule.even_timesteps(), *GUESSES})
        blocks = range(0, self.model.config.num_hidden_layers, 3)
        self.taps: list[Tap] = [(block, feature) for block in blocks for feature in FEATURES]

    def pixel_values(self, rows: Dataset) -> Tensor:
        """Return pictures as (n, C, H, W)."""
        return self.processor(rows[self.args.image_column][:], return_tensors="pt").pixel_values

    @torch.no_grad()
    def pooled(self, latents: Tensor, timestep: int, noise: Tensor | None = None) -> dict[Tap, np.ndarray]:
        """Return mean-pooled tokens, (n, D), of each tap; with the model's own noise unless some is given."""
        parts: dict[Tap, list[Tensor]] = {tap: [] for tap in self.taps}
        for start in range(0, len(latents), self.args.batch_size):
            batch = latents[start : start + self.args.batch_size]
            timesteps = torch.full((len(batch),), timestep)
            if noise is None:
                noised = self.model.add_noise(batch, timestep)
            else:
                drawn = noise[start : start + self.args.batch_size]
                noised = self.model.noise_schedule.add_noise(batch, drawn, timesteps)
            for tap, tokens in self.model.read_taps(noised, timesteps, self.taps).items():
                parts[tap].append(tokens.mean(1))
        return {tap: torch.cat(values).double().numpy() for tap, values in parts.items()}

    def exhaustive_search(self) -> tuple[dict[Tap, np.ndarray], dict[str, dict[Tap, list[float]]]]:
        """Return hits, (T, m), of each tap, and the literature's measures at each timestep of each tap."""
        train, test = self.model.encode(self.pixel_values(self.train)), self.model.encode(self.pixel_values(self.test))
        labels = [np.array(rows[self.args.label_column][:]) for rows in (self.train, self.test)]
        hits: dict[Tap, list[np.ndarray]] = {tap: [] for tap in self.taps}
        measures: dict[str, dict[Tap, list[float]]] = {
            name: {tap: [] for tap in self.taps} for name in ("RankMe", "alpha-ReQ", "LiDAR")
        }
        measured = train[: self.args.num_measured]
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(measured.shape, generator=generator) for _ in range(4)]
        for timestep in tqdm(self.grid, desc="Trying each timestep"):
            features = [self.pooled(latents, timestep) for latents in (train, test)]
            views = [self.pooled(measured, timestep, noise) for noise in draws]
            for tap in self.taps:
                hits[tap].append(probe_hits(features[0][tap], labels[0], features[1][tap], labels[1]))
                own = features[0][tap][: self.args.num_measured]
                measures["RankMe"][tap].append(rank_me(own))
                measures["alpha-ReQ"][tap].append(alpha_req(own))
                measures["LiDAR"][tap].append(lidar(np.stack([view[tap] for view in views])))
        return {tap: np.stack(values) for tap, values in hits.items()}, measures

    def run(self) -> dict[str, Any]:
        """Return everything that is known of the pair in the end."""
        started = time.monotonic()
        hits, measures = self.exhaustive_search()
        search_seconds = time.monotonic() - started
        rows = []
        for tap in self.taps:
            accuracy = hits[tap].mean(1)
            for name, values in measures.items():
                chosen = self.grid[int(np.argmax(values[tap]))]
                rows.append(self.row(name, tap, hits[tap], chosen, spearmanr(values[tap], accuracy).statistic))
            for timestep in (*GUESSES, self.grid[len(self.grid) // 2]):
                name = f"t = {timestep}" if timestep in GUESSES else "middle of the grid"
                rows.append(self.row(name, tap, hits[tap], timestep, float("nan")))
            rows.append(self.random_row(tap, hits[tap]))
        for tap in tqdm(self.taps, desc="Selecting"):
            for name in CRITERIA:
                rows += [self.selection_row(name, tap, hits[tap], seed) for seed in self.args.seeds]
        return {
            "arguments": asdict(self.args),
            "timesteps": self.grid,
            "accuracy": [
                {"block": block, "feature": feature, "accuracies": hits[block, feature].mean(1).tolist()}
                for block, feature in self.taps
            ],
            "search": {
                "num_forwards": len(self.grid) * (len(self.train) + len(self.test)),
                "seconds": search_seconds,
            },
            "rows": rows,
        }

    def selection_row(self, criterion: str, tap: Tap, hits: np.ndarray, seed: int) -> dict[str, Any]:
        """Return what one selection lost and cost."""
        images = self.train.select_columns([self.args.image_column])
        record = select_timestep(self.model, images, criterion=criterion, block=tap[0], feature=tap[1], seed=seed)
        places = [self.grid.index(timestep) for timestep in record.timesteps]
        correlation = spearmanr(record.scores, hits.mean(1)[places]).statistic
        row = self.row(criterion, tap, hits, record.timestep, correlation)
        cost = {name: getattr(record, name) for name in ("num_images", "num_forwards", "seconds", "confidence")}
        return {**row, **cost, "seed": seed}

    def row(self, name: str, tap: Tap, hits: np.ndarray, timestep: int, correlation: float) -> dict[str, Any]:
        """Return what choosing a timestep loses at a tap, in points."""
        return {
            "criterion": name,
            "block": tap[0],
            "feature": tap[1],
            "timestep": timestep,
            "loss": loss(hits, self.grid.index(timestep)),
            "loss_to_maximum": 100 * float(hits.mean(1).max() - hits.mean(1)[self.grid.index(timestep)]),
            "rank_correlation": float(correlation),
        }

    def random_row(self, tap: Tap, hits: np.ndarray) -> dict[str, Any]:
        """Return the mean loss over the grid."""
        every = [self.row("random t", tap, hits, timestep, float("nan")) for timestep in self.grid]
        mean = {name: float(np.mean([row[name] for row in every])) for name in ("loss", "loss_to_maximum")}
        return {**every[0], **mean, "timestep": None}


def sample(path: str, size: int) -> Dataset:
    """Return a random part of a parquet file, the same each time."""
    rows = load_dataset("parquet", data_files=path, split="train")
    return rows.shuffle(seed=0).select(range(min(size, len(rows))))


def probe_hits(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> np.ndarray:
    """Return for each test picture whether a ridge classifier on standardised features is right about it."""
    scaler = StandardScaler().fit(train)
    classifier = RidgeClassifierCV(alphas=STRENGTHS).fit(scaler.transform(train), train_labels)
    return classifier.predict(scaler.transform(test)) == test_labels


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
    """Return a table over all pairs in a folder: mean and worst loss, rank correlation, share of the search's cost."""
    pairs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not pairs:
        raise ValueError(f"There are no results in {str(folder)!r}; run the benchmark on some pairs first.")
    rows = [{**row, "search": pair["search"]} for pair in pairs.values() for row in pair["rows"]]
    lines = [
        f"{len(pairs)} pairs ({', '.join(pairs)}), losses in accuracy points over all taps.",
        "",
        "| criterion | mean loss | worst loss | mean loss to maximum | rank correlation | forward passes | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    summary = []
    for name in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == name]
        losses = [row["loss"] for row in own]

        def mean(get: Callable[[dict], float], own: list[dict] = own) -> float:
            values = [get(row) for row in own]
            return float(np.mean(values)) if np.isfinite(values).all() else float("nan")

        costs = ["", ""]
        if "num_forwards" in own[0]:
            share = mean(lambda row: row["num_forwards"] / row["search"]["num_forwards"])
            costs = [f"1/{1 / share:.0f}", f"{mean(lambda row: row['seconds']):.1f}"]
        correlation = mean(lambda row: row["rank_correlation"])
        cells = [
            name,
            f"{np.mean(losses):.2f}",
            f"{max(losses):.2f}",
            f"{mean(lambda row: row['loss_to_maximum']):.2f}",
            "" if np.isnan(correlation) else f"{correlation:.2f}",
            *costs,
        ]
        summary.append((float(np.mean(losses)), f"| {' | '.join(cells)} |"))
    return "\n".join(lines + [line for _, line in sorted(summary)]) + "\n"


def main() -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not args.summarize:
        if None in (args.name, args.model_name_or_path, args.train_file, args.test_file):
            raise ValueError("Give --name, --model_name_or_path, --train_file and --test_file, or --summarize alone.")
        write(output / f"{args.name}.json", json.dumps(Pair(args).run(), indent=1))
    table = summarize(output)
    write(output / "table.md", table)
    print(table)


if __name__ == "__main__":
    main()
