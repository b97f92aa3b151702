"""Layers of a folded transformer: a denoiser's layers merged with modulation, gates and a constant prompt.

At one timestep these are multiplied into the layers. Several timesteps share the layers, but each has its own norms
and gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..model.folded_transformer import sincos_table
from ..model.layouts import PROJECTIONS, FoldedLayout

State = dict[str, Tensor]
# Weight and bias, float64.
Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Modulation:
    """The modulation of a stream in a block at a constant timestep, (D,) each, float64."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None
    mlp_shift: Tensor | None = None
    mlp_scale: Tensor | None = None
    mlp_gate: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """The layers of one stream of a block, under one set of names.

    Args:
        query: Projection to queries.
        key: Projection to keys.
        value: Projection to values.
        query_norm: Norm of queries, or None.
        key_norm: Norm of keys, or None.
        output: Output projection of the attention.
        mlp: The MLP.
        norm: Norm before attention.
        mlp_norm: Norm before the MLP.
        modulations: Modulation of the stream at each timestep.
        offset: Constant that is added after the attention's gate, (D,), float64.
    """

    query: Any
    key: Any
    value: Any
    query_norm: Any
    key_norm: Any
    output: Any
    mlp: Any
    norm: Any
    mlp_norm: Any
    modulations: Sequence[Modulation]
    offset: Tensor | None = None


def stream_of(
    block: Any,
    attention: Any,
    norm: Any,
    mlp_norm: Any,
    modulations: Sequence[Modulation],
    offset: Tensor | None = None,
) -> Stream:
    """Return the image's stream of a block."""
    projections = attention.to_q, attention.to_k, attention.to_v
    norms = attention.norm_q, attention.norm_k
    return Stream(*projections, *norms, attention.to_out[0], block.ff, norm, mlp_norm, modulations, offset)


def _text_stream_of(block: Any, modulations: Sequence[Modulation]) -> Stream:
    """Return the text's stream of a joint block."""
    attention = block.attn
    projections = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    norms = attention.norm_added_q, attention.norm_added_k
    output, norm = getattr(attention, "to_add_out", None), block.norm1_context.norm
    return Stream(*projections, *norms, output, block.ff_context, norm, block.norm2_context, modulations)


def block_state(layout: FoldedLayout, index: int, stream: Stream) -> State:
    """Return the state of a block's image stream, with its taps."""
    prefix, features = f"blocks.{index}.", layout.features_at(index)
    is_run, is_attending = layout.is_run(index), layout.is_attending(index)
    # Where attention is read after its projection, the gate stays a separate vector.
    has_gate = is_run and _has_gate(features, stream.modulations)
    is_gated = is_run and not has_gate
    state = _stream_state(
        layout, f"{prefix}picture.", stream, layout.projections_at(index), is_attending, is_run, is_gated
    )
    if "normed" in features:
        state |= _normed_state(prefix, stream.norm, stream.modulations)
    if has_gate:
        state |= _gate_state(prefix, stream.modulations, stream.offset)
    return state


def joint_state(layout: FoldedLayout, index: int, block: Any, conditions: Sequence[Tensor]) -> State:
    """Return the state of a block of two streams."""
    is_dual = getattr(block, "use_dual_attention", False)
    own, *others = zip(
        *(chunks(block.norm1.linear(condition), 9 if is_dual else 6) for condition in conditions), strict=True
    )
    state = block_state(layout, index, stream_of(block, block.attn, block.norm1.norm, block.norm2, own))
    if index in layout.dual_attention_blocks and layout.is_run(index):
        dual = stream_of(block, block.attn2, block.norm1.norm, block.norm2, others[0])
        state |= _stream_state(layout, f"blocks.{index}.dual.", dual, PROJECTIONS, True, False)
        state |= _step_gate(f"blocks.{index}.dual.gate", [each.gate for each in dual.modulations])
    if layout.is_attending(index):
        is_used = layout.is_text_used_after(index)
        text = _text_stream_of(block, [_text_modulation(block, condition) for condition in conditions])
        projections = PROJECTIONS if is_used else PROJECTIONS[1:]
        state |= _stream_state(layout, f"blocks.{index}.text.", text, projections, is_used, is_used)
        if is_used:
            state |= _step_gate(f"blocks.{index}.text.gate", [each.gate for each in text.modulations])
    return state


