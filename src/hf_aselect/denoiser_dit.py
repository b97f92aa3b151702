"""diffusers' `DiTTransformer2DModel` as a feature extractor: noised latents and timestep to tokens at a tap."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .denoiser import Denoiser, Pass, grid_of


class DiTDenoiser(Denoiser):
    """A class-conditional DiT, or a SiT in its layout; a tap is read with the null label.

    Facts of diffusers' DiT that are dealt with here and nowhere else: its label embedding drops labels at random in
    train mode (a tap always gets the null label, which is what it drops to); its `forward` un-patchifies to a square
    (we go through its blocks, so a grid may have any shape); its position table is no part of the checkpoint.

    Args:
        transformer: A `DiTTransformer2DModel`.
        timestep_embedding: "diffusers" leaves diffusers' frequencies, 10000^(-i/127), for models that were trained
            with them; "original" sets those of `facebookresearch/DiT`, 10000^(-i/128); "sit" sets the latter and
            conditions on SiT's own time, 1 - t/1000, whose velocity points from the noise to the picture.
        options: Of all families, see `Denoiser`.

    Source: diffusers, `models/transformers/dit_transformer_2d.py`; facebookresearch/DiT, `models.py`,
    `TimestepEmbedder`; willisma/SiT, `transport/path.py` (x_t = t · picture + (1 - t) · noise).
    """

    timestep_embeddings: ClassVar[tuple[str, ...]] = ("diffusers", "original", "sit")

    def __init__(
        self,
        transformer: nn.Module,
        timestep_embedding: str = "diffusers",
        **options: Any,
    ) -> None:
        super().__init__(transformer, timestep_embedding, **options)
        if timestep_embedding != "diffusers":
            for block in self.transformer.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = 0

    @property
    def num_classes(self) -> int:
        """Classes that the DiT knows; as a label, this number is the null label."""
        return int(self.transformer.config.num_embeds_ada_norm)

    @property
    def position_embedding(self) -> nn.Module:
        """The module that holds the position table, in its buffer `pos_embed`."""
        module: nn.Module = self.transformer.pos_embed
        return module

    def begin(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Pass:
        """Return the state before the first block; see `Denoiser`."""
        rows, columns = grid_of(noised_latents, self.patch_size)
        if labels is None:
            labels = torch.full(timesteps.shape, self.num_classes, device=timesteps.device)
        if self.timestep_embedding == "sit":
            timesteps = 1 - timesteps / 1000
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

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w).

        Source: diffusers, `models/transformers/dit_transformer_2d.py`, `forward`.
        """
        transformer, hidden_states = self.transformer, state.hidden_states
        embedding = transformer.transformer_blocks[0].norm1.emb
        condition = embedding(*state.condition, hidden_dtype=hidden_states.dtype)
        shift, scale = transformer.proj_out_1(silu(condition)).chunk(2, dim=1)
        hidden_states = transformer.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        prediction = self.unpatchify(transformer.proj_out_2(hidden_states), state)
        return -prediction if self.timestep_embedding == "sit" else prediction

    def output_modules(self) -> list[nn.Module]:
        """Return the modules that are run after the last block."""
        return [self.transformer.proj_out_1, self.transformer.proj_out_2]
