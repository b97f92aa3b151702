"""The main job from end to end on the embedded DiT: choose the timestep, train a head, compare, save, reload."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    default_data_collator,
    pipeline,
    set_seed,
)

from ..hub.push import write_model_card
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.modeling_classification import DiTForImageClassification
from ..plots import plot_predictions
from ..selection.criteria import Consensus
from ..selection.probe import ridge_probe_accuracy
from ..selection.record import TimestepSelection
from ..selection.select import select_timestep
from ..training.metrics import compute_accuracy
from .results import (
    Stopwatch,
    choice_of,
    probe_baselines,
    probe_figures,
    save_curve,
    training_facts,
    write_json,
)
from .sample import EMBEDDED, load_embedded_split
from .training import demo_arguments

BATCH_SIZE = 50  # pictures in one forward pass without gradients: small ones stay in a CPU's cache


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with; the defaults are those of `hf-aselect demo`.

    Args:
        seed: Seed of the head's weights, the order of the pictures and their augmentation; the timestep is chosen
            with `select_timestep`'s default seed.
        num_train: Training pictures, at most 4,000.
        num_test: Test pictures, at most 2,000.
        num_calibration: Training pictures that the timestep is chosen from.
        num_probe: Training pictures of the linear probes, which are trained at each timestep.
        num_views: Views of each training picture for the attention head: itself, the others mirrored and shifted.
        num_epochs: Epochs of the attention head over all views.
    """

    seed: int = 0
    num_train: int = 4000
    num_test: int = 2000
    num_calibration: int = 256
    num_probe: int = 2000
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
        model = load_model(train, settings)
    selection = TimestepSelection.from_dict(model.config.selection or {})
    processor = ASelectImageProcessor.from_model_config(model.config)
    pixels = {"train": pixel_values(processor, train), "test": pixel_values(processor, test)}
    labels = {"train": torch.tensor(train["label"][:]), "test": torch.tensor(test["label"][:])}
    with watch.measure("raw_pixels"):
        raw_pixels = raw_pixel_accuracy(pixels, labels, settings.seed)
    with watch.measure("select_for_probe"):
        # The model's own choice is for an attention head, which sees more than a linear one.
        pictures = train["image"][: settings.num_calibration]
        for_probe = select_timestep(model, pictures, criterion=Consensus("mean"))
    with watch.measure("exhaustive_search"):
        grid = model.noise_schedule.even_timesteps()
        probed = probe_each_timestep(model, grid, pixels, labels, settings.num_probe)
    with watch.measure("attention_head"):
        trainer = train_head(model, processor, pixels, labels, output / "model", settings)
        attention_head = trainer.evaluate()["eval_accuracy"]
    results = collect_results([selection, for_probe], grid, probed, attention_head, raw_pixels, watch, settings)
    save_classifier(model, trainer, for_probe, results, output)
    save_predictions(test, predict(model, pixels["test"]), output / "predictions.png")
    write_json(output / "results.json", results)
    check_reloaded(model, pixels["test"][:200], test["image"][:16], output / "model")
    return results


def load_model(train: Dataset, settings: DemoSettings) -> DiTForImageClassification:
    """Return a classifier on the embedded DiT, its timestep chosen from training pictures."""
    names = train.features["label"].names
    return DiTForImageClassification.from_pretrained(
        EMBEDDED,
        timestep="auto",
        calibration_images=train["image"][: settings.num_calibration],
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        head="attention",
        head_hidden_size=256,
        head_num_layers=1,
        head_num_attention_heads=64,  # many narrow ones: each looks at few of the 49 tokens
        head_mlp_ratio=1,
    )


def pixel_values(processor: ASelectImageProcessor, dataset: Dataset) -> Tensor:
    """Return the pictures of a dataset as pixel values, (n, C, H, W)."""
    pixels: Tensor = processor(dataset["image"][:], return_tensors="pt").pixel_values
    return pixels


def probe_each_timestep(
    model: DiTForImageClassification,
    timesteps: list[int],
    pixels: dict[str, Tensor],
    labels: dict[str, Tensor],
    num_train: int,
) -> list[float]:
    """Return the test accuracy of a ridge probe on mean-pooled tokens at each timestep: the exhaustive search."""
    pixels = {"train": pixels["train"][:num_train], "test": pixels["test"]}
    labels = {"train": labels["train"][:num_train], "test": labels["test"]}
    accuracies = []
    model.eval()
    for timestep in tqdm(timesteps, desc="Probing each timestep"):
        pooled = {split: pooled_features(model, batch, timestep) for split, batch in pixels.items()}
        accuracies.append(ridge_probe_accuracy(pooled["train"], labels["train"], pooled["test"], labels["test"]))
    return accuracies


@torch.no_grad()
def pooled_features(model: DiTForImageClassification, pixels: Tensor, timestep: int) -> Tensor:
    """Return mean-pooled tokens, (n, D)."""
    return torch.cat([model.extract_features(batch, timestep=timestep).mean(1) for batch in pixels.split(BATCH_SIZE)])


def raw_pixel_accuracy(pixels: dict[str, Tensor], labels: dict[str, Tensor], seed: int) -> float:
    """Return the test accuracy of logistic regression on standardised pixels.

    The strength of its regularisation is the best of four on a fifth of the training pictures.
    """
    flat = {split: batch.flatten(1).numpy() for split, batch in pixels.items()}
    targets = {split: batch.numpy() for split, batch in labels.items()}
    order = np.random.default_rng(seed).permutation(len(flat["train"]))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def fitted(strength: float, rows: np.ndarray) -> Any:
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return regression.fit(flat["train"][rows], targets["train"][rows])

    strengths = (0.0003, 0.001, 0.003, 0.01)
    scores = [fitted(s, rest).score(flat["train"][held_out], targets["train"][held_out]) for s in strengths]
    best = strengths[int(np.argmax(scores))]
    return float(fitted(best, order).score(flat["test"], targets["test"]))


