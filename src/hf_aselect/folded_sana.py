"""Sana's block at one timestep: linear attention, a look at the constant prompt, and convolutions as MLP."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .folded_layout import FoldedLayout
from .folded_parts import PromptAttention, build_activation, split_heads
from .taps import PROJECTIONS


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what linear attention yields, (B, N, D), of queries, keys and values, (B, heads, N, d).

    A weight is the product of query and key where both are positive, so nothing of the size N × N is computed. In
    float32, as the sums over the tokens leave the range of half precision.

    Source: diffusers, `models/attention_processor.py`, `SanaLinearAttnProcessor2_0`.
    """
    positive_query, positive_key = query.relu().float(), key.relu().float()
    summed = (positive_query @ (positive_key.transpose(2, 3) @ value.float())).float()
    weights = (positive_query @ positive_key.sum(2)[..., None]).float()  # (B, heads, N, 1)
    # diffusers adds 1e-15 to the weights. The export to ONNX takes that for 0 and leaves it out, and tokens without
    # any weight become NaN. A power of two on both sides of the division changes no digit of the quotient.
    large = 2.0**30
    return (summed * large / (weights * large + 1e-15 * large)).transpose(1, 2).flatten(2).to(query.dtype)


class FoldedSanaBlock(GradientCheckpointingLayer):
    """A block of Sana, with the taps that it was folded for. Modulation and gates are in the weights.

    Args:
        config: The model's configuration, which names the host's attention kernel in `_attn_implementation`.
        layout: The sizes.
        index: Which block.
    """

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        self.features = layout.features_at(index)
        self.is_run, self.is_attending = layout.is_run(index), layout.is_attending(index)
        self.num_attention_heads = layout.num_attention_heads
        width = layout.hidden_size
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if "normed" in self.features:
            # Attention reads the modulated tokens with the modulation in its weights; who taps them needs it apart.
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.projections = layout.projections_at(index)
        if self.projections:
            self.query_key_value = nn.Linear(width, len(self.projections) * width)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if self.is_attending:
            if layout.query_key_norm_eps is not None:  # of all heads together
                self.query_norm, self.key_norm = (nn.RMSNorm(width, layout.query_key_norm_eps) for _ in range(2))
            self.projection = nn.Linear(width, width)
        self.has_gate = "attention" in self.features and self.is_run
        if self.has_gate:
            # The tap comes before the gate, which then cannot be in the weights.
            self.gate, self.offset = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.cross: PromptAttention | None = None
        if not self.is_run:
            return
        if layout.num_cross_tokens:
            self.cross = PromptAttention(
                config,
                width,
                layout.cross_size or width,
                layout.num_cross_heads or layout.num_attention_heads,
                layout.num_cross_tokens,
                layout.query_key_norm_eps,
            )
        self.mlp_norm = nn.LayerNorm(width, layout.mlp_norm_eps, elementwise_affine=False)
        inner = 2 * layout.mlp_size
        self.up_projection = nn.Linear(width, inner)
        self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.activation = build_activation(layout.activation)
        self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, grid: tuple[int, int] = (1, 1)
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the tokens after the block, the text as it was, and the tokens of each feature that was folded for.

        Args:
            hidden_states: Tokens of the picture, (B, N, D).
            text: Not looked at: what the block reads of the prompt is in its weights.
            grid: Rows and columns of the tokens.
        """
        tapped: dict[str, Tensor] = {}
        normed = self.attention_norm(hidden_states)
        if "normed" in self.features:
            tapped["normed"] = normed * self.normed_scale + self.normed_shift
        projected: dict[str, Tensor] = {}
        if self.projections:
            parts = self.query_key_value(normed).chunk(len(self.projections), -1)
            projected = dict(zip(self.projections, parts, strict=True))
        tapped.update({name: values for name, values in projected.items() if name in self.features})
        if not self.is_attending:
            return hidden_states, text, tapped
        query, key, value = (projected[name] for name in PROJECTIONS)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        heads = self.num_attention_heads
        attended = self.projection(
            linear_attention(split_heads(query, heads), split_heads(key, heads), split_heads(value, heads))
        )
        if attended.dtype == torch.float16:
            attended = attended.clip(-65504, 65504)  # as diffusers, against infinite values
        if "attention" in self.features:
            tapped["attention"] = attended
        if not self.is_run:
            return hidden_states, text, tapped
        if self.has_gate:
            attended = attended * self.gate + self.offset
        hidden_states = hidden_states + attended
        if self.cross is not None:
            hidden_states = hidden_states + self.cross(hidden_states)
        hidden_states = hidden_states + self._convolved(hidden_states, grid)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _convolved(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what the MLP adds, (B, N, D): each channel looks at its neighbourhood, and a half gates the other."""
        inner = self.activation(self.up_projection(self.mlp_norm(hidden_states)))
        inner = self.convolution(inner.unflatten(1, grid).permute(0, 3, 1, 2))
        values, gates = inner.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, -1)
        tokens: Tensor = self.down_projection(values * self.activation(gates))
        return tokens