def _text_modulation(block: Any, condition: Tensor) -> Modulation:
    """Return the modulation of the text's stream of a joint block."""
    values = block.norm1_context.linear(condition)
    if getattr(block, "context_pre_only", False):
        scale, shift = wide(values)[0].chunk(2)
        return Modulation(shift, scale)
    return chunks(values, 6)[0]


def single_state(layout: FoldedLayout, index: int, block: Any, conditions: Sequence[Tensor]) -> State:
    """Return the state of a `FoldedSingleBlock`."""
    prefix, features, is_run = f"blocks.{index}.", layout.features_at(index), layout.is_run(index)
    modulations = [chunks(block.norm.linear(condition), 3)[0] for condition in conditions]
    norm, modulation = _folded_in(block.norm.norm, modulations)
    attention = block.attn
    named = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v}
    layers = [plain(layer) for name, layer in named.items() if is_run or name in features]
    state = _step_norm(f"{prefix}attention_norm", block.norm.norm, [(each.shift, each.scale) for each in modulations])
    if is_run:
        layers.append(plain(block.proj_mlp))
        state |= _linear(f"{prefix}projection", _gated(plain(block.proj_out), _needed(modulation.gate)))
        state |= _query_key_norms(prefix, attention, layout)
        state |= _step_gate(f"{prefix}gate", [each.gate for each in modulations])
    if layers:
        fused = _modulated(_side_by_side(layers), norm, modulation.shift, modulation.scale)
        state |= _linear(f"{prefix}query_key_value_mlp", fused)
    if "normed" in features:
        state |= _normed_state(prefix, block.norm.norm, modulations)
    return state


def sana_state(layout: FoldedLayout, index: int, block: Any, conditions: Sequence[Tensor], context: Tensor) -> State:
    """Return the state of a `FoldedSanaBlock`."""
    prefix, projections, is_run = f"blocks.{index}.", layout.projections_at(index), layout.is_run(index)
    modulations = [table_modulation(block, condition) for condition in conditions]
    norm, modulation = _folded_in(block.norm1, modulations)
    state = _step_norm(f"{prefix}attention_norm", block.norm1, [(each.shift, each.scale) for each in modulations])
    if "normed" in layout.features_at(index):
        state |= _normed_state(prefix, block.norm1, modulations)
    if projections:
        fused = _modulated(_fused(block.attn1, projections), norm, modulation.shift, modulation.scale)
        state |= _linear(f"{prefix}query_key_value", fused)
    if layout.is_attending(index):
        state |= _sana_attention_state(layout, index, block, modulations, context)
    if is_run and layout.num_cross_tokens:
        state |= cross_state(f"{prefix}cross.", block.attn2, context)
        if layout.query_key_norm_eps is not None:
            state[f"{prefix}cross.query_norm.weight"] = _norm_weight(block.attn2.norm_q, layout, layout.cross_size)
    if is_run:
        state |= _sana_mlp_state(prefix, block, modulations)
    return state


def _sana_attention_state(
    layout: FoldedLayout, index: int, block: Any, modulations: Sequence[Modulation], context: Tensor
) -> State:
    """Return the state of the norms and the projection of Sana's attention."""
    prefix, is_run = f"blocks.{index}.", layout.is_run(index)
    state: State = {}
    if layout.query_key_norm_eps is not None:
        state |= _query_key_norms(prefix, block.attn1, layout, layout.hidden_size)
    weight, bias = plain(block.attn1.to_out[0])
    offset = cross_constant(block.attn2, context) if is_run and not layout.num_cross_tokens else None
    if is_run and _has_gate(layout.features_at(index), modulations):
        state |= _gate_state(prefix, modulations, offset)
    elif is_run:
        weight, bias = _gated((weight, bias), _needed(modulations[0].gate))
        bias = bias if offset is None else bias + offset
    return state | _linear(f"{prefix}projection", (weight, bias))


def _sana_mlp_state(prefix: str, block: Any, modulations: Sequence[Modulation]) -> State:
    """Return the state of Sana's convolutional MLP. Its 1 × 1 convolutions become linear layers."""
    mlp = block.ff
    norm, modulation = _folded_in(block.norm2, modulations)
    (up, up_bias), convolution, (down, _) = (
        plain(layer, nn.Conv2d) for layer in (mlp.conv_inverted, mlp.conv_depth, mlp.conv_point)
    )
    entry = up[..., 0, 0], up_bias
    entry = _modulated(entry, norm, _needed(modulation.mlp_shift), _needed(modulation.mlp_scale))
    return {
        **_mlp_step_state(prefix, block.norm2, modulations),
        **_linear(f"{prefix}up_projection", entry),
        **_linear(f"{prefix}convolution", convolution),
        f"{prefix}down_projection.weight": _needed(modulation.mlp_gate)[:, None] * down[..., 0, 0],
    }


