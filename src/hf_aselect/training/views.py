"""Views of the images of a dataset: each image itself, and augmented ones of it."""

import hashlib
import random
import struct
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

# Of a view, as the A-SelecT authors' 512 pixels of 576.
CROP = 8 / 9
Augment = Callable[[Any], Any]


class Views:
    """The images of a dataset, then so many augmented ones of each: row `v * len(dataset) + i` is view v of image i.

    Args:
        dataset: A dataset without a format.
        column: Its column of images.
        num_views: Views of each image, at least 1; the first is the image itself.
        augment: What makes the others, from an image (PIL) to an image. Default: `crop_and_flip`.
        seed: Seed of the random numbers of `augment`.
    """

    def __init__(
        self, dataset: datasets.Dataset, column: str, num_views: int, augment: Augment | None, seed: int
    ) -> None:
        # Alone: reading a row decodes all of its columns.
        self.images = dataset.select_columns([column])
        self.column = column
        self.num_views = num_views
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.images) * self.num_views

    def index_and_view(self, row: int) -> tuple[int, int]:
        """Return which image a row is of, and which view of it."""
        view, index = divmod(row, len(self.images))
        return index, view

    def __getitem__(self, row: int) -> Any:
        """Return the image of a row.

        Raises:
            ValueError: If there is none, or it cannot be read.
        """
        index, view = self.index_and_view(row)
        image = self._image(index)
        return image if view == 0 else self._augmented(image, index, view)

    def _image(self, index: int) -> Any:
        try:
            image = self.images[index][self.column]
        # What PIL makes of broken files.
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise ValueError(f"Picture {index} of the dataset cannot be read ({error}).") from error
        if image is None:
            raise ValueError(f"Row {index} of the dataset has no picture in {self.column!r}.")
        return image

    def _augmented(self, image: Any, index: int, view: int) -> Any:
        """Return an augmented view, the same whatever was drawn before and in whichever process."""
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {index} {view}".encode()).digest()[:4], "big")
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(number)
                np.random.seed(number)
                # Not those of accelerators, which would not be restored.
                torch.default_generator.manual_seed(number)
                return (self.augment or crop_and_flip)(image)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def crop_and_flip(image: Image.Image) -> Image.Image:
    """Return a random crop of 8/9 of each side of an image, flipped or not; by the numbers of `random`.

    Source: the A-SelecT authors' recipe, 512 pixels of 576.
    """
    width, height = image.size
    side_width, side_height = max(1, round(CROP * width)), max(1, round(CROP * height))
    left, top = random.randint(0, width - side_width), random.randint(0, height - side_height)
    crop = image.crop((left, top, left + side_width, top + side_height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
