"""Lumina-Image 2.0's block at one timestep: text and picture in one line, with norms around attention and MLP."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .folded_layout import FoldedLayout
from .folded_parts import Rotary, attend, build_activation, rotated, split_heads
from .taps import PROJECTIONS


class FoldedLumina2Block(GradientCheckpointingLayer):
    """A block of Lumina-Image 2.0, with the taps that it was folded for.

    Scales are in the weights of attention and MLP, gates in those of the norms behind them. There are no shifts, and
    so no biases.

    Args:
        config: The model's configuration, which names the host's attention kernel in `_attn_implementation`.
        layout: The sizes.
        index: Which block; None for a refiner, which is run on the picture alone, before the first.
    """

    is_causal = False  # the host's kernels ask

    def __init__(self, config: Any, layout: FoldedLayout, index: int | None) -> None:
        super().__init__()
        self.config = config
        self.features = () if index is None else layout.features_at(index)
        self.is_run = index is None or layout.is_run(index)
        self.is_attending = index is None or layout.is_attending(index)
        self.is_text_used = index is not None and layout.is_text_used_after(index)
        width, num_heads = layout.hidden_size, layout.num_attention_heads
        head_size, num_key_value_heads = width // num_heads, layout.num_key_value_heads or num_heads
        self.num_attention_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.num_key_value_groups = num_heads // num_key_value_heads  # the host's kernels ask
        self.scaling = head_size**-0.5
        self.attention_norm = nn.RMSNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if "normed" in self.features:
            # Attention reads the scaled tokens with the scale in its weights; who taps them needs it apart.
            self.normed_scale = nn.Parameter(torch.zeros(width))
        self.projections = PROJECTIONS if index is None else layout.projections_at(index)
        sizes = {"query": width, "key": num_key_value_heads * head_size, "value": num_key_value_heads * head_size}
        self.sizes = [sizes[name] for name in self.projections]
        if self.projections:
            self.query_key_value = nn.Linear(width, sum(self.sizes), bias=False)
        if self.is_attending:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(head_size, layout.query_key_norm_eps or 1e-5) for _ in range(2)
            )
            self.projection = nn.Linear(width, width, bias=False)
        if self.is_run:
            self.attention_output_norm = nn.RMSNorm(width, layout.attention_norm_eps)
            self.mlp_norm = nn.RMSNorm(width, layout.mlp_norm_eps, elementwise_affine=False)
            self.up_projection = nn.Linear(width, 2 * layout.mlp_size, bias=False)
            self.activation = build_activation(layout.activation)
            self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)
            self.mlp_output_norm = nn.RMSNorm(width, layout.mlp_norm_eps)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the tokens after the block, those of the text, and the tokens of each feature that was folded for.

        Args:
            hidden_states: Tokens of the picture, (B, N, D).
            text: Tokens of the text, (B, L, D), where attention looks at them; they come first.
            rotary: Rotary positions of text and picture; where there is no text, the last are the picture's.
        """
        tapped: dict[str, Tensor] = {}
        size = hidden_states.shape[1]
        line = hidden_states
        if text is not None and self.is_attending:
            line = torch.cat([text, hidden_states], dim=1)
        normed = self.attention_norm(line)
        if "normed" in self.features:
            tapped["normed"] = normed[:, -size:] * self.normed_scale
        projected: dict[str, Tensor] = {}
        if self.projections:
            parts = self.query_key_value(normed).split(self.sizes, -1)
            projected = dict(zip(self.projections, parts, strict=True))
        tapped.update({name: values[:, -size:] for name, values in projected.items() if name in self.features})
        if not self.is_attending:
            return hidden_states, text, tapped
        if not self.is_text_used:
            # From here on only the picture is of use; the text was looked at.
            line, projected["query"] = hidden_states, projected["query"][:, -size:]
        attended = self.projection(self._mix(projected, rotary))
        if "attention" in self.features:
            tapped["attention"] = attended[:, -size:]
        if not self.is_run:
            return hidden_states, text, tapped
        line = line + self.attention_output_norm(attended)
        gates, values = self.up_projection(self.mlp_norm(line)).chunk(2, -1)
        line = line + self.mlp_output_norm(self.down_projection(self.activation(gates) * values))
        hidden_states = line[:, -size:]
        if self.is_text_used:
            text = line[:, :-size]
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _mix(self, projected: dict[str, Tensor], rotary: Rotary | None) -> Tensor:
        """Return what attention yields, (B, N, D), of queries, keys and values; the last are the picture's."""
        query = self.query_norm(split_heads(projected["query"], self.num_attention_heads))
        key = self.key_norm(split_heads(projected["key"], self.num_key_value_heads))
        value = split_heads(projected["value"], self.num_key_value_heads)
        if rotary is not None:
            query, key = (
                rotated(values, (rotary[0][-values.shape[2] :], rotary[1][-values.shape[2] :]))
                for values in (query, key)
            )
        return attend(self, query, key, value)
