"""How much of what a transformer's features agree on can be read linearly from one of them.

Every timestep and tap is a view of the same images. What many views share is the images' content; what only one
shows is noise, or detail of no use. Here the shared part is the leading principal components of the means of all
reference features together, each centred, standardised and weighted equally; a feature scores by the share of their
variance that a ridge regression predicts from its pooled tokens, for images that it was not fitted to. Pooled are
the tokens' mean and, for a reader that sees more than that, their standard deviation, too.

Where images are aligned (faces, digits, products on a plain ground), what is where says what they show; where they
are not (photographs of animals), it says little. The more they are aligned, the more the means over regions of the
image count beside the mean over all of it, and the more noise the references have where labels are few: see
`alignment` and `reference_range`.

In the first block tokens before the attention have not seen each other. Their mean tells where something is only
because noise and position embeddings differ from place to place. It tells more where there is more noise, which what
other features agree on does not show. So there the layout of the images themselves counts, too.
"""

import math
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

NUM_COMPONENTS = 20
# Of 32 photographs less than that can be chance. Regions would count by it, and a little of them changes the targets.
LEAST_ALIGNMENT = 0.1
# Fields a side in which a layout is described.
NUM_FIELDS = 8
# How much the layout of images counts in the targets, against all features, at taps before any attention. From 0.3 to
# 5 the selection hardly changes, see model_cards/selection-benchmark.
LAYOUT_WEIGHT = 1.0
# Of references: with more noise little is left of the image.
LEAST_LOG_SNR = -5.5
# Sketches keep inner products to about 1 / sqrt(size).
MAX_FEATURES = 192
# So many images at a timestep are summed up: their features have come to the size of the moments.
NUM_KEPT = 2**14
# So many images at most show how several timesteps go together: second moments of each alone do not.
NUM_JOINT = 2**10
# Strengths of the ridge as shares of the mean eigenvalue of the standardised features' covariance.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 1))
NO_DIFFERENCE = (
    "The images, or the first of them, are all the same, and the timestep is selected by how images differ. Pass "
    "different images, or shuffle them."
)
# In float64 at once.
NUM_TOGETHER = 2**11
Key = tuple[int, int, str]  # timestep, block, feature
Item = TypeVar("Item")


