"""Reading a model at many timesteps: images are added in rounds, shared by processes, until the best is sure."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as host_logging

from ..model.layouts import Tap, tap_key
from .accumulators import NUM_GROUPS, Context
from .complements import complements
from .criteria import accumulator_of
from .curve import TimestepCurve, bootstrap
from .distribution import Share, gather_objects, process
from .images import CalibrationPictures
from .massive_channels import find_massive_channels, given_channels
from .placement import taps_read_together
from .reader import ReadableModel, Reader
from .request import Request

# Massive channels are the same in every image, so a few images show them.
NUM_FOR_CHANNELS = 8
NO_IMAGES = "`images` is empty, so there is nothing to select a timestep on."


class Sweep:
    """Reads images at timesteps, adds them up as the criterion asks for, and scores what was read so far.

    Args:
        model: Model to read.
        images: Images to read.
        request: What is selected, and by what.
    """

    def __init__(self, model: ReadableModel, images: CalibrationPictures, request: Request) -> None:
        self.request, self.share = request, Share.of_model(model)
        self.taps_read_together = taps_read_together(model)
        self.reader = Reader(
            model,
            images,
            given_channels(model.config, [*request.taps, *self.taps_read_together]),
            request.criterion.num_draws,
            request.batch_size,
            request.seed,
        )
        context = Context(
            request.taps,
            model.config,
            model.noise_schedule,
            images,
            request.labels,
            self.share,
            request.num_train_images,
        )
        self.accumulator = accumulator_of(request.criterion, context)
        self.num_images = 0
        self.groups: set[int] = set()
        self.sums: dict[int, Tensor] = {}  # by timestep, (A, G, S), of all images so far

    def run(self) -> tuple[TimestepCurve, str]:
        """Read images in rounds until the selection is sure; return the last curve, and why it ended.

        Raises:
            ValueError: If there are no images, or a score is not finite.
        """
        with progress_bar() as self.reader.bar:
            timesteps, max_images = self.request.first_timesteps, self.request.max_images
            order = self.reader.images.order
            size = max_images if order is None else len(order)
            goal = min(self.request.criterion.first_round, size)
            self._find_channels(timesteps)
            done = self._calibrate(goal, timesteps)
            while True:
                added = self._add_images(done, goal, timesteps)
                curve, timesteps = self._refined(goal, timesteps)
                if curve.confidence >= self.request.confidence:
                    return curve, "confidence"
                if goal == size or added < goal - done:
                    return curve, "max_images" if self.num_images == max_images else "all pictures"
                done, goal = goal, min(goal + -(-goal // 2), size)

    def complements(self, curve: TimestepCurve) -> tuple[list[int], list[float]]:
        """Return all that is selected, the curve's best timestep first, and the score of the set up to each.

        From what was kept of the images: nothing is read. Of a single timestep there is no score.
        """
        tap, best = curve.best
        first, count = curve.timesteps[best], self.request.num_timesteps - 1
        if not count:
            return [first], []
        log_snr = self.reader.model.noise_schedule.log_snr(torch.tensor(curve.timesteps)).tolist()

        def scores_of(sets: Sequence[list[int]]) -> list[float]:
            sums = torch.stack([self.accumulator.joint_sums(each, tap).sum(0) for each in sets])
            # Of one process, as the curve.
            scores: list[float] = gather_objects(self.request.criterion.score(sums).tolist())[0]
            return scores

        more, scores = complements(first, count, dict(zip(curve.timesteps, log_snr, strict=True)), scores_of)
        # On the images that the others are scored on, which of very many are the first.
        return [first, *more], [*scores_of([[first]]), *scores]

    def num_forwards(self) -> int:
        """Return how many passes of an image all processes made; they call it together."""
        return sum(self.share.gather(self.reader.num_forwards))

    def massive_channels(self, tap: Tap) -> list[int] | None:
        """Return the massive channels of a tap, found here or by an earlier selection; None where nobody looked."""
        config = self.reader.model.config
        if given_channels(config, [tap])[tap] is None:
            return self.reader.channels[tap]
        return config.channels_at(*tap) if isinstance(config.zeroed_channels, dict) else None

    def other_massive_channels(self, tap: Tap) -> dict[str, list[int]] | None:
        """Return the massive channels of the other taps that are read together with a tap, where anyone looked."""
        others = [each for each in self.taps_read_together if each != tap]
        found = {tap_key(*each): self.massive_channels(each) for each in others}
        return {key: channels for key, channels in found.items() if channels is not None} or None

    def _find_channels(self, timesteps: list[int]) -> None:
        """Find the massive channels of the taps whose channels have to be found, on the first images.

        Every process reads them all, so that all find the same.
        """
        taps = [tap for tap, channels in self.reader.channels.items() if channels is None]
        if taps:
            found = find_massive_channels(self.reader.batches(0, NUM_FOR_CHANNELS, timesteps), taps)
            self.reader.channels.update(self.share.gather(found)[0])

    def _calibrate(self, goal: int, timesteps: list[int]) -> int:
        """Calibrate the accumulator on the first images, if it wants to be; return at which image the rest begins."""
        stop = min(self.accumulator.num_calibration, goal)
        if not self.accumulator.num_calibration:
            return stop
        batches = list(self.reader.batches(0, stop, timesteps))
        read = [index for batch in batches for index in batch.indices]
        if not read:
            raise ValueError(NO_IMAGES)
        own = self.reader.images.share(0, stop, self.share.rank, self.share.world)
        # A stream may have ended before.
        own = [index for index in own if index in read]
        self.accumulator.calibrate(batches, own)
        self.groups.update(index % NUM_GROUPS for index in own)
        self.num_images = len(read)
        return stop

    def _add_images(self, start: int, stop: int, timesteps: list[int]) -> int:
        """Add a part of the images that was not read yet; return how many there were."""
        added = self._read(start, stop, timesteps)
        self.num_images += added
        if not self.num_images:
            raise ValueError(NO_IMAGES)
        if added:
            self.sums.clear()
        return added

    def _refined(self, stop: int, timesteps: list[int]) -> tuple[TimestepCurve, list[int]]:
        """Read the neighbours of the best timestep until none is better; return the curve and its timesteps."""
        curve = self._curve(timesteps)
        while missing := self._unread_neighbours(curve):
            timesteps = sorted({*timesteps, *missing})
            self._read(0, stop, missing)
            curve = self._curve(timesteps)
        return curve, timesteps

    def _unread_neighbours(self, curve: TimestepCurve) -> list[int]:
        """Return the neighbours in the grid of the best timestep that were not read yet."""
        grid = self.request.grid
        place = grid.index(curve.timesteps[curve.best[1]])
        return [t for t in grid[max(0, place - 1) : place + 2] if t not in curve.timesteps]

    def _read(self, start: int, stop: int, timesteps: list[int]) -> int:
        """Add this process's share of a part of the images; return how many all processes added."""
        count = 0
        for batch in self.reader.batches(start, stop, timesteps, self.share):
            self.accumulator.add(batch)
            count += len(batch.indices)
            self.groups.update(index % NUM_GROUPS for index in batch.indices)
        return sum(self.share.gather(count))

    def _curve(self, timesteps: list[int]) -> TimestepCurve:
        """Return the scores at the timesteps read so far, with the bootstrap over groups of images."""
        if new := [timestep for timestep in timesteps if timestep not in self.sums]:
            self.sums.update(self.accumulator.sums(new))
        groups = sorted(set().union(*self.share.gather(self.groups)))
        sums = torch.stack([self.sums[t] for t in timesteps], dim=1)[:, :, groups]  # (A, T, G, S)
        log_snr = self.reader.model.noise_schedule.log_snr(torch.tensor(timesteps))
        try:
            curve = bootstrap(timesteps, log_snr, sums, self.request.criterion.score, self.request.seed)
        except ValueError as error:
            why = "the model's features are NaN, infinite or all zero"
            why += ", or there is only one image" if self.num_images < 2 else ""
            raise ValueError(f"{error}: {why}. Check its weights and the images.") from error
        # Of one process: where the last bits of two machines differ, one of them would go on reading alone.
        first: TimestepCurve = gather_objects(curve)[0]
        return first


@contextmanager
def progress_bar(
    description: str = "Selecting the timestep", total: int | None = None, unit: str = "pass"
) -> Iterator[Any]:
    """Show the progress of the first process; others show nothing.

    Args:
        description: What is done.
        total: How many units there are, None if unknown. A `Reader` sets the total of its bar itself.
        unit: What is counted.
    """
    # Not `disable=False` in the first process: that would overrule TQDM_DISABLE.
    quiet = {"disable": True} if process()[0] else {}
    with host_logging.tqdm(desc=description, total=total, unit=unit, leave=False, **quiet) as bar:
        yield bar
