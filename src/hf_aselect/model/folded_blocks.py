"""The blocks of folded transformers: diffusers' blocks at one timestep."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
    """Return what attention yields, (B, N, heads, d), and its weights: transformers' `attn_implementation="eager"`.

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
    """Return what transformers' attention kernel yields, (B, N, D), of queries, keys and values, (B, heads, N, d).

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
        config: The model's configuration, which names transformers' attention kernel in `_attn_implementation`.
        width: Channels of the tokens.
        size: Channels of queries, keys and values.
        num_heads: Heads.
        num_tokens: Tokens of the prompt.
        norm_eps: Epsilon of the norm of queries, of all heads together; None where there is none.
    """

    is_causal = False  # transformers' kernels ask

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


class StepNorms(nn.Module):
    """A norm at several timesteps, each with the scale and the shift that its conditioning comes to.

    Args:
        norm: What it is without them: a layer norm, or a root mean square norm, which has no shift.
        width: Channels of the tokens.
        num_timesteps: Timesteps T.
    """

    def __init__(self, norm: Any, width: int, num_timesteps: int) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.ones(num_timesteps, width))
        self.bias = nn.Parameter(torch.zeros(num_timesteps, width)) if isinstance(norm, nn.LayerNorm) else None

    def forward(self, hidden_states: Tensor, number: int) -> Tensor:
        """Return the normed tokens, (B, N, D), at a timestep, named by its number in the layout."""
        shape, weight = hidden_states.shape[-1:], self.weight[number]
        if self.bias is None:
            return nn.functional.rms_norm(hidden_states, shape, weight, self.eps)
        return nn.functional.layer_norm(hidden_states, shape, weight, self.bias[number], self.eps)


def build_norm(kind: Any, width: int, eps: float, num_timesteps: int, has_weight: bool = False) -> nn.Module:
    """Build a norm of tokens, of the kind `nn.LayerNorm` or `nn.RMSNorm`.

    At a single timestep scale and shift are in the weights of what reads it; of one that is added, it has a weight.
    """
    norm: nn.Module = kind(width, eps, elementwise_affine=has_weight)
    return norm if num_timesteps == 1 else StepNorms(norm, width, num_timesteps)


def run_norm(norm: nn.Module, hidden_states: Tensor, number: int) -> Tensor:
    """Return tokens normed by what `build_norm` built, (B, N, D), at a timestep."""
    tokens: Tensor = norm(hidden_states, number) if isinstance(norm, StepNorms) else norm(hidden_states)
    return tokens


class FoldedStream(nn.Module):
    """One stream's layers of a block: what attention reads of it, what is added to it, and its MLP.

    Modulation and gates are in the weights. Several timesteps share the weights, and each has its own beside them.

    Args:
        layout: The sizes.
        projections: Which of query, key and value are there, in this order, in one layer.
        is_attending: Whether something of the attention is added.
        is_run: Whether the MLP is there.
        has_gate: Whether the gate behind attention is here where it is not in the weights, and not at the block.
    """

    def __init__(
        self,
        layout: FoldedLayout,
        projections: Sequence[str],
        is_attending: bool,
        is_run: bool,
        has_gate: bool = False,
    ) -> None:
        super().__init__()
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        num_timesteps = len(layout.timesteps)
        self.num_attention_heads = layout.num_attention_heads
        self.projections = tuple(projections)
        self.attention_norm = build_norm(nn.LayerNorm, width, layout.attention_norm_eps, num_timesteps)
        if projections:
            self.query_key_value = nn.Linear(width, len(projections) * width)
        norm_eps, are_needed = layout.query_key_norm_eps, (is_attending, "value" in projections)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(head_size, norm_eps) if norm_eps is not None and is_needed else None for is_needed in are_needed
        )
        if is_attending:
            self.projection = nn.Linear(width, width)
        if is_run:
            self.mlp_norm = build_norm(nn.LayerNorm, width, layout.mlp_norm_eps, num_timesteps)
            self.up_projection = nn.Linear(width, layout.mlp_size)
            self.activation = build_activation(layout.activation)
            self.down_projection = nn.Linear(layout.mlp_size, width)
        self.gate, self.mlp_gate = (
            nn.Parameter(torch.zeros(num_timesteps, width)) if is_needed and num_timesteps > 1 else None
            for is_needed in (has_gate, is_run)
        )

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

    def attended(self, mixed: Tensor, number: int) -> Tensor:
        """Return what is added to the tokens, (B, N, D), of what attention yields."""
        return at_step(self.projection(mixed), self.gate, number)

    def run_mlp(self, hidden_states: Tensor, number: int) -> Tensor:
        """Return the tokens, (B, N, D), with the MLP's part added."""
        inner = self.activation(self.up_projection(run_norm(self.mlp_norm, hidden_states, number)))
        return hidden_states + at_step(self.down_projection(inner), self.mlp_gate, number)


