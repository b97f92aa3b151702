"""Channels that dwarf all others in every token: pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A channel is massive where it exceeds the token's median magnitude so many times, in so large a share of tokens.
# Normal values never do so; the embedded DiT, which has no such channels, comes to 15 times, published ones to
# hundreds.
FACTOR = 30.0
SHARE = 0.9


def outlier_share(tokens: Tensor) -> Tensor:
    """Return in which share of the tokens each channel is an outlier, (D,), in [0, 1], float64.

    The median over a token's channels is not moved by a few large ones, and tokens are asked one by one: a channel
    that is large in a few tokens alone is not called massive.

    Args:
        tokens: Tokens, (..., D).

    Source: what makes an activation massive, arXiv 2402.17762 (there against the median of all activations); that
    diffusion transformers have massive channels, the same in all tokens, arXiv 2505.18584. The rule is ours.
    """
    magnitudes = tokens.float().flatten(0, -2).abs()  # (M, D)
    medians = magnitudes.median(dim=-1, keepdim=True).values
    return (magnitudes > FACTOR * medians).double().mean(0).cpu()


def massive_channels(shares: Sequence[Tensor]) -> list[int]:
    """Return the channels that are massive at half or more of the timesteps.

    Args:
        shares: `outlier_share` at each timestep, (D,).
    """
    massive = torch.stack([share >= SHARE for share in shares]).double().mean(0) >= 0.5
    indices: list[int] = massive.nonzero().flatten().tolist()
    return indices
