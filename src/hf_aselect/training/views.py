"""Views of the images of a dataset: each image itself, and augmented ones of it."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.rows import ImageRows
from ..model.layouts import plain

# Of a view, as the A-SelecT authors' 512 pixels of 576.
CROP = 8 / 9
Augment = Callable[[Any], Any]


class Views:
    """The images of a dataset, then augmented views of each: row `v * len(dataset) + i` is view v of image i.

    Args:
        images: The rows of the dataset.
        num_views: Views of each image, at least 1; the first is the image itself.
        augment: What makes the others, from an image (PIL) to an image. Default: `crop_and_flip`.
        seed: Seed of the random numbers of `augment`, and of code of the user's that makes the rows.
        is_made: Whether such code makes the rows: a transform, or a dataset of torch.

    Raises:
        ValueError: If more than one view is asked for, and the rows are not images.
    """

    def __init__(
        self, images: ImageRows, num_views: int, augment: Augment | None, seed: int, is_made: bool = False
    ) -> None:
        if num_views > 1 and images.is_ready:
            raise ValueError(
                f"`num_views={num_views}` augments images, but the dataset returns `{images.argument}`. Remove its "
                "transform (`dataset.with_format(None)`), or let it augment and pass `num_views=1`."
            )
        self.images = images
        self.num_views = num_views
        self.augment = augment
        self.seed = seed
        self.is_made = is_made
        # Rows that were read last: those of a transform are read once.
        self.read_rows: dict[int, Any] = {}

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

    def read(self, rows: Sequence[int]) -> list[Any]:
        """Return the images of some rows, and keep what else is in those until the next are read.

        Raises:
            ValueError: If there is none, or it cannot be read.
        """
        self.read_rows = {}
        return [self[row] for row in rows]

    def values(self, rows: Sequence[int], name: str) -> list[Any]:
        """Return another column of the rows that were read last.

        Raises:
            ValueError: If one does not have it.
        """
        found = []
        for row in rows:
            index, _ = self.index_and_view(row)
            others = self.images.others(self.read_rows[index])
            if name not in others:
                raise ValueError(f"Row {index} of the dataset has no {name!r}, unlike the first row.")
            found.append(plain(others[name]))
        return found

    def row(self, index: int) -> Any:
        """Return a row of the dataset."""
        # Code of the user's may draw numbers: as when another process reads the row, or it is read again.
        with _seeded(f"{self.seed} {index} 0") if self.is_made else nullcontext():
            return self.images.row(index)

    def _image(self, index: int) -> Any:
        if index not in self.read_rows:
            self.read_rows[index] = self.row(index)
        image = self.images.image(self.read_rows[index], index)
        if image is None:
            raise ValueError(f"Row {index} of the dataset has no image in {self.images.kind!r}.")
        return image

    def _augmented(self, image: Any, index: int, view: int) -> Any:
        """Return an augmented view, the same whatever was drawn before and in whichever process."""
        with _seeded(f"{self.seed} {index} {view}"):
            return (self.augment or crop_and_flip)(image)


@contextmanager
def _seeded(words: str) -> Iterator[None]:
    """Seed the random numbers of `random`, numpy and torch for a while; then they are as they were."""
    number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            # Not those of accelerators, which would not be restored.
            torch.default_generator.manual_seed(number)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def crop_and_flip(image: Image.Image) -> Image.Image:
    """Return a random crop of 8/9 of each side of an image, flipped or not; by the numbers of `random`.

    Source: the A-SelecT authors' recipe, 512 pixels of 576.
    """
    return cropped_and_flipped([image], CROP)[0]


def cropped_and_flipped(images: Sequence[Image.Image], share: float, numbers: Any = random) -> list[Image.Image]:
    """Return the same random part of several images, as an image and its mask, flipped half of the time.

    Args:
        images: Images of one size.
        share: Part of each side, in (0, 1].
        numbers: What draws them, as `random.Random(seed)`. Default: the random numbers of `random`.

    Raises:
        ValueError: If they are of other sizes, as where `datasets` turned an image by its EXIF entry and no mask.
    """
    width, height = images[0].size
    if others := [image.size for image in images if image.size != (width, height)]:
        raise ValueError(f"An image has {(width, height)} pixels and its mask {others[0]}; they must be equal.")
    side_width, side_height = max(1, round(share * width)), max(1, round(share * height))
    left, top = numbers.randint(0, width - side_width), numbers.randint(0, height - side_height)
    crops = [image.crop((left, top, left + side_width, top + side_height)) for image in images]
    is_flipped = numbers.random() < 0.5
    return [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else crop for crop in crops]
