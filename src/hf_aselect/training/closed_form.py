"""Ridge regression from second moments, its strength by cross-validation, and the scale of its logits.

A linear layer that is fitted to targets by least squares with a penalty needs nothing of the rows but sums: of
feature × feature, feature × target and target². Kept by fold, they also give the exact squared error of each fold
under the solution of the other folds. So features of any number of images are read once, and no row is kept for it.
A strength costs one Cholesky decomposition a fold, which is a fifteenth of an eigendecomposition; of the strengths
every fourth is tried, then those around the best.

Of classes the squared error is not what counts: with few images it favours strengths that predict little of anything.
On a sample of the rows each strength is judged by the cross-entropy of its held-out predictions in place of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of the penalty, for standardized features and the mean over rows: scikit-learn's `alpha` divided by the rows. With
# 100 images of 1,024 features the best may be above 10, with 50,000 images below 1e-4.
STRENGTHS: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-14, 9))
# A feature that varies by less than this share of its mean varies by its rounding in float32.
ROUNDING = 1e-6
# The same of a target's variance, as a share of its mean square, summed up in float64.
TARGET_ROUNDING = 1e-14
# Of the logits' scale. From 1 on: a ridge's predictions lie between 0 and 1, so that at 1 all classes are about
# equally likely, which is what a head that has learned nothing says.
SCALES = (1.0, 1e4)
_STEP = 4  # of the strengths that are tried first
# Added to the variances, which are 1 or 0: the first so that constant features have a solution.
_JITTERS = (1e-12, 1e-9, 1e-6, 1e-3, 1.0)
Linear = tuple[Tensor, Tensor]  # weight (K, D) and bias (K,), float64


@dataclass
class Moments:
    """Weighted sums over some rows from which a ridge regression follows; sums of several sets of rows add up.

    Args:
        left: Sum of (1, feature) × (1, feature), (1 + D, 1 + D), float64.
        right: Sum of (1, feature) × target, (1 + D, K), float64.
        squares: Sum of target², (K,), float64.
        origin: What features are counted from, (D,), float64: near their mean, from which they may differ by little.
    """

    left: Tensor
    right: Tensor
    squares: Tensor
    origin: Tensor

    @classmethod
    def empty(cls, origin: Tensor, num_targets: int) -> "Moments":
        """Return the sums over no rows, whose features are counted from `origin`, (D,)."""
        size, origin = 1 + len(origin), origin.double()
        return cls(
            origin.new_zeros(size, size), origin.new_zeros(size, num_targets), origin.new_zeros(num_targets), origin
        )

    @property
    def weight(self) -> float:
        """Sum of the rows' weights."""
        return float(self.left[0, 0])

    @property
    def mean(self) -> Tensor:
        """Mean of the features, counted from the origin, (D,)."""
        return self.left[0, 1:] / self.left[0, 0]

    @property
    def target_mean(self) -> Tensor:
        """Mean of the targets, (K,)."""
        return self.right[0] / self.left[0, 0]

    def add(self, features: Tensor, weights: Tensor, targets: Tensor, squares: Tensor) -> None:
        """Add some rows.

        Args:
            features: Features, (n, D); computed in float64.
            weights: Weight of each row, (n,), at least 0.
            targets: Targets times the weight, (n, K).
            squares: Sum over the rows of target² times the weight, (K,).
        """
        rows = torch.cat([torch.ones(len(features), 1, dtype=torch.float64), features.double() - self.origin], dim=1)
        self.left += (rows * weights.double()[:, None]).T @ rows
        self.right += rows.T @ targets.double()
        self.squares += squares.double()

    def moved(self, origin: Tensor) -> "Moments":
        """Return the same sums with the features counted from another origin, (D,)."""
        shift = self.origin - origin
        left, right = self.left.clone(), self.right.clone()
        first = left[0, 1:]
        left[1:, 1:] += torch.outer(first, shift) + torch.outer(shift, first) + left[0, 0] * torch.outer(shift, shift)
        right[1:] += torch.outer(shift, right[0])
        left[0, 1:] += left[0, 0] * shift
        left[1:, 0] = left[0, 1:]
        return Moments(left, right, self.squares.clone(), origin.clone())

    @classmethod
    def combined(cls, parts: Sequence["Moments"]) -> "Moments":
        """Return the sums over the rows of all parts, counted from the origin of the first."""
        whole = parts[0].moved(parts[0].origin)
        for part in parts[1:]:
            if not torch.equal(part.origin, whole.origin):
                part = part.moved(whole.origin)
            whole.left += part.left
            whole.right += part.right
            whole.squares += part.squares
        return whole

    def without(self, part: "Moments") -> "Moments":
        """Return the sums over the rows that are not in a part, counted from the same origin."""
        return Moments(self.left - part.left, self.right - part.right, self.squares - part.squares, self.origin)

    def centred(self, mean: Tensor, target_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of feature × feature, (D, D), and feature × target, (D, K), counted from means.

        Args:
            mean: Counted from the origin, (D,).
            target_mean: Of the targets, (K,).
        """
        weight, first, targets = self.left[0, 0], self.left[0, 1:], self.right[0]
        products = self.left[1:, 1:] - torch.outer(first, mean) - torch.outer(mean, first)
        products += weight * torch.outer(mean, mean)
        cross = self.right[1:] - torch.outer(first, target_mean) - torch.outer(mean, targets)
        cross += weight * torch.outer(mean, target_mean)
        return products, cross

    def variation(self) -> Tensor:
        """Return the weighted sum over these rows of (target - its mean)², (K,); 0 where there is but rounding."""
        varied = self.squares - self.left[0, 0] * self.target_mean.square()
        return torch.where(varied > TARGET_ROUNDING * self.squares, varied, torch.zeros_like(varied))

    def squared_error(self, solution: Linear) -> Tensor:
        """Return the weighted sum over these rows of the squared error of a solution's predictions, (K,)."""
        weight, bias = solution
        # Counted from the origin, the predictions are (bias', weight) of (1, feature).
        whole = torch.cat([(bias + weight @ self.origin)[:, None], weight], dim=1)  # (K, 1 + D)
        return self.squares - 2 * (whole * self.right.T).sum(1) + (whole @ self.left * whole).sum(1)

    def scale(self) -> Tensor:
        """Return what standardizes the features, (D,): 1 / deviation, 0 for those that are the same in all rows."""
        variance = self.left.diagonal()[1:] / self.left[0, 0] - self.mean.square()
        return _inverse(variance.clamp_min(0).sqrt(), self.mean + self.origin)


def _inverse(deviation: Tensor, mean: Tensor) -> Tensor:
    """Return 1 / deviation of features, (D,); 0 for those that only vary by their rounding."""
    varies = deviation > ROUNDING * mean.abs()
    return torch.where(varies, 1 / deviation, torch.zeros_like(deviation))


@dataclass(frozen=True)
class ClosedForm:
    """A ridge regression whose strength was selected by cross-validation.

    Args:
        strength: The selected strength, see `STRENGTHS`.
        error: Squared error of predicting each fold from the others, as a share of the targets' variance; 1 is what
            predicting the mean gives. Without another loss it is the mean of the targets' own shares.
        losses: The error, or another loss, of each strength that was tried.
        whole: Weight and bias of the solution of all rows, in units of the features as they are.
        by_fold: Those of the solution without each fold.
    """

    strength: float
    error: float
    losses: dict[float, float]
    whole: Linear
    by_fold: list[Linear]


def fit_ridge(
    folds: Sequence[Moments],
    samples: Sequence[Tensor] | None = None,
    loss: Callable[[Tensor], float] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    scale: Tensor | None = None,
) -> ClosedForm:
    """Return the ridge regression of all folds, with the strength whose cross-validated loss is least.

    It is searched for from coarse to fine, which finds it where the loss has one minimum.

    Features are standardized by all rows, so that a penalty means the same for each; intercepts are not penalized.
    Each fold is predicted by the solution of the others, in which there is nothing of it but that standardization.

    Args:
        folds: Sums over the rows of each fold, with one origin.
        samples: Features of some rows of each fold, (m, D), for `loss`.
        loss: Takes the held-out predictions of all samples, in the order of the folds, (M, K), and returns the loss.
            Default: the squared error of all rows, divided by each target's variance, so that the unit of a target
            does not matter.
        strengths: The strengths to select from, each at least 0.
        scale: What the features are multiplied by first, (D,). Default: they are standardized.

    Raises:
        ValueError: If all features or all targets are constant, or there are fewer than two folds with rows.

    Example:
        folds = [Moments.empty(features[0], num_targets=3) for _ in range(5)]
        for number, fold in enumerate(folds):
            rows, one_hot = features[number::5], targets[number::5]
            fold.add(rows, torch.ones(len(rows)), one_hot, one_hot.square().sum(0))
        weight, bias = fit_ridge(folds).whole
    """
    total = Moments.combined(folds)
    scale = total.scale() if scale is None else scale
    if not bool(scale.any()):
        raise ValueError("The features are the same for all images. Check the images, or read a smaller timestep.")
    variation = total.variation()
    varied = variation > 0
    if not bool(varied.any()):
        raise ValueError("The labels are the same for all images, so there is nothing to predict.")
    if sum(fold.weight > 0 for fold in folds) < 2:
        raise ValueError(
            "There are too few images to hold some out and select the ridge strength on them. Pass more images."
        )
    parts = [(fold, None if samples is None else samples[number]) for number, fold in enumerate(folds)]

    def share(errors: Tensor) -> float:
        """Return squared errors of each target as a share of the variance."""
        if loss is not None:
            return float(errors.sum() / variation.sum())
        return float((errors[varied] / variation[varied]).mean())

    trials: dict[int, _Trial] = {}
    places = range(0, len(strengths), _STEP)
    step = _STEP
    while True:
        new = [place for place in places if place in range(len(strengths)) and place not in trials]
        if not new and step == 1:
            break
        if new:
            found = _trials(parts, total, scale, [strengths[place] for place in new])
            trials |= zip(new, (trial.judged(share(trial.errors), loss) for trial in found), strict=True)
        best = min(sorted(trials), key=lambda place: trials[place].loss)
        for place in trials.keys() - {best}:
            # Of many classes they are large.
            trials[place].solutions = []
        # Around the best; where that is better in turn, around that.
        step = max(1, step // 2)
        places = range(best - step, best + step + 1, step)
    return ClosedForm(
        strength=float(strengths[best]),
        error=trials[best].error,
        losses={float(strengths[place]): trials[place].loss for place in sorted(trials)},
        whole=_solutions(total, scale, [strengths[best]])[0],
        by_fold=trials[best].solutions,
    )


@dataclass
class _Trial:
    """A strength, judged by predicting each fold from the others.

    Args:
        errors: Squared error of each target, (K,), of all rows so far.
        error: What that is as a share of the variance, once it is judged.
        predictions: Predictions of the samples of each fold, (m, K), float32.
        solutions: The solution without each fold.
        loss: What strengths are compared by.
    """

    errors: Tensor
    error: float = 0.0
    predictions: list[Tensor] = field(default_factory=list)
    solutions: list[Linear] = field(default_factory=list)
    loss: float = 0.0

    def judged(self, error: float, loss: Callable[[Tensor], float] | None) -> "_Trial":
        """Return this with its error and its loss, and without the predictions."""
        found = error if loss is None else loss(torch.cat(self.predictions))
        return _Trial(self.errors, error, [], self.solutions, found)


def _trials(
    parts: Sequence[tuple[Moments, Tensor | None]], total: Moments, scale: Tensor, strengths: Sequence[float]
) -> list[_Trial]:
    """Return what each strength predicts of each fold, whose rows and sample `parts` holds, from the others."""
    trials = [_Trial(torch.zeros_like(total.squares)) for _ in strengths]
    for fold, sample in parts:
        solutions = _solutions(total.without(fold), scale, strengths)
        for trial, solution in zip(trials, solutions, strict=True):
            trial.solutions.append(solution)
            if fold.weight > 0:
                trial.errors += fold.squared_error(solution)
                if sample is not None:
                    weight, bias = solution
                    trial.predictions.append((sample.double() @ weight.T + bias).float())
    return trials


def _solutions(moments: Moments, scale: Tensor, strengths: Sequence[float]) -> list[Linear]:
    """Return weight, (K, D), and bias, (K,), of each strength, in units of the features as they are."""
    mean, target_mean = moments.mean, moments.target_mean
    products, cross = moments.centred(mean, target_mean)
    products *= torch.outer(scale, scale) / moments.weight
    cross *= scale[:, None] / moments.weight
    diagonal, found = products.diagonal().clone(), []
    for strength in strengths:
        # Products of features far from what they are counted from are rounded, and then not always positive.
        for jitter in _JITTERS:
            products.diagonal().copy_(diagonal + strength + jitter)
            factor, info = torch.linalg.cholesky_ex(products)
            if int(info) == 0:
                break
        # Not `solve`: the pivots of its LU can be wrong, or without end, on two threads of some CPUs.
        solution = torch.cholesky_solve(cross, factor)
        weight = (solution * scale[:, None]).T.contiguous()
        found.append((weight, target_mean - weight @ (mean + moments.origin)))
    return found


@dataclass(frozen=True)
class RowSpace:
    """Coordinates of the space that a few rows of many features span, once these are standardized.

    A ridge regression of the rows lies in it, and so do those of its folds. In the n coordinates they cost n³ and n²
    numbers, not D³ and D². The solutions are the same.

    Args:
        mean: Mean of the features, (D,), float64.
        scale: What standardizes them, (D,).
        basis: Orthonormal basis of the standardized rows, (D, n).
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor

    @classmethod
    def of_rows(cls, features: Tensor, weights: Tensor) -> "RowSpace":
        """Return the space of rows of features, (n, D) with n < D, of some weights, (n,)."""
        features, shares = features.double(), weights.double() / weights.double().sum()
        mean = shares @ features
        scale = _inverse((shares @ (features - mean).square()).sqrt(), mean)
        return cls(mean, scale, torch.linalg.qr(((features - mean) * scale).T).Q)

    def inside(self, features: Tensor) -> Tensor:
        """Return the coordinates of features, (m, D), float64, (m, n)."""
        coordinates: Tensor = ((features.double() - self.mean) * self.scale) @ self.basis
        return coordinates

    def outside(self, solution: Linear) -> Linear:
        """Return a solution in the coordinates as one in the features."""
        weight = solution[0] @ self.basis.T * self.scale
        return weight, solution[1] - weight @ self.mean


def fit_scale(predictions: Tensor, targets: Tensor, is_exclusive: bool) -> tuple[float, float]:
    """Return the factor by which predictions become logits, the one with the least cross-entropy, and that.

    The predictions are of rows that were held out. Least squares targets 0 and 1 leave the differences between
    predictions far below those of logits; a softmax of them would be almost even. Where the predictions are always
    right the cross-entropy falls without end, so one more row, of a class that nobody knows, is counted among them.

    Args:
        predictions: Predictions, (n, K); around 0 where classes are not exclusive.
        targets: Weight of each class in each row, (n, K), at least 0 (exclusive), or 0 and 1.
        is_exclusive: Whether the cross-entropy is that of a softmax; else of a sigmoid of each class.

    Returns:
        A factor in `SCALES`, and the mean cross-entropy at that, in nats.

    Source: temperature scaling, Guo et al., arXiv 1706.04599; the added row is Platt's, in "Probabilistic outputs for
        support vector machines", section 2.2.
    """
    wanted = targets.to(predictions.dtype)
    mass = wanted.sum(1, keepdim=True) if is_exclusive else torch.ones_like(wanted)
    doubt = 1 / (1 + float(mass.sum()))
    wanted = (1 - doubt) * wanted + doubt * mass / (wanted.shape[1] if is_exclusive else 2)

    def likely(scale: float) -> Tensor:
        return (scale * predictions).softmax(1) * mass if is_exclusive else (scale * predictions).sigmoid()

    def slope(scale: float) -> float:
        return float(((likely(scale) - wanted) * predictions).sum(dtype=torch.float64))

    # The cross-entropy is convex in the factor. Twelve halvings of its logarithm's range are within 0.2 %.
    low, high = SCALES
    for _ in range(12 if slope(low) < 0 else 0):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    scale = low if low == SCALES[0] else (low * high) ** 0.5
    logits = scale * predictions
    if is_exclusive:
        surprise = -(wanted * logits.log_softmax(1)).sum(dtype=torch.float64)
    else:
        surprise = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    return scale, float(surprise) / float(mass.sum())
