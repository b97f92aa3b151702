"""What criteria gather while images are read: sums by timestep and group of images, over all processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import BEFORE_ATTENTION, Tap
from ..model.noise_schedule import NoiseSchedule
from .consensus import (
    LAYOUT_WEIGHT,
    NUM_JOINT,
    ConsensusSums,
    Key,
    alignment,
    coarse_layout,
    leading_directions,
    reference_range,
    region_share,
    unexplained,
)
from .distribution import Share
from .images import CalibrationPictures
from .joint_prediction import unexplained_together
from .reader import Batch

# Images are summed in so many groups, and the bootstrap draws groups: sums are all it needs of the images.
NUM_GROUPS = 16
# Scale and weight of a consensus' reference features come from the first so many images.
NUM_CALIBRATION = 32
AUTO_FEATURES = ("hidden", "query", "key", "value")


class Measure(Protocol):
    """`Criterion.measure`."""

    def __call__(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Return numbers of each image, (B, ...), of tokens, (K, B, N, D)."""
        ...


@dataclass(frozen=True)
class Context:
    """What an accumulator may need to know of the selection that it serves.

    Args:
        taps: The taps that are scored, A of them.
        config: Configuration of the model.
        schedule: Its noise schedule.
        images: The images.
        labels: The class index of each image, or its mask, by index; None where there are no labels.
        share: Which images this process reads, and how to gather what all read.
        num_train_images: Labelled images that the head will learn from; None where nobody knows.
    """

    taps: list[Tap]
    config: ASelectConfig
    schedule: NoiseSchedule
    images: CalibrationPictures
    labels: Any
    share: Share
    num_train_images: int | None = None


