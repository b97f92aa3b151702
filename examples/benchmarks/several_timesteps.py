r"""What does a set of timesteps selected without labels lose against one that is found with labels?

    python examples/benchmarks/several_timesteps.py --name fashion-mnist-28 \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output several_timesteps.json

The figure of a set is the test accuracy of a ridge classifier, in closed form, on mean-pooled tokens of its timesteps
side by side: of the default tap, and of `hidden` of all blocks. `select_timestep(num_timesteps=3)` selects a set for
each seed, which samples the calibration images, and for all blocks both at the first of them and at the middle one.
Beside it stand the set that is found greedily on the whole grid by the labels of the training images, each left out in
turn, the first of it alone, and two that are evenly spaced. Results are added to the file under the name of the pair.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor, DiTModel, select_timestep

# Of the ridge, as shares of the mean eigenvalue of the features' covariance.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 0))


@dataclass
class SeveralArguments:
    """The pair, how many images, and where to write."""

    name: str = field(metadata={"help": "Name of the pair."})
    model_name_or_path: str = field(metadata={"help": "The DiT."})
    train_file: str = field(metadata={"help": "Parquet file with images and labels."})
    test_file: str = field(metadata={"help": "Parquet file with images and labels."})
    output: str = field(metadata={"help": "JSON file to add the results to."})
    num_timesteps: int = field(default=3, metadata={"help": "Timesteps in a set."})
    num_train: int = field(default=1000, metadata={"help": "Labelled images that the classifier is fitted to."})
    num_test: int = field(default=1000, metadata={"help": "Images that it is tried on."})
    max_images: int = field(default=256, metadata={"help": "Calibration images of a selection."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the selections."})


class Kernels:
    """Inner products of standardized features, which of several timesteps are the sum of theirs."""

    def __init__(self, train: dict[int, Tensor], test: dict[int, Tensor], labels: tuple[Tensor, Tensor]) -> None:
        self.train_labels, self.test_labels = labels
        self.known: dict[int, tuple[Tensor, Tensor, int]] = {}
        for timestep, values in train.items():
            mean, spread = values.mean(0), values.std(0).clamp_min(1e-12)
            here, there = ((part.double() - mean) / spread for part in (values, test[timestep]))
            self.known[timestep] = here @ here.T, there @ here.T, here.shape[1]
        self.found: dict[tuple[int, ...], tuple[float, float]] = {}

    def accuracies(self, timesteps: list[int]) -> tuple[float, float]:
        """Return the accuracies on the training images, each left out in turn, and on the test images, in per cent."""
        key = tuple(sorted(timesteps))
        if key not in self.found:
            self.found[key] = self.fit([self.known[timestep] for timestep in key])
        return self.found[key]

    def fit(self, parts: list[tuple[Tensor, Tensor, int]]) -> tuple[float, float]:
        """Fit the classifier to features side by side; its strength has the smallest left-out error."""
        kernel, across = (torch.stack([part[which] for part in parts]).sum(0) for which in (0, 1))
        count = len(kernel)
        targets = torch.nn.functional.one_hot(self.train_labels).double()
        offset = targets.mean(0)
        scale = float(kernel.trace()) / sum(size for _, _, size in parts)
        best = (torch.inf, 0.0, 0.0)
        for strength in STRENGTHS:
            ridge = strength * scale
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + ridge * torch.eye(count).double()))
            weights = inverse @ (targets - offset)
            # Residual / (1 - leverage); the mean that was subtracted has leverage 1 / n.
            residuals = ridge * weights / (ridge * inverse.diagonal() - 1 / count)[:, None]
            left_out = ((targets - residuals).argmax(1) == self.train_labels).double().mean()
            tested = ((across @ weights + offset).argmax(1) == self.test_labels).double().mean()
            best = min(best, (float(residuals.square().mean()), 100 * float(left_out), 100 * float(tested)))
        return best[1], best[2]

    def greedy(self, grid: list[int], count: int) -> list[int]:
        """Return the timesteps with which, one after the other, the accuracy on the training images rises most."""
        selected: list[int] = []
        for _ in range(count):
            left = [timestep for timestep in grid if timestep not in selected]
            selected.append(max(left, key=lambda timestep: self.accuracies([*selected, timestep])[0]))
        return selected


def sample(path: str, count: int) -> Dataset:
    """Return some rows of a parquet file, the same each time."""
    rows = load_dataset("parquet", data_files=path, split="train").shuffle(seed=0)
    return rows.select(range(min(count, len(rows))))


@torch.no_grad()
def pooled(model: DiTModel, rows: Dataset, timestep: int) -> dict[str, Tensor]:
    """Return the mean tokens of images at a timestep, (n, D), of the default tap and of all blocks, from one pass."""
    config = model.config
    pixels = ASelectImageProcessor.from_model_config(config)(rows["image"][:], return_tensors="pt").pixel_values
    features = list(dict.fromkeys(["hidden", config.feature]))
    parts = [
        model.extract_features(part, timestep=timestep, block="all", feature=features).mean(1)
        for part in pixels.split(250)
    ]
    # Blocks outermost, then features: (n, blocks, features, D).
    by_block = torch.cat(parts).unflatten(1, (config.num_hidden_layers, len(features), -1))
    return {"default tap": by_block[:, config.block_index(), -1], "all blocks": by_block[:, :, 0].flatten(1)}


def evenly_spaced(grid: list[int], count: int) -> dict[str, list[int]]:
    """Return sets evenly spaced in log-SNR, as the grid is: in the middle of equal parts, and with the ends."""
    last = len(grid) - 1
    return {
        "evenly spaced": [grid[round(last * (2 * place + 1) / (2 * count))] for place in range(count)],
        "evenly spaced, with the ends": [grid[round(last * place / max(1, count - 1))] for place in range(count)],
    }


def table(known: dict) -> str:
    """Return the accuracies of all pairs as a table of Markdown; of the seeds of a selection the mean."""
    lines = ["| pair | features | set | test accuracy, % | timesteps |", "| --- | --- | --- | --- | --- |"]
    for pair, results in known.items():
        for features, sets in results["taps"].items():
            rows: dict[str, list[dict]] = {}
            for name, row in sets.items():
                rows.setdefault(name.partition(", seed ")[0], []).append(row)
            for name, runs in rows.items():
                mean = sum(run["test_accuracy"] for run in runs) / len(runs)
                which = "; ".join(dict.fromkeys(", ".join(map(str, run["timesteps"])) for run in runs))
                lines.append(f"| {pair} | {features} | {name} | {mean:.2f} | {which} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (args,) = HfArgumentParser(SeveralArguments).parse_args_into_dataclasses()
    # Any timestep will do here. A linear head sees of the tokens their mean alone.
    model = DiTModel.from_pretrained(args.model_name_or_path, timestep=0, head="linear")
    own, depth = {"block": model.config.block_index(), "feature": model.config.feature}, model.config.num_hidden_layers
    # Of each set of taps, where timesteps are selected.
    places = {
        "default tap": {"": own},
        "all blocks": {
            " at the first": {"block": 0, "feature": "hidden"},
            " at the middle": {"block": (depth - 1) // 2, "feature": "hidden"},
        },
    }
    train, test = sample(args.train_file, args.num_train), sample(args.test_file, args.num_test)
    calibration = load_dataset("parquet", data_files=args.train_file, split="train").select_columns(["image"])
    grid = model.noise_schedule.even_timesteps()
    labels = torch.tensor(train["label"][:]), torch.tensor(test["label"][:])
    read = [{t: pooled(model, rows, t) for t in tqdm(grid, desc="Reading")} for rows in (train, test)]
    results = {"settings": asdict(args), "grid": grid, "num_test": len(test), "taps": {}}
    for name in places:
        kernels = Kernels(*({t: values[name] for t, values in part.items()} for part in read), labels)
        by_labels = kernels.greedy(grid, args.num_timesteps)
        sets = {
            "one, by labels": by_labels[:1],
            "greedy, by labels": by_labels,
            **evenly_spaced(grid, args.num_timesteps),
        }
        for where, tap in places[name].items():
            for seed in args.seeds:
                selection = select_timestep(
                    model,
                    calibration,
                    num_timesteps=args.num_timesteps,
                    max_images=args.max_images,
                    seed=seed,
                    **tap,
                )
                sets[f"selected{where}, seed {seed}"] = selection.selected
                sets[f"one selected{where}, seed {seed}"] = [selection.timestep]
        results["taps"][name] = {
            each: {"timesteps": timesteps, "test_accuracy": round(kernels.accuracies(timesteps)[1], 2)}
            for each, timesteps in sets.items()
        }
        for each, row in results["taps"][name].items():
            print(f"{name:<12} {each:<40} {row['test_accuracy']:6.2f} %  {row['timesteps']}", flush=True)
    path = Path(args.output)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[args.name] = results
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(known))


if __name__ == "__main__":
    main()
