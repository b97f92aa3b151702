"""A folded transformer: a diffusion transformer at fixed timesteps, as a plain vision transformer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .folded_blocks import FoldedBlock, FoldedLumina2Block, FoldedSanaBlock, FoldedSingleBlock, Rotary
from .layouts import FoldedLayout, Tap


class FoldedTransformer(nn.Module):
    """A plain vision transformer: a diffusion transformer at fixed timesteps, up to the deepest tap.

    It stands in place of a `Denoiser` and is read like one, but at its own timesteps and taps alone. All of its
    layers are plain ones (`nn.Linear`, `nn.LayerNorm` or `nn.RMSNorm`, `nn.Conv2d`), and attention goes through the
    host's kernels, but for Sana's linear attention, for which transformers has none. Several timesteps share them, but
    for scales and shifts of the norms, and gates, of which each has its own.

    Args:
        config: The model's configuration, see `FoldedBlock`.
        layout: The sizes.
    """

    num_classes = 0
    whole_modules: Sequence[nn.Module] = ()
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
        refiners = [FoldedLumina2Block(config, layout, -1) for _ in range(layout.num_refiners)]
        self.refiners: nn.ModuleList | list[nn.Module] = nn.ModuleList(refiners) if refiners else []
        self.blocks = nn.ModuleList(_build_block(config, layout, index) for index in range(layout.last_block + 1))

    def unused_modules(self, block: int, feature: str) -> list[nn.Module]:
        """Return the modules that have no influence on the tokens at (block, feature): what comes after it.

        Of several taps the last one needs all there is, so nothing is left over there; but for a norm of keys that no
        attention looks at.
        """
        picture = getattr(self.blocks[block], "picture", None) if block >= 0 else None
        norms = [] if picture is None or picture.query_norm is not None else [picture.key_norm]
        return [*self.blocks[block + 1 :], *(norm for norm in norms if norm is not None)]

    def unused_parameters(self, taps: Sequence[Tap]) -> list[nn.Parameter]:
        """Return the parameters that have no influence on the tokens at any of `taps`."""
        unused = [
            {id(each): each for module in self.unused_modules(*tap) for each in module.parameters()} for tap in taps
        ]
        return [unused[0][key] for key in set.intersection(*map(set, unused))]

    def tables_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return nothing: all that it has is in its checkpoint."""
        return {}

    def forward(self, noised_latents: Tensor, timesteps: Tensor | int, block: int, feature: str) -> Tensor:
        """Return the tokens at a tap; see `Denoiser.forward`, and of `timesteps` `read_taps`."""
        return self.read_taps(noised_latents, timesteps, [(block, feature)])[block, feature]

    def read_taps(self, noised_latents: Tensor, timesteps: Tensor | int, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Return the tokens at several taps from one pass; see `Denoiser.read_taps`.

        Args:
            noised_latents: Noised latents, (B, C, h, w).
            timesteps: Of several timesteps one, as an integer. A single one is in the weights and not looked at.
            taps: (block, feature) pairs, of the layout's.

        Returns:
            Tokens of each tap, (B, N, D).

        Raises:
            ValueError: If the grid is one that the positions do not reach, or the timestep is none of several.
        """
        number = self._number_of(timesteps)
        hidden_states = self.patch_embedding(noised_latents)
        rows, columns = hidden_states.shape[-2:]
        # Contiguous: every norm would copy it otherwise.
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()
        if self.has_table:
            hidden_states = hidden_states + self._position_table(rows, columns).to(hidden_states.dtype)
        text = self.text.expand(hidden_states.shape[0], -1, -1) if self.has_text else None
        places = self._places(rows, columns, hidden_states.device)
        for block in self.refiners:
            hidden_states = block(hidden_states, None, places, number)[0]
        tokens = {(-1, "hidden"): hidden_states} if (-1, "hidden") in taps else {}
        last = max(block for block, _ in taps)
        for index, block in enumerate(self.blocks[: last + 1]):
            hidden_states, text, tapped = block(hidden_states, text, places, number)
            tokens.update({(index, feature): values for feature, values in tapped.items() if (index, feature) in taps})
        return tokens

    def _number_of(self, timestep: Tensor | int) -> int:
        """Return the index of a timestep in the layout; of several, only an integer avoids waiting for the device."""
        known = self.layout.timesteps
        if len(known) > 1 and (isinstance(timestep, Tensor) or timestep not in known):
            raise ValueError(f"`timestep` must be one of {list(known)}, at which this transformer was folded.")
        return known.index(timestep) if len(known) > 1 else 0

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
                f"size, got {rows}×{columns}. Load the model it was folded from with another `image_size`, and fold "
                "it again."
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
        """Return cosines and sines of text and image, (L + N, d) each.

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
