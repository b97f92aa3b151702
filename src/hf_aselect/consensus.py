"""How much of what a transformer's features agree on can be read linearly from one of them: sums, and R² from sums.

Every timestep and tap is a view of the same pictures. What many views share is the pictures' content; what only one
shows is noise, or detail of no use. Here the shared part is the leading principal components of the means of all
reference features together, each centred, standardised and weighted equally; a feature scores by the share of their
variance that a ridge regression predicts from its pooled tokens, for pictures that it was not fitted to. Pooled are
the tokens' mean and, for a reader that sees more than that, their standard deviation, too.
"""

import torch
from torch import Tensor

NUM_COMPONENTS = 20
# Sketches keep inner products to about 1 / sqrt(size).
MAX_FEATURES = 192
# Strengths of the ridge as shares of the mean eigenvalue of the standardised features' covariance.
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 1))

Key = tuple[int, int, str]  # timestep, block, feature


class ConsensusSums:
    """Second moments of features and shared targets, by fold of the pictures; nothing else of a feature is kept.

    Args:
        num_folds: Picture `index % num_folds` is predicted from the pictures of the other folds.
        num_targets: Size of the sketch of all reference features.
        num_read: How many of the pooled statistics are predicted from, counted from the first, which is the mean.
    """

    def __init__(self, num_folds: int, num_targets: int, num_read: int = 1) -> None:
        self.num_folds, self.num_targets, self.num_read = num_folds, num_targets, num_read
        self.scales: dict[Key, tuple[Tensor, Tensor, float]] = {}
        self.targets: dict[int, Tensor] = {}  # by picture, (num_targets,): what timesteps read later are held against
        self.moments: dict[int, Tensor] = {}  # by timestep, (F, 1 + d, 1 + d + m), float64: a small ridge needs it
        self.target_moments = torch.zeros(num_folds, 1 + num_targets, 1 + num_targets, dtype=torch.float64)

    def calibrate(self, pooled: dict[Key, Tensor]) -> None:
        """Take mean, spread and weight of each reference feature from some pictures' statistics, (n, S, D)."""
        for key, values in pooled.items():
            mean, spread = values.mean(0), values.std(0, correction=0)  # (S, D)
            # A channel that is constant here could be anything elsewhere: it counts as far as the others vary.
            spread = spread.maximum(1e-3 * spread.mean(-1, keepdim=True) + 1e-12)
            standard = ((values - mean) / spread)[:, 0]
            weight = 1 / max(float((standard @ standard.T).norm()), 1e-12) ** 0.5
            self.scales[key] = mean, spread, weight

    def add_targets(self, indices: list[int], reference: dict[Key, Tensor]) -> None:
        """Sketch the means of reference features, (B, S, D) each, of some pictures into their targets."""
        total = torch.zeros(len(indices), self.num_targets)
        for number, (key, (mean, spread, weight)) in enumerate(sorted(self.scales.items())):
            standard = ((reference[key] - mean) / spread)[:, 0] * weight
            total += standard @ _sketch(standard.shape[1], self.num_targets, number)
        self.targets.update(zip(indices, total, strict=True))
        self._accumulate(self.target_moments, indices, _with_ones(total), _with_ones(total))

    def add(self, timestep: int, indices: list[int], pooled: Tensor, like: Key) -> None:
        """Add the statistics, (B, S, D), of pictures whose targets are known.

        Args:
            timestep: Where they were read.
            indices: Which pictures they are of.
            pooled: Statistics of their tokens, (B, S, D).
            like: Reference feature whose mean and spread are near enough: they only set the scale.
        """
        mean, spread, _ = self.scales[like]
        standard = ((pooled - mean) / spread)[:, : self.num_read].flatten(1)
        if standard.shape[1] > MAX_FEATURES:
            standard = standard @ _sketch(standard.shape[1], MAX_FEATURES, -1)
        features = _with_ones(standard)
        both = torch.cat([features, torch.stack([self.targets[index] for index in indices])], dim=1)
        if timestep not in self.moments:
            size = self.num_folds, features.shape[1], both.shape[1]
            self.moments[timestep] = torch.zeros(size, dtype=torch.float64)
        self._accumulate(self.moments[timestep], indices, features, both)

    def _accumulate(self, sums: Tensor, indices: list[int], left: Tensor, right: Tensor) -> None:
        folds = torch.tensor(indices) % self.num_folds
        for fold in folds.unique().tolist():
            sums[fold] += left[folds == fold].double().T @ right[folds == fold].double()


def unexplained(moments: Tensor, target_moments: Tensor, directions: Tensor) -> Tensor:
    """Return by fold the squared error of predicting the shared targets, and their variance, (F, 2), float64.

    Args:
        moments: Sums over pictures of feature × (feature, target), (F, 1 + d, 1 + d + m), by fold, the 1 for the mean.
        target_moments: The same of target × target, (F, 1 + m, 1 + m).
        directions: What `leading_directions` made of these, summed over the folds, (1 + m, k).
    """
    size = moments.shape[1]
    count = float(target_moments.sum(0)[0, 0])
    # One picture's whitened target is (1, u) · directions.
    right = torch.cat([moments[:, :, :1], moments[:, :, size:]], dim=2) @ directions  # (F, 1 + d, k)
    variance = torch.einsum("mk,fmn,nk->f", directions, target_moments, directions)
    left = moments[:, :, :size]  # (F, 1 + d, 1 + d)
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
            raise ValueError(
                "The pictures do not differ, and a timestep is chosen by what differs. Give others."
            ) from error
        errors.append(variance - 2 * (weights * right).sum((1, 2)) + (weights * (left @ weights)).sum((1, 2)))
    best = min(errors, key=lambda error: float(error.sum()))
    return torch.stack([best, variance], dim=-1)


def leading_directions(target_moments: Tensor) -> Tensor:
    """Return what turns (1, u) into the leading whitened principal components of the targets, (1 + m, k)."""
    count = target_moments[0, 0]
    mean = target_moments[0, 1:] / count
    values, vectors = torch.linalg.eigh(_centred(target_moments))
    # Fewer pictures have fewer directions.
    kept = min(NUM_COMPONENTS, max(1, int((values > 1e-6 * values[-1]).sum()) // 2))
    directions = vectors[:, -kept:] / values[-kept:].clamp_min(1e-12).sqrt()
    return torch.cat([-(mean @ directions)[None], directions])


def _centred(moments: Tensor) -> Tensor:
    """Return the centred second moments, (d, d), of moments with a leading 1, (1 + d, 1 + d)."""
    centred: Tensor = moments[1:, 1:] - torch.outer(moments[1:, 0], moments[0, 1:]) / moments[0, 0]
    return centred


def _with_ones(values: Tensor) -> Tensor:
    return torch.cat([values.new_ones(len(values), 1), values], dim=1)


def _sketch(rows: int, columns: int, number: int) -> Tensor:
    """Return a random projection, (rows, columns), that keeps inner products in the mean: the same each time."""
    generator = torch.Generator().manual_seed(1_000_003 + number)
    projection: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
    return projection
