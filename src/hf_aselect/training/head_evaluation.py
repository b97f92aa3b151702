"""Figures of a head on images that it was not fitted to."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.checks import check_masks
from ..selection.distribution import Share
from .closed_form import TARGET_ROUNDING
from .labelled_images import LabelledBatch
from .targets import DENSE, MULTI, REGRESSION, Targets, labelled, targets_of


@dataclass
class Evaluation:
    """Counts predictions that are right, batch by batch.

    Args:
        targets: What labels are.
        config: The model's.
        sums: Of classes the confusion matrix, (K, K), true classes in rows; of labels how many are right, and how
            many there are, (1, 2); of values sums of squared errors, values and squared values, and their number,
            (4, K).
    """

    targets: Targets
    config: Any
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        size = self.targets.num_labels
        shape = (size, size) if self.targets.is_exclusive else (1, 2) if self.targets.kind == MULTI else (4, size)
        self.sums = torch.zeros(shape, dtype=torch.float64)

    def add(self, batch: LabelledBatch, output: Any) -> None:
        """Add the model's output for a batch.

        Raises:
            ValueError: If the labels do not fit the model.
        """
        logits, targets = output.logits.double().cpu(), self.targets
        if targets.kind == DENSE:
            check_masks(batch.labels, batch.inputs["pixel_values"], self.config)
            truth = batch.labels.long()
            known = truth != self.config.semantic_loss_ignore_index
        else:
            _, truth = targets_of(batch.labels, batch.indices, self.config, targets)
            known = labelled(truth, targets.kind)
        if targets.is_exclusive:
            pairs = truth[known] * targets.num_labels + logits.argmax(1)[known]
            self.sums += pairs.bincount(minlength=self.sums.numel()).view(self.sums.shape)
        elif targets.kind == MULTI:
            self.sums += torch.tensor(targets.hits(logits, truth))
        else:
            values = truth.double()
            parts = (logits - values).square(), values, values.square(), torch.ones_like(values)
            self.sums += torch.stack([part.sum(0) for part in parts])

    def figures(self, share: Share) -> dict[str, float]:
        """Return the figures by name: `accuracy`, and `mean_iou` of a segmenter; of values the `error`.

        The error is the squared one, as a share of the values' variance; of several values an image the mean of
        their shares. Classes that neither masks nor predictions have are left out of the mean IoU. All processes call
        it, and get the same.

        Args:
            share: Which images this process added.

        Raises:
            ValueError: If there was no image with a label, or values are the same for all images.
        """
        sums = share.total(self.sums)
        if not float(sums.sum()):
            raise ValueError("No image of `eval_dataset` has a label.")
        if self.targets.kind == MULTI:
            return {"accuracy": float(sums[0, 0] / sums[0, 1])}
        if self.targets.kind == REGRESSION:
            errors, values, squares, counts = sums
            variation = squares - values.square() / counts
            varied = variation > TARGET_ROUNDING * squares
            if not bool(varied.any()):
                raise ValueError("The labels of `eval_dataset` are the same for all images: they show no error.")
            return {"error": float((errors[varied] / variation[varied]).mean())}
        hits, union = sums.diagonal(), sums.sum(0) + sums.sum(1) - sums.diagonal()
        figures = {"accuracy": float(hits.sum() / sums.sum())}
        if self.targets.kind == DENSE:
            figures["mean_iou"] = float((hits[union > 0] / union[union > 0]).mean())
        return figures
