"""How much features of several timesteps predict together, from inner products of the images' features."""

import torch
from torch import Tensor

from .consensus import NO_DIFFERENCE, STRENGTHS


def unexplained_together(gram: Tensor, num_features: int, targets: Tensor, folds: Tensor, num_folds: int) -> Tensor:
    """Return by fold the squared error of predicting targets, and their sum of squares, (F, 2), float64.

    It is what `consensus.unexplained` returns of the same features: a ridge regression with a constant, each fold
    predicted from the others, with the strength of the smallest error. Few images of many features cost less so, and
    the inner products of features side by side are the sum of theirs.

    Args:
        gram: Inner products of the features of each two images, (n, n), float64.
        num_features: Features of an image.
        targets: What is predicted, (n, k), float64, of mean 0.
        folds: The fold of each image, integers in [0, F), (n,).
        num_folds: F.

    Raises:
        ValueError: If the features are the same for all images.

    Source: the residual of a fold that is left out is solved for from the inverse, as that of one image is in
    O. Dubrule, Cross validation of kriging in a unique neighborhood, 1983.
    """
    variance = targets.new_zeros(num_folds).index_add_(0, folds, targets.square().sum(1))
    scale = float(gram.trace() - gram.sum() / len(gram)) / num_features
    errors = []
    for strength in STRENGTHS:
        error = torch.zeros_like(variance)
        try:
            factor = torch.linalg.cholesky(gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype))
            inverse = torch.cholesky_inverse(factor)
            # The constant is not penalized.
            of_ones = inverse.sum(1)
            inverse = inverse - torch.outer(of_ones, of_ones) / of_ones.sum()
            weighted = inverse @ targets
            for fold in folds.unique():
                out = folds == fold
                block = torch.linalg.cholesky(inverse[out][:, out])
                error[fold] = torch.cholesky_solve(weighted[out], block).square().sum()
        except RuntimeError as failure:  # a matrix that is singular
            raise ValueError(NO_DIFFERENCE) from failure
        errors.append(error)
    return torch.stack([min(errors, key=lambda error: float(error.sum())), variance], dim=-1)
