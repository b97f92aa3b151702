"""diffusers' `Lumina2Transformer2DModel` (Lumina-Image 2.0) as a feature extractor."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .denoiser import Denoiser, Pass, grid_of


class Lumina2Denoiser(Denoiser):
    """Lumina-Image 2.0: refiners of text and picture, then blocks of both in one line; read with the empty prompt.

    The refiners are not counted as blocks. Tokens are the picture's alone. Several heads share a key and a value, so
    `key` and `value` are narrower than `query`; these are taken before the head split, the norms and the rotary
    positions. Lumina's own time runs the other way, 1 - t/1000, and its velocity points from the noise to the picture;
    the empty prompt has no system prompt before it, as in diffusers' guidance.

    Args:
        transformer: A `Lumina2Transformer2DModel`.
        options: Of all families, see `Denoiser`.

    Source: diffusers, `models/transformers/transformer_lumina2.py` and `pipelines/lumina2/pipeline_lumina2.py`.
    """

    prompt_fields: ClassVar[dict[str, str]] = {"prompt_embeds": "cap_feat_dim"}

    @property
    def patch_embedding(self) -> nn.Module:
        """The module that makes tokens of noised latents."""
        module: nn.Module = self.transformer.x_embedder
        return module

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
        patches, text_rotary, picture_rotary, rotary, _, _ = transformer.rope_embedder(noised_latents, mask)
        hidden_states = transformer.x_embedder(patches)
        for layer in transformer.context_refiner:
            context = layer(context, mask, text_rotary)
        for layer in transformer.noise_refiner:
            hidden_states = layer(hidden_states, None, picture_rotary, condition)
        together = torch.cat([context, hidden_states], dim=1)
        return Pass(together, rows, columns, condition, rotary=rotary)

    def tokens_of(self, state: Pass) -> Tensor:
        """Return the picture's tokens, (B, N, D): they come after the text's."""
        return state.hidden_states[:, -state.rows * state.columns :]

    def attention_of(self, block: Any) -> Any:
        """Return the block's attention."""
        return block.attn

    def normed(self, state: Pass, block: Any) -> Tensor:
        """Return what the attention reads of the picture, (B, N, D)."""
        tokens: Tensor = block.norm1(self.tokens_of(state), state.condition)[0]
        return tokens

    def attend(self, state: Pass, block: Any, normed: Tensor) -> Tensor:
        """Return what the attention yields for the picture, (B, N, D)."""
        together = block.norm1(state.hidden_states, state.condition)[0]
        tokens: Tensor = block.attn(
            hidden_states=together, encoder_hidden_states=together, image_rotary_emb=state.rotary
        )
        return tokens[:, -state.rows * state.columns :]

    def advance(self, state: Pass, block: Any) -> None:
        """Run a block, changing the state."""
        state.hidden_states = block(state.hidden_states, None, state.rotary, state.condition)

    def finish(self, state: Pass) -> Tensor:
        """Return the prediction, (B, C, h, w)."""
        patches = self.transformer.norm_out(self.tokens_of(state), state.condition)
        return -self.unpatchify(patches, state)

    def output_modules(self) -> list[nn.Module]:
        """Return the modules that are run after the last block."""
        return [self.transformer.norm_out]

    def is_joint(self, block: Any) -> bool:
        """Return whether the block's attention looks at the text, too."""
        return True
