"""The families of diffusion transformers: how diffusers' classes are read at a tap, and how they are built."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .configuration_aselect import ASelectConfig
from .denoiser import Denoiser, Pass, SteppedDenoiser, grid_of, modulated_by_table
from .families import family_of
from .folded_transformer import FoldedTransformer
from .generic_denoiser import GenericDenoiser
from .vae import keep_encoder


class DiTDenoiser(SteppedDenoiser):
    """A class-conditional DiT, or a SiT in its layout; a tap is read with the null label.

    Facts of diffusers' DiT that are dealt with here and nowhere else: its label embedding drops labels at random in
    train mode (a tap always gets the null label, which is what it drops to); its `forward` un-patchifies to a square
    (we go through its blocks, so a grid may have any shape); its position table is no part of the checkpoint.

    Args:
        transformer: A `DiTTransformer2DModel`.
        timestep_embedding: "diffusers" leaves diffusers' frequencies, 10000^(-i/127), for models that were trained
            with them; "original" sets those of `facebookresearch/DiT`, 10000^(-i/128). "sit" and "repa" set the latter
            and condition on a time in [0, 1]: SiT's is 1 - t/1000, and its velocity points from the noise to the
            image; REPA's is t/1000, and its velocity points from the image to the noise.
        options: Of all families, see `Denoiser`.

    Source: diffusers, `models/transformers/dit_transformer_2d.py`; facebookresearch/DiT, `models.py`,
    `TimestepEmbedder`; willisma/SiT, `transport/path.py` (x_t = t · image + (1 - t) · noise); sihyun-yu/REPA,
    `loss.py`, `interpolant` (x_t = (1 - t) · image + t · noise).
    """

    timestep_embeddings: ClassVar[tuple[str, ...]] = ("diffusers", "original", "sit", "repa")
    has_position_table: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("proj_out_1", "proj_out_2")

    def __init__(self, transformer: nn.Module, timestep_embedding: str = "diffusers", **options: Any) -> None:
        super().__init__(transformer, timestep_embedding, **options)
        if timestep_embedding != "diffusers":
            for block in self.transformer.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = 0

    @property
    def num_classes(self) -> int:
        """Classes that the DiT knows; as a label, this number is the null label."""
        return int(self.transformer.config.num_embeds_ada_norm)

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        rows, columns = grid_of(noised_latents, self.patch_size)
        if labels is None:
            labels = torch.full(timesteps.shape, self.num_classes, device=timesteps.device)
        if self.timestep_embedding in ("sit", "repa"):
            timesteps = timesteps / 1000
            timesteps = 1 - timesteps if self.timestep_embedding == "sit" else timesteps
        return Pass(self.transformer.pos_embed(noised_latents), rows, columns, (timesteps, labels))

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the block's attention reads, (B, N, D)."""
        hidden_states = state.hidden_states
        tokens: Tensor = block.norm1(hidden_states, *state.condition, hidden_dtype=hidden_states.dtype)[0]
        return tokens

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        timesteps, labels = state.condition
        state.hidden_states = block(state.hidden_states, timestep=timesteps, class_labels=labels)


class PixArtDenoiser(SteppedDenoiser):
    """A DiT with cross-attention to a text; read with the empty prompt, whose padding is left out.

    All blocks share one modulation, to which each adds a table of its own. PixArt-alpha at 1024 pixels is also
    conditioned on the image's size and aspect ratio: they are the image's own here, as in diffusers' pipeline.

    Source: diffusers, `models/transformers/pixart_transformer_2d.py` and `models/attention.py`,
    `BasicTransformerBlock` with `ada_norm_single`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "caption_channels"}
    has_position_table: ClassVar[bool] = True
    text_input_names: ClassVar[tuple[str, ...]] = ("caption_projection",)

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        transformer, size = self.transformer, noised_latents.shape[0]
        rows, columns = grid_of(noised_latents, self.patch_size)
        hidden_states = transformer.pos_embed(noised_latents)
        height, width = (side * self.vae_scale_factor for side in noised_latents.shape[-2:])
        added = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            resolution = hidden_states.new_tensor([float(height), float(width)])
            aspect_ratio = hidden_states.new_tensor([height / width])
            added = {"resolution": resolution.expand(size, -1), "aspect_ratio": aspect_ratio.expand(size, -1)}
        condition, embedded = transformer.adaln_single(
            timesteps, added, batch_size=size, hidden_dtype=hidden_states.dtype
        )
        context = self.prompt_embeds
        if transformer.caption_projection is not None:
            context = transformer.caption_projection(context)
        return Pass(
            hidden_states, rows, columns, condition, context=context.expand(size, -1, -1), output_condition=embedded
        )

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the block's self-attention reads, (B, N, D)."""
        return modulated_by_table(state, block)

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.hidden_states = block(state.hidden_states, encoder_hidden_states=state.context, timestep=state.condition)


