"""Images with their labels, whatever they come in: a dataset, a stream, pairs, a cache of features, tensors."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.configuration_aselect import ASelectConfig
from ..model.image_processing_aselect import ASelectImageProcessor
from ..selection.distribution import Share
from ..selection.images import UNREADABLE, CalibrationPictures

# What a model takes as it is, by the names of its arguments.
TENSORS = ("features", "latents", "pixel_values")
LABELS = ("labels", "label", "label_ids", "annotation", "mask")
# Of cached features, which no transformer has to read: so many numbers at once, and at most so many rows.
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
        dataset: A `datasets` dataset, streaming or not, or another iterable or indexable one, whose rows are pairs
            (image, label), or dictionaries with a label and an image, `pixel_values`, `features` or `latents`; or a
            dictionary of such tensors and `labels`.
        config: Configuration of the model that they are for.
        is_dense: Whether labels are masks, which are cropped and resized with their images.
        image_column: Column of the images. Default: `image`, or the only one with images.
        label_column: Column of the labels. Default: the first of `LABELS`.
        max_images: Read at most so many: a random sample of a set of known size, the first ones of a stream.
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
        rows, first = _opened(dataset)
        self.is_dense, self.can_repeat = is_dense, not isinstance(rows, _Once)
        self.label, self.kind = _columns(first, image_column, label_column)
        if is_dense and self.kind in ("features", "latents"):
            raise ValueError(
                f"A segmenter is fitted to images and masks, and the dataset has `{self.kind}` in place of images."
            )
        self.row_size = torch.as_tensor(first[self.kind]).numel() if self.kind == "features" else 0
        views = _num_views(rows, first)
        super().__init__(_narrowed(rows, self.label, self.kind), config, max_images or sys.maxsize, seed)
        # Row `v * n + i` of a cache is view v of image i.
        self.num_viewed = None if views is None else len(rows) // views
        if is_dense:
            # As it is saved beside a segmenter, which sees the whole of an image.
            self.processor = ASelectImageProcessor.from_model_config(config, do_center_crop=False)

    def labelled_batches(self, batch_size: int, share: Share) -> Iterator[LabelledBatch]:
        """Yield one process's share of the images.

        Args:
            batch_size: Images in a batch; cached features come in larger ones.
            share: Which of the images.

        Raises:
            ValueError: If an image cannot be read, or a row is of another kind than the first.
        """
        if self.kind == "features":
            batch_size = max(batch_size, min(_MAX_ROWS, _MAX_NUMBERS // max(1, self.row_size)))
        rows = self._rows(0, self.max_images, share.rank, share.world)
        while batch := list(islice(rows, batch_size)):
            indices = [index for index, _ in batch]
            several = getattr(self.images, "__getitems__", None)
            if several is not None and self.order is not None and self.kind in TENSORS:
                found = several(indices)
            else:
                found = [self._picture_and_label(index, read) for index, read in batch]
            yield self._batch(indices, [self._split(index, row) for index, row in zip(indices, found, strict=True)])

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
        if isinstance(images, _Columns):
            return torch.as_tensor(images.columns[str(self.label)])[sorted(order)]
        if isinstance(images, (list, tuple)):
            return [self._split(index, images[index])[1] for index in sorted(order)]
        names = getattr(images, "column_names", None) or ()
        if self.label not in names or _is_transformed(images):
            return None
        labels = images.with_format(None)[self.label][:]
        return labels if len(order) == len(images) else [labels[index] for index in sorted(order)]

    def _picture_and_label(self, index: int, read: Any) -> Any:
        """Return a row of the dataset."""
        try:
            return read()
        except UNREADABLE as error:
            raise ValueError(f"Picture {index} of the set cannot be read: {error}") from error

    def _split(self, index: int, row: Any) -> tuple[Any, Any]:
        """Return what the model reads of a row, and its label."""
        try:
            return (row[0], row[1]) if self.label is None else (row[self.kind], row[self.label])
        except (IndexError, KeyError, TypeError) as error:
            wanted = "a pair (image, label)" if self.label is None else f"`{self.kind}` and `{self.label}`"
            raise ValueError(f"Row {index} of the dataset has not {wanted}, as the first row has.") from error

    def _batch(self, indices: list[int], pairs: list[tuple[Any, Any]]) -> LabelledBatch:
        given, labels = [each for each, _ in pairs], [label for _, label in pairs]
        is_tensor = self.kind in TENSORS or (self.label is None and _is_pixel_values(given[0]))
        if is_tensor:
            name = self.kind if self.kind in TENSORS else "pixel_values"
            inputs = {name: _stacked(name, indices, given)}
            return LabelledBatch(indices, inputs, _stacked("label", indices, labels) if self.is_dense else labels)
        made = self._processed(indices, given, labels if self.is_dense else None)
        return LabelledBatch(indices, {"pixel_values": made.pixel_values}, made.labels if self.is_dense else labels)


class _Columns:
    """Tensors by name, as a set of rows."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = columns
        self.size = min(len(values) for values in columns.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {name: values[index] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.size))


