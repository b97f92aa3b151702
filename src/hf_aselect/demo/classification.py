"""The main job from end to end on the embedded DiT: select the timestep, fit a head, compare, save, reload."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline, set_seed

from ..hub.push import write_model_card
from ..model.heads import pooled_tokens
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.modeling_classification import DiTForImageClassification
from ..plots import plot_predictions
from ..selection.criteria import Consensus
from ..selection.probe import ridge_probe_accuracy
from ..selection.record import TimestepSelection
from ..selection.select import select_timestep
from .attention_head import BATCH_SIZE, load_attention_model, train_attention_head
from .results import Stopwatch, choice_of, probe_baselines, probe_figures, save_curve, write_json
from .sample import EMBEDDED, classes_of, load_embedded_split

# What is read: an early and the last block, which are among the best read-outs that were compared. The more of them,
# the longer the fit takes.
READ_OUT: dict[str, Any] = {"block": [2, 7], "feature": ["hidden", "key"], "pooling": "regions"}
# What the linear probes read in comparison: the tap that a model of this depth has by default.
SINGLE_TAP: dict[str, Any] = {"block": 3, "feature": "query"}
# Test images in the figure of predictions.
NUM_SHOWN = 25


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with; the defaults are those of `hf-aselect demo`.

    Args:
        seed: Seed of the few labels that are drawn, and of the attention head's training; the timestep is selected
            with `select_timestep`'s default seed.
        num_train: Training images, at most 4,000.
        num_test: Test images, at most 2,000.
        num_calibration: Training images that the timestep is selected from.
        num_probe: Training images, and test images, of the linear probes, which are fitted at each timestep.
        few: Numbers of labelled images that the head is fitted to, too; each class has as many of them.
        num_draws: How often these are drawn; the result is the mean.
        attention_head: Whether to train an attention head, too, which takes minutes.
        num_views: Views of each training image for it: the image itself, the others mirrored and shifted.
        num_epochs: Its epochs over all views.
    """

    seed: int = 0
    num_train: int = 4000
    num_test: int = 2000
    num_calibration: int = 256
    num_probe: int = 1000
    few: tuple[int, ...] = (500, 100)
    num_draws: int = 5
    attention_head: bool = False
    num_views: int = 16
    num_epochs: int = 2


