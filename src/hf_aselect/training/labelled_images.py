"""Images with their labels, whatever they come in: a dataset, a stream, pairs, a cache of features, tensors."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images.rows import TENSORS, ImageRows, columns_of, is_transformed, stacked
from ..model.configuration_aselect import ASelectConfig
from ..model.image_processing_aselect import ASelectImageProcessor
from ..selection.distribution import Share
from ..selection.images import CalibrationPictures

# Limits on cached features read at once, which need no transformer: numbers, and rows.
_MAX_NUMBERS, _MAX_ROWS = 2**22, 2048


@dataclass(frozen=True)
class LabelledBatch:
    """Some images and their labels.

    Args:
        indices: Which images of the dataset.
        inputs: What the model reads, by the name of its argument.
        labels: A label for each image; of dense tasks masks, (B, H, W).
    """

    indices: list[int]
    inputs: dict[str, Tensor]
    labels: Any


class LabelledImages(CalibrationPictures):
    """A set of images with labels, read in batches.

    Args:
        dataset: Whatever holds images and labels, see `ImageRows`.
        config: Configuration of the model that they are for.
        is_dense: Whether labels are masks, which are cropped and resized with their images.
        image_column: Column of the images. Default: `image`, or the only one with images.
        label_column: Column of the labels. Default: the first of `LABELS`.
        max_images: Read no more than this: a random sample of a set of known size, the first ones of a stream.
        seed: Seed of the sample.

    Raises:
        ValueError: If the dataset is none of those, is empty, or has no such columns.
    """

    def __init__(
        self,
        dataset: Any,
        config: ASelectConfig,
        *,
        is_dense: bool = False,
        image_column: str | None = None,
        label_column: str | None = None,
        max_images: int | None = None,
        seed: int = 0,
    ) -> None:
        rows = ImageRows(dataset, image_column=image_column, label_column=label_column, is_labelled=True)
        column: Any = (getattr(dataset, "features", None) or {}).get(rows.label)
        while is_dense and hasattr(column, "feature"):
            column = column.feature  # masks as lists of rows
        names = getattr(column, "names", None)
        # By name, where `datasets` knows the names of the classes.
        names = () if is_transformed(dataset) else names or ()
        self.class_numbers = {name: number for number, name in enumerate(names)}
        self.is_dense, self.can_repeat = is_dense, rows.can_repeat
        if is_dense and rows.kind in ("features", "latents"):
            raise ValueError(
                f"`fit_head` of a segmenter needs images and masks, but the dataset has `{rows.kind}` instead of "
                "images."
            )
        self.row_size = torch.as_tensor(rows.first[rows.kind]).numel() if rows.kind == "features" else 0
        views = _num_views(dataset, rows.first)
        super().__init__(rows, config, max_images or sys.maxsize, seed)
        # Row `v * n + i` of a cache is view v of image i.
        self.num_viewed = None if views is None else len(rows) // views
        if is_dense:
            # As it is saved beside a segmenter, which sees the whole of an image.
            self.processor = ASelectImageProcessor.from_model_config(
                config, do_center_crop=False, do_exif_transpose=False
            )

    def labelled_batches(self, batch_size: int, share: Share) -> Iterator[LabelledBatch]:
        """Yield one process's share of the images.

        Args:
            batch_size: Images in a batch; cached features come in larger ones.
            share: Which of the images.

        Raises:
            ValueError: If an image cannot be read, or a row is of another kind than the first.
        """
        if self.images.kind == "features":
            batch_size = max(batch_size, min(_MAX_ROWS, _MAX_NUMBERS // max(1, self.row_size)))
        rows = self._rows(0, self.max_images, share.rank, share.world)
        while batch := list(islice(rows, batch_size)):
            indices = [index for index, _ in batch]
            is_at_once = self.order is not None and self.images.kind in TENSORS
            found = self.images.rows_of(indices) if is_at_once else [read() for _, read in batch]
            yield self._batch(indices, found)

    def image_numbers(self, indices: list[int]) -> Tensor:
        """Return a number for each row, (n,), int64: the same for all views of an image, else its place in the sample.

        Args:
            indices: Rows of the dataset.
        """
        if self.num_viewed is not None:
            return torch.tensor(indices) % self.num_viewed
        if self.order is None or len(self.order) == len(self.images):
            return torch.tensor(indices)
        return torch.from_numpy(np.searchsorted(np.sort(self.order), indices))

    def known_labels(self) -> list[Any] | Tensor | None:
        """Return the labels of all images that are read, if they can be had without an image or a mask; else None."""
        images, order = self.images, self.order
        if order is None or self.is_dense:
            return None
        rows = images.rows
        if (columns := columns_of(rows)) is not None:
            return torch.as_tensor(columns[str(images.label)])[sorted(order)]
        if isinstance(rows, list | tuple):
            return [images.label_of(rows[index], index) for index in sorted(order)]
        names = getattr(rows, "column_names", None) or ()
        if images.label not in names or is_transformed(rows):
            return None
        labels = rows.with_format(None)[images.label][:]
        return labels if len(order) == len(images) else [labels[index] for index in sorted(order)]

    def _batch(self, indices: list[int], rows: list[Any]) -> LabelledBatch:
        pairs = list(zip(rows, indices, strict=True))
        given, labels = [self.images.image(*pair) for pair in pairs], [self.images.label_of(*pair) for pair in pairs]
        if self.images.is_ready:
            name = self.images.argument
            inputs = {name: stacked(name, indices, given)}
            return LabelledBatch(indices, inputs, stacked("label", indices, labels) if self.is_dense else labels)
        made = self._processed(indices, given, labels if self.is_dense else None)
        return LabelledBatch(indices, {"pixel_values": made.pixel_values}, made.labels if self.is_dense else labels)


def _num_views(rows: Any, first: Any) -> int | None:
    """Return how many views a cache of features has of each image; None where it has one."""
    if (
        not isinstance(first, Mapping)
        or "view" not in first
        or "view" not in (getattr(rows, "column_names", ()) or ())
    ):
        return None
    return 1 + int(max(rows.with_format(None)["view"][:]))
