"""diffusers' `SanaTransformer2DModel` as a feature extractor."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .denoiser import Denoiser, Pass, grid_of, modulated_by_table


class SanaDenoiser(Denoiser):
    """A DiT with linear self-attention, cross-attention to a text and convolutions; read with the empty prompt.

    Args:
        transformer: A `SanaTransformer2DModel` without guidance embedding.
        options: Of all families, see `Denoiser`.

    Raises:
        ValueError: If the transformer is conditioned on a guidance (Sana-Sprint): its schedule is another.

    Source: diffusers, `models/transformers/sana_transformer.py`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "caption_channels"}

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = self.transformer.patch_embed
        return module

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
        module: nn.Module = self.transformer.patch_embed
        return None if self.transformer.config.interpolation_scale is None else module

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

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w)."""
        transformer = self.transformer
        hidden_states = transformer.norm_out(
            state.hidden_states, state.output_condition, transformer.scale_shift_table
        )
        return self.unpatchify(transformer.proj_out(hidden_states), state)

    def text_inputs(self) -> list[nn.Module]:
        """Return the modules that only the text runs through before the first block."""
        return [self.transformer.caption_projection, self.transformer.caption_norm]