class ConsensusSums:
    """Features and shared targets of the images; of features of many images only their second moments, by fold.

    An image is kept as `num_targets` numbers and, up to `NUM_KEPT` of them, at most 192 a timestep: thousands of
    images take less memory than their moments.

    Args:
        num_folds: Image `index % num_folds` is predicted from the images of the other folds.
        num_targets: Size of the sketch of all reference features.
        num_read: How many of the pooled statistics are predicted from, counted from the first, which is the mean.
    """

    def __init__(self, num_folds: int, num_targets: int, num_read: int = 1) -> None:
        self.num_folds, self.num_targets, self.num_read = num_folds, num_targets, num_read
        self.scales: dict[Key, Any] = {}  # mean and spread of the statistics, (S, D), and the weight of the mean
        self.region_scales: dict[Key, Any] = {}  # the same of regions, (R, D)
        self.region_factor = 0.0
        self.layout_scale: Any = None  # mean and spread of the layout, (P,), and its weight
        self.targets: dict[int, Tensor] = {}  # by image, (num_targets,): what timesteps read later are held against
        self.features: dict[Key, list[tuple[list[int], Tensor]]] = {}  # which images, (B, d)
        self.num_kept: dict[Key, int] = {}  # how many these are
        # Of images before those: sums of feature × feature and feature × target.
        self.summed: dict[Key, tuple[Tensor, Tensor]] = {}
        self.first: dict[Key, Tensor] = {}  # of the first `NUM_JOINT` of these, one by one

    def calibrate(
        self,
        pooled: dict[Key, Tensor],
        references: Collection[int] | None = None,
        regions: dict[Key, Tensor] | None = None,
        region_weight: float = 0.0,
        layout: Tensor | None = None,
        layout_weight: float = 0.0,
    ) -> None:
        """Take mean, spread and weight of each feature from some images' statistics, (n, S, D).

        Args:
            pooled: The statistics, by timestep, block and feature.
            references: Timesteps whose features are references; those of others have no weight. Default: all.
            regions: Means over R regions of the image, (n, R, D), by timestep, block and feature.
            region_weight: How much these count in the targets, against the means over the whole image.
            layout: The images' own layout, (n, P), as `coarse_layout` returns it.
            layout_weight: How much it counts in the targets, against all features together.
        """
        shared = [torch.zeros(1), torch.zeros(1)]
        for key, values in pooled.items():
            is_reference = references is None or key[0] in references
            *self.scales[key], gram = _scales(values, slice(1), is_reference)
            shared[0] = shared[0] + gram
        for key, values in (regions or {}).items() if region_weight else ():
            *self.region_scales[key], gram = _scales(values, slice(None), is_reference=True)
            shared[1] = shared[1] + gram
        if self.region_scales and float(shared[1].norm()):
            self.region_factor = (region_weight * float(shared[0].norm() / shared[1].norm())) ** 0.5
        if layout is not None and layout_weight:
            mean, spread, gram = _layout_scales(layout)
            whole = shared[0] + self.region_factor**2 * shared[1]
            norm = float(gram.norm())
            self.layout_scale = mean, spread, (layout_weight * float(whole.norm()) / norm) ** 0.5 if norm else 0.0

    def all_scales(self) -> Any:
        """Return what `calibrate` found, for other processes."""
        return self.scales, self.region_scales, self.region_factor, self.layout_scale

    def use_scales(self, scales: Any) -> None:
        """Take what `calibrate` found in another process."""
        self.scales, self.region_scales, self.region_factor, self.layout_scale = scales

    def add_targets(
        self,
        indices: list[int],
        reference: dict[Key, Tensor],
        regions: dict[Key, Tensor] | None = None,
        layout: Tensor | None = None,
    ) -> None:
        """Sketch the means of reference features of some images into their targets.

        Args:
            indices: Which images.
            reference: Their statistics, (B, S, D).
            regions: Their means over regions, (B, R, D), if the calibration had such.
            layout: Their own layout, (B, P), if the calibration had such.
        """
        total = torch.zeros(len(indices), self.num_targets)
        for number, (key, (mean, spread, weight)) in enumerate(sorted(self.region_scales.items())):
            values = (((regions or {})[key] - mean) / spread).flatten(1) * (weight * self.region_factor)
            _count_sketch(values, total, number)
        if self.layout_scale is not None:
            if layout is None:
                raise ValueError("The calibration had a layout of the images, so their targets need theirs.")
            mean, spread, weight = self.layout_scale
            _count_sketch((layout - mean) / spread * weight, total, -1)
        for number, (key, (mean, spread, weight)) in enumerate(sorted(self.scales.items())):
            if weight == 0:
                continue
            standard = ((reference[key] - mean) / spread)[:, 0] * weight
            total += standard @ _sketch(standard.shape[1], self.num_targets, number)
        # Copies: a row of the batch would keep all of it.
        self.targets.update(zip(indices, map(Tensor.clone, total), strict=True))

    def add(self, key: Key, indices: list[int], pooled: Tensor, like: Key) -> None:
        """Add the statistics, (B, S, D), of images whose targets are known.

        Args:
            key: Where they were read: timestep, block and feature.
            indices: Which images they are of.
            pooled: Statistics of their tokens, (B, S, D).
            like: Reference feature whose mean and spread are near enough: they only set the scale.
        """
        mean, spread, _ = self.scales[like]
        standard = ((pooled - mean) / spread)[:, : self.num_read].flatten(1)
        if standard.shape[1] > MAX_FEATURES:
            standard = standard @ _sketch(standard.shape[1], MAX_FEATURES, -1)
        self.features.setdefault(key, []).append((indices, standard))
        self.num_kept[key] = self.num_kept.get(key, 0) + len(indices)
        if self.num_kept[key] >= NUM_KEPT:
            self.summed[key] = self.products(key)
            self.first[key] = self.first_features(key, NUM_JOINT)
            self.features[key], self.num_kept[key] = [], 0

    def products(self, key: Key, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return sums over images by fold, (1, feature) × (1, feature) and (1, feature) × target, float64.

        Args:
            key: Where the features, d numbers an image, were read: timestep, block and feature.
            directions: What turns (1, target) into the k shared ones, (1 + m, k). Default: (1, target) itself.

        Returns:
            Sums of (F, 1 + d, 1 + d) and of (F, 1 + d, k). A small ridge needs float64.
        """
        left = right = None
        if key in self.summed:
            left, right = self.summed[key]
            left, right = left.clone(), right.clone() if directions is None else right @ directions
        kept = self.features[key]
        largest = max((len(values) for _, values in kept), default=1)
        for batches in _parts(kept, max(1, NUM_TOGETHER // largest)):
            indices = [index for named, _ in batches for index in named]
            features = _with_ones(torch.cat([values for _, values in batches])).double()
            targets = self._targets(indices)
            targets = targets if directions is None else targets @ directions
            if left is None or right is None:
                left = features.new_zeros(self.num_folds, features.shape[1], features.shape[1])
                right = features.new_zeros(self.num_folds, features.shape[1], targets.shape[1])
            self._accumulate(left, indices, features, features)
            self._accumulate(right, indices, features, targets)
        if left is None or right is None:
            raise KeyError(key)
        return left, right

    def first_images(self, count: int) -> list[int]:
        """Return the first `count` images, or all, in the order in which they came."""
        return list(islice(self.targets, count))

    def first_features(self, key: Key, count: int) -> Tensor:
        """Return the features of `first_images`, (n, d), float32, `count` at most `NUM_JOINT`.

        Args:
            key: Where they were read: timestep, block and feature.
            count: How many images.
        """
        if key in self.first:
            return self.first[key][:count]
        batches = self.features[key]
        rows = {index: row for indices, values in batches for index, row in zip(indices, values, strict=True)}
        return torch.stack([rows[index] for index in self.first_images(count)])

    def shared_targets(self, indices: list[int], directions: Tensor) -> Tensor:
        """Return the shared targets of some images, (n, k), float64.

        Args:
            indices: Which images.
            directions: What `leading_directions` made of the target moments, (1 + m, k).
        """
        return self._targets(indices) @ directions

    def target_moments(self) -> Tensor:
        """Return the sum over images of (1, target) × (1, target), (1 + m, 1 + m), float64."""
        sums = torch.zeros(1 + self.num_targets, 1 + self.num_targets, dtype=torch.float64)
        for indices in _parts(list(self.targets)):
            targets = self._targets(indices)
            sums += targets.T @ targets
        return sums

    def variance(self, directions: Tensor) -> Tensor:
        """Return by fold the sum over images of the squared shared targets, (F,), float64.

        Args:
            directions: What `leading_directions` made of the target moments, (1 + m, k).
        """
        sums = torch.zeros(self.num_folds, dtype=torch.float64)
        for indices in _parts(list(self.targets)):
            squares = (self._targets(indices) @ directions).square().sum(1)
            sums.index_add_(0, torch.tensor(indices) % self.num_folds, squares)
        return sums

    def _targets(self, indices: list[int]) -> Tensor:
        """Return (1, target) of some images, (n, 1 + m), float64."""
        return _with_ones(torch.stack([self.targets[index] for index in indices])).double()

    def _accumulate(self, sums: Tensor, indices: list[int], left: Tensor, right: Tensor) -> None:
        folds = torch.tensor(indices) % self.num_folds
        for fold in folds.unique().tolist():
            sums[fold] += left[folds == fold].T @ right[folds == fold]


def alignment(latents: Tensor) -> float:
    """Return how far images are aligned, in [0, 1]: their mean's share of the variance of what is coarse in them.

    0 for the photographs of CIFAR-10, 0.36 for Fashion-MNIST's garments, 0.7 for digits.

    Args:
        latents: Clean latents of some images, (n, C, h, w).
    """
    if len(latents) < 2:
        return 0.0
    coarse = coarse_layout(latents).unflatten(1, (latents.shape[1], -1))  # (n, C, 64)
    mean = coarse.mean(0)
    within = coarse.var(0, correction=1).mean(1)  # between images, (C,)
    # The mean of n images varies by a share of that on its own.
    between = mean.var(1, correction=0) - within / len(coarse)
    whole = (between.clamp_min(0) + within).mean()
    share = float(between.clamp_min(0).mean() / whole) if float(whole) else 0.0
    return share if share >= LEAST_ALIGNMENT else 0.0


def coarse_layout(latents: Tensor) -> Tensor:
    """Return what is coarse in latents, (n, C, h, w): the means of 8 × 8 fields, (n, C · 64), float32."""
    return adaptive_avg_pool2d(latents.float(), NUM_FIELDS).flatten(1)


def region_share(common: float, num_read: int) -> float:
    """Return how much of their weight regions get, in [0, 1], for images that are aligned as far as `common` says.

    It is a · (1 - a) for a head that sees the tokens' mean alone, which gains by regions most where about half of what
    is coarse is common to all images, and a² for one that sees more, which gains only where nearly all is.

    Args:
        common: What `alignment` says, a, in [0, 1].
        num_read: How many statistics of the tokens the head sees, counted from the mean.
    """
    return common * (1 - common if num_read == 1 else common)


def reference_range(common: float, num_read: int, num_train_images: int | None = None) -> tuple[float, float]:
    """Return the least and the largest log-SNR of timesteps whose features count in the targets.

    Below the range little is left of the image. Above it features show the image itself and agree on its details.
    From few labels a head cannot learn details, and in aligned images the coarse shape tells what they show. So from
    1,000 labelled images to 100 the upper end falls from 8 to 8 - 5 · min(1, 2a) for a head that sees the tokens' mean
    alone, and to 8 - 6 · a² for one that sees more.

    Args:
        common: What `alignment` says, a, in [0, 1].
        num_read: How many statistics of the tokens the head sees, counted from the mean.
        num_train_images: Labelled images that the head will learn from. None for many.
    """
    many, few = 1000, 100
    scarcity = 0.0 if num_train_images is None else math.log(many / max(1, num_train_images)) / math.log(many / few)
    fall = 5.0 * min(1.0, 2 * common) if num_read == 1 else 6.0 * common**2
    return LEAST_LOG_SNR, 8.0 - fall * min(1.0, max(0.0, scarcity))


def unexplained(left: Tensor, right: Tensor, variance: Tensor) -> Tensor:
    """Return by fold the squared error of predicting the shared targets, and their variance, (F, 2), float64.

    They are NaN where a sum is not finite.

    Args:
        left: Sums over images of (1, feature) × (1, feature), (F, 1 + d, 1 + d), by fold.
        right: The same of (1, feature) × shared target, (F, 1 + d, k).
        variance: Sum of the squared shared targets, (F,).
    """
    if not (left.isfinite().all() and right.isfinite().all()):
        # Some decompositions raise at NaN and some return it.
        return torch.full((len(left), 2), torch.nan, dtype=torch.float64)
    size = left.shape[1]
    count = float(left[:, 0, 0].sum())
    others, others_right = left.sum(0) - left, right.sum(0) - right
    scale = float(_centred(left.sum(0)).diagonal().mean())
    penalty = torch.eye(size, dtype=torch.float64)
    penalty[0, 0] = 0
    tiny = 1e-9 * (count + scale) * torch.eye(size, dtype=torch.float64)
    errors = []
    for strength in STRENGTHS:
        try:
            # Not `solve`: the pivots of its LU can be wrong, or without end, on two threads of some CPUs.
            factor = torch.linalg.cholesky(others + strength * scale * penalty + tiny)
            weights = torch.cholesky_solve(others_right, factor)
        except RuntimeError as error:  # a matrix that is singular
            raise ValueError(NO_DIFFERENCE) from error
        errors.append(variance - 2 * (weights * right).sum((1, 2)) + (weights * (left @ weights)).sum((1, 2)))
    best = min(errors, key=lambda error: float(error.sum()))
    return torch.stack([best, variance], dim=-1)


def leading_directions(target_moments: Tensor) -> Tensor:
    """Return what turns (1, u) into the leading whitened principal components of the targets, (1 + m, k).

    It is NaN where a moment is not finite.

    Raises:
        ValueError: If the targets are the same for all images, or there is only one.
    """
    if not target_moments.isfinite().all():
        return torch.full((len(target_moments), 1), torch.nan, dtype=torch.float64)
    count = float(target_moments[0, 0])
    if count < 2:
        raise ValueError(
            "`images` must hold at least 2 images, because the timestep is selected by how images differ; got 1."
        )
    mean = target_moments[0, 1:] / count
    values, vectors = torch.linalg.eigh(_centred(target_moments))
    # One reference alone adds some hundredths.
    if values[-1] <= 1e-9 * count:
        raise ValueError(NO_DIFFERENCE)
    # Fewer images have fewer directions.
    kept = min(NUM_COMPONENTS, max(1, int((values > 1e-6 * values[-1]).sum()) // 2))
    directions = vectors[:, -kept:] / values[-kept:].clamp_min(1e-12).sqrt()
    return torch.cat([-(mean @ directions)[None], directions])


def _parts(items: list[Item], size: int = NUM_TOGETHER) -> Iterator[list[Item]]:
    """Yield a list in parts."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _centred(moments: Tensor) -> Tensor:
    """Return the centred second moments, (d, d), of moments with a leading 1, (1 + d, 1 + d)."""
    centred: Tensor = moments[1:, 1:] - torch.outer(moments[1:, 0], moments[0, 1:]) / moments[0, 0]
    return centred


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat([values.new_ones(len(values), 1), values], dim=1)


def _scales(values: Tensor, part: slice, is_reference: bool) -> tuple[Tensor, Tensor, float, Tensor]:
    """Return mean and spread, (S, D), of statistics, (n, S, D), the weight of a part of them, and what they agree on.

    That is the Gram matrix, (n, n), of the standardised part, of norm 1; 0 for what is no reference.
    """
    mean, spread = values.mean(0), values.std(0, correction=0)
    # Less than that is the rounding of a feature which is the same for all images.
    rounding = 1e-5 * mean.abs().mean(-1, keepdim=True)
    is_still = bool(spread[0].mean() <= rounding[0])
    # A channel that is constant here could be anything elsewhere: it counts as far as the others vary.
    spread = spread.maximum(1e-3 * spread.mean(-1, keepdim=True)).maximum(rounding) + 1e-12
    standard = ((values - mean) / spread)[:, part].flatten(1)
    gram = standard @ standard.T
    if is_still or not is_reference:
        return mean, spread, 0.0, torch.zeros_like(gram)
    return mean, spread, 1 / float(gram.norm()) ** 0.5, gram / gram.norm()


def _layout_scales(layout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and spread, (P,), of layouts, (n, P), and the Gram matrix, (n, n), of the standardised ones.

    All fields of a channel have one spread. In aligned images those at the border hardly differ, and divided by a
    spread of their own a few images that reach the border would be most of the variance. A channel that is all but
    level in these images counts at most ten times as much as it varies beside the others.
    """
    mean = layout.mean(0)
    channels = layout.var(0, correction=0).unflatten(0, (-1, NUM_FIELDS**2)).mean(1).sqrt()
    spread = channels.maximum(0.1 * channels.mean()).repeat_interleave(NUM_FIELDS**2) + 1e-12
    standard = (layout - mean) / spread
    return mean, spread, standard @ standard.T


def _count_sketch(values: Tensor, total: Tensor, number: int) -> None:
    """Add each column of values, (B, d), with a random sign to a random column of a total, (B, m).

    It keeps inner products in the mean as a dense projection does, which for many regions would be a large one.
    """
    generator = torch.Generator().manual_seed(2_000_003 + number)
    places = torch.randint(total.shape[1], (values.shape[1],), generator=generator)
    signs = torch.randint(2, (values.shape[1],), generator=generator) * 2 - 1
    total.index_add_(1, places, values * signs)


def _sketch(rows: int, columns: int, number: int) -> Tensor:
    """Return a random projection, (rows, columns), that keeps inner products in the mean: the same each time."""
    generator = torch.Generator().manual_seed(1_000_003 + number)
    projection: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
    return projection
