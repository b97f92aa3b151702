"""Channels that dwarf all others in every token: which tokens show them, and where they are looked for."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import Tap
from .reader import Batch

# Features of the residual stream, where a few channels may dwarf all others.
MASSIVE_FEATURES = ("hidden", "normed", "attention")

# Width from which transformers are known to have such channels: DiT-L's. Smaller ones are loaded without a warning.
LARGE = 1024

# A channel is massive if it exceeds the token's median magnitude by this factor, in this share of tokens. Normally
# distributed values never do. The largest factor is 15 in the embedded DiT, which has no such channels, and hundreds
# in published models.
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


def given_channels(config: ASelectConfig, taps: Sequence[Tap]) -> dict[Tap, list[int] | None]:
    """Return the channels to set to zero by tap; None where they have to be found."""
    given: dict[Tap, list[int] | None] = {}
    for tap in taps:
        known = config.channels_at(*tap)
        is_asked_for = config.zeroed_channels == "auto" or tap[1] in MASSIVE_FEATURES
        given[tap] = known if known is not None or is_asked_for else []
    return given


def find_massive_channels(batches: Iterable[Batch], taps: Sequence[Tap]) -> dict[Tap, list[int] | None]:
    """Return the massive channels of each tap in some images; None if there are no images.

    Args:
        batches: The images, at the timesteps to look at.
        taps: The taps.
    """
    sums: dict[Tap, dict[int, Tensor]] = {tap: {} for tap in taps}
    count = 0
    for batch in batches:
        count += len(batch.indices)
        for timestep, tokens in batch.read(list(taps)):
            for tap in taps:
                # The last batch may have fewer images: it counts for as many.
                share = len(batch.indices) * outlier_share(tokens[tap])
                before = sums[tap].get(timestep)
                sums[tap][timestep] = share if before is None else before + share
    return {
        tap: massive_channels([total / count for total in by_timestep.values()]) if by_timestep else None
        for tap, by_timestep in sums.items()
    }
