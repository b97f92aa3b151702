r"""Linear probe with a sweep of learning rates, all heads at once on one pass of features.

On the images that ship in the package, from a checkout of the repository (half a minute on two CPU cores):

    python examples/image_classification/linear_probe.py \
        --model_name_or_path src/hf_aselect/assets/fashion_mnist --timestep 35 \
        --train_file src/hf_aselect/assets/fashion_mnist/train.parquet \
        --test_file src/hf_aselect/assets/fashion_mnist/test.parquet --output_dir fashion-probe

The features' means are read once (`cache_features`), normed as `LinearHead` does, and standardised; then one linear
layer for each learning rate learns from the same batches, as the probes of DINOv2 and DDAE do. A tenth of the training
images, by `--seed`, picks the learning rate; the test images are looked at once, with that one, trained on all of
them. What is saved is a `DiTForImageClassification` with a linear head.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser, set_seed

from hf_aselect import ASelectImageProcessor, DiTForImageClassification, cache_features
from hf_aselect.training.config_arguments import int_or_word, needs_images, one_or_several
from hf_aselect.training.splits import read_splits, train_and_validation


@dataclass
class ProbeArguments:
    """What is probed, on which images, and how."""

    model_name_or_path: str = field(metadata={"help": "hf_aselect checkpoint, or a folder saved by diffusers."})
    train_file: str = field(metadata={"help": "Parquet file with images and labels."})
    test_file: str = field(metadata={"help": "Parquet file of the test images."})
    output_dir: str = field(metadata={"help": "Folder for the probe, and for the features in `features/`."})
    timestep: list[str] | None = field(
        default=None, metadata={"help": "One or several timesteps, or auto (default: the model's, else auto)."}
    )
    block: list[str] | None = field(
        default=None, metadata={"help": "One or several blocks, or all (default: the model's)."}
    )
    feature: list[str] | None = field(
        default=None, metadata={"help": ("One or several features (default: the model's).")}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class indices."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        metadata={"help": "Learning rates to try."},
    )
    num_train_epochs: int = field(default=28, metadata={"help": "Epochs."})
    batch_size: int = field(default=64, metadata={"help": "Batch size."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    num_views: int = field(default=1, metadata={"help": "Views of each training image."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the heads and the batches."})


class Heads(nn.Module):
    """One linear layer for each learning rate, side by side.

    Args:
        num_heads: How many.
        size: Width of the features.
        num_labels: Number of classes.
    """

    def __init__(self, num_heads: int, size: int, num_labels: int) -> None:
        super().__init__()
        # As DINOv2's probes: all begin alike.
        weight = 0.01 * torch.randn(1, size, num_labels)
        self.weights = nn.ParameterList(nn.Parameter(weight[0].clone()) for _ in range(num_heads))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_labels)) for _ in range(num_heads))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (heads, B, K), of features, (B, D)."""
        return torch.stack([features @ weight + bias for weight, bias in zip(self.weights, self.biases, strict=True)])


