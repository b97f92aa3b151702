"""Ridge regression from moments, against scikit-learn and against the rows themselves."""

import re

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import PredefinedSplit
from sklearn.preprocessing import StandardScaler

from hf_aselect.selection.distribution import Share
from hf_aselect.training import feature_sums
from hf_aselect.training.closed_form import (
    SCALES,
    STRENGTHS,
    Moments,
    RowSpace,
    fit_ridge,
    fit_scale,
)
from hf_aselect.training.feature_sums import NUM_FOLDS, FeatureSums, Rows, add_rows, check_memory, folds_of
from hf_aselect.training.head_solution import solve
from hf_aselect.training.targets import DENSE, MULTI, REGRESSION, SINGLE, Targets, targets_of_masks

# Sums of a few hundred products in float64, against scikit-learn's other order of them.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def random_rows(num=120, width=7, classes=3, seed=0, signal=1.0):
    """Features in very different units, around a mean that is far from 0, and class indices that they tell of."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    means = signal * torch.randn(classes, width, generator=generator)
    features = (means[labels] + torch.randn(num, width, generator=generator)) * torch.logspace(-2, 2, width)
    return (features + 30).float(), labels


def table(labels, classes=3):
    return torch.nn.functional.one_hot(labels, classes).double()


def by_fold(features, targets, weights=None, folds=5):
    weights = torch.ones(len(features), dtype=torch.float64) if weights is None else weights
    made = [Moments.empty(features[0], targets.shape[1]) for _ in range(folds)]
    for number, fold in enumerate(made):
        rows = slice(number, None, folds)
        part, weight = targets[rows], weights[rows]
        fold.add(features[rows], weight, part * weight[:, None], (part.square() * weight[:, None]).sum(0))
    return made


def ridge(features, targets, strength, weights=None, reference=None):
    """scikit-learn's weight and bias on features standardized by a reference, in units of the features."""
    scaler = StandardScaler().fit(*(reference or (features.double(), None, weights)))
    total = len(features) if weights is None else float(weights.sum())
    found = Ridge(alpha=strength * total).fit(scaler.transform(features.double()), targets, weights)
    weight = found.coef_ / scaler.scale_
    return torch.from_numpy(weight), torch.from_numpy(found.intercept_ - weight @ scaler.mean_)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 30.0])