class _Rows:
    """A dataset that can be indexed and says how long it is, as an iterable."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[index] for index in range(len(self.dataset)))


class _Once:
    """Rows that come once."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return self.rows


def _opened(dataset: Any) -> tuple[Any, Any]:
    """Return a dataset as rows that can be iterated or indexed, and the first of them."""
    if isinstance(dataset, Mapping):
        dataset = _from_mapping(dataset)
    elif isinstance(dataset, (str, bytes, Image.Image, Tensor, np.ndarray)):
        raise ValueError(_wanted(dataset))
    if isinstance(dataset, Iterator):
        first = next(dataset, None)
        dataset = _Once(chain([] if first is None else [first], dataset))
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        dataset = dataset if isinstance(dataset, Iterable) else _Rows(dataset)
        first = _first_of(dataset) if len(dataset) else None
    elif isinstance(dataset, Iterable) and not hasattr(dataset, "__len__"):
        first = next(iter(dataset), None)
    else:
        raise ValueError(_wanted(dataset))
    if first is None:
        raise ValueError("The dataset has no rows.")
    return dataset, first


def _first_of(dataset: Any) -> Any:
    try:
        return dataset[0]
    except UNREADABLE as error:
        raise ValueError(f"Picture 0 of the set cannot be read: {error}") from error


def _from_mapping(columns: Mapping[str, Any]) -> _Columns:
    """Return tensors by name as rows."""
    sizes = {name: len(values) for name, values in columns.items() if isinstance(values, (Tensor, np.ndarray, list))}
    if len(sizes) != len(columns) or not sizes.keys() & {*TENSORS}:
        raise ValueError(
            f"{_wanted(columns)} with {', '.join(map(str, columns)) or 'nothing'}. Of a `DatasetDict` give one split."
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(f"There must be a label for each image, got {sizes}.")
    return _Columns(columns)


def _wanted(found: Any) -> str:
    return (
        "`dataset` must be a dataset with columns of images and labels, pairs (image, label), or a dictionary of "
        f"`pixel_values` (or `features`, `latents`) and `labels`, got {type(found).__name__}"
    )


def _columns(row: Any, image_column: str | None, label_column: str | None) -> tuple[str | None, str]:
    """Return the names of the labels and of what is read, by the first row; the labels of pairs have none."""
    if not isinstance(row, Mapping):
        if not isinstance(row, (tuple, list)) or len(row) != 2:
            raise ValueError(
                f"Rows of the dataset must be pairs (image, label) or have both by name, got {type(row).__name__}. A "
                "head needs labels."
            )
        if image_column or label_column:
            raise ValueError("The rows of the dataset are pairs (image, label): there are no columns to name.")
        return None, "image"
    for name in (image_column, label_column):
        if name is not None and name not in row:
            raise ValueError(f"The dataset has no column {name!r}, only {', '.join(map(str, row))}.")
    label = label_column or next((name for name in LABELS if name in row), None)
    if label is None:
        raise ValueError(
            f"The dataset has no labels, only {', '.join(map(str, row))}. Name their column by `label_column=`."
        )
    kind = image_column or next((name for name in (*TENSORS, "image") if name in row), None)
    if kind is None:
        pictures = [name for name, value in row.items() if isinstance(value, Image.Image) and name != label]
        if len(pictures) != 1:
            raise ValueError(
                "Expected a column `image`, or exactly one column of images, got columns "
                f"{', '.join(map(str, row))}. Name it by `image_column=`."
            )
        kind = pictures[0]
    return label, str(kind)


def _narrowed(rows: Any, label: str | None, kind: str) -> Any:
    """Return the rows with the columns that are read alone: of a dataset, reading a row decodes all of its images."""
    names = getattr(rows, "column_names", None) or ()
    if not hasattr(rows, "select_columns") or not {label, kind} <= set(names) or _is_transformed(rows):
        return rows
    return rows.select_columns([kind, label])


def _is_transformed(rows: Any) -> bool:
    """Return whether the rows of a dataset are made by a function of the user's, which may need all columns."""
    form = getattr(rows, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _num_views(rows: Any, first: Any) -> int | None:
    """Return how many views a cache of features has of each image; None where it has one."""
    if (
        not isinstance(first, Mapping)
        or "view" not in first
        or "view" not in (getattr(rows, "column_names", ()) or ())
    ):
        return None
    return 1 + int(max(rows.with_format(None)["view"][:]))


def _is_pixel_values(given: Any) -> bool:
    """Return whether an image of a pair is what the processor made of one."""
    return isinstance(given, Tensor) and given.is_floating_point() and given.ndim == 3


def _stacked(name: str, indices: list[int], values: list[Any]) -> Tensor:
    """Return the values of a batch as a tensor.

    Raises:
        ValueError: If they are no tensors of one shape.
    """
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The `{name}` of rows {indices[0]} to {indices[-1]} are no tensors of one shape: {error}"
        ) from error
