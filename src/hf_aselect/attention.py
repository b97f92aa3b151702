"""The host's attention kernels, and rotary positions, as folded blocks use them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotary = tuple[Tensor, Tensor]  # cosines and sines, (S, d) each


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # noqa: ANN401 - the host's signature
) -> tuple[Tensor, Tensor]:
    """Return what attention yields, (B, N, heads, d), and its weights: the host's `attn_implementation="eager"`.

    Args:
        module: The block.
        query: Queries, (B, heads, N, d).
        key: Keys, (B, heads, M, d), or fewer heads that several share.
        value: Values, as the keys.
        attention_mask: Added to the scores, where there is one.
        scaling: Factor of the scores; default: 1/sqrt(d).
        dropout: Share of the weights that train mode drops.
        kwargs: Ignored.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared_by = query.shape[1] // key.shape[1]
    if shared_by > 1:
        key, value = (each.repeat_interleave(shared_by, dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what the host's attention kernel yields, (B, N, D), of queries, keys and values, (B, heads, N, d).

    Args:
        module: The block, with the model's `config`, whose `_attn_implementation` names the kernel, and with what the
            kernels ask: `is_causal`, `scaling`, and `num_key_value_groups` where heads share keys.
        query: Queries.
        key: Keys.
        value: Values.
    """
    config: Any = module.config
    scaling: Any = module.scaling
    kernel: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention_forward
    )
    tokens: Tensor = kernel(module, query, key, value, None, scaling=scaling, dropout=0.0)[0]  # (B, N, heads, d)
    return tokens.flatten(2)


def split_heads(values: Tensor, head_size: int) -> Tensor:
    """Return heads, (B, heads, N, d), of projected tokens, (B, N, heads · d)."""
    heads: Tensor = values.unflatten(-1, (-1, head_size)).transpose(1, 2)
    return heads


def rotary_table(places: Tensor, sizes: tuple[int, ...], theta: float) -> Rotary:
    """Return cosines and sines of places, (S, d) each, float32; neighbouring channels have the same.

    Args:
        places: Places on each axis, (S, axes).
        sizes: Channels of a head for each axis, which add up to d.
        theta: Base of the frequencies.

    Source: diffusers, `models/embeddings.py`, `get_1d_rotary_pos_embed` with `repeat_interleave_real`.
    """
    angles = []
    for axis, size in enumerate(sizes):
        steps = torch.arange(0, size, 2, dtype=torch.float64, device=places.device) / size
        angles.append(torch.outer(places[:, axis].double(), theta**-steps).repeat_interleave(2, dim=1))
    together = torch.cat(angles, dim=1)
    return together.cos().float(), together.sin().float()


def rotated(values: Tensor, rotary: Rotary) -> Tensor:
    """Return queries or keys, (B, heads, S, d), turned by their places; pairs of channels lie side by side."""
    cosines, sines = rotary
    real, imaginary = values.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (values.float() * cosines + turned.float() * sines).to(values.dtype)
