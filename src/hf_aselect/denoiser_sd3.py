"""diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5) as a feature extractor."""

from typing import Any, ClassVar

from torch import Tensor, nn

from .denoiser import Denoiser, Pass, grid_of


class SD3Denoiser(Denoiser):
    """An MMDiT of two streams, picture and text, that attend to each other; read with the empty prompt.

    Tokens are the picture's alone. `query`, `key` and `value` are taken before the head split and before the norm of
    queries and keys that Stable Diffusion 3.5 has. In its dual-attention blocks the first attention is read, the joint
    one; `normed` is what that one reads.

    Source: diffusers, `models/transformers/transformer_sd3.py` and `models/attention.py`, `JointTransformerBlock`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }

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

    def attention_of(self, block: Any) -> Any:
        """Return the block's joint attention."""
        return block.attn

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the joint attention reads of the picture, (B, N, D)."""
        tokens: Tensor = block.norm1(state.hidden_states, emb=state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the joint attention yields for the picture, (B, N, D)."""
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

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w)."""
        transformer = self.transformer
        return self.unpatchify(transformer.proj_out(transformer.norm_out(state.hidden_states, state.condition)), state)

    def text_inputs(self) -> list[nn.Module]:
        """Return the modules that only the text runs through before the first block."""
        return [self.transformer.context_embedder]

    def text_outputs(self, block: Any) -> list[nn.Module]:
        """Return the modules of a block that only the text of later blocks depends on."""
        return [] if block.context_pre_only else [block.attn.to_add_out, block.ff_context]

    def is_joint(self, block: Any) -> bool:
        """Return whether the block's attention looks at the text, too."""
        return True

    def joint_norms_of(self, block: Any) -> list[nn.Module]:
        """Return the module that makes what the joint attention reads of the text."""
        return [block.norm1_context]