def test_the_solution_is_that_of_scikit_learn(strength):
    features, labels = random_rows()
    form = fit_ridge(by_fold(features, table(labels)), strengths=[strength])
    for found, expected in zip(form.whole, ridge(features, table(labels), strength), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    for number, found in enumerate(form.by_fold):
        others = torch.arange(len(labels)) % 5 != number
        scaled_by_all = (features.double(), None, None)
        expected = ridge(features[others], table(labels)[others], strength, reference=scaled_by_all)
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
        torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_weights_count_rows_as_often():
    features, labels = random_rows()
    weights = torch.rand(len(labels), dtype=torch.float64) + 0.1
    form = fit_ridge(by_fold(features, table(labels), weights), strengths=[0.05])
    for found, expected in zip(form.whole, ridge(features, table(labels), 0.05, weights), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_the_strength_is_the_one_that_cross_validation_selects():
    features, labels = random_rows(num=60, width=20)
    form = fit_ridge(by_fold(features, table(labels)))
    # Folds of one size: what is left has 48 rows.
    alphas = np.array(STRENGTHS) * 48
    search = RidgeCV(alphas, scoring="neg_mean_squared_error", cv=PredefinedSplit(np.arange(60) % 5))
    # Of each target the error counts as a share of its variance.
    search.fit(StandardScaler().fit_transform(features.double()), StandardScaler().fit_transform(table(labels)))
    assert form.strength == pytest.approx(search.alpha_ / 48)
    assert STRENGTHS[0] < form.strength < STRENGTHS[-1]
    assert form.error == pytest.approx(-search.best_score_, rel=1e-6)


def test_both_of_two_strengths_are_tried():
    features, labels = random_rows(num=60, width=20)
    form = fit_ridge(by_fold(features, table(labels)), strengths=[1e4, 1e-3])
    assert form.losses.keys() == {1e4, 1e-3} and form.strength == 1e-3


def test_another_loss_selects_the_strength_by_held_out_predictions():
    features, labels = random_rows(num=60, width=20)
    folds = by_fold(features, table(labels))
    samples = [features[number::5] for number in range(5)]
    held = torch.cat([labels[number::5] for number in range(5)])
    seen = []

    def loss(predictions):
        seen.append(predictions)
        return float((predictions.argmax(1) != held).double().mean())

    form = fit_ridge(folds, samples, loss)
    losses = [float((each.argmax(1) != held).double().mean()) for each in seen]
    assert sorted(form.losses.values()) == sorted(losses) and len(losses) < len(STRENGTHS)
    assert form.losses[form.strength] == min(losses)
    by_hand = torch.cat([samples[n].double() @ weight.T + bias for n, (weight, bias) in enumerate(form.by_fold)])
    assert any(torch.allclose(each.double(), by_hand, rtol=1e-4, atol=1e-5) for each in seen)


def test_sums_of_parts_add_up_whatever_they_are_counted_from():
    features, labels = random_rows()
    (whole,) = by_fold(features, table(labels), folds=1)
    parts = by_fold(features, table(labels), folds=3)
    moved = Moments.combined([parts[0].moved(features[5].double()), parts[1], parts[2].moved(torch.zeros(7))])
    assert not torch.equal(moved.origin, whole.origin)
    again = moved.moved(whole.origin)
    for name in ("left", "right", "squares"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=1e-9, atol=1e-6)
    rest = whole.without(parts[0])
    torch.testing.assert_close(rest.left, parts[1].left + parts[2].left, rtol=1e-9, atol=1e-6)


def test_a_mean_that_dwarfs_the_differences_changes_nothing():
    """As at large timesteps, where the noise is the same for all images."""
    features, labels = random_rows()
    small = features - 30
    expected = fit_ridge(by_fold(small, table(labels)), strengths=[0.01])
    shifted = small.double() + 3000
    found = fit_ridge(by_fold(shifted, table(labels)), strengths=[0.01])
    torch.testing.assert_close(found.whole[0], expected.whole[0], rtol=1e-6, atol=1e-8)
    assert found.error == pytest.approx(expected.error, rel=1e-6)


def test_features_counted_from_far_away_are_solved_as_well_as_rounding_allows():
    """Their products are rounded so that they are no longer positive."""
    features, labels = random_rows()
    small = features.double() / features.std(0)
    small = torch.cat([small, small.roll(1, 1) + small], 1)
    far = [each.moved(torch.zeros(14, dtype=torch.float64)) for each in by_fold(small + 3e5, table(labels))]
    expected = fit_ridge(by_fold(small, table(labels)), strengths=[1e-7])
    found = fit_ridge(far, strengths=[1e-7])
    assert found.error == pytest.approx(expected.error, rel=0.2)


def test_few_rows_of_many_features_are_solved_in_their_own_space():
    features, labels = random_rows(num=30, width=200)
    expected = fit_ridge(by_fold(features, table(labels)), strengths=[0.3])
    space = RowSpace.of_rows(features, torch.ones(30))
    assert space.basis.shape == (200, 30)
    inside = by_fold(space.inside(features), table(labels))
    found = fit_ridge(inside, strengths=[0.3], scale=torch.ones(30, dtype=torch.float64))
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    for one, other in zip([found.whole, *found.by_fold], [expected.whole, *expected.by_fold], strict=True):
        weight, bias = space.outside(one)
        torch.testing.assert_close(weight, other[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(bias, other[1], rtol=1e-6, atol=1e-8)


def test_features_that_are_constant_get_no_weight():
    features, labels = random_rows()
    features[:, 2] = 1000.1
    weight, _ = fit_ridge(by_fold(features, table(labels))).whole
    assert not weight[:, 2].any() and bool(weight[:, 3].any())
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(weight[:, others], fit_ridge(by_fold(features[:, others], table(labels))).whole[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda features, labels: (features * 0 + 3, labels), "The features are the same for all images"),
        (lambda features, labels: (features, labels * 0), "The labels are the same for all images"),
        (lambda features, labels: (features[:1], labels[:1]), "The features are the same"),
    ],
)
def test_what_cannot_be_regressed_is_rejected(change, words):
    features, labels = change(*random_rows())
    with pytest.raises(ValueError, match=words):
        fit_ridge(by_fold(features, table(labels)))


def test_at_least_two_folds_have_rows():
    features, labels = random_rows()
    filled, *_ = by_fold(features, table(labels), folds=1)
    with pytest.raises(ValueError, match="There are too few images to hold some out"):
        fit_ridge([filled, Moments.empty(filled.origin, 3)])


def cross_entropy(scale, predictions, labels):
    return float(torch.nn.functional.cross_entropy(scale * predictions, labels))


def test_the_scale_has_the_least_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (3000,), generator=generator)
    predictions = (0.1 * torch.randn(3000, 4, generator=generator)).double() + 0.15 * table(labels, 4)
    scale, loss = fit_scale(predictions, table(labels, 4), is_exclusive=True)
    best = minimize_scalar(lambda each: cross_entropy(each, predictions, labels), bounds=(1, 100), method="bounded")
    # One row that nobody knows is among 3,001.
    assert scale == pytest.approx(best.x, rel=0.01)
    assert loss == pytest.approx(best.fun, rel=0.01)
    # Rows of a weight count as often.
    twice = torch.cat([predictions, predictions[:500]]), torch.cat([table(labels, 4), table(labels, 4)[:500]])
    weighted = table(labels, 4)
    weighted[:500] *= 2
    assert fit_scale(predictions, weighted, True)[0] == pytest.approx(fit_scale(*twice, True)[0], rel=1e-4)


def test_predictions_that_are_always_right_get_a_scale_that_is_finite():
    labels = torch.arange(100) % 10
    scale, _ = fit_scale(table(labels, 10), table(labels, 10), is_exclusive=True)
    likely = (scale * table(labels, 10)).softmax(1).max(1).values
    assert 0.98 < float(likely[0]) < 0.995, "as sure as after 100 images of which none was wrong"


def test_predictions_that_say_nothing_keep_the_least_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (500,), generator=generator)
    predictions = torch.randn(500, 4, generator=generator)
    assert fit_scale(predictions - table(labels, 4), table(labels, 4), is_exclusive=True)[0] == SCALES[0]


def test_the_scale_of_labels_that_are_not_exclusive_is_that_of_a_sigmoid():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(2000, 3, generator=generator) < 0.4).double()
    predictions = 0.2 * (targets - 0.5) + 0.1 * torch.randn(2000, 3, generator=generator)
    scale, loss = fit_scale(predictions, targets, is_exclusive=False)

    def entropy(each):
        return float(torch.nn.functional.binary_cross_entropy_with_logits(each * predictions, targets))

    best = minimize_scalar(entropy, bounds=(1, 100), method="bounded")
    assert scale == pytest.approx(best.x, rel=0.01)
    assert loss == pytest.approx(best.fun, rel=0.01)


