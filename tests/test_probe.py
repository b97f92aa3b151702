import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import one_hot

from hf_aselect.selection.probe import STRENGTHS, _best_ridge, held_out_hits, leave_one_out_hits, ridge_probe_accuracy


def blobs(num_pictures, seed, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_pictures) % 3
    centres = 3 * torch.eye(3, 6)
    return centres[labels] + spread * torch.randn(num_pictures, 6, generator=generator), labels


def test_separate_classes_are_told_apart():
    assert ridge_probe_accuracy(*blobs(90, 0), *blobs(60, 1)) == 1.0


def test_features_without_information_give_chance():
    features, labels = torch.randn(600, 6, generator=torch.Generator().manual_seed(0)), torch.arange(600) % 3
    assert abs(ridge_probe_accuracy(features[:300], labels[:300], features[300:], labels[300:]) - 1 / 3) < 0.1


def test_the_scale_and_place_of_a_feature_do_not_matter():
    (train, train_labels), (test, test_labels) = blobs(90, 0, 3.0), blobs(300, 1, 3.0)
    scale, shift = torch.tensor([1e-3, 1.0, 1e3, 5.0, 0.1, 2.0]), torch.arange(6.0)
    plain = ridge_probe_accuracy(train, train_labels, test, test_labels)
    assert ridge_probe_accuracy(train * scale + shift, train_labels, test * scale + shift, test_labels) == plain


def test_a_constant_feature_does_no_harm():
    (train, train_labels), (test, test_labels) = blobs(90, 0), blobs(60, 1)
    with_constant = [torch.cat([f, torch.ones(len(f), 1)], dim=1) for f in (train, test)]
    assert ridge_probe_accuracy(with_constant[0], train_labels, with_constant[1], test_labels) == 1.0


def test_the_strength_is_the_one_that_leaving_each_picture_out_prefers():
    """Against scikit-learn: 40 noisy images, each predicted by a ridge that was fitted on the other 39."""
    features, labels = blobs(40, 0, 3.0)
    features = ((features - features.mean(0)) / features.std(0)).double()
    targets = one_hot(labels).double() * 2 - 1
    targets = targets - targets.mean(0)
    scale = torch.linalg.eigvalsh(features.T @ features).mean()
    errors = {}
    for exponent in range(-6, 3):
        ridge = Ridge(alpha=float(scale) * 10.0**exponent)
        squares = []
        for left_out in range(40):
            rest = [index for index in range(40) if index != left_out]
            predicted = ridge.fit(features[rest], targets[rest]).predict(features[left_out][None])
            squares.append(((predicted - targets[left_out].numpy()) ** 2).mean())
        errors[exponent] = sum(squares)
    best = float(scale) * 10.0 ** min(errors, key=errors.get)
    expected = Ridge(alpha=best).fit(features, targets).coef_.T
    torch.testing.assert_close(_best_ridge(features, targets)[0], torch.from_numpy(expected))


def test_shapes_that_do_not_fit_are_refused():
    features, labels = blobs(30, 0)
    with pytest.raises(ValueError, match="must have shapes"):
        ridge_probe_accuracy(features, labels, features[:, :2], labels)
    with pytest.raises(ValueError, match="one label per row"):
        ridge_probe_accuracy(features, labels[:5], features, labels)


def test_a_single_class_is_refused():
    features = torch.randn(10, 3)
    with pytest.raises(ValueError, match="at least 2 classes"):
        ridge_probe_accuracy(features, torch.zeros(10).long(), features, torch.zeros(10).long())


