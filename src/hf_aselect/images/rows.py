"""Rows of any set of images, numbered or one after the other, and what in a row is the image, or the label."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.image_processing_aselect import ADDRESS, UNREADABLE, warn_of_fractions

# What a model takes as it is, by the names of its arguments.
TENSORS = ("features", "latents", "pixel_values")
LABELS = ("labels", "label", "label_ids", "annotation", "mask")
# So many rows say which values the floating-point images of a set have.
_PROBED = 8
_BYTES, _FRACTIONS, _PIXEL_VALUES = "[0, 255]", "[0, 1]", "[-1, 1]"
# Rounding, in half precision above all, may pass the ends by a little.
_SLACK = 0.01
# Rows of the tables of other libraries, by the name of library and class, none of which need be installed.
_OF_TABLES: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("pandas", "DataFrame"): lambda table: table.to_dict("records"),
    ("pandas", "Series"): list,
    ("polars", "DataFrame"): lambda table: table.to_dicts(),
    ("polars", "Series"): list,
    ("pyarrow", "Table"): lambda table: table.to_pylist(),
}


class ImageRows:
    """A set of images, and labels where they are wanted, whatever it is.

    Args:
        dataset: A `datasets` dataset, streaming or not, of any format or transform; a dataset of torch, map-style or
            iterable, or a part of one; a list of images, of pairs (image, label) or of dictionaries; an array or
            tensor of images, (B, H, W, C) or (B, C, H, W); a dictionary of tensors by name; or a table of pandas,
            polars or pyarrow with such columns.
        image_column: Column of the images. Default: one of `TENSORS`, or `image`, or the only one with images.
        label_column: Column of the labels. Default: the first of `LABELS`.
        is_labelled: Whether labels are needed.

    Raises:
        ValueError: If it is none of those, is empty, or has no such columns.

    What an image is:

    - by the name `pixel_values` (or `features`, `latents`): what the model takes as it is;
    - of floating-point numbers: in [-1, 1] with negative ones (pixel values from an image processor), in
      [0, 1], or in [0, 255]. The first images of a set decide which, and an image in another range is rejected;
    - anything else: what the image processor takes.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        is_labelled: bool = False,
    ) -> None:
        refuse_addresses(dataset)
        self.rows, first = _opened(dataset, is_labelled)
        self.can_repeat = not isinstance(self.rows, _Once)
        self.label: str | None = None
        self.kind = "image"
        self.is_pair = False
        if first is None:
            if is_labelled:
                raise ValueError("The dataset has no rows.")
        elif _is_named(first):
            self.kind, self.label = _columns(first, image_column, label_column, is_labelled)
        elif image_column or label_column:
            raise ValueError(
                "The dataset's rows are pairs (image, label), so `image_column` and `label_column` cannot be used."
            )
        else:
            # An image as nested lists is a list of its rows.
            is_nested = isinstance(first, tuple | list) and all(isinstance(each, tuple | list) for each in first)
            self.is_pair = isinstance(first, tuple | list) and not is_nested
            if is_labelled and not (self.is_pair and len(first) > 1):
                raise ValueError(
                    "The dataset's rows must be pairs (image, label) or dictionaries with an image and a label, got "
                    f"{type(first).__name__}."
                )
        self.first = first
        self.rows = _narrowed(self.rows, self.label, self.kind)
        self.is_numbered = hasattr(self.rows, "__len__")
        self.scale = None if first is None else self._scale(first)

    def __len__(self) -> int:
        """Return the number of rows; a stream has none."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows one after the other.

        Raises:
            ValueError: If one cannot be read.
        """
        rows = iter(self.rows)
        index = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except UNREADABLE as error:
                raise _unreadable(index, error, self._file_of(index)) from error
            yield row
            index += 1

    def row(self, index: int) -> Any:
        """Return a row by its number.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            return self.rows[index]
        except UNREADABLE as error:
            raise _unreadable(index, error, self._file_of(index)) from error

    def _file_of(self, index: int) -> str | None:
        """Return the file of an image that cannot be read; None where it has none."""
        if (
            not self.is_numbered
            or type((getattr(self.rows, "features", None) or {}).get(self.kind)).__name__ != "Image"
        ):
            return None
        undecoded = self.rows.with_format(None).cast_column(
            self.kind, type(self.rows.features[self.kind])(decode=False)
        )
        path: str | None = undecoded[index][self.kind]["path"]
        return path

    def rows_of(self, indices: list[int]) -> list[Any]:
        """Return several rows, at once where the set can do that."""
        several = getattr(self.rows, "__getitems__", None)
        try:
            return [self.rows[index] for index in indices] if several is None else list(several(indices))
        except UNREADABLE:
            return [self.row(index) for index in indices]

    @property
    def is_ready(self) -> bool:
        """Whether the model takes the rows as they are, as `argument`."""
        return self.kind in TENSORS or self.scale == _PIXEL_VALUES

    @property
    def argument(self) -> str:
        """The argument of the model that takes the rows."""
        return self.kind if self.kind in TENSORS else "pixel_values"

    def image(self, row: Any, index: int) -> Any:
        """Return the image of a row, as the image processor takes it; or what the model takes as it is, a tensor.

        Args:
            row: The row.
            index: Its number, for the error.

        Raises:
            ValueError: If it has none, or one of another kind than those before.
        """
        image = self._of(row, index, self.kind, 0)
        if isinstance(image, list) and self.kind not in TENSORS:
            image = np.asarray(image)  # as `datasets` has arrays without a format
        if self.kind in TENSORS or self.scale is None or not _is_floating(image):
            return image
        values = _array(image)
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        bounds = {_BYTES: (0, 255), _FRACTIONS: (0, 1), _PIXEL_VALUES: (-1, 1)}[self.scale]
        # The image processor reports values that are not numbers.
        if low < bounds[0] - _SLACK or high > bounds[1] + _SLACK:
            raise ValueError(
                f"Image {index} has values from {low:g} to {high:g}, expected {self.scale} as in the other images. "
                "Scale all images alike: to [0, 1] or [0, 255], or to [-1, 1] for pixel values from an image "
                "processor."
            )
        if self.scale == _PIXEL_VALUES:
            return _channels_first(image)
        # One that is dark would be taken for one in [0, 1] where it is seen alone.
        return values.clip(0, 1) * 255 if self.scale == _FRACTIONS else _dark_as_bytes(values)

    def label_of(self, row: Any, index: int) -> Any:
        """Return the label of a row.

        Raises:
            ValueError: If it has none.
        """
        return self._of(row, index, self.label, 1)

    def others(self, row: Any) -> dict[str, Any]:
        """Return what a row has beside its image, by name: all but further images, and of a pair its label."""
        if self.is_pair:
            return {"label": row[1]} if len(row) > 1 else {}
        if not _is_named(self.first):
            return {}
        return {
            str(name): value
            for name, value in row.items()
            if name != self.kind and not isinstance(value, Image.Image) and _is_named_or_plain(value)
        }

    def _of(self, row: Any, index: int, name: str | None, place: int) -> Any:
        """Return a value of a row, by its name or, of a pair, its place."""
        if not self.is_pair and not _is_named(self.first):
            return row
        try:
            return row[place] if self.is_pair else row[name]
        except (IndexError, KeyError, TypeError) as error:
            label = "" if self.label is None else f" and `{self.label}`"
            wanted = "a pair (image, label)" if self.is_pair else f"`{self.kind}`{label}"
            raise ValueError(f"Row {index} of the dataset does not have {wanted}, unlike the first row.") from error

    def _scale(self, first: Any) -> str | None:
        """Return which values the floating-point images have, by the first of them; None of other images."""
        if self.kind in TENSORS or not _is_floating(self._of(first, 0, self.kind, 0)):
            return None
        probed = [first]
        if self.is_numbered:
            probed += [self.row(index) for index in range(1, len(self), max(1, len(self) // _PROBED))[: _PROBED - 1]]
        images = [self._of(row, 0, self.kind, 0) for row in probed]
        values = [_array(image) for image in images if _is_floating(image)]
        low = min(float(each.min()) for each in values if each.size) if any(each.size for each in values) else 0.0
        high = max((float(each.max()) for each in values if each.size), default=0.0)
        if high == 0 and isinstance(self.rows, Tensor):
            return _PIXEL_VALUES  # grey, whoever made them
        if low < 0:
            return _PIXEL_VALUES if low >= -1 - _SLACK and high <= 1 + _SLACK else _BYTES
        return _FRACTIONS if high <= 1 + _SLACK else _BYTES


class _Columns:
    """Tensors by name, as a set of rows."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = columns
        self.size = min(len(values) for values in columns.values())

    def __len__(self) -> int:
        return self.size

    @property
    def column_names(self) -> list[str]:
        """Their names, as a dataset has them."""
        return list(self.columns)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.columns[index]
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