def test_folds_do_not_follow_classes_that_take_turns():
    images = torch.arange(1000)
    folds = folds_of(images)
    assert folds.bincount().tolist() == [200] * NUM_FOLDS
    assert all(folds[start : start + 5].sort().values.tolist() == list(range(5)) for start in range(0, 1000, 5))
    labels = images % 5
    for fold in range(NUM_FOLDS):
        assert labels[folds == fold].bincount(minlength=5).min() > 20
    assert torch.equal(folds_of(images[300:310]), folds[300:310]), "a function of the image alone"


def rows_of(features, targets):
    numbers = torch.arange(len(features))
    return Rows(features, targets, numbers, numbers << 20)


def sums_of(rows, targets, batch=32, kept_bytes=2**28, order=None):
    sums = FeatureSums(rows.features.shape[1], targets.num_labels, kept_bytes)
    rows = rows if order is None else rows[order]
    for start in range(0, len(rows), batch):
        sums.add(rows[slice(start, start + batch)], targets)
    return sums.gathered(Share())


def test_many_rows_become_moments_and_a_sample():
    features, labels = random_rows(num=3000)
    rows, targets = rows_of(features, labels), Targets(SINGLE, 3)
    moments, kept = sums_of(rows, targets)
    assert moments is None and torch.equal(kept.features, features)
    moments, kept = sums_of(rows, targets, kept_bytes=rows.num_bytes // 3)
    direct = [Moments.empty(features.double().mean(0), 3) for _ in range(NUM_FOLDS)]
    add_rows(direct, rows, targets)
    for found, expected in zip(moments, direct, strict=True):
        torch.testing.assert_close(found.moved(expected.origin).left, expected.left, rtol=1e-9, atol=1e-5)
        torch.testing.assert_close(found.moved(expected.origin).right, expected.right, rtol=1e-9, atol=1e-5)
    # A quarter, of all parts of the set, and the same however they come.
    assert len(kept) == pytest.approx(750, abs=100)
    assert len(kept[kept.images < 1000]) == pytest.approx(250, abs=60)
    _, shuffled = sums_of(rows, targets, 7, rows.num_bytes // 3, torch.randperm(3000))
    assert torch.equal(shuffled.numbers, kept.numbers) and torch.equal(shuffled.features, kept.features)


def test_a_head_of_moments_is_that_of_the_rows():
    features, labels = random_rows(num=3000)
    rows, targets = rows_of(features, labels), Targets(SINGLE, 3)
    kept = solve(*sums_of(rows, targets), targets)
    summed = solve(*sums_of(rows, targets, kept_bytes=rows.num_bytes // 3), targets)
    assert summed.accuracy == pytest.approx(kept.accuracy, abs=0.03)
    # The strength is selected on a quarter of the rows, and the cross-entropy of several is almost the same.
    guesses = [(features.double() @ each.weight.T + each.bias).argmax(1) for each in (kept, summed)]
    assert float((guesses[0] == guesses[1]).double().mean()) > 0.97


def test_the_held_out_accuracy_is_that_of_new_images():
    features, labels = random_rows(num=4200, width=40, seed=3, signal=0.25)
    rows, targets = rows_of(features[:200], labels[:200]), Targets(SINGLE, 3)
    solution = solve(*sums_of(rows, targets), targets)
    logits = features[200:].double() @ solution.weight.T + solution.bias
    accuracy = float((logits.argmax(1) == labels[200:]).double().mean())
    # 200 images: 3 points of standard error.
    assert 0.6 < accuracy < 0.9 and solution.accuracy == pytest.approx(accuracy, abs=0.08)
    # As sure as it is right.
    assert float(logits.softmax(1).max(1).values.mean()) == pytest.approx(accuracy, abs=0.08)
    worse = cross_entropy(0.3, logits, labels[200:]), cross_entropy(3.0, logits, labels[200:])
    assert cross_entropy(1.0, logits, labels[200:]) < min(worse)


def test_labels_that_say_nothing_are_not_learned_by_heart():
    """Few images of many features: without a penalty every label is fitted exactly."""
    features, _ = random_rows(num=100, width=1024)
    labels = torch.randint(10, (100,), generator=torch.Generator().manual_seed(5))
    targets = Targets(SINGLE, 10)
    solution = solve(*sums_of(rows_of(features, labels), targets), targets)
    assert solution.accuracy < 0.25
    likely = (features.double() @ solution.weight.T + solution.bias).softmax(1)
    assert float(likely.max(1).values.mean()) < 0.5


def test_several_labels_and_values_are_solved_too():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    marks = (features @ torch.randn(6, 3, generator=generator) + 0.5 > 0).float()
    targets = Targets(MULTI, 3)
    solution = solve(*sums_of(rows_of(features, marks), targets), targets)
    logits = features.double() @ solution.weight.T + solution.bias
    assert solution.accuracy > 0.85 and float(((logits > 0) == (marks > 0.5)).double().mean()) > 0.85
    values = features @ torch.randn(6, 2, generator=generator) + 7 + 0.1 * torch.randn(400, 2, generator=generator)
    targets = Targets(REGRESSION, 2)
    solution = solve(*sums_of(rows_of(features, values), targets), targets)
    assert (solution.scale, solution.accuracy) == (1.0, None) and solution.error < 0.02
    torch.testing.assert_close(
        features.double() @ solution.weight.T + solution.bias, values.double(), atol=0.5, rtol=0
    )


def test_balanced_classes_weigh_the_same():
    targets = Targets(SINGLE, 3).balanced(torch.tensor([90.0, 10.0, 0.0]))
    weights, products, squares = targets.sums(torch.tensor([0] * 90 + [1] * 10))
    assert products.sum(0).tolist() == pytest.approx([50, 50, 0])
    assert float(weights.sum()) == pytest.approx(100) and torch.equal(squares, products.sum(0))


def test_a_token_has_the_classes_of_its_pixels():
    from types import SimpleNamespace

    mask = torch.tensor([[0, 0, 1, 2], [0, 2, 1, 255], [255, 255, 1, 1], [255, 255, 2, 2]])
    config = SimpleNamespace(num_labels=3, semantic_loss_ignore_index=255)
    found = targets_of_masks(mask[None], torch.zeros(1, 3, 4, 4), (2, 2), config)
    expected = [[0.75, 0, 0.25], [0, 0.5, 0.25], [0, 0, 0], [0, 0.5, 0.5]]
    assert found.tolist() == expected
    # As many rows as there are pixels, each with the features of its token.
    weights, products, squares = Targets(DENSE, 3).sums(found)
    assert weights.tolist() == [1, 0.75, 0, 1] and squares.tolist() == [0.75, 1, 1]
    assert torch.equal(products, found.double())


def test_moments_beyond_the_memory_are_rejected_before_they_are_made(monkeypatch):
    monkeypatch.setattr(feature_sums, "available_memory", lambda: 10**9)
    check_memory(1024, 10)
    with pytest.raises(ValueError, match=r"width 20000 need 5\d\.\d GB of memory, but 1\.0 GB are available"):
        check_memory(20_000, 10)
    sums = FeatureSums(20_000, 2, kept_bytes=10**5)
    few = rows_of(torch.zeros(1, 20_000), torch.zeros(1, dtype=torch.long))
    sums.add(few, Targets(SINGLE, 2))
    with pytest.raises(ValueError, match=r"at most \d+ images \(`max_images=`\)"):
        sums.add(few, Targets(SINGLE, 2))


def test_the_memory_of_this_machine_is_known():
    assert 2**24 < feature_sums.available_memory() < 2**50


def test_rows_that_are_kept_need_memory_for_their_number_or_their_width(monkeypatch):
    monkeypatch.setattr(feature_sums, "available_memory", lambda: 10**9)
    check_memory(20_000, 10, num_rows=1000)
    # They take 256 MB, and their moments many times that.
    with pytest.raises(ValueError, match=r"need 8.\d GB of memory, but 1.0 GB are .* at most (\d+) images") as some:
        check_memory(8000, 10, num_rows=8100)
    most = int(re.search(r"at most (\d+) images", str(some.value))[1])
    check_memory(8000, 10, num_rows=most)
    # A segmenter's rows are its tokens.
    with pytest.raises(ValueError, match=f"at most {most // 64} images"):
        check_memory(8000, 10, num_rows=8100, rows_per_image=64)