def lumina2_state(layout: FoldedLayout, prefix: str, index: int, block: Any, conditions: Sequence[Tensor]) -> State:
    """Return the state of a `FoldedLumina2Block`; of a refiner at -1."""
    parts = torch.stack([wide(block.norm1.linear(silu(condition)))[0] for condition in conditions]).chunk(4, 1)
    # (T, D) each, of one timestep (D,).
    scale, gate, mlp_scale, mlp_gate = (each[0] if len(conditions) == 1 else each for each in parts)
    attention, mlp, projections = block.attn, block.feed_forward, layout.projections_at(index)
    scale, mlp_scale = _scale(block.norm1.norm, 1 + scale), _scale(block.ffn_norm1, 1 + mlp_scale)
    # Several timesteps have them at the norms.
    before, mlp_before = (each if len(conditions) == 1 else torch.ones_like(each[0]) for each in (scale, mlp_scale))
    state: State = {} if len(conditions) == 1 else {f"{prefix}attention_norm.weight": scale}
    if "normed" in layout.features_at(index) and len(conditions) == 1:
        state[f"{prefix}normed_scale"] = scale
    if projections:
        state[f"{prefix}query_key_value.weight"] = _fused(attention, projections)[0] * before
    if layout.is_attending(index):
        state |= _query_key_norms(prefix, attention, layout)
        state[f"{prefix}projection.weight"] = plain(attention.to_out[0])[0]
    if layout.is_run(index):
        up = torch.cat([plain(mlp.linear_1)[0], plain(mlp.linear_3)[0]])
        state[f"{prefix}attention_output_norm.weight"] = _scale(block.norm2, gate.tanh())
        state |= {} if len(conditions) == 1 else {f"{prefix}mlp_norm.weight": mlp_scale}
        state[f"{prefix}up_projection.weight"] = up * mlp_before
        state[f"{prefix}down_projection.weight"] = plain(mlp.linear_2)[0]
        state[f"{prefix}mlp_output_norm.weight"] = _scale(block.ffn_norm2, mlp_gate.tanh())
    return state


def patch_state(embedding: Any, layout: FoldedLayout) -> State:
    """Return the state of a patch embedding that is a convolution, and the positions of the layout's grid."""
    weight, bias = plain(embedding.proj, nn.Conv2d)
    state = {"patch_embedding.weight": weight, "patch_embedding.bias": bias}
    if layout.positions == "table":
        state["positions"] = embedding.cropped_pos_embed(
            layout.rows * layout.patch_size, layout.columns * layout.patch_size
        )
    elif layout.positions == "sincos":
        state["positions"] = sincos_table(
            layout.hidden_size, layout.rows, layout.columns, layout.position_base_size, layout.position_scale
        )
    return state


def _stream_state(
    layout: FoldedLayout,
    prefix: str,
    stream: Stream,
    projections: Sequence[str],
    is_attending: bool,
    is_run: bool,
    is_gated: bool = True,
) -> State:
    """Return the state of a `FoldedStream`."""
    norm, modulation = _folded_in(stream.norm, stream.modulations)
    mlp_norm, _ = _folded_in(stream.mlp_norm, stream.modulations)
    shifts = [(each.shift, each.scale) for each in stream.modulations]
    state = _step_norm(f"{prefix}attention_norm", stream.norm, shifts)
    if projections:
        fused = _side_by_side([plain(getattr(stream, name)) for name in projections])
        state |= _linear(f"{prefix}query_key_value", _modulated(fused, norm, modulation.shift, modulation.scale))
    if layout.query_key_norm_eps is not None:
        if is_attending:
            state[f"{prefix}query_norm.weight"] = _norm_weight(stream.query_norm, layout)
        if "value" in projections:
            state[f"{prefix}key_norm.weight"] = _norm_weight(stream.key_norm, layout)
    if is_attending:
        is_gated = is_gated and len(stream.modulations) == 1
        state |= _linear(f"{prefix}projection", _output_layer(stream) if is_gated else plain(stream.output))
    if is_run:
        up, down = plain(stream.mlp.net[0].proj), plain(stream.mlp.net[2])
        up = _modulated(up, mlp_norm, _needed(modulation.mlp_shift), _needed(modulation.mlp_scale))
        state |= _mlp_step_state(prefix, stream.mlp_norm, stream.modulations)
        state |= _linear(f"{prefix}up_projection", up)
        state |= _linear(f"{prefix}down_projection", _gated(down, _needed(modulation.mlp_gate)))
    return state