def is_stream(dataset: Any) -> bool:
    """Return whether rows come one after the other, and cannot be asked for."""
    is_numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, torch.utils.data.IterableDataset) or not is_numbered


def as_rows(dataset: Any) -> Any:
    """Return a dictionary of tensors, a table or an array of objects as rows of a known number; else as it is.

    Raises:
        ValueError: If it is a dictionary of anything else.
    """
    if isinstance(dataset, Mapping):
        return _from_mapping(dataset)
    if isinstance(dataset, np.ndarray) and dataset.dtype == object:
        return list(dataset)  # images, or pairs, as pandas' `to_numpy` gives them
    made = _OF_TABLES.get((type(dataset).__module__.partition(".")[0], type(dataset).__name__))
    return dataset if made is None else made(dataset)


def column_of(dataset: Any, name: str) -> Any:
    """Return a column of a set with columns, as it is stored: a transform may need other columns beside it.

    Raises:
        KeyError: If it has no such column.
    """
    if name not in (getattr(dataset, "column_names", None) or ()):
        raise KeyError(name)
    return (dataset.with_format(None) if hasattr(dataset, "with_format") else dataset)[name]


def columns_of(rows: Any) -> Mapping[str, Any] | None:
    """Return the values by name of rows that are a dictionary of tensors; None of others."""
    return rows.columns if isinstance(rows, _Columns) else None


