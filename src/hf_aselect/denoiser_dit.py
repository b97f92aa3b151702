"""diffusers' `DiTTransformer2DModel` as a feature extractor: noised latents and timestep to tokens at a tap."""

from typing import Any

import torch
from torch import Tensor, nn


class DiTDenoiser(nn.Module):
    """A DiT that is read at one block, and run no further.

    Facts of diffusers' DiT that are dealt with here and nowhere else: its label embedding drops labels at random in
    train mode (we always give the null label, which is what it drops to); its `forward` un-patchifies to a square
    (we go through its blocks, so a grid may have any shape); its position table is no part of the checkpoint.

    Args:
        transformer: A `DiTTransformer2DModel`.
        timestep_embedding: "original" sets the frequencies of `facebookresearch/DiT`, 10000^(-i/128); "diffusers"
            leaves diffusers' 10000^(-i/127).
    """

    transformer: Any  # diffusers is imported when a denoiser is built, not here

    def __init__(self, transformer: nn.Module, timestep_embedding: str) -> None:
        super().__init__()
        self.transformer = transformer
        if timestep_embedding == "original":
            for block in self.transformer.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = 0

    @property
    def num_channels(self) -> int:
        """Channels of the latents."""
        return int(self.transformer.config.in_channels)

    @property
    def patch_size(self) -> int:
        """Side of a token in latents."""
        return int(self.transformer.config.patch_size)

    @property
    def position_embedding(self) -> nn.Module:
        """The module that holds the position table, in its buffer `pos_embed`."""
        module: nn.Module = self.transformer.pos_embed
        return module

    def position_table(self) -> Tensor:
        """Return a newly computed position table, (1, N, D), float32: checkpoints do not hold it."""
        embed: Any = self.position_embedding
        with torch.device("cpu"):
            fresh = type(embed)(
                height=embed.height * embed.patch_size,
                width=embed.width * embed.patch_size,
                patch_size=embed.patch_size,
                in_channels=1,
                embed_dim=embed.proj.out_channels,
            )
        table: Tensor = fresh.pos_embed
        return table

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the modules that are not run when tokens are read at (block, feature)."""
        blocks = self.transformer.transformer_blocks
        tapped, unused = blocks[block], list(blocks[block + 1 :])
        unused += [self.transformer.proj_out_1, self.transformer.proj_out_2]
        attention = tapped.attn1
        projections = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v}
        if feature == "hidden":
            return unused
        unused.append(tapped.ff)
        if feature != "attention":
            unused.append(attention.to_out)
            unused += [module for name, module in projections.items() if name != feature]
        return unused

    def forward(self, noised_latents: Tensor, timesteps: Tensor, block: int, feature: str) -> Tensor:
        """Return the tokens at a tap, with the null label, running no module that comes after it.

        Args:
            noised_latents: Noised latents, (B, C, h, w); h and w multiples of the patch size.
            timesteps: Integer timesteps in [0, 1000), (B,).
            block: Block index, counted from the first.
            feature: One of `configuration_aselect.FEATURES`.

        Returns:
            Tokens in row-major order, (B, N, D).
        """
        labels = torch.full_like(timesteps, self.transformer.config.num_embeds_ada_norm)
        hidden_states = self.transformer.pos_embed(noised_latents)  # (B, N, D)
        blocks = self.transformer.transformer_blocks
        for earlier in blocks[:block]:
            hidden_states = earlier(hidden_states, timestep=timesteps, class_labels=labels)
        return self._read(blocks[block], feature, hidden_states, timesteps, labels)

    def _read(
        self,
        block: Any,  # noqa: ANN401 - diffusers' block
        feature: str,
        hidden_states: Tensor,
        timesteps: Tensor,
        labels: Tensor,
    ) -> Tensor:
        tokens: Tensor
        if feature == "hidden":
            tokens = block(hidden_states, timestep=timesteps, class_labels=labels)
            return tokens
        tokens = block.norm1(hidden_states, timesteps, labels, hidden_dtype=hidden_states.dtype)[0]
        attention = block.attn1
        if feature != "normed":
            reader = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v, "attention": attention}
            tokens = reader[feature](tokens)
        return tokens
