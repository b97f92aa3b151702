"""The families of transformers that can be folded: of each the layout and the weights of its plain twin."""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor
from torch.nn.functional import silu

from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import FoldedLayout
from .layers import (
    block_state,
    chunks,
    cross_constant,
    cross_state,
    joint_state,
    lumina2_state,
    patch_state,
    plain,
    sana_state,
    single_state,
    stream_of,
    table_modulation,
)
from .passes import Pass

Weights = Iterator[tuple[str, Tensor]]
Folded = tuple[FoldedLayout, Weights]
# A function that folds a family. It takes the denoiser, its configuration, the first block's inputs at each timestep,
# and the timesteps and tap keys of the layout.
Fold = Callable[[Any, ASelectConfig, list[Pass], dict[str, Any]], Folded]


def fold_dit(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold DiT and SiT."""
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **_mlp(first.ff),
        **_sincos(denoiser.transformer.pos_embed),
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm3.eps,
    )
    return layout, _dit_weights(denoiser, starts, layout)


def _dit_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    yield from patch_state(denoiser.transformer.pos_embed, layout).items()
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        embeddings = [block.norm1.emb(*start.condition, hidden_dtype=start.hidden_states.dtype) for start in starts]
        modulations = [chunks(block.norm1.linear(silu(embedding)), 6)[0] for embedding in embeddings]
        stream = stream_of(block, block.attn1, block.norm1.norm, block.norm3, modulations)
        yield from block_state(layout, index, stream).items()


def fold_pixart(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold PixArt: keys and values of its cross-attention to the prompt are constants."""
    transformer = denoiser.transformer
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **_mlp(first.ff),
        **_sincos(transformer.pos_embed),
        attention_norm_eps=first.norm1.eps,
        mlp_norm_eps=first.norm2.eps,
        num_cross_tokens=_num_cross_tokens(starts[0]),
        is_size_fixed=bool(transformer.use_additional_conditions),
    )
    return layout, _pixart_weights(denoiser, starts, layout)


def _pixart_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    yield from patch_state(denoiser.transformer.pos_embed, layout).items()
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        modulations = [table_modulation(block, start.condition) for start in starts]
        is_run = layout.is_run(index)
        has_constant = is_run and not layout.num_cross_tokens
        offset = cross_constant(block.attn2, _context(starts[0])) if has_constant else None
        stream = stream_of(block, block.attn1, block.norm1, block.norm2, modulations, offset)
        yield from block_state(layout, index, stream).items()
        if is_run and layout.num_cross_tokens:
            yield from cross_state(f"blocks.{index}.cross.", block.attn2, _context(starts[0])).items()


def fold_sd3(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold Stable Diffusion 3: the text stream is kept as far as the image's attention reads it."""
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **_mlp(first.ff),
        positions="table",
        position_table_size=denoiser.transformer.pos_embed.pos_embed_max_size,
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=None if first.attn.norm_q is None else first.attn.norm_q.eps,
        text_size=_context(starts[0]).shape[1],
        num_joint_blocks=len(denoiser.blocks),
        dual_attention_blocks=tuple(
            index for index, block in enumerate(denoiser.blocks) if getattr(block, "use_dual_attention", False)
        ),
    )
    return layout, _sd3_weights(denoiser, starts, layout)


def _sd3_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    yield from patch_state(denoiser.transformer.pos_embed, layout).items()
    if layout.is_text_used_after(-1):
        yield "text", _context(starts[0])
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        yield from joint_state(layout, index, block, [silu(start.condition) for start in starts]).items()


def fold_flux(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold FLUX: double-stream blocks like those of Stable Diffusion 3, then single-stream blocks."""
    transformer = denoiser.transformer
    first = transformer.transformer_blocks[0]
    norms = [block.attn.norm_q for block in denoiser.blocks]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **_mlp(first.ff),
        **_rotary(transformer.pos_embed),
        attention_norm_eps=first.norm1.norm.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=_same([norm.eps for norm in norms], "epsilons of its norms"),
        text_size=_context(starts[0]).shape[1],
        is_text_first=True,
        num_joint_blocks=len(denoiser.blocks) - len(transformer.single_transformer_blocks),
    )
    return layout, _flux_weights(denoiser, starts, layout)


def _flux_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    weight, bias = plain(denoiser.transformer.x_embedder)
    # A token's 2 × 2 latents are packed channel by channel, as a convolution's weights lie.
    yield "patch_embedding.weight", weight.unflatten(1, (-1, 2, 2))
    yield "patch_embedding.bias", bias
    if layout.is_text_used_after(-1):
        yield "text", _context(starts[0])
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        state_of = single_state if layout.is_single(index) else joint_state
        yield from state_of(layout, index, block, [silu(start.condition) for start in starts]).items()


def fold_sana(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold Sana: as PixArt, with linear attention, and with convolutions, the first and last of them linear layers."""
    embedding = denoiser.transformer.patch_embed
    first = denoiser.blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **({"positions": "none"} if embedding.pos_embed is None else _sincos(embedding)),
        blocks="sana",
        mlp_size=first.ff.conv_point.in_channels,
        activation="silu",
        attention_norm_eps=first.norm1.eps,
        mlp_norm_eps=first.norm2.eps,
        query_key_norm_eps=None if first.attn1.norm_q is None else first.attn1.norm_q.eps,
        num_cross_tokens=_num_cross_tokens(starts[0]),
        num_cross_heads=first.attn2.heads,
        cross_size=first.attn2.to_q.out_features,
    )
    return layout, _sana_weights(denoiser, starts, layout)


