"""Metrics as `evaluate.Metric`, computed without network."""

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of predictions that equal their reference, in [0, 1].

    `evaluate.load("accuracy")` downloads its code; this is the same figure without network. It may not reflect the
    accuracy on rare classes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="Class indices: `predictions` and `references`, one each per picture.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # noqa: ANN401 - lists or arrays
        """Return `{"accuracy": share}`.

        Raises:
            ValueError: If there are no predictions.
        """
        if not len(predictions):
            raise ValueError("Accuracy needs at least one prediction, got none.")
        return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return `{"accuracy": share}` of logits, (n, K), for `Trainer(compute_metrics=...)`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    result: dict[str, float] = Accuracy().compute(predictions=logits.argmax(-1), references=prediction.label_ids)
    return result