def at_step(tokens: Tensor, gate: Tensor | None, number: int) -> Tensor:
    """Return tokens, (B, N, D), behind a gate, (D,), or that of a timestep, (T, D); as they are without one."""
    if gate is None:
        return tokens
    return tokens * (gate if gate.dim() == 1 else gate[number])


class FoldedLayer(GradientCheckpointingLayer):
    """What blocks of all kinds share: how far they are run, and what is read of them on the way.

    Args:
        config: The model's configuration, which names transformers' attention kernel in `_attn_implementation`.
        layout: The sizes.
        index: Which block; -1 for a refiner, which is run on the image alone, before the first.
    """

    is_causal = False  # transformers' kernels ask
    projection_name: ClassVar[str] = "query_key_value"
    sizes: Sequence[int] = ()  # of what it makes, `parts`
    has_shift: ClassVar[bool] = True  # of the modulation
    has_gate: ClassVar[bool] = True  # behind attention
    has_offset: ClassVar[bool] = True  # whether something constant may be added behind that

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        width, self.num_timesteps = layout.hidden_size, len(layout.timesteps)
        self.config, self.num_attention_heads = config, layout.num_attention_heads
        self.scaling = (width // layout.num_attention_heads) ** -0.5
        self.features, self.is_run = layout.features_at(index), layout.is_run(index)
        self.is_attending, self.is_text_used = layout.is_attending(index), layout.is_text_used_after(index)
        self.parts = self.projections = layout.projections_at(index)
        self.normed_scale = self.normed_shift = self.gate = self.offset = None
        if "normed" in self.features and self.num_timesteps == 1:
            # Attention reads the modulated tokens with the modulation in its weights; who taps them needs it apart.
            self.normed_scale = nn.Parameter(torch.zeros(width))
            self.normed_shift = nn.Parameter(torch.zeros(width)) if self.has_shift else None
        is_apart = "attention" in self.features or self.num_timesteps > 1
        if self.has_gate and self.is_run and is_apart:
            # A tap comes before the gate, which then cannot be in the weights.
            self.gate = nn.Parameter(torch.zeros(width if self.num_timesteps == 1 else (self.num_timesteps, width)))
            self.offset = nn.Parameter(torch.zeros(width)) if self.has_offset else None

    def project(self, normed: Tensor) -> dict[str, Tensor]:
        """Return those of query, key and value that are there, (B, N, D) each."""
        if not self.sizes:
            return {}
        together: Tensor = getattr(self, self.projection_name)(normed)
        return dict(zip(self.parts, together.split(self.sizes, -1), strict=True))

    def read(self, normed: Tensor, projected: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """Return what is read before attention, (B, N, D) each: of the last `size` tokens, which are the image's."""
        tapped = {name: values[:, -size:] for name, values in projected.items() if name in self.features}
        if "normed" in self.features:
            scaled = normed[:, -size:] if self.normed_scale is None else normed[:, -size:] * self.normed_scale
            tapped["normed"] = scaled if self.normed_shift is None else scaled + self.normed_shift
        return tapped

    def gated(self, attended: Tensor, number: int) -> Tensor:
        """Return what attention adds to the tokens, (B, N, D), of what it yields."""
        tokens = at_step(attended, self.gate, number)
        return tokens if self.offset is None else tokens + self.offset


class FoldedBlock(FoldedLayer):
    """A block of one or two streams, with the taps that it was folded for."""

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__(config, layout, index)
        width = layout.hidden_size
        self.is_text_first = layout.is_text_first
        self.picture = FoldedStream(layout, self.projections, self.is_attending, self.is_run)
        self.text: FoldedStream | None = None
        if layout.text_size and self.is_attending:
            is_used = self.is_text_used
            self.text = FoldedStream(layout, PROJECTIONS if is_used else PROJECTIONS[1:], is_used, is_used, is_used)
        self.dual: FoldedStream | None = None
        if index in layout.dual_attention_blocks and self.is_run:
            self.dual = FoldedStream(layout, PROJECTIONS, is_attending=True, is_run=False, has_gate=True)
        self.cross: PromptAttention | None = None
        if layout.num_cross_tokens and self.is_run:
            self.cross = PromptAttention(config, width, width, self.num_attention_heads, layout.num_cross_tokens)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, places: Rotary | None = None, number: int = 0
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the tokens after the block, those of the text, and the tokens of each feature that was folded for.

        Args:
            hidden_states: Tokens of the image, (B, N, D).
            text: Tokens of the text, (B, L, D), where there are any, and attention looks at them. Sana's does not.
            places: Rotary positions of the text's tokens, as far as there are any, and the image's; of Sana rows and
                columns of the tokens.
            number: Which of the layout's timesteps.
        """
        stream = self.picture
        normed = run_norm(stream.attention_norm, hidden_states, number)
        projected = stream.project(normed) if stream.projections else {}
        tapped = self.read(normed, projected, hidden_states.shape[1])
        if not self.is_attending:
            return hidden_states, text, tapped
        mixed, mixed_text = self._mix(stream.heads(projected), text, places, number)
        attended = stream.projection(mixed)
        if "attention" in self.features:
            tapped["attention"] = attended
        if not self.is_run:
            return hidden_states, text, tapped
        added = self.gated(attended, number)
        if self.dual is not None:
            # At one timestep both read the same norm, as their modulations are in their weights.
            own = normed if self.num_timesteps == 1 else run_norm(self.dual.attention_norm, hidden_states, number)
            mixed = attend(self, **self.dual.heads(self.dual.project(own)))
            added = added + self.dual.attended(mixed, number)
        hidden_states = hidden_states + added
        if self.cross is not None:
            hidden_states = hidden_states + self.cross(hidden_states)
        hidden_states = stream.run_mlp(hidden_states, number)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        if self.text is not None and text is not None and mixed_text is not None:
            text = self.text.run_mlp(text + self.text.attended(mixed_text, number), number)
        return hidden_states, text, tapped

    def _mix(
        self, picture: dict[str, Tensor], text: Tensor | None, rotary: Rotary | None, number: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention yields for the image, (B, N, D), and for the text, where that is used."""
        if self.text is None or text is None:
            return attend(self, **picture), None
        other = self.text.heads(self.text.project(run_norm(self.text.attention_norm, text, number)))
        size, length = picture["query"].shape[2], text.shape[1]
        both = {
            name: [other[name], values] if self.is_text_first else [values, other[name]]
            for name, values in picture.items()
            if name in other
        }
        joined = {name: torch.cat(values, 2) for name, values in both.items()}
        joined.setdefault("query", picture["query"])
        if rotary is not None:
            # Where the text has no queries, those of the image are the last.
            last = joined["query"].shape[2]
            joined["query"] = rotated(joined["query"], (rotary[0][-last:], rotary[1][-last:]))
            joined["key"] = rotated(joined["key"], rotary)
        mixed = attend(self, **joined)
        if "query" not in other:
            return mixed, None
        if self.is_text_first:
            return mixed[:, length:], mixed[:, :length]
        return mixed[:, :size], mixed[:, size:]


class FoldedSingleBlock(FoldedLayer):
    """A block of FLUX in which text and image are one stream, and attention and MLP stand beside each other."""

    has_offset = False
    projection_name = "query_key_value_mlp"

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__(config, layout, index)
        self.text_size = layout.text_size
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        self.attention_norm = build_norm(nn.LayerNorm, width, layout.attention_norm_eps, self.num_timesteps)
        self.parts = (*self.projections, "mlp") if self.is_run else self.projections
        self.sizes = [layout.mlp_size if name == "mlp" else width for name in self.parts]
        if self.sizes:
            self.query_key_value_mlp = nn.Linear(width, sum(self.sizes))
        if self.is_run:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(head_size, layout.query_key_norm_eps or 1e-6) for _ in range(2)
            )
            self.activation = build_activation(layout.activation)
            self.projection = nn.Linear(width + layout.mlp_size, width)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, places: Rotary | None = None, number: int = 0
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns."""
        line = torch.cat([text, hidden_states], dim=1) if self.is_run and text is not None else hidden_states
        normed = run_norm(self.attention_norm, line, number)
        parts = self.project(normed)
        tapped = self.read(normed, parts, hidden_states.shape[1])
        if not self.is_run or text is None:
            return hidden_states, text, tapped
        query, key, value = (split_heads(parts[name], self.num_attention_heads) for name in PROJECTIONS)
        query, key = self.query_norm(query), self.key_norm(key)
        if places is not None:
            query, key = rotated(query, places), rotated(key, places)
        added = self.projection(torch.cat([attend(self, query, key, value), self.activation(parts["mlp"])], dim=-1))
        text_added, added = self.gated(added, number).tensor_split([self.text_size], dim=1)
        text, hidden_states = text + text_added, hidden_states + added
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped


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


class FoldedSanaBlock(FoldedLayer):
    """A block of Sana, with the taps that it was folded for."""

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__(config, layout, index)
        width, count = layout.hidden_size, self.num_timesteps
        self.attention_norm = build_norm(nn.LayerNorm, width, layout.attention_norm_eps, count)
        self.sizes = [width for _ in self.projections]
        if self.sizes:
            self.query_key_value = nn.Linear(width, sum(self.sizes))
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if self.is_attending:
            if layout.query_key_norm_eps is not None:  # of all heads together
                self.query_norm, self.key_norm = (nn.RMSNorm(width, layout.query_key_norm_eps) for _ in range(2))
            self.projection = nn.Linear(width, width)
        self.cross: PromptAttention | None = None
        if not self.is_run:
            return
        if layout.num_cross_tokens:
            size, heads = layout.cross_size or width, layout.num_cross_heads or layout.num_attention_heads
            num_tokens, norm_eps = layout.num_cross_tokens, layout.query_key_norm_eps
            self.cross = PromptAttention(config, width, size, heads, num_tokens, norm_eps)
        self.mlp_norm = build_norm(nn.LayerNorm, width, layout.mlp_norm_eps, count)
        inner = 2 * layout.mlp_size
        self.up_projection = nn.Linear(width, inner)
        self.convolution = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.activation = build_activation(layout.activation)
        self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)
        self.mlp_gate = nn.Parameter(torch.zeros(count, width)) if count > 1 else None

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, places: tuple[int, int] = (1, 1), number: int = 0
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns; what the block reads of the prompt is in its weights."""
        normed = run_norm(self.attention_norm, hidden_states, number)
        projected = self.project(normed)
        tapped = self.read(normed, projected, hidden_states.shape[1])
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
        hidden_states = hidden_states + self.gated(attended, number)
        if self.cross is not None:
            hidden_states = hidden_states + self.cross(hidden_states)
        convolved = self._convolved(run_norm(self.mlp_norm, hidden_states, number), places)
        hidden_states = hidden_states + at_step(convolved, self.mlp_gate, number)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _convolved(self, normed: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what the MLP yields, (B, N, D): each channel looks around itself, and a half gates the other."""
        inner = self.activation(self.up_projection(normed))
        inner = self.convolution(inner.unflatten(1, grid).permute(0, 3, 1, 2))
        values, gates = inner.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, -1)
        tokens: Tensor = self.down_projection(values * self.activation(gates))
        return tokens


class FoldedLumina2Block(FoldedLayer):
    """A block of Lumina-Image 2.0, or a refiner, with the taps that it was folded for.

    Scales are in the weights of attention and MLP, gates in those of the norms behind them. There are no shifts, and
    so no biases.
    """

    has_shift = has_gate = False

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__(config, layout, index)
        width, num_heads, count = layout.hidden_size, layout.num_attention_heads, self.num_timesteps
        head_size, num_key_value_heads = width // num_heads, layout.num_key_value_heads or num_heads
        self.num_key_value_heads = num_key_value_heads
        self.num_key_value_groups = num_heads // num_key_value_heads  # transformers' kernels ask
        self.attention_norm = build_norm(nn.RMSNorm, width, layout.attention_norm_eps, count)
        narrow = num_key_value_heads * head_size
        self.sizes = [width if name == "query" else narrow for name in self.projections]
        if self.sizes:
            self.query_key_value = nn.Linear(width, sum(self.sizes), bias=False)
        if self.is_attending:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(head_size, layout.query_key_norm_eps or 1e-5) for _ in range(2)
            )
            self.projection = nn.Linear(width, width, bias=False)
        if self.is_run:
            self.attention_output_norm = build_norm(nn.RMSNorm, width, layout.attention_norm_eps, count, True)
            self.mlp_norm = build_norm(nn.RMSNorm, width, layout.mlp_norm_eps, count)
            self.up_projection = nn.Linear(width, 2 * layout.mlp_size, bias=False)
            self.activation = build_activation(layout.activation)
            self.down_projection = nn.Linear(layout.mlp_size, width, bias=False)
            self.mlp_output_norm = build_norm(nn.RMSNorm, width, layout.mlp_norm_eps, count, True)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, places: Rotary | None = None, number: int = 0
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns; the text's tokens come first."""
        size, line = hidden_states.shape[1], hidden_states
        if text is not None and self.is_attending:
            line = torch.cat([text, hidden_states], dim=1)
        normed = run_norm(self.attention_norm, line, number)
        projected = self.project(normed)
        tapped = self.read(normed, projected, size)
        if not self.is_attending:
            return hidden_states, text, tapped
        if not self.is_text_used:
            # From here on only the image is of use; the text was looked at.
            line, projected["query"] = hidden_states, projected["query"][:, -size:]
        attended = self.projection(self._mix(projected, places))
        if "attention" in self.features:
            tapped["attention"] = attended[:, -size:]
        if not self.is_run:
            return hidden_states, text, tapped
        line = line + run_norm(self.attention_output_norm, attended, number)
        gates, values = self.up_projection(run_norm(self.mlp_norm, line, number)).chunk(2, -1)
        added = self.down_projection(self.activation(gates) * values)
        line = line + run_norm(self.mlp_output_norm, added, number)
        hidden_states = line[:, -size:]
        if self.is_text_used:
            text = line[:, :-size]
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _mix(self, projected: dict[str, Tensor], rotary: Rotary | None) -> Tensor:
        """Return what attention yields, (B, N, D), of queries, keys and values; the last are the image's."""
        query = self.query_norm(split_heads(projected["query"], self.num_attention_heads))
        key = self.key_norm(split_heads(projected["key"], self.num_key_value_heads))
        value = split_heads(projected["value"], self.num_key_value_heads)
        if rotary is not None:
            query, key = (
                rotated(values, (rotary[0][-values.shape[2] :], rotary[1][-values.shape[2] :]))
                for values in (query, key)
            )
        return attend(self, query, key, value)
