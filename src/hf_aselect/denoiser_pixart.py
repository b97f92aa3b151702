"""diffusers' `PixArtTransformer2DModel` (PixArt-alpha and PixArt-Sigma) as a feature extractor."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .denoiser import Denoiser, Pass, grid_of, modulated_by_table


class PixArtDenoiser(Denoiser):
    """A DiT with cross-attention to a text; read with the empty prompt, whose padding is left out.

    All blocks share one modulation, to which each adds a table of its own. PixArt-alpha at 1024 pixels is also
    conditioned on the picture's size and aspect ratio: they are the picture's own here, as in diffusers' pipeline.

    Source: diffusers, `models/transformers/pixart_transformer_2d.py` and `models/attention.py`,
    `BasicTransformerBlock` with `ada_norm_single`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "caption_channels"}

    @property
    def position_embedding(self) -> nn.Module:
        """The module that holds the position table, in its buffer `pos_embed`."""
        module: nn.Module = self.transformer.pos_embed
        return module

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

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w)."""
        transformer = self.transformer
        shift, scale = (transformer.scale_shift_table[None] + state.output_condition[:, None]).chunk(2, dim=1)
        hidden_states = transformer.norm_out(state.hidden_states) * (1 + scale) + shift
        return self.unpatchify(transformer.proj_out(hidden_states), state)

    def text_inputs(self) -> list[nn.Module]:
        """Return the modules that only the text runs through before the first block."""
        projection = self.transformer.caption_projection
        return [] if projection is None else [projection]
