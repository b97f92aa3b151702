"""Folding: a denoiser at a constant timestep, as the weights of a plain transformer."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import Denoiser, Pass, eval_mode
from ..model.folded_transformer import sincos_table
from ..model.layouts import PROJECTIONS, FoldedLayout, Tap, tap_key

State = dict[str, Tensor]
Weights = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Modulation:
    """What a block's conditioning does to a stream at a constant timestep, (D,) each, float64."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None
    mlp_shift: Tensor | None = None
    mlp_scale: Tensor | None = None
    mlp_gate: Tensor | None = None


def fold_model(model: Any) -> Any:
    """Return a model's folded twin; see its `fold`."""
    config = copy.deepcopy(model.config)
    config.resolved_timestep()
    base = model._base()
    if config.folded:
        raise ValueError("This model is folded already.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("A part of this model is not in memory. Load it without offloading, then fold it.")
    taps = list(dict.fromkeys(base.taps()))
    if (config.block_index(), config.feature) not in taps:
        # A backbone or decoder reads other blocks than this one, which would be kept for nothing.
        taps += [(0, config.feature)] if max(taps)[0] < 0 else []
        if isinstance(config.zeroed_channels, list) and config.zeroed_channels:
            own = tap_key(config.block_index(), config.feature)
            config.zeroed_channels = {own: config.zeroed_channels}  # they stay where they are
        config.block = max(taps)[0]
    layout, weights = fold_denoiser(base.denoiser, config, taps)
    if isinstance(config.zeroed_channels, dict):
        kept = config.zeroed_channels.items()
        config.zeroed_channels = {key: channels for key, channels in kept if key in layout.taps}
    config.folded_layout, config.folded = layout.to_dict(), True
    if not model.config.is_selection_in_use():
        config.selection = None
    config.validate()
    return _with_weights(model, config, weights)


def _with_weights(model: Any, config: ASelectConfig, weights: State) -> Any:
    """Return a model of a folded configuration: its denoiser with the folded weights, the rest as in the model."""
    with torch.device("meta"):
        folded = type(model)(config)
    prefix = "" if model is model._base() else f"{model.base_model_prefix}."
    others = {
        name: value.clone() for name, value in model.state_dict().items() if not name.startswith(f"{prefix}denoiser.")
    }
    weights = {f"{prefix}denoiser.{name}": value for name, value in weights.items()}
    folded.load_state_dict({**others, **weights}, assign=True)
    folded._base().freeze()
    return folded.train(model.training)


@torch.no_grad()
def fold_denoiser(denoiser: Denoiser, config: ASelectConfig, taps: Sequence[Tap]) -> tuple[FoldedLayout, State]:
    """Return what a denoiser is at the configuration's timestep, read at some taps: layout and weights.

    At a constant timestep and label (or prompt) the six modulation vectors of a block are constants. With LN the norm
    without affine, W·((1 + scale)·LN(x) + shift) + b = (W·diag(1 + scale))·LN(x) + (W·shift + b), and
    gate·(W·x + b) = (diag(gate)·W)·x + gate·b. Lumina-Image has scales without shifts, and its gates come after norms,
    whose weights they scale. Query, key and value become one layer. The products are computed in float64 and rounded
    once, to the weights' dtype.

    Args:
        denoiser: A denoiser of DiT (or SiT), PixArt, Stable Diffusion 3, FLUX, Sana or Lumina-Image 2.
        config: Its configuration, with an integer timestep.
        taps: Where it is to be read; blocks counted from the first.

    Returns:
        The layout, and the state of a `FoldedTransformer` of it.

    Raises:
        ValueError: If the family cannot be folded, or a layer is none that a plain one could stand for.
    """
    # By the name of diffusers' class: where a checkpoint's own code runs, our classes are there twice.
    name = type(denoiser.transformer).__name__
    if name not in _FAMILIES:
        raise ValueError(f"A {name} cannot be folded. Those that can be are {', '.join(_FAMILIES)}.")
    fold = _FAMILIES[name]
    parameter = next(denoiser.parameters())
    height, width = (side // config.vae_scale_factor for side in config.image_height_width)
    with eval_mode(denoiser):
        latents = torch.zeros(1, denoiser.num_channels, height, width, device=parameter.device, dtype=parameter.dtype)
        timesteps = torch.full((1,), int(config.timestep), device=parameter.device)
        start = denoiser.begin(latents, timesteps, None)
        layout, weights = fold(denoiser, config, start, [tap_key(*tap) for tap in taps])
        # Each is rounded as it comes: in float64 all of them would take twice the model's memory.
        target = parameter.device, parameter.dtype
        return layout, {name: value.to(*target, copy=True).contiguous() for name, value in weights}


def _sizes(denoiser: Denoiser, config: ASelectConfig, start: Pass, taps: list[str]) -> dict[str, Any]:
    """Return the sizes that all families have."""
    return {
        "timestep": config.timestep,
        "taps": tuple(taps),
        "num_channels": denoiser.num_channels,
        "patch_size": denoiser.patch_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "rows": start.rows,
        "columns": start.columns,
    }


def _fold_dit(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold DiT and SiT."""
    transformer = denoiser.transformer
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        **_mlp(first.ff),
        **_sincos(transformer.pos_embed),
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm3.eps,
    )

    def modulation(block: Any) -> Modulation:
        embedding = block.norm1.emb(*start.condition, hidden_dtype=start.hidden_states.dtype)
        return _chunks(block.norm1.linear(silu(embedding)), 6)[0]

    def weights() -> Weights:
        yield from _patches(transformer.pos_embed, layout)
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            parts = _stream_of(block, block.attn1, block.norm1.norm, block.norm3, modulation(block))
            yield from _block_state(layout, index, parts).items()

    return layout, weights()


def _fold_pixart(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold PixArt: keys and values of its cross-attention to the prompt are constants."""
    transformer = denoiser.transformer
    first = denoiser.blocks[0]
    num_tokens = start.context.shape[1]  # type: ignore[union-attr]
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        **_mlp(first.ff),
        **_sincos(transformer.pos_embed),
        attention_norm_eps=first.norm1.eps,
        mlp_norm_eps=first.norm2.eps,
        # One token gets all attention, whatever the query: what is read of it is a constant.
        num_cross_tokens=num_tokens if num_tokens > 1 else 0,
        is_size_fixed=bool(transformer.use_additional_conditions),
    )

    def weights() -> Weights:
        yield from _patches(transformer.pos_embed, layout)
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            table = block.scale_shift_table + start.condition.reshape(6, -1)
            modulation = _chunks(table.reshape(1, -1), 6)[0]
            parts = _stream_of(block, block.attn1, block.norm1, block.norm2, modulation)
            cross = block.attn2
            if layout.is_run(index) and num_tokens == 1:
                parts.offset = _wide(cross.to_out[0](cross.to_v(start.context))[0, 0])
            yield from _block_state(layout, index, parts).items()
            if layout.is_run(index) and num_tokens > 1:
                yield from _cross_state(f"blocks.{index}.cross.", cross, start)

    return layout, weights()


def _fold_sd3(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold Stable Diffusion 3: the text's stream goes on as far as the picture's attention looks at it."""
    transformer = denoiser.transformer
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        **_mlp(first.ff),
        positions="table",
        position_table_size=transformer.pos_embed.pos_embed_max_size,
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=None if first.attn.norm_q is None else first.attn.norm_q.eps,
        text_size=start.context.shape[1],  # type: ignore[union-attr]
        num_joint_blocks=len(denoiser.blocks),
        dual_attention_blocks=tuple(
            index for index, block in enumerate(denoiser.blocks) if getattr(block, "use_dual_attention", False)
        ),
    )

    def weights() -> Weights:
        yield from _patches(transformer.pos_embed, layout)
        if layout.is_text_used_after(-1):
            yield "text", start.context  # type: ignore[misc]
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            yield from _joint_state(layout, index, block, silu(start.condition)).items()

    return layout, weights()


def _fold_flux(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold FLUX: blocks of two streams as Stable Diffusion 3's, then those of one."""
    transformer = denoiser.transformer
    single = transformer.single_transformer_blocks
    norms = [block.attn.norm_q for block in denoiser.blocks]
    first = transformer.transformer_blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        **_mlp(first.ff),
        positions="rotary",
        rotary_sizes=tuple(transformer.pos_embed.axes_dim),
        rotary_theta=float(transformer.pos_embed.theta),
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=_same([norm.eps for norm in norms], "epsilons of its norms"),
        text_size=start.context.shape[1],  # type: ignore[union-attr]
        is_text_first=True,
        num_joint_blocks=len(denoiser.blocks) - len(single),
    )

    def weights() -> Weights:
        weight, bias = _plain(transformer.x_embedder)
        # A token's 2 × 2 latents are packed channel by channel, as a convolution's weights lie.
        yield "patch_embedding.weight", weight.unflatten(1, (-1, 2, 2))
        yield "patch_embedding.bias", bias
        if layout.is_text_used_after(-1):
            yield "text", start.context  # type: ignore[misc]
        condition = silu(start.condition)
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            if layout.is_single(index):
                modulation = _chunks(block.norm.linear(condition), 3)[0]
                yield from _single_state(layout, index, block, modulation).items()
            else:
                yield from _joint_state(layout, index, block, condition).items()

    return layout, weights()


def _fold_sana(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold Sana: as PixArt, with linear attention, and with convolutions, the first and last of them linear layers."""
    transformer = denoiser.transformer
    first = denoiser.blocks[0]
    cross = first.attn2
    num_tokens = start.context.shape[1]  # type: ignore[union-attr]
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        **({"positions": "none"} if transformer.patch_embed.pos_embed is None else _sincos(transformer.patch_embed)),
        blocks="sana",
        mlp_size=first.ff.conv_point.in_channels,
        activation="silu",
        attention_norm_eps=first.norm1.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=None if first.attn1.norm_q is None else first.attn1.norm_q.eps,
        num_cross_tokens=num_tokens if num_tokens > 1 else 0,  # as PixArt's
        num_cross_heads=cross.heads,
        cross_size=cross.to_q.out_features,
    )

    def weights() -> Weights:
        yield from _patches(transformer.patch_embed, layout)
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            table = block.scale_shift_table + start.condition.reshape(6, -1)
            modulation = _chunks(table.reshape(1, -1), 6)[0]
            yield from _sana_state(layout, index, block, modulation, start).items()

    return layout, weights()


def _fold_lumina2(denoiser: Any, config: ASelectConfig, start: Pass, taps: list[str]) -> tuple[FoldedLayout, Weights]:
    """Fold Lumina-Image 2: the refined text is a constant; the picture's refiners are kept, before the blocks."""
    transformer = denoiser.transformer
    all_blocks = [*transformer.noise_refiner, *transformer.layers]
    first = all_blocks[0]
    text_size = start.hidden_states.shape[1] - start.rows * start.columns
    layout = FoldedLayout(
        **_sizes(denoiser, config, start, taps),
        blocks="lumina2",
        num_refiners=len(transformer.noise_refiner),
        num_key_value_heads=first.attn.to_k.out_features * config.num_attention_heads // config.hidden_size,
        mlp_size=first.feed_forward.linear_1.out_features,
        activation="silu",
        positions="rotary",
        rotary_sizes=tuple(transformer.rope_embedder.axes_dim),
        rotary_theta=float(transformer.rope_embedder.theta),
        is_text_placed=True,
        attention_norm_eps=_same(
            [norm.eps for block in all_blocks for norm in (block.norm1.norm, block.norm2)], "epsilons of their norms"
        ),
        mlp_norm_eps=_same(
            [norm.eps for block in all_blocks for norm in (block.ffn_norm1, block.ffn_norm2)],
            "epsilons of their norms",
        ),
        query_key_norm_eps=first.attn.norm_q.eps,
        text_size=text_size,
        is_text_first=True,
    )

    def weights() -> Weights:
        weight, bias = _plain(transformer.x_embedder)
        side = denoiser.patch_size
        # A token's latents are packed with the channels last, a convolution's weights have them first.
        yield "patch_embedding.weight", weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        yield "patch_embedding.bias", bias
        if layout.is_text_used_after(-1):
            yield "text", start.hidden_states[:, :text_size]
        for index, block in enumerate(transformer.noise_refiner):
            yield from _lumina2_state(layout, f"refiners.{index}.", None, block, start).items()
        for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
            yield from _lumina2_state(layout, f"blocks.{index}.", index, block, start).items()

    return layout, weights()


_Fold = Callable[[Any, ASelectConfig, Pass, list[str]], tuple[FoldedLayout, Weights]]
_FAMILIES: dict[str, _Fold] = {
    "DiTTransformer2DModel": _fold_dit,
    "PixArtTransformer2DModel": _fold_pixart,
    "SD3Transformer2DModel": _fold_sd3,
    "FluxTransformer2DModel": _fold_flux,
    "SanaTransformer2DModel": _fold_sana,
    "Lumina2Transformer2DModel": _fold_lumina2,
}


@dataclass
class _Stream:
    """The layers of one stream of a block, under one set of names."""

    query: Any
    key: Any
    value: Any
    query_norm: Any
    key_norm: Any
    output: Any
    mlp: Any
    norm: Any
    mlp_norm: Any
    modulation: Modulation
    offset: Tensor | None = None  # added behind the gate


def _stream_of(block: Any, attention: Any, norm: Any, mlp_norm: Any, modulation: Modulation) -> _Stream:
    """Return the picture's stream of a block."""
    projections = attention.to_q, attention.to_k, attention.to_v
    norms = attention.norm_q, attention.norm_k
    return _Stream(*projections, *norms, attention.to_out[0], block.ff, norm, mlp_norm, modulation)


def _text_stream_of(block: Any, modulation: Modulation) -> _Stream:
    """Return the text's stream of a joint block."""
    attention = block.attn
    projections = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    norms = attention.norm_added_q, attention.norm_added_k
    output, norm = getattr(attention, "to_add_out", None), block.norm1_context.norm
    return _Stream(*projections, *norms, output, block.ff_context, norm, block.norm2_context, modulation)


def _joint_state(layout: FoldedLayout, index: int, block: Any, condition: Tensor) -> State:
    """Return the state of a block of two streams."""
    is_dual = getattr(block, "use_dual_attention", False)
    modulations = _chunks(block.norm1.linear(condition), 9 if is_dual else 6)
    state = _block_state(layout, index, _stream_of(block, block.attn, block.norm1.norm, block.norm2, modulations[0]))
    if index in layout.dual_attention_blocks and layout.is_run(index):
        dual = _stream_of(block, block.attn2, block.norm1.norm, block.norm2, modulations[1])
        state |= _stream_state(layout, f"blocks.{index}.dual.", dual, PROJECTIONS, True, False)
    if layout.is_attending(index):
        is_used = layout.is_text_used_after(index)
        values = block.norm1_context.linear(condition)
        if getattr(block, "context_pre_only", False):
            scale, shift = _wide(values)[0].chunk(2)
            modulation = Modulation(shift, scale)
        else:
            modulation = _chunks(values, 6)[0]
        state |= _stream_state(
            layout,
            f"blocks.{index}.text.",
            _text_stream_of(block, modulation),
            PROJECTIONS if is_used else PROJECTIONS[1:],
            is_used,
            is_used,
        )
    return state


def _block_state(layout: FoldedLayout, index: int, parts: _Stream) -> State:
    """Return the state of a block's picture stream, with its taps."""
    prefix, features = f"blocks.{index}.", layout.features_at(index)
    is_run, is_attending = layout.is_run(index), layout.is_attending(index)
    projections = PROJECTIONS if is_attending else [name for name in PROJECTIONS if name in features]
    has_gate = is_run and "attention" in features
    is_gated = is_run and not has_gate
    state = _stream_state(layout, f"{prefix}picture.", parts, projections, is_attending, is_run, is_gated)
    if "normed" in features:
        scale, shift = _affine(parts.norm, parts.modulation.shift, parts.modulation.scale)
        state |= {f"{prefix}normed_scale": scale, f"{prefix}normed_shift": shift}
    if has_gate:
        gate = _needed(parts.modulation.gate)
        offset = torch.zeros_like(gate) if parts.offset is None else parts.offset
        state |= {f"{prefix}gate": gate, f"{prefix}offset": offset}
    return state


def _stream_state(
    layout: FoldedLayout,
    prefix: str,
    parts: _Stream,
    projections: Sequence[str],
    is_attending: bool,
    is_run: bool,
    is_gated: bool = True,
) -> State:
    """Return the state of a `FoldedStream`."""
    state: State = {}
    modulation = parts.modulation
    if projections:
        fused = _side_by_side([_plain(getattr(parts, name)) for name in projections])
        state |= _linear(f"{prefix}query_key_value", _modulated(fused, parts.norm, modulation.shift, modulation.scale))
    if layout.query_key_norm_eps is not None:
        if is_attending:
            state[f"{prefix}query_norm.weight"] = _norm_weight(parts.query_norm, layout)
        if "value" in projections:
            state[f"{prefix}key_norm.weight"] = _norm_weight(parts.key_norm, layout)
    if is_attending:
        weight, bias = _plain(parts.output)
        if is_gated:
            weight, bias = _gated((weight, bias), _needed(modulation.gate))
            if parts.offset is not None:
                bias = bias + parts.offset
        state |= _linear(f"{prefix}projection", (weight, bias))
    if is_run:
        up, down = _mlp_layers(parts.mlp)
        up = _modulated(up, parts.mlp_norm, _needed(modulation.mlp_shift), _needed(modulation.mlp_scale))
        state |= _linear(f"{prefix}up_projection", up)
        state |= _linear(f"{prefix}down_projection", _gated(down, _needed(modulation.mlp_gate)))
    return state


def _single_state(layout: FoldedLayout, index: int, block: Any, modulation: Modulation) -> State:
    """Return the state of a `FoldedSingleBlock`."""
    prefix, features, is_run = f"blocks.{index}.", layout.features_at(index), layout.is_run(index)
    attention = block.attn
    named = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v}
    layers = [_plain(layer) for name, layer in named.items() if is_run or name in features]
    state: State = {}
    if is_run:
        layers.append(_plain(block.proj_mlp))
        state |= _linear(f"{prefix}projection", _gated(_plain(block.proj_out), _needed(modulation.gate)))
        state[f"{prefix}query_norm.weight"] = _norm_weight(attention.norm_q, layout)
        state[f"{prefix}key_norm.weight"] = _norm_weight(attention.norm_k, layout)
    if layers:
        fused = _modulated(_side_by_side(layers), block.norm.norm, modulation.shift, modulation.scale)
        state |= _linear(f"{prefix}query_key_value_mlp", fused)
    if "normed" in features:
        scale, shift = _affine(block.norm.norm, modulation.shift, modulation.scale)
        state |= {f"{prefix}normed_scale": scale, f"{prefix}normed_shift": shift}
    return state


def _sana_state(layout: FoldedLayout, index: int, block: Any, modulation: Modulation, start: Pass) -> State:
    """Return the state of a `FoldedSanaBlock`."""
    prefix, features, is_run = f"blocks.{index}.", layout.features_at(index), layout.is_run(index)
    attention, cross = block.attn1, block.attn2
    state: State = {}
    if "normed" in features:
        scale, shift = _affine(block.norm1, modulation.shift, modulation.scale)
        state |= {f"{prefix}normed_scale": scale, f"{prefix}normed_shift": shift}
    if layout.projections_at(index):
        fused = _fused(attention, layout.projections_at(index))
        fused = _modulated(fused, block.norm1, modulation.shift, modulation.scale)
        state |= _linear(f"{prefix}query_key_value", fused)
    if layout.is_attending(index):
        if layout.query_key_norm_eps is not None:
            state[f"{prefix}query_norm.weight"] = _norm_weight(attention.norm_q, layout, layout.hidden_size)
            state[f"{prefix}key_norm.weight"] = _norm_weight(attention.norm_k, layout, layout.hidden_size)
        output = _plain(attention.to_out[0])
        gate = _needed(modulation.gate)
        offset = torch.zeros_like(gate)
        if is_run and not layout.num_cross_tokens:
            offset = _wide(cross.to_out[0](cross.to_v(start.context))[0, 0])
        if is_run and "attention" in features:
            state |= {f"{prefix}gate": gate, f"{prefix}offset": offset}
        elif is_run:
            weight, bias = _gated(output, gate)
            output = weight, bias + offset
        state |= _linear(f"{prefix}projection", output)
    if not is_run:
        return state
    if layout.num_cross_tokens:
        state |= _cross_state(f"{prefix}cross.", cross, start)
        if layout.query_key_norm_eps is not None:
            state[f"{prefix}cross.query_norm.weight"] = _norm_weight(cross.norm_q, layout, layout.cross_size)
    mlp = block.ff
    (up, up_bias), (inner, inner_bias), (down, _) = (
        _plain(layer, nn.Conv2d) for layer in (mlp.conv_inverted, mlp.conv_depth, mlp.conv_point)
    )
    # Convolutions of single tokens are linear layers.
    entry = up[..., 0, 0], up_bias
    entry = _modulated(entry, block.norm2, _needed(modulation.mlp_shift), _needed(modulation.mlp_scale))
    state |= _linear(f"{prefix}up_projection", entry)
    state |= _linear(f"{prefix}convolution", (inner, inner_bias))
    state[f"{prefix}down_projection.weight"] = _needed(modulation.mlp_gate)[:, None] * down[..., 0, 0]
    return state


def _lumina2_state(layout: FoldedLayout, prefix: str, index: int | None, block: Any, start: Pass) -> State:
    """Return the state of a `FoldedLumina2Block`; of a refiner if there is no index."""
    features = () if index is None else layout.features_at(index)
    scale, gate, mlp_scale, mlp_gate = _wide(block.norm1.linear(silu(start.condition)))[0].chunk(4)
    attention, mlp = block.attn, block.feed_forward
    scale, mlp_scale = _scale(block.norm1.norm, 1 + scale), _scale(block.ffn_norm1, 1 + mlp_scale)
    projections = PROJECTIONS if index is None else layout.projections_at(index)
    state: State = {}
    if "normed" in features:
        state[f"{prefix}normed_scale"] = scale
    if projections:
        state[f"{prefix}query_key_value.weight"] = _fused(attention, projections)[0] * scale
    if index is None or layout.is_attending(index):
        size = layout.hidden_size // layout.num_attention_heads
        state[f"{prefix}query_norm.weight"] = _norm_weight(attention.norm_q, layout, size)
        state[f"{prefix}key_norm.weight"] = _norm_weight(attention.norm_k, layout, size)
        state[f"{prefix}projection.weight"] = _plain(attention.to_out[0])[0]
    if index is None or layout.is_run(index):
        up = torch.cat([_plain(mlp.linear_1)[0], _plain(mlp.linear_3)[0]])
        state[f"{prefix}attention_output_norm.weight"] = _scale(block.norm2, gate.tanh())
        state[f"{prefix}up_projection.weight"] = up * mlp_scale
        state[f"{prefix}down_projection.weight"] = _plain(mlp.linear_2)[0]
        state[f"{prefix}mlp_output_norm.weight"] = _scale(block.ffn_norm2, mlp_gate.tanh())
    return state


def _scale(norm: Any, factor: Tensor) -> Tensor:
    """Return what a norm's output is multiplied with, (D,): its own weight, if any, and a factor."""
    return factor if norm.weight is None else factor * _wide(norm.weight)


def _cross_state(prefix: str, attention: Any, start: Pass) -> Weights:
    """Yield the state of a `PromptAttention`, but for a norm of queries."""
    key = attention.to_k(start.context)[0]
    yield f"{prefix}key", key if attention.norm_k is None else attention.norm_k(key)
    yield f"{prefix}value", attention.to_v(start.context)[0]
    yield from _linear(f"{prefix}query", _plain(attention.to_q)).items()
    yield from _linear(f"{prefix}projection", _plain(attention.to_out[0])).items()


def _chunks(values: Tensor, count: int) -> list[Modulation]:
    """Return the modulations, (1, count · D), that diffusers' order stands for: three or six, then perhaps three."""
    parts = _wide(values)[0].chunk(count)
    first = Modulation(*parts[: 3 if count == 3 else 6])
    return [first, Modulation(*parts[6:])] if count > 6 else [first]


def _wide(values: Tensor) -> Tensor:
    """Return values in float64: on the CPU, where their device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _needed(vector: Tensor | None) -> Tensor:
    if vector is None:
        raise ValueError("A block without gates cannot be folded to its end.")
    return vector


Layer = tuple[Tensor, Tensor]  # weight and bias, float64


def _fused(attention: Any, projections: Sequence[str]) -> Layer:
    """Return those of query, key and value that are needed, as one layer."""
    named = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v}
    return _side_by_side([_plain(named[name]) for name in projections])


def _side_by_side(layers: list[Layer]) -> Layer:
    """Return layers that read the same as one layer."""
    return torch.cat([weight for weight, _ in layers]), torch.cat([bias for _, bias in layers])


def _plain(layer: Any, kind: type[Any] = nn.Linear) -> Layer:
    """Return weight and bias of a linear layer or a convolution; refuse anything that computes more than they say.

    Raises:
        ValueError: If it is no plain layer of its kind: adapters and quantized weights would get lost.
    """
    if type(layer) is not kind:
        raise ValueError(
            f"Only plain linear layers and convolutions can be folded, got a {type(layer).__name__}. Merge adapters "
            "first (peft's `merge_and_unload`), and load the model without quantization."
        )
    weight: Tensor = _wide(layer.weight)
    bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else _wide(layer.bias)
    return weight, bias


def _linear(name: str, layer: Layer) -> State:
    return {f"{name}.weight": layer[0], f"{name}.bias": layer[1]}


def _affine(norm: Any, shift: Tensor, scale: Tensor) -> Layer:
    """Return scale and shift of a norm's output, its own and the modulation's together."""
    total, offset = 1 + scale, shift
    if getattr(norm, "bias", None) is not None:
        offset = offset + total * _wide(norm.bias)
    if getattr(norm, "weight", None) is not None:
        total = total * _wide(norm.weight)
    return total, offset


def _modulated(layer: Layer, norm: Any, shift: Tensor, scale: Tensor) -> Layer:
    """Return the layer that makes of the norm's output what a layer makes of the modulated one."""
    weight, bias = layer
    total, offset = _affine(norm, shift, scale)
    return weight * total, bias + weight @ offset


def _gated(layer: Layer, gate: Tensor) -> Layer:
    """Return the layer that makes what the gate leaves of a layer's output."""
    weight, bias = layer
    return gate[:, None] * weight, gate * bias


def _mlp_layers(mlp: Any) -> tuple[Layer, Layer]:
    return _plain(mlp.net[0].proj), _plain(mlp.net[2])


def _mlp(mlp: Any) -> dict[str, Any]:
    """Return width and activation of an MLP.

    Raises:
        ValueError: If it has a gate of its own or another activation.
    """
    entry = mlp.net[0]
    if type(entry).__name__ != "GELU":
        raise ValueError(f"An MLP with {type(entry).__name__} cannot be folded, only one with GELU.")
    return {
        "mlp_size": entry.proj.out_features,
        "activation": "gelu_tanh" if entry.approximate == "tanh" else "gelu",
    }


def _norm_weight(norm: Any, layout: FoldedLayout, size: int | None = None) -> Tensor:
    """Return the weight of a norm of queries or keys, by default of a head.

    Raises:
        ValueError: If it is no root mean square norm, or another than the rest.
    """
    if not type(norm).__name__.endswith("RMSNorm"):
        raise ValueError(f"Norms of queries and keys of kind {type(norm).__name__} cannot be folded, only RMSNorm.")
    if norm.eps != layout.query_key_norm_eps or getattr(norm, "bias", None) is not None:
        raise ValueError("A transformer whose norms of queries and keys differ in kind cannot be folded.")
    if norm.weight is None:
        return torch.ones(size or layout.hidden_size // layout.num_attention_heads, dtype=torch.float64)
    weight: Tensor = norm.weight
    return weight


def _same(values: list[Any], what: str) -> Any:
    if len(set(values)) > 1:
        raise ValueError(f"A transformer cannot be folded whose blocks differ in the {what}: {sorted(set(values))}.")
    return values[0]


def _sincos(embedding: Any) -> dict[str, Any]:
    return {
        "positions": "sincos",
        "position_base_size": embedding.base_size,
        "position_scale": float(embedding.interpolation_scale),
    }


def _patches(embedding: Any, layout: FoldedLayout) -> Weights:
    """Yield the state of the patch embedding, and the positions of the layout's grid."""
    weight, bias = _plain(embedding.proj, nn.Conv2d)
    yield "patch_embedding.weight", weight
    yield "patch_embedding.bias", bias
    if layout.positions == "table":
        sides = (side * layout.patch_size for side in (layout.rows, layout.columns))
        yield "positions", embedding.cropped_pos_embed(*sides)
    elif layout.positions == "sincos":
        yield (
            "positions",
            sincos_table(
                layout.hidden_size,
                layout.rows,
                layout.columns,
                layout.position_base_size,
                layout.position_scale,
            ),
        )