class JointDenoiser(SteppedDenoiser):
    """A DiT with blocks of two streams, image and text, that attend to each other."""

    prompt_fields: ClassVar[dict[str, str]] = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }
    attention_name: ClassVar[str] = "attn"
    text_input_names: ClassVar[tuple[str, ...]] = ("context_embedder",)

    def text_outputs(self, block: Any) -> list[nn.Module]:
        """Return the modules of a block that only the text of later blocks depends on."""
        is_last = getattr(block, "context_pre_only", False)
        return [] if is_last or not self.is_joint(block) else [block.attn.to_add_out, block.ff_context]

    def is_joint(self, block: Any) -> bool:
        """Return whether the block is one of two streams."""
        return hasattr(block, "norm1_context")

    def joint_norms_of(self, block: Any) -> list[nn.Module]:
        """Return the module that makes what the joint attention reads of the text."""
        return [block.norm1_context] if self.is_joint(block) else []


class SD3Denoiser(JointDenoiser):
    """An MMDiT of two streams, image and text, that attend to each other; read with the empty prompt.

    Tokens are the image's alone. `query`, `key` and `value` are taken before the head split and before the norm of
    queries and keys that Stable Diffusion 3.5 has. In its dual-attention blocks the first attention is read, the joint
    one; `normed` is what that one reads.

    Source: diffusers, `models/transformers/transformer_sd3.py` and `models/attention.py`, `JointTransformerBlock`.
    """

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        transformer, size = self.transformer, noised_latents.shape[0]
        rows, columns = grid_of(noised_latents, self.patch_size)
        return Pass(
            transformer.pos_embed(noised_latents).contiguous(),
            rows,
            columns,
            transformer.time_text_embed(timesteps, self.pooled_prompt_embeds.expand(size, -1)),
            context=transformer.context_embedder(self.prompt_embeds.expand(size, -1, -1)),
        )

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the joint attention reads of the image, (B, N, D)."""
        tokens: Tensor = block.norm1(state.hidden_states, emb=state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the joint attention yields for the image, (B, N, D)."""
        if block.context_pre_only:
            context = block.norm1_context(state.context, state.condition)
        else:
            context = block.norm1_context(state.context, emb=state.condition)[0]
        tokens: Tensor = block.attn(hidden_states=normed, encoder_hidden_states=context)[0]
        return tokens

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.context, state.hidden_states = block(
            hidden_states=state.hidden_states, encoder_hidden_states=state.context, temb=state.condition
        )


class FluxDenoiser(JointDenoiser):
    """FLUX.1: blocks of two streams (image and text), then blocks of one; read with the empty prompt.

    Blocks are numbered in one line, those of two streams first. A block of one stream projects attention and MLP
    together, so it has no `attention`. Tokens are the image's alone. `query` and `key` are taken before the head
    split, their norm and the rotary positions. The guidance-distilled FLUX.1-dev is conditioned on `guidance`. A token
    stands for 2 × 2 latents, which diffusers' pipeline packs before the transformer sees them.

    Source: diffusers, `models/transformers/transformer_flux.py` and `pipelines/flux/pipeline_flux.py`.
    """

    patch_embedding_name: ClassVar[str] = "x_embedder"

    @property
    def num_channels(self) -> int:
        """Channels of the latents, before they are packed."""
        return int(self.transformer.config.in_channels) // 4

    @property
    def patch_size(self) -> int:
        """Side of a token in latents."""
        return 2

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks of two streams, then those of one."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        transformer, size, device = self.transformer, noised_latents.shape[0], noised_latents.device
        rows, columns = grid_of(noised_latents, 2)
        packed = noised_latents.unflatten(-1, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
        packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 4C)
        # Not by diffusers' way over t/1000 in the model's dtype, which loses the timestep's last digits in half
        # precision.
        condition = [timesteps.float()]
        if transformer.config.guidance_embeds:
            condition.append(torch.full_like(condition[0], 1000 * self.guidance))
        prompt = self.prompt_embeds.expand(size, -1, -1)
        places = torch.zeros(prompt.shape[1] + rows * columns, 3, device=device)
        grid = places[prompt.shape[1] :].unflatten(0, (rows, columns))
        grid[..., 1] = torch.arange(rows, device=device)[:, None]
        grid[..., 2] = torch.arange(columns, device=device)
        return Pass(
            transformer.x_embedder(packed),
            rows,
            columns,
            transformer.time_text_embed(*condition, self.pooled_prompt_embeds.expand(size, -1)),
            context=transformer.context_embedder(prompt),
            rotary=transformer.pos_embed(places),
        )

    def norms_of(self, block: Any) -> list[nn.Module]:
        """Return the modules that `normed` runs."""
        return [block.norm1 if self.is_joint(block) else block.norm]

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the attention reads of the image, (B, N, D)."""
        (norm,) = self.norms_of(block)
        tokens: Tensor = norm(state.hidden_states, emb=state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the attention of a block of two streams yields for the image, (B, N, D).

        Raises:
            ValueError: If the block is one of one stream.
        """
        if not self.is_joint(block):
            raise ValueError("FLUX's blocks of one stream have no `attention`: it is projected with the MLP.")
        context = block.norm1_context(state.context, emb=state.condition)[0]
        tokens: Tensor = block.attn(
            hidden_states=normed, encoder_hidden_states=context, image_rotary_emb=state.rotary
        )[0]
        return tokens

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.context, state.hidden_states = block(
            hidden_states=state.hidden_states,
            encoder_hidden_states=state.context,
            temb=state.condition,
            image_rotary_emb=state.rotary,
        )