def refuse_addresses(dataset: Any) -> None:
    """Reject a `datasets.Dataset` whose rows are addresses of images, which decoding them would fetch.

    Raises:
        ValueError: If there is one.
    """
    features: Any = getattr(dataset, "features", None)
    table: Any = getattr(dataset, "data", None)
    if not isinstance(features, dict) or not hasattr(table, "column"):
        return
    for name, feature in features.items():
        if type(feature).__name__ != "Image" or name not in table.column_names:
            continue
        for chunk in table.column(name).chunks:
            # Without bytes it is the path that is opened.
            paths = chunk.field("path").filter(chunk.field("bytes").is_null()).drop_null().to_pylist()
            if outside := [path for path in paths if ADDRESS.search(path)]:
                raise ValueError(
                    f"The column {name!r} has URLs instead of images, such as {outside[0][:100]!r}, and URLs are not "
                    "fetched. Download the images first."
                )


def is_transformed(rows: Any) -> bool:
    """Return whether the rows of a dataset are made by a function of the user's, which may need all columns."""
    form = getattr(rows, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def stacked(name: str, indices: list[int], values: list[Any]) -> Tensor:
    """Return the values of a batch as a tensor.

    Raises:
        ValueError: If they are not tensors of one shape.
    """
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` of rows {indices[0]} to {indices[-1]} must be tensors of one shape: {error}"
        ) from error


def _unreadable(index: int, error: BaseException, file: str | None = None) -> ValueError:
    return ValueError(f"Image {index}{f', {file!r},' if file else ''} cannot be read: {error}")


def _opened(dataset: Any, is_labelled: bool) -> tuple[Any, Any]:
    """Return a dataset as rows that can be iterated or indexed, and the first of them; None where there is none."""
    dataset = as_rows(dataset)
    if isinstance(dataset, str | bytes | os.PathLike | Image.Image) or getattr(dataset, "is_sparse", False):
        raise ValueError(_wanted(dataset))
    elif isinstance(dataset, Tensor | np.ndarray):
        if is_labelled:
            raise ValueError(_wanted(dataset))
        # Grey images need no axis of channels; what has three or four in its place is one image.
        if dataset.ndim != 4 and (dataset.ndim != 3 or {dataset.shape[0], dataset.shape[-1]} & {1, 3, 4}):
            raise ValueError(
                "A tensor of images must have shape (B, C, H, W), or (B, H, W) for greyscale, got "
                f"{tuple(dataset.shape)}."
            )
    else:
        dataset = _by_rows(dataset)
    if isinstance(dataset, Iterator):
        first = next(dataset, None)
        return _Once(chain([] if first is None else [first], dataset)), first
    if not is_stream(dataset):
        dataset = dataset if isinstance(dataset, Iterable) else _Rows(dataset)
        return dataset, _first_of(dataset) if len(dataset) else None
    if isinstance(dataset, torch.utils.data.IterableDataset) or (
        isinstance(dataset, Iterable) and not hasattr(dataset, "__len__")
    ):
        stream = iter(dataset)
        try:
            return dataset, next(stream, None)
        except UNREADABLE as error:
            raise _unreadable(0, error) from error
    raise ValueError(_wanted(dataset))


def _by_rows(dataset: Any) -> Any:
    """Return a dataset whose format gives tables with one that gives rows; any other as it is."""
    form = getattr(dataset, "format", None)
    if not isinstance(form, Mapping) or form.get("type") not in ("arrow", "pandas", "polars"):
        return dataset
    return dataset.with_format(None, columns=form["columns"], output_all_columns=form["output_all_columns"])


def _first_of(dataset: Any) -> Any:
    try:
        return dataset[0]
    except UNREADABLE as error:
        raise _unreadable(0, error) from error


def _from_mapping(columns: Mapping[str, Any]) -> _Columns:
    """Return tensors by name as rows."""
    sizes = {name: len(values) for name, values in columns.items() if isinstance(values, Tensor | np.ndarray | list)}
    if len(sizes) != len(columns) or not sizes.keys() & {*TENSORS}:
        raise ValueError(
            f"{_wanted(columns)} with {', '.join(map(str, columns)) or 'nothing'}. Pass one split of a `DatasetDict`."
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Each image must have a label, got {sizes}.")
    return _Columns(columns)


def _wanted(found: Any) -> str:
    hint = ". Pass the `dataset` of the DataLoader." if isinstance(found, torch.utils.data.DataLoader) else ""
    if isinstance(found, str | os.PathLike):
        hint = '. Load the images of a folder with `load_dataset("imagefolder", data_dir=...)` of `datasets`.'
    return (
        "Images must be a list of PIL images or arrays, a dataset with an image column (and a label column if "
        "labels are needed), pairs (image, label), a dense tensor, or a dictionary with `pixel_values` (or "
        f"`features`, `latents`) and `labels`, got {type(found).__name__}{hint}"
    )


def _is_named(row: Any) -> bool:
    """Return whether a row has its values by name, and is not an encoded image, as `datasets` has them undecoded."""
    return isinstance(row, Mapping) and row.keys() != {"bytes", "path"}


def _is_named_or_plain(value: Any) -> bool:
    """Return whether a value is not an encoded image."""
    return not isinstance(value, Mapping) or _is_named(value)


def _columns(
    row: Mapping[str, Any], image_column: str | None, label_column: str | None, is_labelled: bool
) -> tuple[str, str | None]:
    """Return the names of the image column and the label column, from the first row."""
    names = ", ".join(map(str, row))
    for name in (image_column, label_column):
        if name is not None and name not in row:
            raise ValueError(f"The dataset has no column {name!r}, only {names}.")
    label = label_column or next((name for name in LABELS if name in row), None)
    if label is None and is_labelled:
        raise ValueError(f"The dataset has no label column, only {names}. Pass its name as `label_column=`.")
    # A selection reads images; cached features are for a head.
    known = (*TENSORS, "image") if is_labelled else ("image", "pixel_values")
    kind = image_column or next((name for name in known if name in row), None)
    if kind is None:
        found = [name for name, value in row.items() if name not in (*LABELS, label) and _is_image(value)]
        if len(found) != 1:
            raise ValueError(
                f"The dataset must have a column `image` or exactly one image column, got {names}. Pass its name as "
                "`image_column=`, or select it with `select_columns`."
            )
        kind = found[0]
    return str(kind), label if is_labelled else None


def _is_image(value: Any) -> bool:
    """Return whether a value is an image: of PIL, an array, or encoded."""
    is_encoded = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
    return isinstance(value, Image.Image) or is_encoded or getattr(value, "ndim", 0) in (2, 3)


def _narrowed(rows: Any, label: str | None, kind: str) -> Any:
    """Return the rows with the columns that are read alone: of a dataset, reading a row decodes all of its images."""
    names = getattr(rows, "column_names", None) or ()
    wanted = [kind] if label is None else [kind, label]
    if not hasattr(rows, "select_columns") or not set(wanted) <= set(names) or is_transformed(rows):
        return rows
    return rows.select_columns(wanted)


def _is_floating(image: Any) -> bool:
    """Return whether an image is of floating-point numbers, in an array or a tensor in memory."""
    if isinstance(image, Tensor):
        return image.is_floating_point() and not image.is_meta and image.layout == torch.strided
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def _array(image: Any) -> Any:
    """Return an image of floating-point numbers as an array."""
    return image.detach().cpu().float().numpy() if isinstance(image, Tensor) else image


def _channels_first(image: Any) -> Any:
    """Return pixel values of one image as (C, H, W), whichever axis their channels are on."""
    if image.ndim == 2:
        return image[None]
    is_last = image.ndim == 3 and image.shape[0] not in (1, 3) and image.shape[-1] in (1, 3)
    return torch.as_tensor(image).movedim(-1, 0) if is_last else image


def _dark_as_bytes(values: Any) -> Any:
    """Return an image in [0, 255], with one of no value above 1 as bytes."""
    warn_of_fractions([values])
    return np.rint(values).astype(np.uint8) if values.size and 0 <= values.min() <= values.max() <= 1 else values
