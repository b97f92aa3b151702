"""Calibration pictures of any kind, as numbered batches of pixel values."""

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ..model.configuration_aselect import ASelectConfig
from ..model.image_processing_aselect import ASelectImageProcessor

_ADDRESS = re.compile(r"\b(?:https?|ftp|sftp|s3|gs|gcs|abfs|az)://", re.IGNORECASE)
# What PIL makes of broken files.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)


class CalibrationPictures:
    """A set of pictures that can be read again and again, a part at a time.

    Args:
        images: PIL pictures or arrays; a `datasets` dataset with an image column, streaming or not; or pixel values,
            (B, C, H, W), in [-1, 1].
        config: Configuration of the model that they are for.
        max_images: Read so many at the most: a random sample of a set of known size, the first ones of a stream.
        seed: Seed of the sample.

    Raises:
        ValueError: If `images` is none of those or pixel values are outside [-1, 1].
    """

    def __init__(self, images: Any, config: ASelectConfig, max_images: int, seed: int) -> None:
        # Of a set or a DataLoader, whose size is known, no picture can be asked for by its number.
        is_numbered = hasattr(images, "__getitem__") or not hasattr(images, "__len__")
        is_strange = isinstance(images, (str, bytes, Image.Image, dict)) or getattr(images, "is_sparse", False)
        if is_strange or not is_numbered or not isinstance(images, Iterable):
            raise ValueError(
                "Pictures must be a list of PIL pictures or arrays, a dataset with an image column, or a dense tensor "
                f"of pixel values, got {type(images).__name__}."
            )
        if isinstance(images, Tensor):
            _check_pixel_values(images)
        refuse_addresses(images)
        if isinstance(images, Iterator):
            images = list(islice(images, max_images))  # it could not be read again
        self.images: Any = images
        self.processor = ASelectImageProcessor.from_model_config(config)
        self.max_images = max_images
        self.order: list[int] | None = None  # of a stream the size is unknown
        if hasattr(images, "__len__"):
            generator = torch.Generator().manual_seed(seed)
            self.order = torch.randperm(len(images), generator=generator)[:max_images].tolist()

    def batches(
        self, start: int, stop: int, batch_size: int, rank: int, world: int
    ) -> Iterator[tuple[list[int], Callable[[], Tensor]]]:
        """Yield indices in the set, and what reads their pixel values, (B, C, H, W), of one process's share of a part.

        Args:
            start: First picture of the part, counted in the sample.
            stop: End of the part; a shorter sample ends earlier.
            batch_size: Pictures in a batch.
            rank: Which process this is.
            world: How many processes share the pictures: each takes every `world`-th of the sample, so that a picture
                is of the same process in every part.
        """
        rows = iter(self._rows(start, min(stop, self.max_images), rank, world))
        while batch := list(islice(rows, batch_size)):
            indices = [index for index, _ in batch]
            yield indices, partial(self._read, indices, [row for _, row in batch])

    def share(self, start: int, stop: int, rank: int, world: int) -> list[int]:
        """Return the indices of one process's share of a part, as `batches` yields them, without reading a picture.

        A stream may end before.
        """
        first, stop = start + (rank - start) % world, min(stop, self.max_images)
        # In the order of the set: reading a dataset forward is faster.
        return list(range(first, stop, world)) if self.order is None else sorted(self.order[first:stop:world])

    def patch_labels(self, index: int, mask: Any, rows: int, columns: int, ignored: int) -> Tensor:
        """Return the class of each token of a picture, (rows · columns,): that of most of its pixels, -1 if of none.

        Args:
            index: Which picture.
            mask: Its mask, of its size, as `ASelectImageProcessor` takes them; it is cut and resized as the picture.
            rows: Rows of the token grid.
            columns: Its columns.
            ignored: Value of mask pixels that have no class.

        Raises:
            ValueError: If the mask does not fit the picture.
        """
        row = self.images[index]
        if isinstance(self.images, Tensor):
            labels = torch.as_tensor(mask).long()
            if labels.shape != row.shape[-2:]:
                raise ValueError(f"A mask has shape {tuple(labels.shape)}, its picture {tuple(row.shape[-2:])}.")
        else:
            labels = torch.from_numpy(self.processor([_picture_of(row)], [mask])["labels"][0])
        patches = labels.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        has_class = patches != ignored
        # Counted by what is there: the numbers of the classes may be large.
        classes, places = (patches * has_class).unique(return_inverse=True)
        counts = torch.nn.functional.one_hot(places, len(classes)) * has_class[..., None]
        most, found = counts.sum(1).max(1)
        return torch.where(most > 0, classes[found], -1)

    def _rows(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Yield the index of each picture of the share, and what reads its row."""
        if self.order is None:
            for index, row in islice(self._numbered(), start + (rank - start) % world, stop, world):
                yield index, partial(_itself, row)
            return
        for index in self.share(start, stop, rank, world):
            yield index, partial(self.images.__getitem__, index)

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        """Yield the rows of a stream with their numbers."""
        rows = iter(self.images)
        for index in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except UNREADABLE as error:
                raise ValueError(f"Picture {index} of the set cannot be read: {error}") from error
            yield index, row

    def _read(self, indices: list[int], readers: list[Callable[[], Any]]) -> Tensor:
        if isinstance(self.images, Tensor):
            return torch.stack([read() for read in readers])
        pictures = [self._picture(index, read) for index, read in zip(indices, readers, strict=True)]
        values: Tensor = self._processed(indices, pictures).pixel_values
        return values

    def _processed(self, indices: list[int], pictures: list[Any], masks: list[Any] | None = None) -> BatchFeature:
        """Return what the processor makes of images and their masks, if any.

        Raises:
            ValueError: If it rejects one, which is named by its index.
        """
        try:
            return self.processor(pictures, masks, return_tensors="pt")
        except ValueError:
            for place, index in enumerate(indices):
                mask = None if masks is None else [masks[place]]
                try:
                    self.processor([pictures[place]], mask, return_tensors="pt")
                except ValueError as error:
                    raise ValueError(f"Picture {index} of the set cannot be read: {error}") from error
            raise

    def _picture(self, index: int, read: Callable[[], Any]) -> Any:
        try:
            return _picture_of(read())
        except UNREADABLE as error:
            raise ValueError(f"Picture {index} of the set cannot be read: {error}") from error


def refuse_addresses(dataset: Any) -> None:
    """Refuse a `datasets.Dataset` whose rows are addresses of pictures, which decoding them would fetch.

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
            if outside := [path for path in paths if _ADDRESS.search(path)]:
                raise ValueError(
                    f"The column {name!r} holds addresses in place of pictures, {outside[0][:100]!r} among them, and "
                    "nothing is fetched that was not named. Download them first."
                )


def _itself(row: Any) -> Any:
    return row


def _check_pixel_values(images: Tensor) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"Pixel values must be floating-point numbers in [-1, 1], got {images.dtype}; give PIL pictures or arrays."
        )
    if images.ndim != 4:
        raise ValueError(f"Pixel values must have shape (B, C, H, W), got {tuple(images.shape)}.")
    # Rounding in half precision may pass 1 by a little.
    if images.numel() and float(images.abs().max()) > 1.01:
        low, high = float(images.min()), float(images.max())
        raise ValueError(
            f"Pixel values must be in [-1, 1], got [{low:g}, {high:g}]; give PIL pictures, or scale them."
        )


def _picture_of(row: Any) -> Any:
    """Return the picture of a dataset's row; a row that is a picture already as it is."""
    if not isinstance(row, dict):
        return row
    pictures = [name for name, value in row.items() if isinstance(value, Image.Image)]
    if "image" in row:
        return row["image"]
    if len(pictures) != 1:
        raise ValueError(
            f"Expected a dataset with a column `image` or exactly one column of PIL pictures, got columns {list(row)}."
        )
    return row[pictures[0]]