def run_demo(output: str | os.PathLike[str], settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run the demo and write `model/`, `results.json`, `timestep_curve.png` and `predictions.png`.

    Args:
        output: Folder for the files; made if it is missing.
        settings: What to run with.

    Returns:
        The results, as in `results.json`: accuracies are shares in [0, 1].

    Raises:
        RuntimeError: If the saved model, loaded again, does not predict the same.
        OSError: If the folder cannot be written.
    """
    settings = settings or DemoSettings()
    output = Path(output)
    (output / "model").mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    train = load_embedded_split("train", settings.num_train)
    test = load_embedded_split("test", settings.num_test)
    set_seed(settings.seed)
    with watch.measure("select_timestep"):
        model = load_model(train, settings.num_calibration)
    processor = ASelectImageProcessor.from_model_config(model.config)
    pixels = {"train": pixel_values(processor, train), "test": pixel_values(processor, test)}
    labels = {"train": torch.tensor(train["label"][:]), "test": torch.tensor(test["label"][:])}
    with watch.measure("read_features"):
        pooled = {split: pooled_features(model, batch, split) for split, batch in pixels.items()}
    few = few_label_accuracies(model, pooled, pixels, labels, settings, watch)
    with watch.measure("read_out"):
        # Last: this is the head that is saved.
        read_out = fit(model, pooled, labels)
    with watch.measure("raw_pixels"):
        raw_pixels = raw_pixel_accuracy(pixels, labels, settings.seed)
    with watch.measure("select_for_probe"):
        # The model's own selection is for a head that sees more than the mean.
        shown = train["image"][: settings.num_calibration]
        for_probe = select_timestep(model, shown, criterion=Consensus("mean"), **SINGLE_TAP)
    with watch.measure("exhaustive_search"):
        grid = sorted({*model.noise_schedule.even_timesteps()[::2], for_probe.timestep})
        probed = probe_each_timestep(model, grid, pixels, labels, settings.num_probe)
    results = {
        **choice_of(TimestepSelection.from_dict(model.config.selection or {}), grid, probed),
        "accuracy": {
            "read_out": read_out,
            "raw_pixels": raw_pixels,
            **{name: float(np.mean(shares)) for name, shares in few.items()},
            **probe_figures(for_probe.timestep, grid, probed),
        },
        "read_out": [list(entry) for entry in model.config.read_outs()],
        "pooling": model.config.pooling,
        "probe_timestep": for_probe.timestep,
        "probe": list(SINGLE_TAP.values()),
        "few_accuracies": few,
        "probe_accuracies": probed,
        "seconds": watch.seconds,
        "seed": settings.seed,
        "num_train": settings.num_train,
        "num_probe": min(settings.num_probe, settings.num_train),
        "num_probe_test": min(settings.num_probe, settings.num_test),
        "num_test": settings.num_test,
        "few": list(settings.few),
        "num_draws": settings.num_draws,
    }
    if settings.attention_head:
        given = {"num_views": settings.num_views, "num_epochs": settings.num_epochs}
        with watch.measure("attention_head"):
            other = load_attention_model(train, settings.num_calibration)
            folder = output / "attention_head"
            share = train_attention_head(other, pixels, labels, folder, seed=settings.seed, **given)
        results["accuracy"]["attention_head"] = share
        results |= {"attention_head_timestep": other.config.timestep, **given}
    with watch.measure("save_and_reload"):
        save_classifier(model, processor, for_probe, results, output)
        save_predictions(test, predict(model, pooled["test"][:NUM_SHOWN]), output / "predictions.png")
        check_reloaded(model, pixels["test"][:200], test["image"][:16], output / "model")
    write_json(output / "results.json", results)
    return results


def load_model(train: Dataset, num_calibration: int) -> DiTForImageClassification:
    """Return a classifier on the embedded DiT, its timestep selected from training images."""
    return DiTForImageClassification.from_pretrained(
        EMBEDDED,
        timestep="auto",
        calibration_images=train["image"][:num_calibration],
        head="linear",
        head_norm=False,
        # A head in closed form has it in its weights.
        standardize_features=False,
        **READ_OUT,
        **classes_of(train),
    )


def pixel_values(processor: ASelectImageProcessor, dataset: Dataset) -> Tensor:
    """Return the images of a dataset as pixel values, (n, C, H, W)."""
    pixels: Tensor = processor(dataset["image"][:], return_tensors="pt").pixel_values
    return pixels


@torch.no_grad()
def pooled_features(model: DiTForImageClassification, pixels: Tensor, split: str) -> Tensor:
    """Return what the head reads of images, (n, S · D), so that they are read once for all fits."""
    model.eval()
    config = model.config
    batches = tqdm(pixels.split(BATCH_SIZE), desc=f"Reading the {split} images", leave=False)
    read = [pooled_tokens(model.extract_features(batch), config.pooling, config.token_grid) for batch in batches]
    return torch.cat(read).flatten(1)


def fit(
    model: DiTForImageClassification, pooled: dict[str, Tensor], labels: dict[str, Tensor], rows: Tensor | None = None
) -> float:
    """Fit the head in closed form to some training images (default: all), and return its test accuracy in [0, 1]."""
    everything = slice(None)
    train, test = (
        {"features": pooled[split][part], "labels": labels[split][part]}
        for split, part in (("train", everything if rows is None else rows), ("test", everything))
    )
    found = model.fit_head(train, eval_dataset=test)
    return float((found.evaluation or {})["accuracy"])


def few_label_accuracies(
    model: DiTForImageClassification,
    pooled: dict[str, Tensor],
    pixels: dict[str, Tensor],
    labels: dict[str, Tensor],
    settings: DemoSettings,
    watch: Stopwatch,
) -> dict[str, list[float]]:
    """Return the test accuracy of the head and of raw pixels from few labels, for each draw of them, by name."""
    accuracies = {}
    for num in settings.few:
        drawn = draw_labels(labels["train"], num, settings.num_draws, settings.seed)
        with watch.measure(f"read_out_{num}"):
            accuracies[f"read_out_{num}"] = [fit(model, pooled, labels, rows) for rows in drawn]
        with watch.measure(f"raw_pixels_{num}"):
            accuracies[f"raw_pixels_{num}"] = [
                raw_pixel_accuracy(pixels, labels, settings.seed, rows) for rows in drawn
            ]
    return accuracies


def draw_labels(labels: Tensor, num: int, num_draws: int, seed: int) -> list[Tensor]:
    """Return the indices of `num` images, equally many of each class, for each draw.

    Args:
        labels: Class of each image, (n,).
        num: Images of a draw; fewer where it is not a multiple of the classes, or a class has too few.
        num_draws: Draws.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are more classes than that.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    if num < len(classes):
        raise ValueError(f"`num` must be at least {len(classes)}, one image of each class, got {num}.")
    draws = []
    for _ in range(num_draws):
        order = torch.randperm(len(labels), generator=generator)
        parts = [order[labels[order] == each][: num // len(classes)] for each in classes]
        together = torch.cat(parts)
        draws.append(together[torch.randperm(len(together), generator=generator)])
    return draws


@torch.no_grad()
def probe_each_timestep(
    model: DiTForImageClassification,
    timesteps: list[int],
    pixels: dict[str, Tensor],
    labels: dict[str, Tensor],
    num_probe: int,
) -> list[float]:
    """Return the test accuracy of a ridge probe on a single tap's mean at each timestep: the exhaustive search."""
    model.eval()
    accuracies = []
    for timestep in tqdm(timesteps, desc="Probing each timestep", leave=False):
        means = {}
        for split, batch in pixels.items():
            parts = batch[:num_probe].split(BATCH_SIZE)
            means[split] = torch.cat(
                [model.extract_features(part, timestep=timestep, **SINGLE_TAP).mean(1) for part in parts]
            )
        known = {split: each[:num_probe] for split, each in labels.items()}
        accuracies.append(ridge_probe_accuracy(means["train"], known["train"], means["test"], known["test"]))
    return accuracies


def raw_pixel_accuracy(
    pixels: dict[str, Tensor], labels: dict[str, Tensor], seed: int, rows: Tensor | None = None
) -> float:
    """Return the test accuracy of logistic regression on standardised pixels, trained on some images (default: all).

    The strength of its regularisation is the best of several on a fifth of the training images.
    """
    flat = {split: batch.flatten(1).numpy() for split, batch in pixels.items()}
    targets = {split: batch.numpy() for split, batch in labels.items()}
    drawn = np.arange(len(flat["train"])) if rows is None else rows.numpy()
    order = np.random.default_rng(seed).permutation(drawn)
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def fitted(strength: float, rows: np.ndarray) -> Any:
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        # Two threads take ten times as long for so little.
        with threadpool_limits(1), warnings.catch_warnings():
            # A regression of few images that is not at its optimum yet is no worse for it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return regression.fit(flat["train"][rows], targets["train"][rows])

    # The fewer images, the less regularisation is best.
    strengths = (0.0003, 0.001, 0.003, 0.01) if len(order) > 1000 else (0.001, 0.003, 0.01, 0.03, 0.1)
    scores = [fitted(s, rest).score(flat["train"][held_out], targets["train"][held_out]) for s in strengths]
    best = strengths[int(np.argmax(scores))]
    return float(fitted(best, order).score(flat["test"], targets["test"]))


@torch.no_grad()
def predict(model: DiTForImageClassification, pooled: Tensor) -> list[int]:
    """Return the most likely class of each image, (n,)."""
    classes: list[int] = model.eval()(features=pooled).logits.argmax(-1).tolist()
    return classes


def save_classifier(
    model: DiTForImageClassification,
    processor: ASelectImageProcessor,
    for_probe: TimestepSelection,
    results: dict[str, Any],
    output: Path,
) -> None:
    """Write model, processor, card and the curve, which is that of the probe's selection beside its accuracy."""
    model.save_pretrained(output / "model", include_code=True)
    processor.save_pretrained(output / "model")
    save_curve(for_probe, model, results["timesteps"], results["probe_accuracies"], output)
    accuracy = results["accuracy"]
    few = {
        f"{name} from {num} labels": accuracy[f"{key}_{num}"]
        for num in results["few"]
        for name, key in (("this read-out", "read_out"), ("logistic regression on raw pixels", "raw_pixels"))
    }
    write_model_card(
        model,
        output / "model",
        model_name="Fashion-MNIST classifier on hf_aselect's embedded DiT",
        license="apache-2.0",
        dataset="fashion_mnist",
        accuracy=accuracy["read_out"],
        baselines={
            "logistic regression on raw pixels": accuracy["raw_pixels"],
            **few,
            **probe_baselines("linear probe of one tap", "the timestep selected for that tap", accuracy),
        },
        training={
            **model.card_facts["training"],
            "images of the linear probes": results["num_probe"],
            "test images": results["num_test"],
            "seed of the label subsets": results["seed"],
        },
        command=f"hf-aselect demo --seed {results['seed']}",
    )


def save_predictions(test: Dataset, predicted: list[int], path: Path) -> None:
    """Draw the first test images with their true and predicted names."""
    names = test.features["label"].names
    shown = range(min(NUM_SHOWN, len(test)))
    plot_predictions(
        path,
        [test[index]["image"] for index in shown],
        [names[test[index]["label"]] for index in shown],
        [names[predicted[index]] for index in shown],
    )


def check_reloaded(model: DiTForImageClassification, pixels: Tensor, images: list[Any], folder: Path) -> None:
    """Load the saved model through the Auto classes and `pipeline`, and compare its predictions.

    Raises:
        RuntimeError: If a logit differs, or a label of the pipeline does.
    """
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        # Not to the bit: loaded weights lie at other addresses, for which a kernel may sum in another order.
        if not torch.allclose(reloaded(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"The model reloaded from {str(folder)!r} gives other logits than the fitted one.")
        expected = model(processor(images, return_tensors="pt").pixel_values).logits.argmax(-1).tolist()
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    found = [ranking[0]["label"] for ranking in classify(images, top_k=1)]
    names = model.config.id2label or {}
    if found != [names[index] for index in expected]:
        raise RuntimeError(f"The pipeline on {str(folder)!r} gives other labels than the fitted model.")
