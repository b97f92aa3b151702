"""Segmentation from end to end on the embedded DiT: scenes composed of its sample, UperNet, comparison, reloading."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    Trainer,
    default_data_collator,
    pipeline,
    set_seed,
)

from ..hub.push import write_model_card
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.modeling_segmentation import DiTForSemanticSegmentation
from ..plots import plot_overlays
from ..selection.images import CalibrationPictures
from ..selection.probe import ridge_probe_predictions
from ..selection.record import TimestepSelection
from ..training.metrics import MeanIoU
from .results import (
    Stopwatch,
    choice_of,
    probe_baselines,
    probe_figures,
    save_curve,
    training_facts,
    write_json,
)
from .sample import EMBEDDED
from .scenes import SIDE, compose_scenes
from .training import demo_arguments

BATCH_SIZE = 25


@dataclass(frozen=True)
class SegmentationDemoSettings:
    """What the demo runs with; the defaults are those of `hf-aselect demo --task segmentation`.

    Args:
        seed: Seed of UperNet's weights and the order of the scenes; scenes are the same for every seed, and the
            timestep is selected with `select_timestep`'s default seed.
        num_train: Training scenes.
        num_test: Test scenes, of other items.
        num_calibration: Training scenes that the timestep is selected from.
        num_probe: Training scenes of the linear probes, which are trained at each timestep.
        num_epochs: Epochs of UperNet.
    """

    seed: int = 0
    num_train: int = 1600
    num_test: int = 200
    num_calibration: int = 256
    num_probe: int = 200
    num_epochs: int = 5


def run_segmentation_demo(
    output: str | os.PathLike[str], settings: SegmentationDemoSettings | None = None
) -> dict[str, Any]:
    """Run the demo and write `model/`, `results.json`, `timestep_curve.png` and `overlays.png`.

    Args:
        output: Folder for the files; made if it is missing.
        settings: What to run with.

    Returns:
        The results, as in `results.json`: mean intersection over union, in [0, 1].

    Raises:
        RuntimeError: If the saved model, loaded again, does not predict the same.
        OSError: If the folder cannot be written.
    """
    settings = settings or SegmentationDemoSettings()
    output = Path(output)
    (output / "model").mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    train, names = compose_scenes("train", settings.num_train)
    test, _ = compose_scenes("test", settings.num_test)
    set_seed(settings.seed)
    with watch.measure("select_timestep"):
        model = load_segmenter(train, names, settings)
    selection = TimestepSelection.from_dict(model.config.selection or {})
    processor = ASelectImageProcessor.from_model_config(model.config)
    batches = {
        split: processor(rows["image"][:], rows["annotation"][:], return_tensors="pt")
        for split, rows in (("train", train), ("test", test))
    }
    with watch.measure("colours"):
        colours = colour_mean_iou(batches, names)
    probes = PatchProbes(model, batches, train, settings.num_probe)
    grid = model.noise_schedule.even_timesteps()
    with watch.measure("exhaustive_search"):
        probed = [probes.mean_iou(timestep) for timestep in tqdm(grid, desc="Probing each timestep")]
    with watch.measure("random_weights"):
        untrained = probes.of_random_weights(selection.timestep, settings.seed)
    with watch.measure("upernet"):
        trainer = train_segmenter(model, processor, batches, names, output / "model", settings)
        upernet = trainer.evaluate()["eval_mean_iou"]
    figures = {
        "upernet": upernet,
        **probe_figures(selection.timestep, grid, probed),
        "random_weights": untrained,
        "colours": colours,
    }
    results = collect_segmentation_results(selection, grid, probed, figures, watch, settings)
    save_segmenter(model, trainer, selection, results, output)
    save_overlays(model, batches["test"], names, output / "overlays.png")
    write_json(output / "results.json", results)
    check_segmenter_reloaded(model, batches["test"]["pixel_values"][:50], test["image"][:8], output / "model")
    return results


def load_segmenter(train: Dataset, names: list[str], settings: SegmentationDemoSettings) -> DiTForSemanticSegmentation:
    """Return a segmenter on the embedded DiT, its timestep selected from training scenes."""
    return DiTForSemanticSegmentation.from_pretrained(
        EMBEDDED,
        timestep="auto",
        calibration_images=train["image"][: settings.num_calibration],
        image_size=SIDE,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        decoder="upernet",
        decoder_hidden_size=32,
        auxiliary_hidden_size=32,
    )


class PatchProbes:
    """Linear probes of single tokens at any timestep, at the configuration's tap: the cheap exhaustive search."""

    def __init__(
        self, model: DiTForSemanticSegmentation, batches: dict[str, Any], train: Dataset, num_train: int
    ) -> None:
        self.model = model
        self.pixels = {
            "train": batches["train"]["pixel_values"][:num_train],
            "test": batches["test"]["pixel_values"],
        }
        self.masks = batches["test"]["labels"]
        self.side = SIDE // model.config.patch_pixels
        pictures = CalibrationPictures(train["image"][:num_train], model.config, num_train, 0)
        ignored = model.config.semantic_loss_ignore_index
        self.labels = torch.cat(
            [
                pictures.patch_labels(index, mask, self.side, self.side, ignored)
                for index, mask in enumerate(train["annotation"][:num_train])
            ]
        )

    @torch.no_grad()
    def mean_iou(self, timestep: int) -> float:
        """Return the mean intersection over union on the test scenes' pixels of a probe of tokens at a timestep."""
        self.model.eval()
        tokens = {
            split: torch.cat(
                [self.model.extract_features(batch, timestep=timestep) for batch in values.split(BATCH_SIZE)]
            )
            for split, values in self.pixels.items()
        }
        predicted = ridge_probe_predictions(tokens["train"].flatten(0, 1), self.labels, tokens["test"].flatten(0, 1))
        grid = predicted.unflatten(0, (len(self.masks), self.side, self.side))
        size = self.model.config.patch_pixels
        return mean_iou_of(grid.repeat_interleave(size, 1).repeat_interleave(size, 2), self.masks, self.model)

    def of_random_weights(self, timestep: int, seed: int) -> float:
        """Return the same of a transformer with the weights that its training began with, as it were."""
        transformer = self.model.backbone.denoiser.transformer
        trained = {name: value.clone() for name, value in transformer.state_dict().items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer.load_state_dict(type(transformer).from_config(transformer.config).state_dict())
        try:
            return self.mean_iou(timestep)
        finally:
            transformer.load_state_dict(trained)


def mean_iou_of(predictions: Tensor, masks: Tensor, model: DiTForSemanticSegmentation) -> float:
    """Return the mean intersection over union of predicted masks, (n, H, W)."""
    metric = MeanIoU(int(model.config.num_labels or 0), model.config.semantic_loss_ignore_index)
    figures = metric.compute(predictions=predictions, references=masks)
    return float(figures["mean_iou"])


def colour_mean_iou(batches: dict[str, Any], names: list[str]) -> float:
    """Return what is known from a pixel's grey level alone: each has the class that is most frequent at it."""
    levels = {split: ((batch["pixel_values"][:, 0] + 1) * 127.5).round().long() for split, batch in batches.items()}
    counts = torch.zeros(256, len(names), dtype=torch.long)
    flat = levels["train"].flatten() * len(names) + batches["train"]["labels"].flatten()
    counts.view(-1).index_add_(0, flat, torch.ones_like(flat))
    guesses = counts.argmax(1)[levels["test"]]
    return float(MeanIoU(len(names)).compute(predictions=guesses, references=batches["test"]["labels"])["mean_iou"])


def train_segmenter(
    model: DiTForSemanticSegmentation,
    processor: ASelectImageProcessor,
    batches: dict[str, Any],
    names: list[str],
    output: Path,
    settings: SegmentationDemoSettings,
) -> Trainer:
    """Train UperNet with the plain Trainer and return the trainer."""
    metric = MeanIoU(len(names), model.config.semantic_loss_ignore_index)

    def compute_metrics(prediction: Any, compute_result: bool) -> dict[str, float]:
        metric.add_batch(predictions=prediction.predictions.cpu(), references=prediction.label_ids.cpu())
        return {"mean_iou": metric.compute()["mean_iou"]} if compute_result else {}

    arguments = demo_arguments(
        output,
        num_train_epochs=settings.num_epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.01,
        seed=settings.seed,
        # Masks are counted batch by batch.
        batch_eval_metrics=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(batches["train"]),
        eval_dataset=rows_of(batches["test"]),
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=compute_metrics,  # type: ignore[arg-type]  # with `batch_eval_metrics` it has two arguments
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
    )
    trainer.train()
    return trainer


def rows_of(batch: Any) -> list[dict[str, Tensor]]:
    """Return the images and masks of a batch as rows of Trainer's."""
    pairs = zip(batch["pixel_values"], batch["labels"], strict=True)
    return [{"pixel_values": image, "labels": mask} for image, mask in pairs]


def collect_segmentation_results(
    selection: TimestepSelection,
    grid: list[int],
    probed: list[float],
    figures: dict[str, float],
    watch: Stopwatch,
    settings: SegmentationDemoSettings,
) -> dict[str, Any]:
    """Return the results as they are written to `results.json`."""
    return {
        **choice_of(selection, grid, probed),
        "mean_iou": figures,
        "probe_mean_ious": probed,
        "seconds": watch.seconds,
        "seed": settings.seed,
        "num_train": settings.num_train,
        "num_probe": settings.num_probe,
        "num_test": settings.num_test,
        "num_epochs": settings.num_epochs,
    }


@torch.no_grad()
def predict_masks(model: DiTForSemanticSegmentation, pixels: Tensor) -> Tensor:
    """Return the most likely class of each pixel, (n, H, W)."""
    model.eval()
    masks: Tensor = torch.cat([model(batch).logits.argmax(1) for batch in pixels.split(BATCH_SIZE)])
    return masks


def save_segmenter(
    model: DiTForSemanticSegmentation,
    trainer: Trainer,
    selection: TimestepSelection,
    results: dict[str, Any],
    output: Path,
) -> None:
    """Write model, processor, card and the curve."""
    model.include_code = True  # the card says that it is there
    trainer.save_model()
    save_curve(selection, model, results["timesteps"], results["probe_mean_ious"], output, accuracy_name="mean IoU")
    figures = results["mean_iou"]
    write_model_card(
        model,
        output / "model",
        model_name="Segmenter of composed Fashion-MNIST scenes on hf_aselect's embedded DiT",
        license="apache-2.0",
        # An id of the Hub; the name says that scenes are composed.
        dataset="fashion_mnist",
        mean_iou=figures["upernet"],
        baselines={
            **probe_baselines("linear probe of tokens", "the selected timestep", figures),
            "linear probe of tokens of random weights": figures["random_weights"],
            "grey level of a pixel": figures["colours"],
        },
        training={
            "training scenes": results["num_train"],
            "training scenes of the linear probes": results["num_probe"],
            "test scenes": results["num_test"],
            "epochs": results["num_epochs"],
            **training_facts(trainer, results),
        },
        command=f"hf-aselect demo --task segmentation --seed {results['seed']}",
        limits=(
            "Scenes are composed of images of single items of clothing on black, so the results say little about "
            "photographs."
        ),
    )


def save_overlays(model: DiTForSemanticSegmentation, batch: Any, names: list[str], path: Path) -> None:
    """Draw the first six scenes of a batch with their true and predicted masks."""
    pixels, masks = batch["pixel_values"][:6], batch["labels"][:6]
    guesses = predict_masks(model, pixels)
    scenes = [(scene[0].numpy() + 1) / 2 for scene in pixels]
    plot_overlays(path, scenes, list(masks.numpy()), list(guesses.numpy()), names)


def check_segmenter_reloaded(
    model: DiTForSemanticSegmentation, pixels: Tensor, pictures: list[Any], folder: Path
) -> None:
    """Load the saved model through the Auto classes and `pipeline`, and compare its predictions.

    Raises:
        RuntimeError: If a logit differs, or a mask of the pipeline does.
    """
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    model.eval()
    with torch.no_grad():
        # Not to the bit: loaded weights lie at other addresses, for which a kernel may sum in another order.
        if not torch.allclose(reloaded(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"The model reloaded from {str(folder)!r} gives other logits than the trained one.")
    segment = pipeline("image-segmentation", model=str(folder), device="cpu")
    label2id = {str(name): int(index) for name, index in (model.config.label2id or {}).items()}
    expected = predict_masks(model, processor(pictures, return_tensors="pt").pixel_values)
    for found, mask in zip(segment(pictures, subtask="semantic"), expected, strict=True):
        if not np.array_equal(_mask_of(found, label2id, tuple(mask.shape)), mask.numpy()):
            raise RuntimeError(f"The pipeline on {str(folder)!r} gives other masks than the trained model.")


def _mask_of(found: list[dict[str, Any]], label2id: dict[str, int], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the class of each pixel from what the pipeline says of each class."""
    mask = np.full(shape, -1, dtype=np.int64)
    for entry in found:
        mask[np.asarray(entry["mask"]) > 0] = label2id[entry["label"]]
    return mask
