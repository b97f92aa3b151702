"""The plain vision transformer that a diffusion transformer is at one timestep."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .folded_layout import FoldedLayout
from .folded_lumina2 import FoldedLumina2Block
from .folded_parts import PromptAttention, Rotary, attend, build_activation, rotated, split_heads
from .folded_sana import FoldedSanaBlock
from .taps import PROJECTIONS, Tap


class FoldedStream(nn.Module):
    """One stream's layers of a block: what attention reads of it, what is added to it, and its MLP.

    Modulation and gates are in the weights.

    Args:
        layout: The sizes.
        projections: Which of query, key and value are there, in this order, in one layer.
        is_attending: Whether something of the attention is added.
        is_run: Whether the MLP is there.
    """

    def __init__(self, layout: FoldedLayout, projections: Sequence[str], is_attending: bool, is_run: bool) -> None:
        super().__init__()
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        self.num_attention_heads = layout.num_attention_heads
        self.projections = tuple(projections)
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if projections:
            self.query_key_value = nn.Linear(width, len(projections) * width)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if layout.query_key_norm_eps is not None and is_attending:
            self.query_norm = nn.RMSNorm(head_size, layout.query_key_norm_eps)
        if layout.query_key_norm_eps is not None and "value" in projections:
            self.key_norm = nn.RMSNorm(head_size, layout.query_key_norm_eps)
        if is_attending:
            self.projection = nn.Linear(width, width)
        if is_run:
            self.mlp_norm = nn.LayerNorm(width, layout.mlp_norm_eps, elementwise_affine=False)
            self.up_projection = nn.Linear(width, layout.mlp_size)
            self.activation = build_activation(layout.activation)
            self.down_projection = nn.Linear(layout.mlp_size, width)

    def project(self, normed: Tensor) -> dict[str, Tensor]:
        """Return those of query, key and value that are there, (B, N, D) each."""
        return dict(zip(self.projections, self.query_key_value(normed).chunk(len(self.projections), -1), strict=True))

    def heads(self, projected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return queries, keys and values, (B, heads, N, d) each, normed where the transformer does so."""
        split = {name: split_heads(values, self.num_attention_heads) for name, values in projected.items()}
        if self.query_norm is not None and "query" in split:
            split["query"] = self.query_norm(split["query"])
        if self.key_norm is not None:
            split["key"] = self.key_norm(split["key"])
        return split

    def run_mlp(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens, (B, N, D), with the MLP's part added."""
        inner = self.activation(self.up_projection(self.mlp_norm(hidden_states)))
        tokens: Tensor = hidden_states + self.down_projection(inner)
        return tokens


class FoldedBlock(GradientCheckpointingLayer):
    """A block of one or two streams, with the taps that it was folded for.

    Args:
        config: The model's configuration, which names the host's attention kernel in `_attn_implementation`.
        layout: The sizes.
        index: Which block.
    """

    is_causal = False  # the host's kernels ask

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        self.config = config
        self.features = layout.features_at(index)
        self.is_run, self.is_attending = layout.is_run(index), layout.is_attending(index)
        self.is_text_first = layout.is_text_first
        self.num_attention_heads = layout.num_attention_heads
        self.scaling = (layout.hidden_size // layout.num_attention_heads) ** -0.5
        width = layout.hidden_size
        self.picture = FoldedStream(layout, layout.projections_at(index), self.is_attending, self.is_run)
        if "normed" in self.features:
            # Attention reads the modulated tokens with the modulation in its weights; who taps them needs it apart.
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.has_gate = "attention" in self.features and self.is_run
        if self.has_gate:
            # The tap comes before the gate, which then cannot be in the weights.
            self.gate, self.offset = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.text: FoldedStream | None = None
        if layout.text_size and self.is_attending:
            is_text_used = layout.is_text_used_after(index)
            self.text = FoldedStream(
                layout, PROJECTIONS if is_text_used else PROJECTIONS[1:], is_text_used, is_text_used
            )
        self.dual: FoldedStream | None = None
        if index in layout.dual_attention_blocks and self.is_run:
            self.dual = FoldedStream(layout, PROJECTIONS, is_attending=True, is_run=False)
        self.cross: PromptAttention | None = None
        if layout.num_cross_tokens and self.is_run:
            self.cross = PromptAttention(config, width, width, self.num_attention_heads, layout.num_cross_tokens)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the tokens after the block, those of the text, and the tokens of each feature that was folded for.

        Args:
            hidden_states: Tokens of the picture, (B, N, D).
            text: Tokens of the text, (B, L, D), where there are any.
            rotary: Rotary positions of all tokens, where there are any.
        """
        stream, tapped = self.picture, {}
        normed = stream.attention_norm(hidden_states)
        if "normed" in self.features:
            tapped["normed"] = normed * self.normed_scale + self.normed_shift
        projected = stream.project(normed) if stream.projections else {}
        tapped.update({name: values for name, values in projected.items() if name in self.features})
        if not self.is_attending:
            return hidden_states, text, tapped
        mixed, mixed_text = self._mix(stream.heads(projected), text, rotary)
        attended = stream.projection(mixed)
        if "attention" in self.features:
            tapped["attention"] = attended
        if not self.is_run:
            return hidden_states, text, tapped
        if self.has_gate:
            attended = attended * self.gate + self.offset
        hidden_states = hidden_states + attended
        if self.dual is not None:
            split = self.dual.heads(self.dual.project(normed))
            hidden_states = hidden_states + self.dual.projection(attend(self, **split))
        if self.cross is not None:
            hidden_states = hidden_states + self.cross(hidden_states)
        hidden_states = stream.run_mlp(hidden_states)
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        if self.text is not None and mixed_text is not None:
            text = self.text.run_mlp(text + self.text.projection(mixed_text))
        return hidden_states, text, tapped

    def _mix(
        self, picture: dict[str, Tensor], text: Tensor | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention yields for the picture, (B, N, D), and for the text, where that is used."""
        if self.text is None or text is None:
            return attend(self, **picture), None
        other = self.text.heads(self.text.project(self.text.attention_norm(text)))
        size, length = picture["query"].shape[2], text.shape[1]
        both = {
            name: [other[name], values] if self.is_text_first else [values, other[name]]
            for name, values in picture.items()
            if name in other
        }
        joined = {name: torch.cat(values, 2) for name, values in both.items()}
        joined.setdefault("query", picture["query"])
        if rotary is not None:
            # Where the text has no queries, those of the picture are the last.
            last = joined["query"].shape[2]
            joined["query"] = rotated(joined["query"], (rotary[0][-last:], rotary[1][-last:]))
            joined["key"] = rotated(joined["key"], rotary)
        mixed = attend(self, **joined)
        if "query" not in other:
            return mixed, None
        if self.is_text_first:
            return mixed[:, length:], mixed[:, :length]
        return mixed[:, :size], mixed[:, size:]


class FoldedSingleBlock(GradientCheckpointingLayer):
    """A block of FLUX in which text and picture are one stream, and attention and MLP stand beside each other.

    Args:
        config: The model's configuration, see `FoldedBlock`.
        layout: The sizes.
        index: Which block.
    """

    is_causal = False

    def __init__(self, config: Any, layout: FoldedLayout, index: int) -> None:
        super().__init__()
        self.config = config
        self.features, self.is_run = layout.features_at(index), layout.is_run(index)
        self.text_size = layout.text_size
        self.num_attention_heads = layout.num_attention_heads
        width, head_size = layout.hidden_size, layout.hidden_size // layout.num_attention_heads
        self.scaling = head_size**-0.5
        self.attention_norm = nn.LayerNorm(width, layout.attention_norm_eps, elementwise_affine=False)
        if "normed" in self.features:
            self.normed_scale, self.normed_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.projections = layout.projections_at(index)
        self.sizes = [width] * len(self.projections) + ([layout.mlp_size] if self.is_run else [])
        if self.sizes:
            self.query_key_value_mlp = nn.Linear(width, sum(self.sizes))
        if self.is_run:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(head_size, layout.query_key_norm_eps or 1e-6) for _ in range(2)
            )
            self.activation = build_activation(layout.activation)
            self.projection = nn.Linear(width + layout.mlp_size, width)

    def forward(
        self, hidden_states: Tensor, text: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return what `FoldedBlock.forward` returns."""
        tapped: dict[str, Tensor] = {}
        if not self.is_run or text is None:
            normed = self.attention_norm(hidden_states)
            parts = self._project(normed)
        else:
            normed = self.attention_norm(torch.cat([text, hidden_states], dim=1))
            parts = self._project(normed)
        start = self.text_size if self.is_run else 0
        if "normed" in self.features:
            tapped["normed"] = normed[:, start:] * self.normed_scale + self.normed_shift
        tapped.update({name: parts[name][:, start:] for name in self.projections if name in self.features})
        if not self.is_run or text is None:
            return hidden_states, text, tapped
        query, key, value = (split_heads(parts[name], self.num_attention_heads) for name in PROJECTIONS)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        added = self.projection(torch.cat([attend(self, query, key, value), self.activation(parts["mlp"])], dim=-1))
        text, hidden_states = text + added[:, :start], hidden_states + added[:, start:]
        if "hidden" in self.features:
            tapped["hidden"] = hidden_states
        return hidden_states, text, tapped

    def _project(self, normed: Tensor) -> dict[str, Tensor]:
        if not self.sizes:
            return {}
        names = [*self.projections, "mlp"] if self.is_run else list(self.projections)
        return dict(zip(names, self.query_key_value_mlp(normed).split(self.sizes, -1), strict=True))


class FoldedTransformer(nn.Module):
    """A plain vision transformer: what a diffusion transformer is at one timestep, as far as it is read.

    It stands in the place of a `Denoiser` and is read like one, but at its own timestep and taps alone. All of its
    layers are plain ones (`nn.Linear`, `nn.LayerNorm` or `nn.RMSNorm`, `nn.Conv2d`), and attention goes through the
    host's kernels, but for Sana's linear attention, for which the host has none.

    Args:
        config: The model's configuration, see `FoldedBlock`.
        layout: The sizes.
    """

    # A position table that is no part of the checkpoint: there is none, it is among the weights.
    position_embedding = None
    num_classes = 0
    positions: Tensor  # (1, N, D), of those that are added

    def __init__(self, config: Any, layout: FoldedLayout) -> None:
        super().__init__()
        self.layout = layout
        self.patch_size = layout.patch_size
        self.patch_embedding = nn.Conv2d(
            layout.num_channels, layout.hidden_size, layout.patch_size, stride=layout.patch_size
        )
        self.has_table = layout.positions in ("sincos", "table")
        if self.has_table:
            self.register_buffer("positions", torch.zeros(1, layout.rows * layout.columns, layout.hidden_size))
        self.has_text = layout.is_text_used_after(-1)
        if self.has_text:
            self.text = nn.Parameter(torch.zeros(1, layout.text_size, layout.hidden_size))
        refiners = [FoldedLumina2Block(config, layout, None) for _ in range(layout.num_refiners)]
        self.refiners: nn.ModuleList | list[nn.Module] = nn.ModuleList(refiners) if refiners else []
        self.blocks = nn.ModuleList(_build_block(config, layout, index) for index in range(layout.last_block + 1))

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the modules that have no influence on the tokens at (block, feature): what comes after it.

        Of several taps the last one needs all there is, so nothing is left over there.
        """
        return list(self.blocks[block + 1 :])

    def forward(self, noised_latents: Tensor, timesteps: Tensor, block: int, feature: str) -> Tensor:
        """Return the tokens at a tap; see `Denoiser.forward`. `timesteps` must all be the layout's."""
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass; see `Denoiser.read_taps`.

        Args:
            noised_latents: Noised latents, (B, C, h, w).
            timesteps: The layout's timestep, (B,): it is in the weights and not looked at.
            taps: (block, feature) pairs, of the layout's.

        Returns:
            Tokens of each tap, (B, N, D).

        Raises:
            ValueError: If the grid is one that the positions do not reach.
        """
        hidden_states = self.patch_embedding(noised_latents)
        rows, columns = hidden_states.shape[-2:]
        # Contiguous: every norm would copy it otherwise.
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()
        if self.has_table:
            hidden_states = hidden_states + self._position_table(rows, columns).to(hidden_states.dtype)
        text = self.text.expand(hidden_states.shape[0], -1, -1) if self.has_text else None
        places = self._places(rows, columns, hidden_states.device)
        for block in self.refiners:
            hidden_states = block(hidden_states, None, places)[0]
        tokens = {(-1, "hidden"): hidden_states} if (-1, "hidden") in taps else {}
        last = max(block for block, _ in taps)
        for index, block in enumerate(self.blocks[: last + 1]):
            hidden_states, text, tapped = block(hidden_states, text, places)
            tokens.update({(index, feature): values for feature, values in tapped.items() if (index, feature) in taps})
        return tokens

    def _places(self, rows: int, columns: int, device: torch.device) -> Rotary | tuple[int, int] | None:
        """Return what the blocks must know of where tokens stand: rotary positions, the grid, or nothing."""
        if self.layout.positions == "rotary":
            return self._rotary(rows, columns, device)
        return (rows, columns) if self.layout.blocks == "sana" else None

    def _position_table(self, rows: int, columns: int) -> Tensor:
        """Return the positions of a grid, (1, N, D)."""
        layout = self.layout
        if (rows, columns) == (layout.rows, layout.columns):
            return self.positions
        if layout.is_size_fixed or (layout.positions == "table" and (rows > layout.rows or columns > layout.columns)):
            reach = "only" if layout.is_size_fixed else "at most"
            raise ValueError(
                f"This model was folded for a grid of {layout.rows}×{layout.columns} tokens and reads {reach} that "
                f"size, got {rows}×{columns}. Load the model it was folded from with another `image_size` and fold it "
                "again."
            )
        if layout.positions == "table":
            # The middle of the whole table, not of the part that is here: an odd and an even side have other middles.
            whole = max(layout.position_table_size, layout.rows, layout.columns)
            top = (whole - rows) // 2 - (whole - layout.rows) // 2
            left = (whole - columns) // 2 - (whole - layout.columns) // 2
            grid = self.positions.unflatten(1, (layout.rows, layout.columns))
            middle: Tensor = grid[:, top : top + rows, left : left + columns].flatten(1, 2)
            return middle
        table = sincos_table(layout.hidden_size, rows, columns, layout.position_base_size, layout.position_scale)
        return table.to(self.positions.device)

    def _rotary(self, rows: int, columns: int, device: torch.device) -> Rotary:
        """Return cosines and sines of text and picture, (L + N, d) each.

        Source: diffusers, `models/embeddings.py`, `get_1d_rotary_pos_embed` with `repeat_interleave_real`; of Lumina
        `Lumina2RotaryPosEmbed`, whose complex numbers are the same pairs of channels.
        """
        layout = self.layout
        wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no more
        places = torch.zeros(layout.text_size + rows * columns, 3, dtype=wide, device=device)
        if layout.is_text_placed:
            places[:, 0] = torch.arange(layout.text_size + rows * columns, device=device).clamp(max=layout.text_size)
        grid = places[layout.text_size :].unflatten(0, (rows, columns))
        grid[..., 1] = torch.arange(rows, device=device)[:, None]
        grid[..., 2] = torch.arange(columns, device=device)
        angles = []
        for axis, size in enumerate(layout.rotary_sizes):
            steps = torch.arange(0, size, 2, dtype=wide, device=device) / size
            angles.append(torch.outer(places[:, axis], layout.rotary_theta**-steps).repeat_interleave(2, dim=1))
        together = torch.cat(angles, dim=1)
        return together.cos().float(), together.sin().float()


def _build_block(config: Any, layout: FoldedLayout, index: int) -> nn.Module:
    """Build a counted block of the layout's kind."""
    if layout.blocks == "sana":
        return FoldedSanaBlock(config, layout, index)
    if layout.blocks == "lumina2":
        return FoldedLumina2Block(config, layout, index)
    return (FoldedSingleBlock if layout.is_single(index) else FoldedBlock)(config, layout, index)


def sincos_table(size: int, rows: int, columns: int, base_size: int, scale: float) -> Tensor:
    """Return sinusoidal positions of a grid, (1, rows · columns, size), float32, on the CPU.

    Args:
        size: Channels, a multiple of 4: a half for the column, a half for the row, each half sines and half cosines.
        rows: Rows of the grid.
        columns: Its columns.
        base_size: Places run up to this, whatever the grid.
        scale: What they are divided by.

    Source: diffusers, `models/embeddings.py`, `get_2d_sincos_pos_embed`, which puts the column first.
    """
    # Places in float32 and angles in float64, as diffusers.
    place_of_row, place_of_column = (
        torch.arange(side, dtype=torch.float32, device="cpu") / (side / base_size) / scale for side in (rows, columns)
    )
    frequencies = 1 / 10000 ** (torch.arange(size // 4, dtype=torch.float64, device="cpu") / (size / 4))
    by_column, by_row = (torch.outer(places.double(), frequencies) for places in (place_of_column, place_of_row))
    halves = [torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (by_column, by_row)]
    grid = torch.cat(
        [halves[0][None].expand(rows, -1, -1), halves[1][:, None].expand(-1, columns, -1)], dim=-1
    )  # (rows, columns, size)
    return grid.flatten(0, 1)[None].float()
