"""The blocks of folded transformers: what is left of diffusers' blocks at one timestep."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layouts import PROJECTIONS, FoldedLayout

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
        self, config: Any, width: int, size: int, num_heads: int, num_tokens: int, norm_eps: float | None = None
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


class FoldedStream(nn.Module):
    """One stream's layers of a block: what attention reads of it, what is added to it, and its MLP.

    Modulation and gates are in the weights.

    Args:
        layout: The sizes.
        projections: Which of query, key and value are there, in this order, in one layer.
        is_attending: Whether something of the attention is added.
        is_run: Whether the MLP is there.
    """

    def __init__(self, layout: FoldedLayout, projections: Sequence[str], is_attending: bool, is_run: bool) -> None:
        super().__init__()
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        self.num_attention_heads = layout.num_attention_heads
        self.projections = tuple(projections)
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if projections:
            self.query_key_value = nn.Linear(width, len(projections) * width)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if layout.query_key_norm_eps is not None and is_attending:
            self.query_norm = nn.RMSNorm(head_size, layout.query_key_norm_eps)
        if layout.query_key_norm_eps is not None and "value" in projections:
            self.key_norm = nn.RMSNorm(head_size, layout.query_key_norm_eps)
        if is_attending:
            self.projection = nn.Linear(width, width)
        if is_run:
            self.mlp_norm = nn.LayerNorm(width, layout.mlp_norm_eps, elementwise_affine=False)
            self.up_projection = nn.Linear(width, layout.mlp_size)
            self.activation = build_activation(layout.activation)
            self.down_projection = nn.Linear(layout.mlp_size, width)

    def project(self, normed: Tensor) -> dict[str, Tensor]:
        """Return those of query, key and value that are there, (B, N, D) each."""
        return dict(zip(self.projections, self.query_key_value(normed).chunk(len(self.projections), -1), strict=True))

    def heads(self, projected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return queries, keys and values, (B, heads, N, d) each, normed where the transformer does so."""
        split = {name: split_heads(values, self.num_attention_heads) for name, values in projected.items()}
        if self.query_norm is not None and "query" in split:
            split["query"] = self.query_norm(split["query"])
        if self.key_norm is not None:
            split["key"] = self.key_norm(split["key"])
        return split

    def run_mlp(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens, (B, N, D), with the MLP's part added."""
        inner = self.activation(self.up_projection(self.mlp_norm(hidden_states)))
        tokens: Tensor = hidden_states + self.down_projection(inner)
        return tokens


class FoldedBlock(GradientCheckpointingLayer):
    """A block of one or two streams, with the taps that it was folded for.

    Args:
        config: The model's configuration, which names the host's attention kernel in `_attn_implementation`.
        layout: The sizes.
        index: Which block.
    """

    is_causal = False  # the host's kernels ask

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        self.config = config
        self.features = layout.features_at(index)
        self.is_run, self.is_attending = layout.is_run(index), layout.is_attending(index)
        self.is_text_first = layout.is_text_first
        self.num_attention_heads = layout.num_attention_heads
        self.scaling = (layout.hidden_size // layout.num_attention_heads) ** -0.5
        width = layout.hidden_size
        self.picture = FoldedStream(layout, layout.projections_at(index), self.is_attending, self.is_run)
        if "normed" in self.features:
            # Attention reads the modulated tokens with the modulation in its weights; who taps them needs it apart.
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.has_gate = "attention" in self.features and self.is_run
        if self.has_gate:
            # The tap comes before the gate, which then cannot be in the weights.
            self.gate, self.offset = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.text: FoldedStream | None = None
        if layout.text_size and self.is_attending:
            is_text_used = layout.is_text_used_after(index)
            self.text = FoldedStream(
                layout, PROJECTIONS if is_text_used else PROJECTIONS[1:], is_text_used, is_text_used
            )
        self.dual: FoldedStream | None = None
        if index in layout.dual_attention_blocks and self.is_run:
            self.dual = FoldedStream(layout, PROJECTIONS, is_attending=True, is_run=False)
        self.cross: PromptAttention | None = None
        if layout.num_cross_tokens and self.is_run:
            self.cross = PromptAttention(config, width, width, self.num_attention_heads, layout.num_cross_tokens)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the tokens after the block, those of the text, and the tokens of each feature that was folded for.

        Args:
            hidden_states: Tokens of the picture, (B, N, D).
            text: Tokens of the text, (B, L, D), where there are any.
            rotary: Rotary positions of all tokens, where there are any.
        """
        stream, tapped = self.picture, {}
        normed = stream.attention_norm(hidden_states)
        if "normed" in self.features:
            tapped["normed"] = normed * self.normed_scale + self.normed_shift
        projected = stream.project(normed) if stream.projections else {}
        tapped.update({name: values for name, values in projected.items() if name in self.features})
        if not self.is_attending:
            return hidden_states, text, tapped
        mixed, mixed_text = self._mix(stream.heads(projected), text, rotary)
        attended = stream.projection(mixed)
        if "attention" in self.features:
            tapped["attention"] = attended
        if not self.is_run:
            return hidden_states, text, tapped
        if self.has_gate:
            attended = attended * self.gate + self.offset
        hidden_states = hidden_states + attended
        if self.dual is not None:
            split = self.dual.heads(self.dual.project(normed))
            hidden_states = hidden_states + self.dual.projection(attend(self, **split))
        if self.cross is not None:
            hidden_states = hidden_states + self.cross(hidden_states)
        hidden_states = stream.run_mlp(hidden_states)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        if self.text is not None and mixed_text is not None:
            text = self.text.run_mlp(text + self.text.projection(mixed_text))
        return hidden_states, text, tapped

    def _mix(
        self, picture: dict[str, Tensor], text: Tensor | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention yields for the picture, (B, N, D), and for the text, where that is used."""
        if self.text is None or text is None:
            return attend(self, **picture), None
        other = self.text.heads(self.text.project(self.text.attention_norm(text)))
        size, length = picture["query"].shape[2], text.shape[1]
        both = {
            name: [other[name], values] if self.is_text_first else [values, other[name]]
            for name, values in picture.items()
            if name in other
        }
        joined = {name: torch.cat(values, 2) for name, values in both.items()}
        joined.setdefault("query", picture["query"])
        if rotary is not None:
            # Where the text has no queries, those of the picture are the last.
            last = joined["query"].shape[2]
            joined["query"] = rotated(joined["query"], (rotary[0][-last:], rotary[1][-last:]))
            joined["key"] = rotated(joined["key"], rotary)
        mixed = attend(self, **joined)
        if "query" not in other:
            return mixed, None
        if self.is_text_first:
            return mixed[:, length:], mixed[:, :length]
        return mixed[:, :size], mixed[:, size:]


class FoldedSingleBlock(GradientCheckpointingLayer):
    """A block of FLUX in which text and picture are one stream, and attention and MLP stand beside each other.

    Args:
        config: The model's configuration, see `FoldedBlock`.
        layout: The sizes.
        index: Which block.
    """

    is_causal = False

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        self.config = config
        self.features, self.is_run = layout.features_at(index), layout.is_run(index)
        self.text_size = layout.text_size
        self.num_attention_heads = layout.num_attention_heads
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        self.scaling = head_size**-0.5
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if "normed" in self.features:
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.projections = layout.projections_at(index)
        self.sizes = [width] * len(self.projections) + ([layout.mlp_size] if self.is_run else [])
        if self.sizes:
            self.query_key_value_mlp = nn.Linear(width, sum(self.sizes))
        if self.is_run:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(head_size, layout.query_key_norm_eps or 1e-6) for _ in range(2)
            )
            self.activation = build_activation(layout.activation)
            self.projection = nn.Linear(width + layout.mlp_size, width)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns."""
        tapped: dict[str, Tensor] = {}
        line = torch.cat([text, hidden_states], dim=1) if self.is_run and text is not None else hidden_states
        normed = self.attention_norm(line)
        parts = self._project(normed)
        start = self.text_size if self.is_run else 0
        if "normed" in self.features:
            tapped["normed"] = normed[:, start:] * self.normed_scale + self.normed_shift
        tapped.update({name: parts[name][:, start:] for name in self.projections if name in self.features})
        if not self.is_run or text is None:
            return hidden_states, text, tapped
        query, key, value = (split_heads(parts[name], self.num_attention_heads) for name in PROJECTIONS)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        added = self.projection(torch.cat([attend(self, query, key, value), self.activation(parts["mlp"])], dim=-1))
        text, hidden_states = text + added[:, :start], hidden_states + added[:, start:]
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _project(self, normed: Tensor) -> dict[str, Tensor]:
        if not self.sizes:
            return {}
        names = [*self.projections, "mlp"] if self.is_run else list(self.projections)
        return dict(zip(names, self.query_key_value_mlp(normed).split(self.sizes, -1), strict=True))


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
            size, heads = layout.cross_size or width, layout.num_cross_heads or layout.num_attention_heads
            num_tokens, norm_eps = layout.num_cross_tokens, layout.query_key_norm_eps
            self.cross = PromptAttention(config, width, size, heads, num_tokens, norm_eps)
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
