"""A block of Sana with its timestep in the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Rotary, attend, split_heads
from .folded_layout import FoldedLayout
from .taps import PROJECTIONS


class FoldedSanaBlock(GradientCheckpointingLayer):
    """Linear attention, attention to the constant prompt, and a gated MLP with a convolution over the grid.

    Args:
        config: The model's configuration, which names the host's kernel for the attention to the prompt.
        layout: The sizes.
        index: Which block.

    Source: diffusers, `models/transformers/sana_transformer.py`, and `SanaLinearAttnProcessor2_0`.
    """

    is_causal = False

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:  # noqa: ANN401 - any of the host's
        super().__init__()
        self.config = config
        self.features = layout.features_at(index)
        self.is_run, self.is_attending = layout.is_run(index), layout.is_attending(index)
        width = layout.hidden_size
        self.head_size = width // layout.num_attention_heads
        self.cross_head_size = width // (layout.num_cross_heads or 1)
        self.scaling = self.cross_head_size**-0.5
        self.projections = tuple(
            PROJECTIONS if self.is_attending else [name for name in PROJECTIONS if name in self.features]
        )
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if self.projections:
            self.query_key_value = nn.Linear(width, len(self.projections) * width)
        if "normed" in self.features:
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if layout.query_key_norm_eps is not None and self.is_attending:
            # Over all heads together.
            self.query_norm, self.key_norm = (nn.RMSNorm(width, layout.query_key_norm_eps) for _ in range(2))
        if self.is_attending:
            self.projection = nn.Linear(width, width)
        self.has_gate = "attention" in self.features and self.is_run
        if self.has_gate:
            self.gate, self.offset = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.has_cross_attention = layout.num_cross_tokens > 0 and self.is_run
        if self.has_cross_attention:
            self.cross_query = nn.Linear(width, width)
            self.cross_query_norm: nn.Module | None = None
            if layout.query_key_norm_eps is not None:
                self.cross_query_norm = nn.RMSNorm(width, layout.query_key_norm_eps)
            self.cross_key, self.cross_value = (
                nn.Parameter(torch.zeros(layout.num_cross_tokens, width)) for _ in range(2)
            )
            self.cross_projection = nn.Linear(width, width)
        if self.is_run:
            inner = 2 * layout.mlp_size
            self.mlp_norm = nn.LayerNorm(width, layout.mlp_norm_eps, elementwise_affine=False)
            self.up_projection = nn.Linear(width, inner)
            self.activation = nn.SiLU()
            self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
            self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | None = None,
        rotary: Rotary | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns; `grid` has the rows and columns of the tokens."""
        tapped: dict[str, Tensor] = {}
        normed = self.attention_norm(hidden_states)
        if "normed" in self.features:
            tapped["normed"] = normed * self.normed_scale + self.normed_shift
        projected: dict[str, Tensor] = {}
        if self.projections:
            parts = self.query_key_value(normed).chunk(len(self.projections), -1)
            projected = dict(zip(self.projections, parts, strict=True))
        tapped |= {name: values for name, values in projected.items() if name in self.features}
        if not self.is_attending:
            return hidden_states, text, tapped
        attended = self.projection(self._mix(**projected))
        if "attention" in self.features:
            tapped["attention"] = attended
        if not self.is_run:
            return hidden_states, text, tapped
        if self.has_gate:
            attended = attended * self.gate + self.offset
        hidden_states = hidden_states + attended
        if self.has_cross_attention:
            hidden_states = hidden_states + self._look_at_prompt(hidden_states)
        hidden_states = hidden_states + self._mlp(hidden_states, grid)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what linear attention yields, (B, N, D), computed in float32 as diffusers does."""
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        heads = [split_heads(each, self.head_size) for each in (relu(query), relu(key), value)]
        queries, keys, values = (each.float() for each in heads)  # (B, heads, N, d)
        sums = keys.transpose(2, 3) @ values  # (B, heads, d, d)
        total = keys.sum(2)[..., None]  # (B, heads, d, 1)
        mixed = (queries @ sums) / (queries @ total + 1e-15)
        return mixed.transpose(1, 2).flatten(2).to(query.dtype)

    def _look_at_prompt(self, hidden_states: Tensor) -> Tensor:
        """Return what attention to the constant prompt adds, (B, N, D)."""
        query = self.cross_query(hidden_states)
        if self.cross_query_norm is not None:
            query = self.cross_query_norm(query)
        key, value = (
            split_heads(constant.expand(hidden_states.shape[0], -1, -1), self.cross_head_size)
            for constant in (self.cross_key, self.cross_value)
        )
        tokens: Tensor = self.cross_projection(attend(self, split_heads(query, self.cross_head_size), key, value))
        return tokens

    def _mlp(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what the gated MLP adds, (B, N, D)."""
        inner = self.activation(self.up_projection(self.mlp_norm(hidden_states)))
        maps = self.convolution(inner.transpose(1, 2).unflatten(2, grid))
        values, gate = maps.flatten(2).transpose(1, 2).chunk(2, dim=-1)
        tokens: Tensor = self.down_projection(values * self.activation(gate))
        return tokens