def test_leaving_each_picture_out_is_training_on_the_others():
    """Against scikit-learn at the strength that was selected, which is found by trying all."""
    features, labels = blobs(40, 0, 3.0)
    standard = ((features - features.mean(0)) / features.std(0)).double()
    targets = one_hot(labels).double() * 2 - 1
    scale = float(torch.linalg.eigvalsh(standard.T @ standard).mean())
    found = leave_one_out_hits(features, labels).tolist()
    candidates = []
    for exponent in range(-6, 3):
        ridge, hits = Ridge(alpha=scale * 10.0**exponent), []
        for left_out in range(40):
            rest = [index for index in range(40) if index != left_out]
            predicted = ridge.fit(standard[rest], targets[rest]).predict(standard[left_out][None])[0]
            hits.append(bool(predicted.argmax() == labels[left_out]))
        candidates.append(hits)
    assert found in candidates
    assert 0 < sum(found) < 40


@pytest.mark.parametrize("labels", [torch.zeros(5, dtype=torch.long), torch.arange(4)])
def test_a_probe_without_classes_or_labels_is_refused(labels):
    with pytest.raises(ValueError, match=r"one label per row|at least 2 classes"):
        leave_one_out_hits(torch.rand(5, 3), labels)


def test_held_out_hits_are_those_of_a_classifier_of_the_other_folds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    features = torch.randn(120, 6, generator=generator)
    features[:, 0] += 2 * labels
    folds = torch.arange(120) % 4
    hits = held_out_hits(features, labels, folds)
    assert 0.5 < float(hits.double().mean()) < 1
    # By hand, at the strength that is best on what is left out.
    standard = (features.double() - features.double().mean(0)) / features.double().std(0)
    targets = torch.nn.functional.one_hot(labels).double() * 2 - 1
    offset = targets.mean(0)
    found = []
    for strength in STRENGTHS:
        predicted = torch.zeros_like(targets)
        for fold in range(4):
            out = folds == fold
            left = standard[~out]
            moments = left.T @ left
            ridge = strength * moments.diagonal().mean() * torch.eye(6, dtype=torch.float64)
            weights = torch.linalg.solve(moments + ridge, left.T @ (targets - offset)[~out])
            predicted[out] = standard[out] @ weights
        found.append((float((predicted - targets + offset).square().mean()), predicted))
    best = min(found, key=lambda pair: pair[0])[1]
    assert torch.equal(hits, (best + offset).argmax(1) == labels)


def test_what_comes_together_is_left_out_together():
    """Rows of an image tell of each other: left out one by one, they would be told right."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.arange(40).repeat_interleave(4)
    features = torch.randn(40, 60, generator=generator)[pictures] + 0.01 * torch.randn(160, 60, generator=generator)
    labels = torch.randint(0, 2, (40,), generator=generator)[pictures]
    assert float(leave_one_out_hits(features, labels).double().mean()) > 0.9
    assert float(held_out_hits(features, labels, pictures % 8).double().mean()) < 0.7


def test_one_fold_or_class_is_refused():
    for labels, folds in (([0, 0, 0], [0, 1, 2]), ([0, 1, 0], [0, 0, 0])):
        with pytest.raises(ValueError, match="at least 2 classes and at least 2 images"):
            held_out_hits(torch.randn(3, 2), torch.tensor(labels), torch.tensor(folds))


def test_features_that_are_the_same_for_all_tell_nothing():
    labels = torch.arange(30) % 3
    for features in (torch.zeros(30, 6), torch.full((30, 6), 3.5)):
        assert leave_one_out_hits(features, labels).double().mean() <= 1 / 3
        assert held_out_hits(features, labels, torch.arange(30) // 3).double().mean() <= 1 / 3
        assert ridge_probe_accuracy(features, labels, features, labels) == pytest.approx(1 / 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(number):
    features, labels = blobs(30, 0)
    broken = features.clone()
    broken[3, 2] = number
    words = "features of a probe must be finite, got 1 of 180"
    with pytest.raises(ValueError, match=words):
        leave_one_out_hits(broken, labels)
    with pytest.raises(ValueError, match=words):
        held_out_hits(broken, labels, torch.arange(30) % 5)
    with pytest.raises(ValueError, match=words):
        ridge_probe_accuracy(features, labels, broken, labels)