def fit(features: Tensor, labels: Tensor, num_labels: int, rates: list[float], args: ProbeArguments) -> Heads:
    """Train one head for each learning rate on the same batches."""
    torch.manual_seed(args.seed)
    heads = Heads(len(rates), features.shape[1], num_labels)
    groups = [
        {"params": [weight, bias], "lr": rate}
        for weight, bias, rate in zip(heads.weights, heads.biases, rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    num_steps = args.num_train_epochs * -(-len(labels) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(args.num_train_epochs):
        for places in torch.randperm(len(labels)).split(args.batch_size):
            logits = heads(features[places])
            # The sum of their losses: none of them sees another's gradient.
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[places].repeat(len(rates)), reduction="none"
            )
            optimizer.zero_grad()
            losses.unflatten(0, (len(rates), -1)).mean(1).sum().backward()
            optimizer.step()
            schedule.step()
    return heads


@torch.no_grad()
def accuracies(heads: Heads, features: Tensor, labels: Tensor) -> list[float]:
    """Return the accuracy of each head."""
    return [float(value) for value in (heads(features).argmax(-1) == labels).double().mean(1)]


@torch.no_grad()
def normed(model: DiTForImageClassification, features: Tensor) -> Tensor:
    """Return what the linear layer of a new `LinearHead` reads of pooled tokens, (B, S · D)."""
    pooled = model.classifier.pool(features)
    return nn.functional.layer_norm(pooled, pooled.shape[1:])


@torch.no_grad()
def save(model: DiTForImageClassification, heads: Heads, mean: Tensor, spread: Tensor, folder: Path) -> None:
    """Save the model with the first of some heads, and the standardisation in its weights."""
    model.classifier.norm.reset_parameters()  # a head that was trained before has another
    weight = heads.weights[0] / spread[:, None]
    model.classifier.output_projection.weight.copy_(weight.T)
    model.classifier.output_projection.bias.copy_(heads.biases[0] - mean @ weight)
    model.save_pretrained(folder)
    ASelectImageProcessor.from_model_config(model.config).save_pretrained(folder)


def main() -> None:
    (args,) = HfArgumentParser(ProbeArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    columns = [args.image_column, args.label_column]
    splits = read_splits(train_file=args.train_file, validation_file=args.test_file, columns=columns)
    train, test = train_and_validation(splits.select_columns(columns), args.seed, args.label_column)
    if len(train) < 10:
        raise ValueError(f"The learning rate is selected on a tenth of the training images, got {len(train)} of them.")
    names = train.features[args.label_column].names
    words = {name: getattr(args, name) for name in ("timestep", "block", "feature") if getattr(args, name) is not None}
    given = {name: one_or_several([int_or_word(word) for word in several]) for name, several in words.items()}
    has_use = needs_images(args.model_name_or_path, given)
    model = DiTForImageClassification.from_pretrained(
        args.model_name_or_path,
        calibration_images=train.shuffle(args.seed)[:256][args.image_column] if has_use else None,
        num_train_images=len(train),
        head="linear",
        head_norm=True,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **given,
    )
    output = Path(args.output_dir)
    options = {"what": "pooled", "image_column": args.image_column, "dtype": "float32"}
    cached = cache_features(model, train, output / "features", num_views=args.num_views, seed=args.seed, **options)
    features, labels = normed(model, cached["features"][:]), cached[args.label_column][:]
    cached = cache_features(model, test, output / "features", **options)
    test_features, test_labels = normed(model, cached["features"][:]), cached[args.label_column][:]

    # All views of an image are on the same side.
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))[: len(train) // 10]
    is_held_out = torch.zeros(len(train), dtype=torch.bool).index_fill(0, chosen, True).repeat(args.num_views)
    mean, spread = features[~is_held_out].mean(0), features[~is_held_out].std(0).clamp_min(1e-6)
    scaled = (features - mean) / spread
    heads = fit(scaled[~is_held_out], labels[~is_held_out], len(names), args.learning_rates, args)
    validation = accuracies(heads, scaled[is_held_out], labels[is_held_out])
    for rate, accuracy in zip(args.learning_rates, validation, strict=True):
        print(f"learning rate {rate:g}: validation accuracy {accuracy:.4f}")
    best = args.learning_rates[validation.index(max(validation))]
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    final = fit((features - mean) / spread, labels, len(names), [best], args)
    (accuracy,) = accuracies(final, (test_features - mean) / spread, test_labels)

    save(model, final, mean, spread, output)
    result = {
        "timestep": model.config.timestep,
        "learning_rate": best,
        "validation_accuracy": dict(zip(map(str, args.learning_rates), validation, strict=True)),
        "test_accuracy": accuracy,
        "seed": args.seed,
    }
    (output / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"Test accuracy {accuracy:.4f}, learning rate {best:g}. Saved {output}.")


if __name__ == "__main__":
    main()