def _output_layer(stream: Stream) -> Layer:
    """Return the attention's output projection, merged with its gate and the constant after it."""
    weight, bias = _gated(plain(stream.output), _needed(stream.modulations[0].gate))
    return weight, bias if stream.offset is None else bias + stream.offset


def _normed_state(prefix: str, norm: Any, modulations: Sequence[Modulation]) -> State:
    """Return the state of the tap "normed": the modulated norm before a block's attention, itself of several steps."""
    if len(modulations) > 1:
        return {}
    scale, shift = _affine(norm, modulations[0].shift, modulations[0].scale)
    return {f"{prefix}normed_scale": scale, f"{prefix}normed_shift": shift}


def _folded_in(norm: Any, modulations: Sequence[Modulation]) -> tuple[Any, Modulation]:
    """Return norm and modulation that go into the weights: of several timesteps none, as each has its own."""
    if len(modulations) == 1:
        return norm, modulations[0]
    zero, one = torch.zeros_like(modulations[0].shift), torch.ones_like(modulations[0].shift)
    return None, Modulation(zero, zero, one, zero, zero, one)


def _step_norm(name: str, norm: Any, shifts_scales: Sequence[tuple[Tensor, Tensor]]) -> State:
    """Return the state of the norm of several timesteps, `StepNorms`; that of a single one has none."""
    if len(shifts_scales) == 1:
        return {}
    scales, shifts = zip(*(_affine(norm, shift, scale) for shift, scale in shifts_scales), strict=True)
    return {f"{name}.weight": torch.stack(scales), f"{name}.bias": torch.stack(shifts)}


def _step_gate(name: str, gates: Sequence[Tensor | None]) -> State:
    """Return the state of a gate of several timesteps; that of a single one is in the weights."""
    return {} if len(gates) == 1 else {name: torch.stack([_needed(gate) for gate in gates])}


def _mlp_step_state(prefix: str, norm: Any, modulations: Sequence[Modulation]) -> State:
    """Return the state of norm and gate of an MLP at several timesteps."""
    shifts = [(_needed(each.mlp_shift), _needed(each.mlp_scale)) for each in modulations]
    gates = _step_gate(f"{prefix}mlp_gate", [each.mlp_gate for each in modulations])
    return {**_step_norm(f"{prefix}mlp_norm", norm, shifts), **gates}


def _has_gate(features: Sequence[str], modulations: Sequence[Modulation]) -> bool:
    """Return whether the gate after a block's attention stays a separate vector, if the block is run to its end."""
    return "attention" in features or len(modulations) > 1


def _gate_state(prefix: str, modulations: Sequence[Modulation], offset: Tensor | None) -> State:
    """Return the state of the gate behind a block's attention, and of the constant behind that."""
    gates = [_needed(each.gate) for each in modulations]
    gate = gates[0] if len(gates) == 1 else torch.stack(gates)
    return {f"{prefix}gate": gate, f"{prefix}offset": torch.zeros_like(gates[0]) if offset is None else offset}


def cross_state(prefix: str, attention: Any, context: Tensor) -> State:
    """Return the state of a `PromptAttention`, but for a norm of queries: keys and values are constants."""
    key = attention.to_k(context)[0]
    return {
        f"{prefix}key": key if attention.norm_k is None else attention.norm_k(key),
        f"{prefix}value": attention.to_v(context)[0],
        **_linear(f"{prefix}query", plain(attention.to_q)),
        **_linear(f"{prefix}projection", plain(attention.to_out[0])),
    }


def cross_constant(attention: Any, context: Tensor) -> Tensor:
    """Return the constant that cross-attention to a one-token prompt adds to every token, (D,), float64.

    The only token gets an attention weight of 1 from every query.
    """
    return wide(attention.to_out[0](attention.to_v(context))[0, 0])