def augmented(pixels: Tensor, shift: int = 1) -> Tensor:
    """Return pictures, (n, C, H, W), mirrored or not and shifted by up to `shift` pixels each way, at random."""
    mirrored = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
    padded = torch.nn.functional.pad(mirrored, [shift] * 4, mode="replicate")
    height, width = pixels.shape[-2:]
    corners = torch.randint(2 * shift + 1, (len(pixels), 2)).tolist()
    return torch.stack(
        [view[:, top : top + height, left : left + width] for view, (top, left) in zip(padded, corners, strict=True)]
    )


@torch.no_grad()
def training_rows(
    model: DiTForImageClassification, pixels: Tensor, labels: Tensor, num_views: int
) -> list[dict[str, Tensor]]:
    """Return rows of tokens and labels: of the pictures as they are, and of `num_views - 1` augmented copies.

    The frozen backbone sees each view once, instead of once in each epoch.
    """
    model.eval()
    rows = []
    for view in tqdm(range(num_views), desc="Reading tokens of the views"):
        shown = pixels if view == 0 else augmented(pixels)
        # Half precision: the tokens of all views take some 800 MB.
        tokens = torch.cat([model.extract_features(batch).half() for batch in shown.split(BATCH_SIZE)])
        rows += [{"features": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]
    return rows


def train_head(
    model: DiTForImageClassification,
    processor: ASelectImageProcessor,
    pixels: dict[str, Tensor],
    labels: dict[str, Tensor],
    output: Path,
    settings: DemoSettings,
) -> Trainer:
    """Train the classifier's head with the plain Trainer and return the trainer."""
    test_rows = [{"pixel_values": p, "labels": y} for p, y in zip(pixels["test"], labels["test"], strict=True)]
    arguments = demo_arguments(
        output,
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_steps=50,
        # 4,000 pictures: with less, the head learns them by heart.
        weight_decay=2.0,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(model, pixels["train"], labels["train"], settings.num_views),
        eval_dataset=test_rows,
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=compute_accuracy,
    )
    trainer.train()
    return trainer


def collect_results(
    selections: list[TimestepSelection],
    grid: list[int],
    probed: list[float],
    attention_head: float,
    raw_pixels: float,
    watch: Stopwatch,
    settings: DemoSettings,
) -> dict[str, Any]:
    """Return the results as they are written to `results.json`, of the choices for the head and for the probe."""
    selection, for_probe = selections
    return {
        **choice_of(selection, grid, probed),
        "probe_timestep": for_probe.timestep,
        "accuracy": {
            "attention_head": attention_head,
            **probe_figures(for_probe, grid, probed),
            "raw_pixels": raw_pixels,
        },
        "probe_accuracies": probed,
        "seconds": watch.seconds,
        "seed": settings.seed,
        "num_train": settings.num_train,
        "num_probe": settings.num_probe,
        "num_views": settings.num_views,
        "num_epochs": settings.num_epochs,
        "num_test": settings.num_test,
    }


@torch.no_grad()
def predict(model: DiTForImageClassification, pixels: Tensor) -> list[int]:
    """Return the most likely class of each picture, (n,)."""
    model.eval()
    classes: list[int] = torch.cat([model(batch).logits.argmax(-1) for batch in pixels.split(BATCH_SIZE)]).tolist()
    return classes


def save_classifier(
    model: DiTForImageClassification,
    trainer: Trainer,
    for_probe: TimestepSelection,
    results: dict[str, Any],
    output: Path,
) -> None:
    """Write model, processor, card and the curve, which is that of the probe's choice beside the probe's accuracy."""
    model.include_code = True  # the card says that it is there
    trainer.save_model()
    save_curve(for_probe, model, results["timesteps"], results["probe_accuracies"], output)
    accuracy = results["accuracy"]
    write_model_card(
        model,
        output / "model",
        model_name="Fashion-MNIST classifier on hf_aselect's embedded DiT",
        license="apache-2.0",
        dataset="fashion_mnist",
        accuracy=accuracy["attention_head"],
        baselines={
            **probe_baselines("linear probe", "the timestep chosen for it", accuracy),
            "logistic regression on raw pixels": accuracy["raw_pixels"],
        },
        training={
            "training pictures": results["num_train"],
            "training pictures of the linear probes": results["num_probe"],
            "views of each training picture": results["num_views"],
            "test pictures": results["num_test"],
            "epochs over all views": results["num_epochs"],
            **training_facts(trainer, results),
        },
        command=f"hf-aselect demo --seed {results['seed']}",
    )


def save_predictions(test: Dataset, predicted: list[int], path: Path) -> None:
    """Draw the first 40 test pictures with their true and predicted names."""
    names = test.features["label"].names
    shown = range(min(40, len(test)))
    plot_predictions(
        path,
        [test[index]["image"] for index in shown],
        [names[test[index]["label"]] for index in shown],
        [names[predicted[index]] for index in shown],
    )


def check_reloaded(model: DiTForImageClassification, pixels: Tensor, pictures: list[Any], folder: Path) -> None:
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
            raise RuntimeError(f"The model reloaded from {str(folder)!r} gives other logits than the trained one.")
        expected = model(processor(pictures, return_tensors="pt").pixel_values).logits.argmax(-1).tolist()
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    found = [ranking[0]["label"] for ranking in classify(pictures, top_k=1)]
    names = model.config.id2label or {}
    if found != [names[index] for index in expected]:
        raise RuntimeError(f"The pipeline on {str(folder)!r} gives other labels than the trained model.")