class SanaDenoiser(SteppedDenoiser):
    """A DiT with linear self-attention, cross-attention to a text and convolutions; read with the empty prompt.

    Args:
        transformer: A `SanaTransformer2DModel` without guidance embedding.
        options: Of all families, see `Denoiser`.

    Raises:
        ValueError: If the transformer is conditioned on a guidance (Sana-Sprint): its schedule is another.

    Source: diffusers, `models/transformers/sana_transformer.py`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "caption_channels"}
    patch_embedding_name: ClassVar[str] = "patch_embed"
    text_input_names: ClassVar[tuple[str, ...]] = ("caption_projection", "caption_norm")

    def __init__(self, transformer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(transformer, *args, **options)
        if self.transformer.config.guidance_embeds:
            raise ValueError(
                "A Sana transformer with `guidance_embeds` (Sana-Sprint) is not supported, as it was distilled on a "
                "schedule of its own; take the Sana checkpoint that it was distilled from."
            )

    @property
    def position_embedding(self) -> nn.Module | None:
        """The module that holds the position table, in its buffer `pos_embed`; None where there is none."""
        return None if self.transformer.config.interpolation_scale is None else self.patch_embedding

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        transformer, size = self.transformer, noised_latents.shape[0]
        rows, columns = grid_of(noised_latents, self.patch_size)
        hidden_states = transformer.patch_embed(noised_latents)
        condition, embedded = transformer.time_embed(
            timesteps * transformer.config.timestep_scale, batch_size=size, hidden_dtype=hidden_states.dtype
        )
        context = transformer.caption_norm(transformer.caption_projection(self.prompt_embeds))
        return Pass(
            hidden_states, rows, columns, condition, context=context.expand(size, -1, -1), output_condition=embedded
        )

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the block's self-attention reads, (B, N, D)."""
        return modulated_by_table(state, block)

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.hidden_states = block(
            state.hidden_states,
            encoder_hidden_states=state.context,
            timestep=state.condition,
            height=state.rows,
            width=state.columns,
        )