def _sana_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    yield from patch_state(denoiser.transformer.patch_embed, layout).items()
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        conditions = [start.condition for start in starts]
        yield from sana_state(layout, index, block, conditions, _context(starts[0])).items()


def fold_lumina2(denoiser: Any, config: ASelectConfig, starts: list[Pass], read: dict[str, Any]) -> Folded:
    """Fold Lumina-Image 2: the refined text is a constant; the image's refiners are kept, before the blocks."""
    transformer = denoiser.transformer
    all_blocks = [*transformer.noise_refiner, *transformer.layers]
    attention_norms = [norm for block in all_blocks for norm in (block.norm1.norm, block.norm2)]
    mlp_norms = [norm for block in all_blocks for norm in (block.ffn_norm1, block.ffn_norm2)]
    first = all_blocks[0]
    layout = FoldedLayout(
        **_sizes(denoiser, config, starts[0]),
        **read,
        **_rotary(transformer.rope_embedder),
        blocks="lumina2",
        num_refiners=len(transformer.noise_refiner),
        num_key_value_heads=first.attn.to_k.out_features * config.num_attention_heads // config.hidden_size,
        mlp_size=first.feed_forward.linear_1.out_features,
        activation="silu",
        is_text_placed=True,
        attention_norm_eps=_same([norm.eps for norm in attention_norms], "epsilons of their norms"),
        mlp_norm_eps=_same([norm.eps for norm in mlp_norms], "epsilons of their norms"),
        query_key_norm_eps=first.attn.norm_q.eps,
        text_size=starts[0].hidden_states.shape[1] - starts[0].rows * starts[0].columns,
        is_text_first=True,
    )
    return layout, _lumina2_weights(denoiser, starts, layout)


def _lumina2_weights(denoiser: Any, starts: list[Pass], layout: FoldedLayout) -> Weights:
    transformer, side = denoiser.transformer, denoiser.patch_size
    weight, bias = plain(transformer.x_embedder)
    # A token's latents are packed with the channels last, a convolution's weights have them first.
    yield "patch_embedding.weight", weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
    yield "patch_embedding.bias", bias
    if layout.is_text_used_after(-1):
        yield "text", starts[0].hidden_states[:, : layout.text_size]
    conditions = [start.condition for start in starts]
    for index, block in enumerate(transformer.noise_refiner):
        yield from lumina2_state(layout, f"refiners.{index}.", -1, block, conditions).items()
    for index, block in enumerate(denoiser.blocks[: layout.last_block + 1]):
        yield from lumina2_state(layout, f"blocks.{index}.", index, block, conditions).items()


def _sizes(denoiser: Any, config: ASelectConfig, start: Pass) -> dict[str, Any]:
    """Return the sizes that all families have."""
    return {
        "num_channels": denoiser.num_channels,
        "patch_size": denoiser.patch_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "rows": start.rows,
        "columns": start.columns,
    }


def _mlp(mlp: Any) -> dict[str, Any]:
    """Return width and activation of an MLP.

    Raises:
        ValueError: If it has a separate gate or another activation.
    """
    entry = mlp.net[0]
    if type(entry).__name__ != "GELU":
        raise ValueError(f"Only MLPs with GELU can be folded, got {type(entry).__name__}.")
    return {
        "mlp_size": entry.proj.out_features,
        "activation": "gelu_tanh" if entry.approximate == "tanh" else "gelu",
    }


def _sincos(embedding: Any) -> dict[str, Any]:
    """Return the parameters of a sinusoidal position table."""
    return {
        "positions": "sincos",
        "position_base_size": embedding.base_size,
        "position_scale": float(embedding.interpolation_scale),
    }


def _rotary(embedding: Any) -> dict[str, Any]:
    """Return the parameters of rotary positions."""
    return {
        "positions": "rotary",
        "rotary_sizes": tuple(embedding.axes_dim),
        "rotary_theta": float(embedding.theta),
    }


def _same(values: list[Any], what: str) -> Any:
    """Return the one value that all blocks have.

    Raises:
        ValueError: If they have several.
    """
    if len(set(values)) > 1:
        raise ValueError(
            f"A transformer whose blocks differ in the {what} cannot be folded, got {sorted(set(values))}."
        )
    return values[0]


def _context(start: Pass) -> Tensor:
    """Return the prompt's tokens, (1, L, D), which the families that ask for them always have."""
    return cast(Tensor, start.context)


def _num_cross_tokens(start: Pass) -> int:
    """Return how many tokens of the prompt cross-attention selects from; of a single one it reads a constant."""
    num_tokens = _context(start).shape[1]
    return num_tokens if num_tokens > 1 else 0
