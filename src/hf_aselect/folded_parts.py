"""What the blocks of folded transformers of all families are made of: attention, positions, activations."""

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
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return what attention yields, (B, N, heads, d), and its weights: the host's `attn_implementation="eager"`.

    Args:
        module: The block; its `num_key_value_groups`, if any, says how many heads share a key and a value.
        query: Queries, (B, heads, N, d).
        key: Keys, (B, heads, M, d).
        value: Values, (B, heads, M, d).
        attention_mask: Added to the scores, where there is one.
        scaling: Factor of the scores; default: 1/sqrt(d).
        dropout: Share of the weights that train mode drops.
        kwargs: Ignored.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what the host's attention kernel yields, (B, N, D), of queries, keys and values, (B, heads, N, d).

    Args:
        module: What attends: `config` names the kernel, `scaling` is the factor of the scores.
        query: Queries.
        key: Keys.
        value: Values.
    """
    kernel: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    return kernel(module, query, key, value, None, scaling=module.scaling, dropout=0.0)[0].flatten(2)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """Return tokens, (B, N, D), by heads, (B, heads, N, d)."""
    heads: Tensor = tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return heads


def rotated(values: Tensor, rotary: Rotary) -> Tensor:
    """Return queries or keys, (B, heads, S, d), turned by their positions; pairs of channels lie side by side."""
    cosines, sines = rotary
    real, imaginary = values.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (values.float() * cosines + turned.float() * sines).to(values.dtype)


def build_activation(name: str) -> nn.Module:
    """Build the activation that a layout names: one of `folded_layout.ACTIVATIONS`."""
    if name == "silu":
        return nn.SiLU()
    return nn.GELU("tanh" if name == "gelu_tanh" else "none")


class PromptAttention(nn.Module):
    """Cross-attention to the constant prompt, of which only keys and values are left.

    Args:
        config: The model's configuration, which names the host's attention kernel in `_attn_implementation`.
        width: Channels of the tokens.
        size: Channels of queries, keys and values.
        num_heads: Heads.
        num_tokens: Tokens of the prompt.
        norm_eps: Epsilon of the norm of queries, of all heads together; None where there is none.
    """

    is_causal = False  # the host's kernels ask

    def __init__(
        self,
        config: Any,
        width: int,
        size: int,
        num_heads: int,
        num_tokens: int,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_heads, self.scaling = config, num_heads, (size // num_heads) ** -0.5
        self.query = nn.Linear(width, size)
        self.query_norm = None if norm_eps is None else nn.RMSNorm(size, norm_eps)
        self.key, self.value = (nn.Parameter(torch.zeros(num_tokens, size)) for _ in range(2))
        self.projection = nn.Linear(size, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what is added to tokens, (B, N, D)."""
        query = self.query(hidden_states)
        if self.query_norm is not None:
            query = self.query_norm(query)
        key, value = (
            split_heads(constant.expand(hidden_states.shape[0], -1, -1), self.num_heads)
            for constant in (self.key, self.value)
        )
        tokens: Tensor = self.projection(attend(self, split_heads(query, self.num_heads), key, value))
        return tokens
