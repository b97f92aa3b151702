r"""What do standardised features do to a head that is trained by gradient? Accuracy and steps, with and without.

    python examples/benchmarks/standardized_features.py --model_name_or_path src/hf_aselect/assets/fashion_mnist \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output_dir standardized

At each timestep (by default 0, the selected one, 300, 700 and 900) a linear head and a small attention head are
trained on the same tokens, once as they are and once standardised (`config.standardize_features`), with the same
seeds, data and recipe. Written is `standardized.json`, and a table of accuracies and of the steps that a head takes to
95 % of the better one's accuracy: both are tried on the test images every 20 steps.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from selection_regret import sample
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_aselect import ASelectImageProcessor, DiTForImageClassification
from hf_aselect.model.heads import FeatureStandardization

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "attention": {"head": "attention", "head_hidden_size": 64, "head_num_layers": 1},
}
LEARNING_RATES = {"linear": 1e-2, "attention": 2e-3}
EVERY = 20
ENOUGH = 0.95


@dataclass
class StandardizationArguments:
    """Which DiT and images, how long, where to write."""

    model_name_or_path: str = field(metadata={"help": "The DiT."})
    train_file: str = field(metadata={"help": "Parquet file with images and labels."})
    test_file: str = field(metadata={"help": "Parquet file with images and labels."})
    output_dir: str = field(metadata={"help": "Folder for standardized.json and table.md."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices."})
    num_train: int = field(default=1000, metadata={"help": "Images to train on."})
    num_test: int = field(default=1000, metadata={"help": "Images to try on."})
    timesteps: list[int] = field(
        default_factory=lambda: [0, 300, 700, 900], metadata={"help": "Timesteps beside the selected one."}
    )
    num_steps: int = field(default=400, metadata={"help": "Steps of a training, of 50 images each."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of weights and order."})


class Comparison:
    """A DiT whose tokens are read once a timestep, for heads with and without standardisation."""

    def __init__(self, args: StandardizationArguments) -> None:
        self.args = args
        parts = [sample(args.train_file, args.num_train), sample(args.test_file, args.num_test)]
        self.num_labels = parts[0].features[args.label_column].num_classes
        self.labels = [torch.tensor(part[args.label_column][:]) for part in parts]
        config = self.load("linear", 0, False, None).config
        processor = ASelectImageProcessor.from_model_config(config)
        self.images = [processor(part[args.image_column][:], return_tensors="pt").pixel_values for part in parts]

    def load(
        self, head: str, timestep: Any, is_standardized: bool, images: Tensor | None
    ) -> DiTForImageClassification:
        """Return a classifier with a new head."""
        return DiTForImageClassification.from_pretrained(
            self.args.model_name_or_path,
            timestep=timestep,
            num_labels=self.num_labels,
            standardize_features=is_standardized,
            calibration_images=images,
            **HEADS[head],
        )

    def run(self) -> list[dict[str, Any]]:
        """Return a row for each head, timestep, seed and way."""
        rows = []
        for head in HEADS:
            selected = self.load(head, "auto", True, self.images[0][:256]).config.timestep
            for timestep in tqdm(sorted({selected, *self.args.timesteps}), desc=f"{head} head"):
                tokens: list[Tensor] | None = None
                for is_standardized in (False, True):
                    calibration = self.images[0][:256] if is_standardized else None
                    model = self.load(head, timestep, is_standardized, calibration)
                    if tokens is None:
                        tokens = [self.read(model, images) for images in self.images]
                    for seed in self.args.seeds:
                        curve = self.train(model, head, tokens, seed)
                        found = {"head": head, "timestep": timestep, "is_selected": timestep == selected}
                        rows.append({**found, "is_standardized": is_standardized, "seed": seed, "accuracies": curve})
        return rows

    @torch.no_grad()
    def read(self, model: DiTForImageClassification, images: Tensor) -> Tensor:
        """Return the tokens of images as they are, (n, N, D)."""
        return torch.cat([model.extract_features(batch) for batch in images.split(64)])

    def train(self, model: DiTForImageClassification, head: str, tokens: list[Tensor], seed: int) -> list[float]:
        """Train a head with new weights, and return its accuracy on the test images every 20 steps."""
        torch.manual_seed(seed)
        for module in model.classifier.modules():
            if not isinstance(module, FeatureStandardization):
                model._init_weights(module)
        weights = [weight for weight in model.classifier.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATES[head], weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATES[head], total_steps=self.args.num_steps
        )
        curve, order = [], torch.randperm(0)
        for step in range(1, self.args.num_steps + 1):
            if len(order) < 50:
                order = torch.randperm(len(tokens[0]))
            chosen, order = order[:50], order[50:]
            optimizer.zero_grad()
            model(features=tokens[0][chosen], labels=self.labels[0][chosen]).loss.backward()
            optimizer.step()
            schedule.step()
            if step % EVERY == 0:
                with torch.no_grad():
                    predicted = torch.cat([model(features=part).logits.argmax(1) for part in tokens[1].split(500)])
                curve.append(float((predicted == self.labels[1]).float().mean()))
        return curve


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean and deviation over seeds of the last accuracy, and steps to 95 % of the best."""
    lines = [
        "| head | timestep | accuracy, as they are | standardized | steps, as they are | standardized |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for head, timestep in dict.fromkeys((row["head"], row["timestep"]) for row in rows):
        here = [row for row in rows if (row["head"], row["timestep"]) == (head, timestep)]
        curves = [[row["accuracies"] for row in here if row["is_standardized"] == way] for way in (False, True)]
        lasts = [np.array([curve[-1] for curve in each]) for each in curves]
        goal = ENOUGH * max(float(last.mean()) for last in lasts)
        cells = [f"{last.mean():.3f} ± {last.std():.3f}" for last in lasts]
        cells += [steps_to(goal, each) for each in curves]
        name = f"{timestep} (selected)" if here[0]["is_selected"] else str(timestep)
        lines.append(f"| {head} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def steps_to(goal: float, curves: list[list[float]]) -> str:
    """Return the median of the steps after which heads reach an accuracy, and "never" where most do not."""
    reached = [next((i for i, value in enumerate(curve, 1) if value >= goal), np.inf) for curve in curves]
    median = float(np.median(reached))
    return str(int(EVERY * median)) if np.isfinite(median) else "never"


def main() -> None:
    (args,) = HfArgumentParser(StandardizationArguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = Comparison(args).run()
    result = {"arguments": asdict(args), "rows": rows}
    (output / "standardized.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
