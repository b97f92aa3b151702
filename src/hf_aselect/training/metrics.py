"""Metrics as `evaluate.Metric`, computed without network."""

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of predictions that equal their reference, in [0, 1].

    `evaluate.load("accuracy")` downloads its code; this is the same figure without network. It may not reflect the
    accuracy on rare classes.

    Example:
        >>> from hf_aselect import Accuracy
        >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]
        0.6666666666666666
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="Class indices: `predictions` and `references`, with one of each per image.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """Return `{"accuracy": share}`.

        Raises:
            ValueError: If there are no predictions.
        """
        if not len(predictions):
            raise ValueError("Accuracy needs at least one prediction, got none.")
        return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}


class MeanIoU(evaluate.Metric):  # type: ignore[misc]
    """Mean intersection over union of segmentation masks, in [0, 1], with pixel and class accuracies.

    Each batch is kept as a matrix of counts, (K, K), so memory does not grow with images, and counts of batches and
    processes add up. A class that neither masks nor predictions have is left out of the means and named in
    `absent_classes`. The figures are those of `evaluate.load("mean_iou")`, without network.

    Args:
        num_labels: Classes, at least 1.
        ignore_index: Value of mask pixels that have no class.
        kwargs: Passed on to transformers (`num_process`, `process_id`, ...).

    Raises:
        ValueError: If `num_labels` is less than 1.

    Example:
        >>> import numpy as np
        >>> from hf_aselect import MeanIoU
        >>> metric = MeanIoU(num_labels=2)
        >>> float(metric.compute(predictions=np.array([[[0, 1]]]), references=np.array([[[0, 1]]]))["mean_iou"])
        1.0
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any) -> None:
        if num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union of segmentation masks.",
            citation="",
            inputs_description="Masks of class indices of equal shape: `predictions` and `references`.",
            features=datasets.Features(
                {"counts": datasets.Sequence(datasets.Sequence(datasets.Value("int64")))},
            ),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count the pixels of one predicted mask, (H, W), against its reference; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count the pixels of some masks.

        Args:
            predictions: Predicted masks of class indices, (H, W) each, in a list or an array.
            references: The true ones, of the same shapes.
            kwargs: Passed on to transformers.

        Raises:
            ValueError: If shapes differ, or a value is not a class index: outside [0, K), and no `ignore_index` of a
                reference.
        """
        counts = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)
        if len(predictions) != len(references):
            raise ValueError(
                f"There must be one reference per predicted mask, got {len(predictions)} predicted masks and "
                f"{len(references)} references."
            )
        for prediction, reference in zip(predictions, references, strict=True):
            counts += self._count(np.asarray(prediction), np.asarray(reference))
        super().add_batch(counts=[counts.tolist()], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
        """Return the figures of all that was added, after adding `predictions` and `references` if they are given."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute(**kwargs)

    def _count(self, prediction: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.int64]:
        """Return how many pixels of each true class (rows) were predicted as each class (columns)."""
        if prediction.shape != reference.shape:
            raise ValueError(
                f"A predicted mask must have the shape of its reference, got {prediction.shape} and "
                f"{reference.shape}. Resize the logits to the reference, not the reference to the logits."
            )
        counted = reference != self.ignore_index
        true, guess = reference[counted].astype(np.int64), prediction[counted].astype(np.int64)
        for name, values in (("reference", true), ("prediction", guess)):
            outside = np.unique(values[(values < 0) | (values >= self.num_labels)])
            if outside.size:
                raise ValueError(
                    f"A {name} holds {outside[:5].tolist()}, expected classes in [0, {self.num_labels})"
                    + (f" or {self.ignore_index} for pixels without a class." if name == "reference" else ".")
                )
        return np.bincount(true * self.num_labels + guess, minlength=self.num_labels**2).reshape(
            self.num_labels, self.num_labels
        )

    def _compute(self, counts: Any) -> dict[str, Any]:
        total = np.asarray(counts, dtype=np.int64).sum(0)
        if not total.sum():
            raise ValueError("MeanIoU needs at least one pixel with a class, got none.")
        right, true, guessed = total.diagonal(), total.sum(1), total.sum(0)
        union = true + guessed - right
        present, in_truth = union > 0, true > 0
        iou = [float(r / u) if u else None for r, u in zip(right, union, strict=True)]
        accuracy = [float(r / t) if t else None for r, t in zip(right, true, strict=True)]
        return {
            "mean_iou": float((right[present] / union[present]).mean()),
            "mean_accuracy": float((right[in_truth] / true[in_truth]).mean()),
            "overall_accuracy": float(right.sum() / true.sum()),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
            "absent_classes": np.flatnonzero(~present).tolist(),
        }


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return `{"accuracy": share}` of logits, (n, K), for `Trainer(compute_metrics=...)`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    result: dict[str, float] = Accuracy().compute(predictions=logits.argmax(-1), references=prediction.label_ids)
    return result
