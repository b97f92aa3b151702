"""A cheap linear probe: closed-form ridge classification of pooled features."""

import torch
from torch import Tensor

# Strengths of the ridge as shares of the mean eigenvalue of the features' covariance.
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 3))


def ridge_probe_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Return the test accuracy of a ridge classifier on standardised features.

    One least-squares target per class (1 for the class, -1 else); the strength is the one with the smallest
    leave-one-out error on the training set, in closed form, so no test image takes part in the selection.

    Args:
        train_features: Features, (n, D); computed in float64.
        train_labels: Class indices from 0, (n,).
        test_features: Features, (m, D).
        test_labels: Class indices from 0, (m,).

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, there is only one class, or a feature is not finite.
    """
    if len(test_features) != len(test_labels):
        raise ValueError("`labels` must have one label per row of `features`.")
    predicted = ridge_probe_predictions(train_features, train_labels, test_features)
    return float((predicted == test_labels).double().mean())


def ridge_probe_predictions(train_features: Tensor, train_labels: Tensor, test_features: Tensor) -> Tensor:
    """Return the class that the classifier of `ridge_probe_accuracy` gives each row of test features, (m,).

    Args:
        train_features: Features, (n, D); computed in float64.
        train_labels: Class indices from 0, (n,).
        test_features: Features, (m, D).

    Raises:
        ValueError: If the shapes do not fit, there is only one class, or a feature is not finite.
    """
    if train_features.ndim != 2 or train_features.shape[1:] != test_features.shape[1:]:
        raise ValueError(
            "Features must have shapes (n, D) and (m, D), got "
            f"{tuple(train_features.shape)} and {tuple(test_features.shape)}."
        )
    if len(train_features) != len(train_labels):
        raise ValueError("`labels` must have one label per row of `features`.")
    if len(train_labels.unique()) < 2:
        raise ValueError("A probe needs training images of at least 2 classes.")
    train, test = _standardised(train_features, train_features), _standardised(test_features, train_features)
    targets = torch.nn.functional.one_hot(train_labels.long()).double() * 2 - 1
    offset = targets.mean(0)
    weights, _ = _best_ridge(train, targets - offset)
    predicted: Tensor = (test @ weights + offset).argmax(1)
    return predicted


def leave_one_out_hits(features: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether a ridge classifier trained on all the others is right about it.

    The classifier and the selection of its strength are those of `ridge_probe_accuracy`; the strength is selected
    once, on all images, which favours no feature over another.

    Args:
        features: Features, (n, D); computed in float64.
        labels: Class indices from 0, (n,).

    Returns:
        Hits, (n,), bool.

    Raises:
        ValueError: If the shapes do not fit, there is only one class, or a feature is not finite.
    """
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(
            f"`labels` must have one label per row of `features`, got shapes {tuple(features.shape)} and "
            f"{tuple(labels.shape)}."
        )
    # Counted by what is there: the numbers of the classes may be large.
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("A probe needs images of at least 2 classes.")
    features = _standardised(features, features)
    targets = torch.nn.functional.one_hot(labels.long()).double() * 2 - 1
    offset = targets.mean(0)
    _, left_out = _best_ridge(features, targets - offset)
    hits: Tensor = (left_out + offset).argmax(1) == labels
    return hits


def held_out_hits(features: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Return for each row whether a ridge classifier trained on the other folds is right about it.

    For rows that come together, as the patches of an image: left out one by one, the others would tell of it. The
    strength is the one with the smallest squared error on what is left out, selected once.

    Args:
        features: Features, (n, D); computed in float64.
        labels: Class indices from 0, (n,).
        folds: Which fold each row is in, integers, (n,).

    Returns:
        Hits, (n,), bool.

    Raises:
        ValueError: If there is only one class or one fold, or a feature is not finite.
    """
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2 or len(folds.unique()) < 2:
        raise ValueError("A probe needs at least 2 classes and at least 2 images.")
    features = _standardised(features, features)
    targets = torch.nn.functional.one_hot(labels.long()).double() * 2 - 1
    offset = targets.mean(0)
    targets = targets - offset
    moments, products = features.T @ features, features.T @ targets
    predictions = torch.zeros(len(STRENGTHS), *targets.shape, dtype=torch.float64)
    for fold in folds.unique():
        out = folds == fold
        held = features[out]
        eigenvalues, eigenvectors = torch.linalg.eigh(moments - held.T @ held)
        rotated = eigenvectors.T @ (products - held.T @ targets[out])
        for number, strength in enumerate(STRENGTHS):
            shrunk = _shrunk(eigenvalues, strength)
            predictions[number, out] = held @ eigenvectors @ (shrunk[:, None] * rotated)
    best = (predictions - targets).square().mean((1, 2)).argmin()
    hits: Tensor = (predictions[best] + offset).argmax(1) == labels
    return hits


def _best_ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ridge solution, (D, K), whose leave-one-out squared error is smallest, and those predictions."""
    eigenvalues, eigenvectors = torch.linalg.eigh(features.T @ features)
    rotated = features @ eigenvectors  # (n, D)
    projected = rotated.T @ targets  # (D, K)
    best_error = float("inf")
    best, left_out = projected, targets
    for strength in STRENGTHS:
        shrunk = _shrunk(eigenvalues, strength)
        # Leave-one-out residual = residual / (1 - leverage); the mean that was subtracted has leverage 1 / n.
        leverage = (rotated.square() * shrunk).sum(1) + 1 / len(features)
        solution = shrunk[:, None] * projected
        residual = (targets - rotated @ solution) / (1 - leverage)[:, None]
        error = float(residual.square().mean())
        if error < best_error:
            best_error, best, left_out = error, eigenvectors @ solution, targets - residual
    return best, left_out


def _standardised(features: Tensor, reference: Tensor) -> Tensor:
    """Return features, (n, D), in float64, with the mean and the standard deviation of a reference taken out."""
    for values in (features, reference):
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"The features of a probe must be finite, got {int((~values.isfinite()).sum())} of {values.numel()} "
                "values that are NaN or infinite."
            )
    reference = reference.double()
    standardised: Tensor = (features.double() - reference.mean(0)) / reference.std(0).clamp_min(1e-12)
    return standardised


def _shrunk(eigenvalues: Tensor, strength: float) -> Tensor:
    """Return the inverse of eigenvalues with a ridge added, (D,); finite even if all features are constant."""
    shrunk: Tensor = 1 / (eigenvalues.clamp_min(0) + strength * eigenvalues.mean()).clamp_min(1e-12)
    return shrunk