class Accumulator(ABC):
    """Gathers what a criterion measures, batch by batch, and makes sums of it."""

    # All processes read so many images together before each reads its share of the others.
    num_calibration: ClassVar[int] = 0

    def calibrate(self, batches: Sequence[Batch], own: list[int]) -> None:
        """Learn what all processes have to share from the first images, and add this process's own of them.

        It is called once, before anything else, if `num_calibration` is not 0.

        Args:
            batches: The first images, at the timesteps to be read; the same in every process.
            own: Indices of those that are this process's share.
        """
        raise NotImplementedError

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Add some images of this process's share at some timesteps.

        Images come again at timesteps that they were not read at yet.
        """

    @abstractmethod
    def sums(self, timesteps: list[int]) -> dict[int, Tensor]:
        """Return sums over the images of all processes, by timestep, (A, `NUM_GROUPS`, S), float64.

        An image is in group `index % NUM_GROUPS`. All processes call it together, with timesteps at which all images
        so far were read.
        """

    def joint_sums(self, timesteps: list[int], tap: int) -> Tensor:
        """Return sums over the images of all processes of several timesteps read together, (`NUM_GROUPS`, S), float64.

        Criteria with `scores_sets` have it. All processes call it together, after the last image.

        Args:
            timesteps: Timesteps at which all images were read.
            tap: Which of the taps.
        """
        raise NotImplementedError


class SumAccumulator(Accumulator):
    """Adds up numbers measured of each image.

    Args:
        measure: Returns the numbers, (B, S), float64, of tokens, (K, B, N, D).
        context: The selection.
    """

    def __init__(self, measure: Measure, context: Context) -> None:
        self.measure, self.taps, self.share = measure, context.taps, context.share
        self.own: dict[int, Tensor] = {}  # by timestep, (A, G, S)

    def add(self, batch: Batch) -> None:
        """Measure some images, and add the numbers to the sums of their groups."""
        for timestep, tokens in batch.read(self.taps):
            values = torch.stack([self.measure(tokens[tap], *batch.grid) for tap in self.taps])
            if timestep not in self.own:
                self.own[timestep] = values.new_zeros(len(self.taps), NUM_GROUPS, values.shape[-1])
            self.own[timestep].index_add_(1, torch.tensor(batch.indices) % NUM_GROUPS, values)

    def sums(self, timesteps: list[int]) -> dict[int, Tensor]:
        """Return the sums of all processes, added in the order of their ranks."""
        total: dict[int, Tensor] = {}
        for part in self.share.gather({t: self.own[t] for t in timesteps if t in self.own}):
            for timestep, sums in part.items():
                total[timestep] = total[timestep] + sums if timestep in total else sums
        return total


class ProbeAccumulator(Accumulator):
    """Keeps what was measured of each image, and counts on how many of them a probe of all is right.

    Args:
        measure: Returns the features to keep, (B, ...), of tokens, (K, B, N, D).
        hits: Returns right answers and answers of each image, (n, 2), float64, of features and labels.
        labels: Returns the labels, (n, ...), of images by their indices, with rows and columns of the token grid.
        context: The selection.
    """

    def __init__(
        self,
        measure: Measure,
        hits: Callable[[Tensor, Tensor], Tensor],
        labels: Callable[[list[int], tuple[int, int]], Tensor],
        context: Context,
    ) -> None:
        self.measure, self.hits, self.labels = measure, hits, labels
        self.taps, self.share = context.taps, context.share
        self.grid = (0, 0)
        self.pooled: dict[int, list[tuple[list[int], list[Tensor]]]] = {}  # by timestep: indices, features by tap

    def add(self, batch: Batch) -> None:
        """Keep the features of some images."""
        self.grid = batch.grid
        for timestep, tokens in batch.read(self.taps):
            measured = [self.measure(tokens[tap], *batch.grid) for tap in self.taps]
            self.pooled.setdefault(timestep, []).append((batch.indices, measured))

    def sums(self, timesteps: list[int]) -> dict[int, Tensor]:
        """Return right answers and answers; every process fits the probe to the images of all."""
        parts = self.share.gather({t: self.pooled[t] for t in timesteps if t in self.pooled})
        # A process may have had no images.
        self.grid = max(self.share.gather(self.grid))
        every = range(len(self.taps))
        sums = {}
        for t in timesteps:
            indices, pooled = _in_order([batch for part in parts for batch in part.get(t, [])], every)
            # Taps may differ in width.
            sums[t] = torch.stack([self._sums_of_hits(indices, each) for each in pooled])
        return sums

    def joint_sums(self, timesteps: list[int], tap: int) -> Tensor:
        """Return right answers and answers of a probe of the features of several timesteps side by side."""
        parts = self.share.gather({t: self.pooled[t] for t in timesteps if t in self.pooled})
        read = [_in_order([batch for part in parts for batch in part.get(t, [])], [tap]) for t in timesteps]
        return self._sums_of_hits(read[0][0], torch.cat([pooled[0] for _, pooled in read], dim=-1))

    def _sums_of_hits(self, indices: Tensor, pooled: Tensor) -> Tensor:
        """Return right answers and answers of a probe of features, (n, ...), of some images, (G, 2)."""
        hits = self.hits(pooled, self.labels(indices.tolist(), self.grid))
        return hits.new_zeros(NUM_GROUPS, 2).index_add_(0, indices % NUM_GROUPS, hits)


def _in_order(batches: list[tuple[list[int], list[Tensor]]], taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the images of some batches, rising, (n,), and their features at some taps, (n, ...) each."""
    indices = torch.tensor([index for named, _ in batches for index in named])
    order = indices.argsort()
    return indices[order], [torch.cat([values[tap] for _, values in batches])[order] for tap in taps]


class PatchLabels:
    """The classes of some patches of each image, by its mask.

    Args:
        places: Returns which tokens are read, (S,), of how many.
        context: The selection; its labels are masks.
    """

    def __init__(self, places: Callable[[int], Tensor], context: Context) -> None:
        self.places, self.images, self.masks = places, context.images, context.labels
        self.ignored = context.config.semantic_loss_ignore_index
        self.known: dict[int, Tensor] = {}  # by image, (N,)

    def __call__(self, indices: list[int], grid: tuple[int, int]) -> Tensor:
        """Return the classes, (n, S), of images on a token grid; -1 for patches of none."""
        for index in indices:
            if index not in self.known:
                self.known[index] = self.images.patch_labels(index, self.masks[index], *grid, self.ignored)
        places = self.places(grid[0] * grid[1])
        return torch.stack([self.known[index][places] for index in indices])


