"""The linear head that features and targets make: its weights, the scale of its logits, and its held-out accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .closed_form import ClosedForm, Moments, RowSpace, fit_ridge, fit_scale
from .feature_sums import NUM_FOLDS, Rows, add_rows
from .targets import MULTI, REGRESSION, Targets

# Limits on the held-out predictions that strengths are compared by: rows, and numbers per strength.
_NUM_COMPARED, _NUM_PREDICTED = 2**13, 2**20
# Limit on the predictions that the scale of the logits (a single number) is fitted to.
_NUM_FOR_SCALE = 2**14
# Those that are looked at at once.
_NUM_TOGETHER = 2**14


@dataclass(frozen=True)
class HeadSolution:
    """A linear head in closed form.

    Args:
        weight: Weight of the logits, (K, D), float64.
        bias: Their bias, (K,).
        strength: Strength of the ridge, see `closed_form.STRENGTHS`.
        scale: Factor by which predictions became logits.
        error: Squared error of held-out predictions, as a share of the targets' variance.
        accuracy: Share of held-out predictions that are right; None of a regression.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    scale: float
    error: float
    accuracy: float | None


def solve(moments: list[Moments] | None, rows: Rows, targets: Targets) -> HeadSolution:
    """Return the head with the strength and the scale that do best on rows that are held out, a fifth at a time.

    Args:
        moments: Sums over all rows by fold; None where `rows` are all rows.
        rows: All rows, or a sample.
        targets: How labels become targets.

    Raises:
        ValueError: As `fit_ridge`.
    """
    form = _regression(moments, rows, targets)
    scale, middle = 1.0, _middle(targets)
    if targets.kind != REGRESSION:
        some = _sample(rows, _NUM_FOR_SCALE)
        ((_, found),) = _held_out(form, some, targets)
        scale, _ = fit_scale(found, targets.table(some.targets), targets.is_exclusive)
    weight, bias = form.whole
    return HeadSolution(
        weight=scale * weight,
        bias=scale * (bias - middle),
        strength=form.strength,
        scale=scale,
        error=form.error,
        accuracy=_accuracy(form, rows, targets),
    )


def _regression(moments: list[Moments] | None, rows: Rows, targets: Targets) -> ClosedForm:
    """Return the regression, of moments, or of rows where all are kept."""
    width = rows.features.shape[1]
    if moments is not None:
        return _selected(moments, rows, targets)
    if len(rows) >= width:
        origin = rows.features.mean(0, dtype=torch.float64)
        moments = [Moments.empty(origin, targets.num_labels) for _ in range(NUM_FOLDS)]
        add_rows(moments, rows, targets)
        return _selected(moments, rows, targets)
    space = RowSpace.of_rows(rows.features, targets.sums(rows.targets)[0])
    inner = replace(rows, features=space.inside(rows.features))
    moments = [Moments.empty(torch.zeros(len(rows)), targets.num_labels) for _ in range(NUM_FOLDS)]
    add_rows(moments, inner, targets)
    form = _selected(moments, inner, targets, torch.ones(len(rows), dtype=torch.float64))
    return replace(form, whole=space.outside(form.whole), by_fold=[space.outside(each) for each in form.by_fold])


def _selected(moments: list[Moments], rows: Rows, targets: Targets, scale: Tensor | None = None) -> ClosedForm:
    """Return the regression of the strength that is best on held-out rows: by cross-entropy, of values by error."""
    if targets.kind == REGRESSION:
        return fit_ridge(moments, scale=scale)
    some = _sample(rows, min(_NUM_COMPARED, _NUM_PREDICTED // targets.num_labels))
    parts = [some[some.folds == number] for number in range(NUM_FOLDS)]
    wanted = targets.table(torch.cat([part.targets for part in parts]))
    middle = _middle(targets)

    def loss(predictions: Tensor) -> float:
        return fit_scale(predictions - middle, wanted, targets.is_exclusive)[1]

    return fit_ridge(moments, [part.features for part in parts], loss, scale=scale)


def _middle(targets: Targets) -> float:
    """Return what predictions are counted from: of several labels an image a half, so that what is likely is above."""
    return 0.5 if targets.kind == MULTI else 0.0


def _sample(rows: Rows, num: int) -> Rows:
    """Return some rows at random, always the same."""
    generator = torch.Generator().manual_seed(0)
    return rows if len(rows) <= num else rows[torch.randperm(len(rows), generator=generator)[:num]]


def _held_out(form: ClosedForm, rows: Rows, targets: Targets) -> Iterator[tuple[Rows, Tensor]]:
    """Yield some rows at a time, and what the solution without their fold predicts, (n, K), float64."""
    middle = _middle(targets)
    for start in range(0, len(rows), _NUM_TOGETHER):
        part = rows[slice(start, start + _NUM_TOGETHER)]
        folds, found = part.folds, torch.zeros(len(part), targets.num_labels, dtype=torch.float64)
        for number, (weight, bias) in enumerate(form.by_fold):
            own = folds == number
            found[own] = part.features[own].double() @ weight.T + (bias - middle)
        yield part, found


def _accuracy(form: ClosedForm, rows: Rows, targets: Targets) -> float | None:
    """Return the share of held-out predictions that are right; None of a regression."""
    if targets.kind == REGRESSION:
        return None
    hits = [targets.hits(found, part.targets) for part, found in _held_out(form, rows, targets)]
    return sum(right for right, _ in hits) / sum(count for _, count in hits)
