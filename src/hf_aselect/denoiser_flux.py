"""diffusers' `FluxTransformer2DModel` (FLUX.1) as a feature extractor."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, Pass, grid_of


class FluxDenoiser(Denoiser):
    """FLUX.1: blocks of two streams (picture and text), then blocks of one; read with the empty prompt.

    Blocks are numbered in one line, those of two streams first. A block of one stream projects attention and MLP
    together, so it has no `attention`. Tokens are the picture's alone. `query` and `key` are taken before the head
    split, their norm and the rotary positions. The guidance-distilled FLUX.1-dev is conditioned on `guidance`. A token
    stands for 2 × 2 latents, which diffusers' pipeline packs before the transformer sees them.

    Source: diffusers, `models/transformers/transformer_flux.py` and `pipelines/flux/pipeline_flux.py`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = self.transformer.x_embedder
        return module

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

    def attention_of(self, block: Any) -> Any:
        """Return the block's attention."""
        return block.attn

    def norms_of(self, block: Any) -> list[nn.Module]:
        """Return the modules that `normed` runs."""
        return [block.norm1 if self.is_joint(block) else block.norm]

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the attention reads of the picture, (B, N, D)."""
        (norm,) = self.norms_of(block)
        tokens: Tensor = norm(state.hidden_states, emb=state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the attention of a block of two streams yields for the picture, (B, N, D).

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

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w)."""
        transformer = self.transformer
        patches = transformer.proj_out(transformer.norm_out(state.hidden_states, state.condition))  # (B, N, 4C)
        grid = patches.unflatten(-1, (-1, 2, 2)).unflatten(1, (state.rows, state.columns))
        picture: Tensor = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return picture

    def text_inputs(self) -> list[nn.Module]:
        """Return the modules that only the text runs through before the first block."""
        return [self.transformer.context_embedder]

    def text_outputs(self, block: Any) -> list[nn.Module]:
        """Return the modules of a block that only the text of later blocks depends on."""
        return [block.attn.to_add_out, block.ff_context] if self.is_joint(block) else []

    def is_joint(self, block: Any) -> bool:
        """Return whether the block is one of two streams."""
        return hasattr(block, "norm1_context")

    def joint_norms_of(self, block: Any) -> list[nn.Module]:
        """Return the module that makes what the joint attention reads of the text."""
        return [block.norm1_context] if self.is_joint(block) else []
