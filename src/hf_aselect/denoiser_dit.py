"""diffusers' `DiTTransformer2DModel` as a feature extractor: noised latents and timestep to tokens at a tap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class DiTDenoiser(nn.Module):
    """A DiT that is read at one block, and run no further; or run to its end, to generate.

    Facts of diffusers' DiT that are dealt with here and nowhere else: its label embedding drops labels at random in
    train mode (a tap always gets the null label, which is what it drops to); its `forward` un-patchifies to a square
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
    def num_classes(self) -> int:
        """Classes that the DiT knows; as a label, this number is the null label."""
        return int(self.transformer.config.num_embeds_ada_norm)

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
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    def read_taps(
        self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], Tensor]:
        """Return the tokens at several taps from one pass, as `forward` does at one.

        Args:
            noised_latents: Noised latents, (B, C, h, w); h and w multiples of the patch size.
            timesteps: Integer timesteps in [0, 1000), (B,).
            taps: (block, feature) pairs.

        Returns:
            Tokens of each tap, (B, N, D).
        """
        labels = torch.full_like(timesteps, self.num_classes)
        hidden_states = self.transformer.pos_embed(noised_latents)  # (B, N, D)
        last = max(block for block, _ in taps)
        tokens = {}
        for index, block in enumerate(self.transformer.transformer_blocks[: last + 1]):
            asked = [feature for tapped, feature in taps if tapped == index]
            for feature in asked:
                if feature != "hidden":
                    tokens[index, feature] = self._read(block, feature, hidden_states, timesteps, labels)
            if index < last or "hidden" in asked:
                hidden_states = block(hidden_states, timestep=timesteps, class_labels=labels)
            if "hidden" in asked:
                tokens[index, "hidden"] = hidden_states
        return tokens

    def predict(self, noised_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return what the DiT predicts, running all of it: the noise, or what its scheduler's `prediction_type` says.

        A learned variance, where the DiT has one, is left out. Call it in eval mode: in train mode diffusers replaces
        one label in ten by the null label, at random.

        Args:
            noised_latents: Noised latents, (B, C, h, w); h and w multiples of the patch size.
            timesteps: Timesteps in [0, 1000], (B,).
            labels: Class indices in [0, `num_classes`), or `num_classes` for the null label, (B,).

        Returns:
            The prediction, (B, C, h, w).

        Source: diffusers, `models/transformers/dit_transformer_2d.py`, `forward`.
        """
        transformer, side = self.transformer, self.patch_size
        rows, columns = noised_latents.shape[-2] // side, noised_latents.shape[-1] // side
        hidden_states = transformer.pos_embed(noised_latents)  # (B, N, D)
        for block in transformer.transformer_blocks:
            hidden_states = block(hidden_states, timestep=timesteps, class_labels=labels)
        embedding = transformer.transformer_blocks[0].norm1.emb
        condition = embedding(timesteps, labels, hidden_dtype=hidden_states.dtype)
        shift, scale = transformer.proj_out_1(silu(condition)).chunk(2, dim=1)
        hidden_states = transformer.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        patches = transformer.proj_out_2(hidden_states).unflatten(-1, (side, side, -1))  # (B, N, p, p, C or 2C)
        grid = patches[..., : self.num_channels].unflatten(1, (rows, columns))
        prediction: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return prediction

    def _read(
        self,
        block: Any,  # noqa: ANN401 - diffusers' block
        feature: str,
        hidden_states: Tensor,
        timesteps: Tensor,
        labels: Tensor,
    ) -> Tensor:
        tokens: Tensor = block.norm1(hidden_states, timesteps, labels, hidden_dtype=hidden_states.dtype)[0]
        attention = block.attn1
        if feature != "normed":
            reader = {"query": attention.to_q, "key": attention.to_k, "value": attention.to_v, "attention": attention}
            tokens = reader[feature](tokens)
        return tokens
