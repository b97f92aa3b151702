"""What a head is fitted to: labels of any kind, as targets of least squares."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model.checks import IGNORED_LABEL, check_masks, checked_labels, short
from ..selection.distribution import Share
from .labelled_images import LabelledBatch

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
DENSE = "semantic_segmentation"


@dataclass(frozen=True)
class Targets:
    """How labels become targets.

    Targets are kept small: class indices, (n,), of `SINGLE`; rows, (n, K), of 0 and 1 of `MULTI` and of values of
    `REGRESSION`; of `DENSE` the share of a token's pixels that each class has, (n, K). Each pixel is then a row of
    least squares, with the features of its token.

    Args:
        kind: One of the above.
        num_labels: Number of classes, or of values, K.
        class_weights: Weight of each class, (K,), of `SINGLE` and `DENSE`. Default: 1 each.
    """

    kind: str
    num_labels: int
    class_weights: Tensor | None = None

    @property
    def is_exclusive(self) -> bool:
        """Whether an image, or a pixel, has one class."""
        return self.kind in (SINGLE, DENSE)

    def counts(self, targets: Tensor) -> Tensor:
        """Return how many images, or tokens, each class has, (K,), float64; nothing of values."""
        if self.kind == SINGLE:
            return targets.bincount(minlength=self.num_labels).double()
        return targets.double().sum(0) if self.kind != REGRESSION else torch.zeros(0, dtype=torch.float64)

    def balanced(self, counts: Tensor) -> "Targets":
        """Return the same with weights by which all classes that there are count the same in sum.

        Args:
            counts: How many images, or tokens, each class has, (K,).
        """
        present = counts > 0
        each = counts.sum() / present.sum()
        return replace(self, class_weights=torch.where(present, each / counts.clamp_min(1e-12), torch.zeros(())))

    def table(self, targets: Tensor) -> Tensor:
        """Return targets as a table, (n, K), float64; of classes, times their weight."""
        if self.kind == SINGLE:
            targets = torch.nn.functional.one_hot(targets, self.num_labels)
        table = targets.double()
        return table if self.class_weights is None else table * self.class_weights

    def sums(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `Moments.add` takes: weights, (n,), weighted targets, (n, K), and sums of squares, (K,)."""
        table = self.table(targets)
        if self.is_exclusive:
            # A row of 0 and 1 for each image or pixel: squares are the same.
            return table.sum(1), table, table.sum(0)
        return torch.ones(len(table), dtype=torch.float64), table, table.square().sum(0)

    def hits(self, logits: Tensor, targets: Tensor) -> tuple[float, float]:
        """Return how many predictions are right, and how many there are: of images, labels of images, or tokens.

        Args:
            logits: Predictions, (n, K); of `MULTI` above 0 where an image has the label.
            targets: Targets.
        """
        if self.kind == MULTI:
            return float(((logits > 0) == (targets > 0.5)).sum()), float(targets.numel())
        guesses = logits.argmax(1)
        if self.kind == SINGLE:
            return float((guesses == targets).sum()), float(len(targets))
        return float(targets.gather(1, guesses[:, None]).sum()), float(targets.sum())


def targets_of(
    labels: list[Any] | Tensor, indices: list[int], config: Any, known: Targets | None = None
) -> tuple[Targets, Tensor]:
    """Return what the labels of a classifier are, and the targets.

    Args:
        labels: A label for each image.
        indices: Which images they are of, for the error.
        config: The model's.
        known: What earlier labels of the same set are; these must be the same.

    Returns:
        `Targets`, and the targets as that keeps them; images that are left out (-100) have that class.

    Raises:
        ValueError: If the labels are not one for each image, of one kind, or do not fit the configuration.
    """
    given = labels if isinstance(labels, Tensor) else _as_tensor(labels, indices)
    if known is not None and config.problem_type is None:
        # A batch alone could be of another kind.
        config = SimpleNamespace(num_labels=config.num_labels, problem_type=known.kind)
    checked = checked_labels(given, len(given), config)
    num_labels = int(config.num_labels or 0)
    if checked.is_floating_point():
        kind = config.problem_type or (REGRESSION if num_labels == 1 else MULTI)
        return Targets(kind, num_labels), checked.reshape(len(given), num_labels)
    return Targets(SINGLE, num_labels), checked.reshape(-1)


def _as_tensor(labels: list[Any], indices: list[int]) -> Tensor:
    """Return labels as a tensor, whatever numbers they are."""
    if all(type(label) is int for label in labels):
        return torch.tensor(labels)
    made: list[Tensor] = []
    for index, label in zip(indices, labels, strict=True):
        try:
            each = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The label of image {index} is {short(label)}, but must be a number or a list of numbers. Convert "
                "names to class indices first (`dataset.class_encode_column`), and remove images without a label."
            ) from error
        if made and (each.shape != made[0].shape or each.is_floating_point() != made[0].is_floating_point()):
            raise ValueError(
                f"All labels must be of one kind, got {_kind(each)} for image {index}, and {_kind(made[0])} for "
                f"image {indices[0]}."
            )
        made.append(each)
    return torch.stack(made)


def _kind(label: Tensor) -> str:
    """Return what a label is."""
    what = str(label.dtype).removeprefix("torch.")
    return f"{label.numel()} numbers ({what})" if label.ndim else f"a number ({what})"