def chunks(values: Tensor, count: int) -> list[Modulation]:
    """Return the modulations, (1, count · D), in diffusers' order: three or six, then optionally three more."""
    parts = wide(values)[0].chunk(count)
    first = Modulation(*parts[: 3 if count == 3 else 6])
    return [first, Modulation(*parts[6:])] if count > 6 else [first]


def table_modulation(block: Any, condition: Tensor) -> Modulation:
    """Return the modulation of a block with its own table, to which the conditioning, (1, 6 · D), is added."""
    table = block.scale_shift_table + condition.reshape(6, -1)
    return chunks(table.reshape(1, -1), 6)[0]


def _affine(norm: Any, shift: Tensor, scale: Tensor) -> Layer:
    """Return scale and shift of a norm's output, its own and the modulation's together."""
    total, offset = 1 + scale, shift
    if getattr(norm, "bias", None) is not None:
        offset = offset + total * wide(norm.bias)
    if getattr(norm, "weight", None) is not None:
        total = total * wide(norm.weight)
    return total, offset


def _modulated(layer: Layer, norm: Any, shift: Tensor, scale: Tensor) -> Layer:
    """Return the layer that maps the norm's output as the given layer maps the modulated output."""
    weight, bias = layer
    total, offset = _affine(norm, shift, scale)
    return weight * total, bias + weight @ offset


def _gated(layer: Layer, gate: Tensor) -> Layer:
    """Return the layer with a gate multiplied into its output."""
    weight, bias = layer
    return gate[:, None] * weight, gate * bias


def _scale(norm: Any, factor: Tensor) -> Tensor:
    """Return the scale of a norm, (D,): its own weight, if any, times a factor."""
    return factor if norm.weight is None else factor * wide(norm.weight)


def _needed(vector: Tensor | None) -> Tensor:
    """Return a vector of a modulation.

    Raises:
        ValueError: If the modulation has none.
    """
    if vector is None:
        raise ValueError("A block without gates cannot be folded to its end.")
    return vector


def _query_key_norms(prefix: str, attention: Any, layout: FoldedLayout, size: int | None = None) -> State:
    """Return the state of both norms of an attention."""
    named = {"query": attention.norm_q, "key": attention.norm_k}
    return {f"{prefix}{name}_norm.weight": _norm_weight(norm, layout, size) for name, norm in named.items()}


def _norm_weight(norm: Any, layout: FoldedLayout, size: int | None = None) -> Tensor:
    """Return the weight of a norm of queries or keys, by default of a head.

    Raises:
        ValueError: If it is not a root mean square norm, or another than the rest.
    """
    if not type(norm).__name__.endswith("RMSNorm"):
        raise ValueError(f"Only RMSNorm on queries and keys can be folded, got {type(norm).__name__}.")
    if norm.eps != layout.query_key_norm_eps or getattr(norm, "bias", None) is not None:
        raise ValueError("A transformer with different kinds of norms on queries and keys cannot be folded.")
    if norm.weight is None:
        return torch.ones(size or layout.hidden_size // layout.num_attention_heads, dtype=torch.float64)
    weight: Tensor = norm.weight
    return weight


def plain(layer: Any, kind: type[Any] = nn.Linear) -> Layer:
    """Return weight and bias of a linear layer or a convolution; reject anything that computes more than they say.

    Raises:
        ValueError: If it is not a plain layer of its kind: adapters and quantized weights would get lost.
    """
    if type(layer) is not kind:
        raise ValueError(
            f"Only plain linear layers and convolutions can be folded, got a {type(layer).__name__}. Merge adapters "
            "first (peft's `merge_and_unload`), and load the model without quantization."
        )
    weight: Tensor = wide(layer.weight)
    bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else wide(layer.bias)
    return weight, bias


def wide(values: Tensor) -> Tensor:
    """Return values in float64: on the CPU, where their device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _fused(attention: Any, projections: Sequence[str]) -> Layer:
    """Return the required projections among query, key and value as one layer."""
    named = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v}
    return _side_by_side([plain(named[name]) for name in projections])


def _side_by_side(layers: list[Layer]) -> Layer:
    """Return layers that read the same as one layer."""
    return torch.cat([weight for weight, _ in layers]), torch.cat([bias for _, bias in layers])


def _linear(name: str, layer: Layer) -> State:
    """Return the state of a linear layer or a convolution of a name."""
    return {f"{name}.weight": layer[0], f"{name}.bias": layer[1]}
