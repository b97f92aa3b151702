"""A block of Lumina-Image 2.0 with its timestep in the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Rotary, attend, rotated, split_heads
from .folded_layout import FoldedLayout
from .taps import PROJECTIONS


class FoldedLumina2Block(GradientCheckpointingLayer):
    """Attention whose heads share keys and values, and a gated MLP, each between two norms.

    Scales are in the weights of the first norm, and gates, which stand behind the second, in those of that.

    Args:
        config: The model's configuration, see `FoldedBlock`.
        layout: The sizes.
        index: Which block; None for a refiner of the picture, which is run whole and has no taps.

    Source: diffusers, `models/transformers/transformer_lumina2.py`.
    """

    is_causal = False

    def __init__(self, config: Any, layout: FoldedLayout, index: int | None) -> None:  # noqa: ANN401 - any of the host's
        super().__init__()
        self.config = config
        self.features = () if index is None else layout.features_at(index)
        self.is_run = index is None or layout.is_run(index)
        self.is_attending = index is None or layout.is_attending(index)
        self.is_text_used = index is not None and layout.is_text_used_after(index)
        width, self.head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        shared = layout.num_key_value_heads or layout.num_attention_heads
        self.num_key_value_groups = layout.num_attention_heads // shared
        self.scaling = self.head_size**-0.5
        sizes = dict(zip(PROJECTIONS, (width, shared * self.head_size, shared * self.head_size), strict=True))
        self.projections = tuple(
            PROJECTIONS if self.is_attending else [name for name in PROJECTIONS if name in self.features]
        )
        self.sizes = [sizes[name] for name in self.projections]
        self.attention_norm = nn.RMSNorm(width, layout.attention_norm_eps)
        if self.projections:
            self.query_key_value = nn.Linear(width, sum(self.sizes), bias=False)
        if self.is_attending:
            self.query_norm, self.key_norm = (nn.RMSNorm(self.head_size, layout.query_key_norm_eps) for _ in range(2))
            self.projection = nn.Linear(width, width, bias=False)
        if self.is_run:
            self.attention_output_norm = nn.RMSNorm(width, layout.attention_norm_eps)
            self.mlp_norm, self.mlp_output_norm = (nn.RMSNorm(width, layout.mlp_norm_eps) for _ in range(2))
            self.gate_projection = nn.Linear(width, layout.mlp_size, bias=False)
            self.up_projection = nn.Linear(width, layout.mlp_size, bias=False)
            self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)
            self.activation = nn.SiLU()

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | None = None,
        rotary: Rotary | None = None,
        grid: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns. The text comes before the picture."""
        tapped: dict[str, Tensor] = {}
        start = 0 if text is None or not self.is_attending else text.shape[1]
        together = hidden_states if text is None or not self.is_attending else torch.cat([text, hidden_states], dim=1)
        normed = self.attention_norm(together)
        if "normed" in self.features:
            tapped["normed"] = normed[:, start:]
        projected: dict[str, Tensor] = {}
        if self.projections:
            parts = self.query_key_value(normed).split(self.sizes, -1)
            projected = dict(zip(self.projections, parts, strict=True))
        tapped |= {name: values[:, start:] for name, values in projected.items() if name in self.features}
        if not self.is_attending:
            return hidden_states, text, tapped
        heads = {name: split_heads(values, self.head_size) for name, values in projected.items()}
        query, key = self.query_norm(heads["query"]), self.key_norm(heads["key"])
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        # What is not used any more of the text is not asked for.
        first = 0 if self.is_text_used else start
        attended = self.projection(attend(self, query[:, :, first:], key, heads["value"]))
        if "attention" in self.features:
            tapped["attention"] = attended[:, start - first :]
        if not self.is_run:
            return hidden_states, text, tapped
        together = together[:, first:] + self.attention_output_norm(attended)
        inner = self.mlp_norm(together)
        # As diffusers: the activation in float32.
        gate = self.activation(self.gate_projection(inner).float()).to(inner.dtype)
        together = together + self.mlp_output_norm(self.down_projection(gate * self.up_projection(inner)))
        hidden_states = together[:, start - first :]
        if self.is_text_used and text is not None:
            text = together[:, :start]
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped
