"""Features of images as they are read: kept while they are few, summed up into moments once they are many."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..selection.distribution import Share
from .closed_form import Moments
from .targets import Targets

# Rows up to this size are kept, of all processes together; of more a sample.
KEPT_BYTES = 2**28
# A fifth of the images is held out at a time.
NUM_FOLDS = 5
# Rows that are summed up together: of fewer, reading and writing the moments takes longer than the products.
_NUM_TOGETHER = 2**12
# Matrices of the moments' size beside those of the folds while the regression is solved.
_NUM_WORKING = 12
# Solutions of each fold that are held at once, beside their sums: of the strengths that are tried together.
_NUM_SOLUTIONS = 9
# Bits of a token's number in its image.
TOKEN_BITS = 20


@dataclass
class Rows:
    """Rows of features: one an image, or one a token.

    Args:
        features: Features, (n, D), float32.
        targets: Targets as `Targets` keeps them.
        images: Number of the image that a row is of, (n,), int64; all views of an image have one.
        numbers: A different number for each row, (n,), int64.
    """

    features: Tensor
    targets: Tensor
    images: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.features)

    def __getitem__(self, places: Tensor | slice) -> "Rows":
        """Return some of them."""
        return Rows(self.features[places], self.targets[places], self.images[places], self.numbers[places])

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(each.nbytes for each in (self.features, self.targets, self.images, self.numbers))

    @property
    def folds(self) -> Tensor:
        """The fold of each row, (n,), in [0, `NUM_FOLDS`); rows of an image are in one."""
        return folds_of(self.images)

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.images for part in parts]),
            torch.cat([part.numbers for part in parts]),
        )


def folds_of(images: Tensor) -> Tensor:
    """Return the fold of each image, (n,), by its number: of `NUM_FOLDS` in sequence each is in another one.

    In which order is random: a set whose classes take turns would have a class in one fold alone.

    Args:
        images: Numbers of images, (n,), int64, from 0.
    """
    places = images.numpy() % NUM_FOLDS
    block = images.numpy()[:, None] - places[:, None] + np.arange(NUM_FOLDS)
    keys = _hashed(block)
    own = np.take_along_axis(keys, places[:, None], 1)
    return torch.from_numpy((keys < own).sum(1))


class FeatureSums:
    """Adds up rows of features in one pass, whatever their number, in memory that does not grow with it.

    Up to `KEPT_BYTES` rows are kept as they are. Beyond that the moments of all rows are summed up by fold, and of the
    rows a uniform sample of that size is kept, on which held-out predictions are made.

    Args:
        width: Width D of the features.
        num_labels: Number of targets K.
        kept_bytes: Memory of the rows that are kept.
        rows_per_image: Rows of one image.
    """

    def __init__(self, width: int, num_labels: int, kept_bytes: int = KEPT_BYTES, rows_per_image: int = 1) -> None:
        self.width, self.num_labels, self.kept_bytes = width, num_labels, kept_bytes
        self.rows_per_image = rows_per_image
        self.targets: Targets | None = None
        self.moments: list[Moments] | None = None
        self.kept: list[Rows] = []
        self.waiting: list[Rows] = []
        self.num_bytes, self.share_kept = 0, 1.0

    def add(self, rows: Rows, targets: Targets) -> None:
        """Add some rows.

        Args:
            rows: The rows.
            targets: How labels become targets, the same each time.

        Raises:
            ValueError: If their moments become necessary and exceed the memory.
        """
        self.targets = targets
        if self.moments is not None:
            self.waiting.append(rows)
            if sum(map(len, self.waiting)) >= _NUM_TOGETHER:
                self._flush()
        rows = rows if self.share_kept == 1 else rows[_keys(rows.numbers) < self.share_kept]
        self.kept.append(rows)
        self.num_bytes += rows.num_bytes
        while self.num_bytes > self.kept_bytes:
            self.begin_moments()
            self._thin(self.share_kept / 2)

    def begin_moments(self) -> None:
        """Begin to sum up moments, with the rows that are kept.

        Raises:
            ValueError: If they exceed the memory.
        """
        if self.moments is not None:
            return
        check_memory(self.width, self.num_labels, rows_per_image=self.rows_per_image)
        self.kept = [Rows.joined(self.kept)] if self.kept else []
        origin = torch.zeros(self.width, dtype=torch.float64)
        if self.kept:
            origin = self.kept[0].features.mean(0, dtype=torch.float64)
        self.moments = [Moments.empty(origin, self.num_labels) for _ in range(NUM_FOLDS)]
        self.waiting = list(self.kept)
        self._flush()

    def gathered(self, share: Share) -> tuple[list[Moments] | None, Rows]:
        """Return the moments of all processes by fold, None where all rows are kept, and the rows that are kept.

        All processes call it, and get the same; either all of them or none have begun moments. The rows are in the
        order of their numbers.

        Args:
            share: Which images this process reads.
        """
        moments = None
        if self.moments is not None:
            self._flush()
            # Fold by fold: those of many processes together could exceed the memory.
            moments = [Moments.combined(share.gather(fold)) for fold in self.moments]
        self._thin(min(share.gather(self.share_kept)))
        parts = [rows for part in share.gather(self.kept) for rows in part]
        # Held once: they take most of the memory.
        self.kept = []
        rows = Rows.joined(parts)
        del parts
        is_sorted = bool((rows.numbers.diff() > 0).all())
        return moments, rows if is_sorted else rows[rows.numbers.argsort()]

    def _thin(self, share: float) -> None:
        """Keep no more than a share of all rows, by their numbers: the same, however they come."""
        if share < self.share_kept:
            self.kept = [Rows.joined([rows[_keys(rows.numbers) < share] for rows in self.kept])] if self.kept else []
            self.num_bytes, self.share_kept = sum(rows.num_bytes for rows in self.kept), share

    def _flush(self) -> None:
        """Add the rows that wait to the moments."""
        if self.waiting and self.moments is not None and self.targets is not None:
            add_rows(self.moments, Rows.joined(self.waiting), self.targets)
        self.waiting = []


def add_rows(moments: list[Moments], rows: Rows, targets: Targets) -> None:
    """Add rows to the moments of their folds, some thousands at a time: in float64 they take twice the memory."""
    for start in range(0, len(rows), _NUM_TOGETHER * NUM_FOLDS):
        part = rows[slice(start, start + _NUM_TOGETHER * NUM_FOLDS)]
        folds = part.folds
        for number, fold in enumerate(moments):
            own = part[folds == number]
            if len(own):
                fold.add(own.features, *targets.sums(own.targets))


def check_memory(width: int, num_targets: int, num_rows: int | None = None, rows_per_image: int = 1) -> None:
    """Reject features whose regression the memory cannot hold.

    Args:
        width: Width D of the features.
        num_targets: Number of targets K.
        num_rows: Number of rows, n; None where it is unknown, or moments have begun.
        rows_per_image: Rows of one image.

    Raises:
        ValueError: If it exceeds what is available.
    """
    needed, available = _memory(width, num_targets, num_rows), available_memory()
    if needed <= available:
        return
    most = KEPT_BYTES // row_bytes(width, num_targets)
    while most and _memory(width, num_targets, most) > available:
        most = most * 9 // 10
    raise ValueError(
        f"The moments of features of width {width} need {needed / 1e9:.1f} GB of memory, but "
        f"{available / 1e9:.1f} GB are available. Read fewer taps, or at most {most // rows_per_image} images "
        "(`max_images=`), as the moments of few images are smaller."
    )


def row_bytes(width: int, num_targets: int) -> int:
    """Return about the memory of a row that is kept, with its targets and numbers."""
    return 4 * width + 4 * num_targets + 16


def _memory(width: int, num_targets: int, num_rows: int | None) -> int:
    """Return about the memory of a regression; of fewer rows than features it is solved in the space of the rows."""
    is_kept = num_rows is not None and num_rows * row_bytes(width, num_targets) <= KEPT_BYTES
    if num_rows is None or not is_kept or num_rows >= width:
        size, outside = 1 + width, 0
    else:
        # The basis of that space, the rows in float64, and the solution of all and without each fold.
        size, outside = 1 + num_rows, 8 * width * (3 * num_rows + (1 + NUM_FOLDS) * num_targets)
    matrices = (NUM_FOLDS + _NUM_WORKING) * size + _NUM_SOLUTIONS * NUM_FOLDS * num_targets
    return 8 * size * matrices + outside


def available_memory() -> int:
    """Return how many bytes of memory programs can still be given; all of it where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        (line,) = (line for line in text.splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63


def _keys(numbers: Tensor) -> Tensor:
    """Return a uniform random number in [0, 1) for each row, by its number alone, (n,), float64."""
    return torch.from_numpy(_hashed(numbers.numpy()) / 2.0**64)


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Return integers that look random, uint64, of the shape of `numbers`.

    Source: the finalizer of SplitMix64, Steele et al., "Fast splittable pseudorandom number generators", figure 15.
    """
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
