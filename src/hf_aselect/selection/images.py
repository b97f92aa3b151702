"""Calibration images of any kind, as numbered batches of pixel values."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from ..images.rows import ImageRows, stacked
from ..model.configuration_aselect import ASelectConfig
from ..model.image_processing_aselect import ASelectImageProcessor


class CalibrationPictures:
    """A set of images that can be read again and again, a part at a time.

    Args:
        images: The images, whatever they come in, see `ImageRows`; or those.
        config: Configuration of the model that they are for.
        max_images: Read no more than this: a random sample of a set of known size, the first ones of a stream.
        seed: Seed of the sample.

    Raises:
        ValueError: If `images` is none of those, or pixel values are outside [-1, 1].
    """

    def __init__(self, images: Any, config: ASelectConfig, max_images: int, seed: int) -> None:
        if isinstance(images, Iterator):
            images = list(islice(images, max_images))  # it could not be read again
        self.images = images if isinstance(images, ImageRows) else ImageRows(images)
        self.processor = ASelectImageProcessor.from_model_config(config)
        self.max_images = max_images
        self.order: list[int] | None = None  # of a stream the size is unknown
        if self.images.is_numbered:
            generator = torch.Generator().manual_seed(seed)
            self.order = torch.randperm(len(self.images), generator=generator)[:max_images].tolist()

    def batches(
        self, start: int, stop: int, batch_size: int, rank: int, world: int
    ) -> Iterator[tuple[list[int], Callable[[], Tensor]]]:
        """Yield indices in the set, and what reads their pixel values, (B, C, H, W), of one process's share of a part.

        Args:
            start: First image of the part, counted in the sample.
            stop: End of the part; a shorter sample ends earlier.
            batch_size: Images in a batch.
            rank: Which process this is.
            world: How many processes share the images: each takes every `world`-th of the sample, so that an image
                is of the same process in every part.
        """
        rows = iter(self._rows(start, min(stop, self.max_images), rank, world))
        while batch := list(islice(rows, batch_size)):
            indices = [index for index, _ in batch]
            yield indices, partial(self._read, indices, [row for _, row in batch])

    def share(self, start: int, stop: int, rank: int, world: int) -> list[int]:
        """Return the indices of one process's share of a part, as `batches` yields them, without reading an image.

        A stream may end before.
        """
        first, stop = start + (rank - start) % world, min(stop, self.max_images)
        # In the order of the set: reading a dataset forward is faster.
        return list(range(first, stop, world)) if self.order is None else sorted(self.order[first:stop:world])

    def patch_labels(self, index: int, mask: Any, rows: int, columns: int, ignored: int) -> Tensor:
        """Return the class of each token of an image, (rows · columns,): that of most of its pixels, -1 if of none.

        Args:
            index: Which image.
            mask: Its mask, of its size, as `ASelectImageProcessor` takes them; it is cut and resized as the image.
            rows: Rows of the token grid.
            columns: Its columns.
            ignored: Value of mask pixels that have no class.

        Raises:
            ValueError: If the mask does not fit the image.
        """
        image = self.images.image(self.images.row(index), index)
        if self.images.is_ready:
            labels, shape = torch.as_tensor(mask).long(), torch.as_tensor(image).shape[-2:]
            if labels.shape != shape:
                raise ValueError(
                    f"A mask has shape {tuple(labels.shape)}, but its image has {tuple(shape)}. Resize the mask to "
                    "its image."
                )
        else:
            labels = torch.as_tensor(self.processor([image], [mask])["labels"][0])
        patches = labels.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        has_class = patches != ignored
        # Counted by what is there: the numbers of the classes may be large.
        classes, places = (patches * has_class).unique(return_inverse=True)
        counts = torch.nn.functional.one_hot(places, len(classes)) * has_class[..., None]
        most, found = counts.sum(1).max(1)
        return torch.where(most > 0, classes[found], -1)

    def _rows(self, start: int, stop: int, rank: int, world: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Yield the index of each image of the share, and what reads its row."""
        if self.order is None:
            for index, row in islice(enumerate(self.images), start + (rank - start) % world, stop, world):
                yield index, partial(_itself, row)
            return
        for index in self.share(start, stop, rank, world):
            yield index, partial(self.images.row, index)

    def _read(self, indices: list[int], readers: list[Callable[[], Any]]) -> Tensor:
        images = [self.images.image(read(), index) for index, read in zip(indices, readers, strict=True)]
        if self.images.is_ready:
            values = stacked("pixel_values", indices, images)
            check_pixel_values(values)
            return values
        processed: Tensor = self._processed(indices, images).pixel_values
        return processed

    def _processed(self, indices: list[int], pictures: list[Any], masks: list[Any] | None = None) -> BatchFeature:
        """Return images, and their masks if any, from the processor.

        Raises:
            ValueError: If it rejects one, which is named by its index.
        """
        try:
            return self.processor(pictures, masks, return_tensors="pt")
        except ValueError:
            is_image_wrong = self.processor.num_channels in (1, 3)  # else the model takes none
            for place, index in enumerate(indices if is_image_wrong else ()):
                mask = None if masks is None else [masks[place]]
                try:
                    self.processor([pictures[place]], mask, return_tensors="pt")
                except ValueError as error:
                    raise ValueError(f"Image {index} cannot be read: {error}") from error
            raise


def _itself(row: Any) -> Any:
    return row


def check_pixel_values(values: Tensor) -> None:
    """Reject what is given for pixel values and is none.

    Raises:
        ValueError: If it is not a floating-point tensor (B, C, H, W) in [-1, 1].
    """
    if not values.is_floating_point():
        raise ValueError(
            f"Pixel values must be floating-point numbers in [-1, 1], got {values.dtype}. Pass PIL images or arrays "
            "instead."
        )
    if values.ndim != 4:
        raise ValueError(f"Pixel values must have shape (B, C, H, W), got {tuple(values.shape)}.")
    # Rounding in half precision may pass 1 by a little.
    if values.numel() and float(values.abs().max()) > 1.01:
        low, high = float(values.min()), float(values.max())
        raise ValueError(
            f"Pixel values must be in [-1, 1], got [{low:g}, {high:g}]. Pass PIL images, or scale the values."
        )