class Lumina2Denoiser(SteppedDenoiser):
    """Lumina-Image 2.0: refiners of text and image, then blocks of both in one line; read with the empty prompt.

    The refiners are not counted as blocks. Tokens are the image's alone. Several heads share a key and a value, so
    `key` and `value` are narrower than `query`; these are taken before the head split, the norms and the rotary
    positions. Lumina's own time runs the other way, 1 - t/1000, and its velocity points from the noise to the image;
    the empty prompt has no system prompt before it, as in diffusers' guidance.

    Args:
        transformer: A `Lumina2Transformer2DModel`.
        options: Of all families, see `Denoiser`.

    Source: diffusers, `models/transformers/transformer_lumina2.py` and `pipelines/lumina2/pipeline_lumina2.py`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "cap_feat_dim"}
    patch_embedding_name: ClassVar[str] = "x_embedder"
    attention_name: ClassVar[str] = "attn"
    stem_names: ClassVar[tuple[str, ...]] = ("noise_refiner", "context_refiner", "time_caption_embed")
    output_names: ClassVar[tuple[str, ...]] = ("norm_out",)

    def __init__(self, transformer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(transformer, *args, **options)
        length, limit = (
            getattr(self, "prompt_embeds", torch.empty(1, 0)).shape[1],
            self.transformer.config.axes_lens[0],
        )
        if length > limit:
            raise ValueError(f"`prompt_embeds` of a Lumina may have {limit} tokens at the most, got {length}.")
        # Plain tensors, no buffers: where the model is built without data, no checkpoint would fill them.
        rope = self.transformer.rope_embedder
        with torch.device("cpu"):
            rope.freqs_cis = rope._precompute_freqs_cis(rope.axes_dim, rope.axes_lens, rope.theta)

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks after the refiners."""
        blocks: Sequence[Any] = self.transformer.layers
        return blocks

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        transformer, size = self.transformer, noised_latents.shape[0]
        rows, columns = grid_of(noised_latents, self.patch_size)
        prompt = self.prompt_embeds.expand(size, -1, -1)
        condition, context = transformer.time_caption_embed(noised_latents, 1 - timesteps / 1000, prompt)
        mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        # It counts the mask in Python: of one on the CPU, so that an accelerator is not waited for.
        counted = torch.ones(prompt.shape[:2], dtype=torch.long, device="cpu")
        patches, text_rotary, picture_rotary, rotary, _, _ = transformer.rope_embedder(noised_latents, counted)
        hidden_states = transformer.x_embedder(patches)
        for layer in transformer.context_refiner:
            context = layer(context, mask, text_rotary)
        for layer in transformer.noise_refiner:
            hidden_states = layer(hidden_states, None, picture_rotary, condition)
        together = torch.cat([context, hidden_states], dim=1)
        return Pass(together, rows, columns, condition, rotary=rotary)

    def tokens_of(self, state: Pass) -> Tensor:
        """Return the image's tokens, (B, N, D): they come after the text's."""
        return state.hidden_states[:, -state.rows * state.columns :]

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the attention reads of the image, (B, N, D)."""
        tokens: Tensor = block.norm1(self.tokens_of(state), state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the attention yields for the image, (B, N, D)."""
        together = block.norm1(state.hidden_states, state.condition)[0]
        tokens: Tensor = block.attn(
            hidden_states=together, encoder_hidden_states=together, image_rotary_emb=state.rotary
        )
        return tokens[:, -state.rows * state.columns :]

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.hidden_states = block(state.hidden_states, None, state.rotary, state.condition)

    def is_joint(self, block: Any) -> bool:
        """Return whether the block's attention looks at the text, too."""
        return True


# Those that are written by hand: folding needs their parts.
HAND_WRITTEN: dict[str, type[Denoiser]] = {
    "DiTTransformer2DModel": DiTDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "FluxTransformer2DModel": FluxDenoiser,
    "SanaTransformer2DModel": SanaDenoiser,
    "Lumina2Transformer2DModel": Lumina2Denoiser,
}


def build_denoiser(config: ASelectConfig, with_prompt: bool = True) -> Denoiser | FoldedTransformer:
    """Build the denoiser of a configuration, with new weights; a plain transformer where it is folded.

    Args:
        config: The configuration.
        with_prompt: Whether to build the buffers of the empty prompt's embeddings, too; without them nothing can be
            read, and their shapes need not be known.

    Raises:
        ValueError: If the transformer's class has no denoiser here, its kind is not supported, or the configuration
            lacks the shapes of the prompt that it is conditioned on.
    """
    if (layout := config.folding) is not None:
        return FoldedTransformer(config, layout)
    transformer = dict(config.transformer or {})
    family = family_of(transformer.get("_class_name"))
    build = partial(_build, transformer, family.transformer_class)
    options: dict[str, Any] = {
        "timestep_embedding": config.timestep_embedding,
        "prompt_shapes": (config.prompt_shapes or {}) if with_prompt else None,
        "guidance": config.guidance,
        "vae_scale_factor": config.vae_scale_factor,
    }
    if family.name in HAND_WRITTEN:
        return HAND_WRITTEN[family.name](build(), **options)
    return GenericDenoiser(build(), family=family, rebuild=build, **options)


def build_vae_encoder(config: ASelectConfig) -> nn.Module | None:
    """Build the encoder half of the VAE of a configuration, with new weights; None in pixel space.

    Raises:
        ValueError: If diffusers cannot build it.
    """
    if config.vae is None:
        return None
    return keep_encoder(_build(config.vae))


def _build(config: dict[str, Any], kind: Any = None) -> Any:
    """Build a model of diffusers of its configuration, or of another class than the one that it names."""
    # diffusers takes seconds to import, and folded models, configurations and heads do not need it. In a `try`, as
    # transformers asks for everything else that a model's code imports.
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"A {config['_class_name']} needs diffusers: pip install diffusers") from error

    # diffusers would take its own defaults for what this lists, whatever the configuration says.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    if kind is None and not hasattr(diffusers, config["_class_name"]):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {config['_class_name']}. Upgrade it: pip install -U diffusers"
        )
    try:
        return (kind or getattr(diffusers, config["_class_name"])).from_config(config)
    except Exception as error:  # whatever the class makes of values that it does not check
        raise ValueError(
            f"diffusers cannot build a {config['_class_name']} of its configuration ({type(error).__name__}: "
            f"{error}). Save or download the checkpoint again."
        ) from error