class ConsensusAccumulator(Accumulator):
    """Holds features at each timestep and tap against what those of several timesteps and blocks agree on.

    Taps are comparable: all are held against the same targets, and of wide ones as many numbers are read.

    Several taps are compared by what can be read from the mean of their tokens, and regions do not count: with the
    deviation read, too, or with regions, the selected taps lost more on the pairs that this was developed on.

    Args:
        measure: Returns statistics of the tokens of each image, (B, S, D), float32.
        measure_regions: Returns the means over regions of the image, (B, R, D), float32.
        num_targets: Size of the sketch of all reference features.
        num_read: How many of the statistics are predicted from, counted from the first.
        region_weight: How much regions count in the targets, before it is multiplied by `consensus.region_share`.
        has_layout: Whether the images' layout counts in the targets.
        context: The selection.
    """

    num_calibration = NUM_CALIBRATION

    def __init__(
        self,
        measure: Measure,
        measure_regions: Measure,
        num_targets: int,
        num_read: int,
        region_weight: float,
        has_layout: bool,
        context: Context,
    ) -> None:
        self.measure, self.measure_regions = measure, measure_regions
        self.share, self.schedule = context.share, context.schedule
        self.own_taps = context.taps
        self.taps = list(dict.fromkeys([*self.own_taps, *_reference_taps(context.config)]))
        is_single = len(self.own_taps) == 1
        self.region_weight = region_weight if is_single else 0.0
        self.has_layout = has_layout
        self.num_read_by_head, self.num_train_images = num_read, context.num_train_images
        self.references: list[int] = []  # timesteps, once calibrated
        self.kept = ConsensusSums(NUM_GROUPS, num_targets, num_read if is_single else 1)
        self.grams: dict[Key, tuple[Tensor, int]] = {}  # of the features of several timesteps, and how many these are

    def calibrate(self, batches: Sequence[Batch], own: list[int]) -> None:
        """Take the scales of the reference features, and add this process's own images.

        One process's scales are used by all: the last bits may differ from machine to machine.
        """
        read = [index for batch in batches for index in batch.indices]
        latents = torch.cat([batch.latents.float().cpu() for batch in batches])
        common, layout = alignment(latents), coarse_layout(latents)
        self.region_weight *= region_share(common, self.kept.num_read)
        self.references = self._references(batches[0].timesteps, common)
        measured = [self._measured_references(batch) for batch in batches]
        pooled, regions = (
            {key: torch.cat([each[part].pop(key) for each in measured]) for key in list(measured[0][part])}
            for part in (0, 1)
        )
        weight = LAYOUT_WEIGHT if self.has_layout else 0.0
        self.kept.calibrate(pooled, self.references, regions, self.region_weight, layout, weight)
        self.kept.use_scales(self.share.gather(self.kept.all_scales())[0])
        if own:
            places = [read.index(index) for index in own]
            mine, mine_by_region = (
                {key: values[places] for key, values in part.items()} for part in (pooled, regions)
            )
            self.kept.add_targets(own, mine, mine_by_region, layout[places])
            self._add(own, mine, batches[0].timesteps)

    def add(self, batch: Batch) -> None:
        """Add the features of some images; and their targets, unless these are known."""
        if all(index in self.kept.targets for index in batch.indices):
            # Timesteps that are read later, next to the best, have no share in the targets.
            self._add(batch.indices, self._measured(batch, self.own_taps), batch.timesteps)
            return
        measured, regions = self._measured_references(batch)
        layout = coarse_layout(batch.latents.cpu()) if self.has_layout else None
        self.kept.add_targets(batch.indices, measured, regions, layout)
        self._add(batch.indices, measured, batch.timesteps)

    def sums(self, timesteps: list[int]) -> dict[int, Tensor]:
        """Return squared errors and variance of the shared targets."""
        directions = self._directions()
        variance = self.share.total(self.kept.variance(directions))
        # One timestep and tap after the other: some megabytes each.
        return {
            timestep: torch.stack([self._unexplained((timestep, *tap), directions, variance) for tap in self.own_taps])
            for timestep in timesteps
        }

    def joint_sums(self, timesteps: list[int], tap: int) -> Tensor:
        """Return squared errors and variance of the shared targets, predicted from several timesteps together."""
        count = NUM_JOINT // self.share.world
        own = self.kept.first_images(count)
        indices = torch.tensor([index for part in self.share.gather(own) for index in part])
        order = indices.argsort()
        # A process may have no image, where there are fewer than processes.
        found = self.share.gather(self.kept.shared_targets(own, self._directions()) if own else None)
        targets = torch.cat([part for part in found if part is not None])
        grams = [self._gram((timestep, *self.own_taps[tap]), count, order) for timestep in timesteps]
        return unexplained_together(
            torch.stack([gram for gram, _ in grams]).sum(0),
            sum(size for _, size in grams),
            targets[order],
            indices[order] % NUM_GROUPS,
            NUM_GROUPS,
        )

    def _gram(self, key: Key, count: int, order: Tensor) -> tuple[Tensor, int]:
        """Return the inner products of the features of some images, (n, n), float64, and how many these are.

        Those of features side by side are their sum.

        Args:
            key: Where they were read: timestep, block and feature.
            count: The first so many images of each process.
            order: Puts the images of all processes in the order of their indices, (n,).
        """
        if key not in self.grams:
            own = self.kept.first_features(key, count) if key in self.kept.features else None
            features = torch.cat([part for part in self.share.gather(own) if part is not None])[order].double()
            self.grams[key] = features @ features.T, features.shape[1]
        return self.grams[key]

    def _directions(self) -> Tensor:
        """Return what turns (1, target) into the shared ones, (1 + m, k), of the images so far."""
        # Of one process: another machine may find them with other signs.
        found: Tensor = self.share.gather(leading_directions(self.share.total(self.kept.target_moments())))[0]
        return found

    def _references(self, timesteps: list[int], common: float) -> list[int]:
        """Return the timesteps whose features are references: all, if none has a log-SNR within the range.

        The more of the others a grid has, the more extreme the selected timestep would be.
        """
        low, high = reference_range(common, self.num_read_by_head, self.num_train_images)
        log_snr = self.schedule.log_snr(torch.tensor(timesteps)).tolist()
        within = [timestep for timestep, ratio in zip(timesteps, log_snr, strict=True) if low <= ratio <= high]
        return within or timesteps

    def _unexplained(self, key: Key, directions: Tensor, variance: Tensor) -> Tensor:
        """Return the squared error at a timestep and tap, and the variance, (G, 2)."""
        own = self.kept.products(key, directions) if key in self.kept.features else None
        parts = [part for part in self.share.gather(own) if part is not None]
        left, right = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
        return unexplained(left, right, variance)

    def _measured(self, batch: Batch, taps: list[Tap]) -> dict[Key, Tensor]:
        """Return the statistics of the images of a batch, (B, S, D), at each timestep and tap."""
        return {
            (timestep, *tap): self.measure(tokens[tap], *batch.grid)
            for timestep, tokens in batch.read(taps)
            for tap in taps
        }

    def _measured_references(self, batch: Batch) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """Return the statistics, (B, S, D), of all taps and, where regions count, their means, (B, R, D), too."""
        pooled: dict[Key, Tensor] = {}
        regions: dict[Key, Tensor] = {}
        for timestep, tokens in batch.read(self.taps):
            for tap in self.taps:
                pooled[(timestep, *tap)] = self.measure(tokens[tap], *batch.grid)
                if self.region_weight and timestep in self.references:
                    regions[(timestep, *tap)] = self.measure_regions(tokens[tap], *batch.grid)
        return pooled, regions

    def _add(self, indices: list[int], measured: dict[Key, Tensor], timesteps: list[int]) -> None:
        """Add the features of images whose targets are known."""
        calibrated = sorted({timestep for timestep, _, _ in self.kept.scales})
        for timestep in timesteps:
            near = min(calibrated, key=lambda known: abs(known - timestep))
            for tap in self.own_taps:
                self.kept.add((timestep, *tap), indices, measured[(timestep, *tap)], (near, *tap))


def is_before_mixing(config: ASelectConfig, taps: Sequence[Tap]) -> bool:
    """Return whether there is one tap, and no attention was run before it, so that no token has seen another."""
    # Blocks that diffusers does not count as such: of Lumina-Image 2.0 and Z-Image they are run on the image.
    is_refined = any(name.endswith("refiner_layers") and count for name, count in (config.transformer or {}).items())
    return len(taps) == 1 and taps[0][0] == 0 and taps[0][1] in BEFORE_ATTENTION and not is_refined


def _reference_taps(config: ASelectConfig) -> list[Tap]:
    """Return the taps whose agreement a consensus is: four features of three blocks, from 0 to 6/8 of the depth."""
    blocks = sorted({share * config.num_hidden_layers // 8 for share in (0, 3, 6)})
    return list(product(blocks, AUTO_FEATURES))