def targets_of_masks(masks: Tensor, pixel_values: Tensor, grid: tuple[int, int], config: Any) -> Tensor:
    """Return the share of each token's pixels that each class has, (B · rows · columns, K), float32.

    Pixels of no class have a share in none, so that a row adds up to less than 1, or to 0.

    Args:
        masks: Class of each pixel, (B, H, W).
        pixel_values: The images, (B, C, H, W).
        grid: Rows and columns of the tokens.
        config: The segmenter's.

    Raises:
        ValueError: If the masks do not fit the images or the configuration.
    """
    check_masks(masks, pixel_values, config)
    num_labels, (rows, columns) = int(config.num_labels), grid
    height, width = masks.shape[-2] // rows, masks.shape[-1] // columns
    tokens = masks.long().unflatten(1, (rows, height)).unflatten(3, (columns, width)).transpose(2, 3)
    tokens = tokens.flatten(3).flatten(0, 2)  # (B · rows · columns, pixels)
    has_class = tokens != config.semantic_loss_ignore_index
    places = torch.arange(len(tokens))[:, None] * num_labels + tokens
    counts = places[has_class].bincount(minlength=len(tokens) * num_labels)
    shares: Tensor = counts.view(len(tokens), num_labels).float() / (height * width)
    return shares


def labelled(targets: Tensor, kind: str) -> Tensor:
    """Return which targets are of an image, or a token, with a label, (n,), bool."""
    if kind == SINGLE:
        return targets != IGNORED_LABEL
    return targets.sum(1) > 0 if kind == DENSE else torch.ones(len(targets), dtype=torch.bool)


class LabelCounts:
    """Turns labels into targets, batch by batch, and counts the classes.

    Args:
        config: The model's.
        is_dense: Whether labels are masks.
        targets: How labels become targets, if that is known already.
    """

    def __init__(self, config: Any, is_dense: bool, targets: Targets | None = None) -> None:
        self.config = config
        self.found = targets or (Targets(DENSE, int(config.num_labels)) if is_dense else None)
        self.num_images = 0
        # Images, labels or pixels of each class.
        self.counts = torch.zeros(int(config.num_labels), dtype=torch.float64)
        # Smallest and largest value of each label, of `MULTI` and `REGRESSION`.
        self.range = torch.tensor([torch.inf, -torch.inf]).double()[:, None].repeat(1, int(config.num_labels))

    @property
    def targets(self) -> Targets:
        """How labels become targets.

        Raises:
            ValueError: If there was no label yet.
        """
        if self.found is None:
            raise ValueError("The dataset has no image with a label.")
        return self.found

    @property
    def vary(self) -> bool:
        """Whether any label of `MULTI` or `REGRESSION` has several values."""
        return bool((self.range[0] < self.range[1]).any())

    def add(self, batch: LabelledBatch, grid: tuple[int, int] = (1, 1)) -> tuple[Tensor, Tensor]:
        """Return the targets of a batch, and which of them are of an image, or a token, with a label.

        Args:
            batch: Images and labels.
            grid: Of masks: rows and columns of the tokens.

        Raises:
            ValueError: If the labels do not fit the model, or those before.
        """
        num_pixels = 1.0
        if self.found is not None and self.found.kind == DENSE:
            found = targets_of_masks(batch.labels, batch.inputs["pixel_values"], grid, self.config)
            num_pixels = batch.labels.numel() / len(found)
        else:
            kind, found = targets_of(batch.labels, batch.indices, self.config, self.found)
            self.found = self.found or kind
        known = labelled(found, self.found.kind)
        self.num_images += int(known.view(len(batch.indices), -1).any(1).sum())
        if self.found.kind != REGRESSION:
            self.counts += self.found.counts(found[known]) * num_pixels
        if not self.found.is_exclusive:
            low, high = found.double().aminmax(dim=0)
            self.range = torch.stack([self.range[0].minimum(low), self.range[1].maximum(high)])
        return found, known

    def total(self, share: Share) -> None:
        """Add up what all processes counted; all of them call it."""
        # A process may have no image, where there are fewer than processes.
        targets = [each for each in share.gather(self.found) if each is not None]
        self.num_images, self.counts = sum(share.gather(self.num_images)), share.total(self.counts)
        ranges = torch.stack(share.gather(self.range))
        self.range = torch.stack([ranges[:, 0].amin(0), ranges[:, 1].amax(0)])
        self.found = targets[0] if targets and self.num_images else None

    def check(self, allow_missing: bool) -> None:
        """Reject too few images, labels that do not vary, and classes without an image.

        Args:
            allow_missing: Whether classes may have none.

        Raises:
            ValueError: If there are.
        """
        if self.num_images < 2:
            raise ValueError(f"A head needs at least 2 images with a label, got {self.num_images}.")
        is_exclusive = self.targets.is_exclusive
        if not is_exclusive and not self.vary:
            raise ValueError("The labels are the same for all images, so there is nothing to predict.")
        if self.targets.kind == REGRESSION:
            return
        missing = (self.counts == 0).nonzero().flatten().tolist()
        if is_exclusive and len(self.counts) - len(missing) < 2:
            raise ValueError("The labels are the same for all images. A head needs images of at least two classes.")
        if missing and not allow_missing:
            names = self.config.id2label or {}
            named = ", ".join(f"{names.get(number, number)!r} ({number})" for number in missing[:10])
            raise ValueError(
                f"{len(missing)} of {len(self.counts)} classes have no image among {self.num_images}: "
                f"{named}{', ...' * (len(missing) > 10)}. Add images of all classes, load the model with fewer "
                "(`num_labels=`), or pass `allow_missing=True` to never predict them."
            )


def check_classes(labels: list[Any], names: dict[int, str], allow_missing: bool) -> None:
    """Reject labels of images that no classifier of these classes can be fitted to.

    Args:
        labels: A label for each image.
        names: Names of the classes by their number.
        allow_missing: Whether classes may be without an image.

    Raises:
        ValueError: If there is none.
    """
    counts = LabelCounts(SimpleNamespace(num_labels=len(names), id2label=names, problem_type=None), is_dense=False)
    counts.add(LabelledBatch(list(range(len(labels))), {}, labels))
    counts.check(allow_missing)
