"""Heads: tokens, standardized where their statistics are known, to logits of an image."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.modeling_layers import GradientCheckpointingLayer

from .layouts import POOLINGS

# Names of heads in early checkpoints of 0.1.0, by their names today; the longest first. peft
# puts a prefix before the names of an adapter.
FORMER_NAMES = {
    rf"(?:^|(?<=^base_model\.model\.)){former}\.": f"{name}."
    for former, name in (
        (r"head\.classifier", "classifier.output_projection"),
        ("head", "classifier"),
        ("decoder", "decode_head"),
    )
}

# What `from_pretrained` renames: a linear layer that took the head's place was saved by its own name, too.
SAVED_NAMES = {**FORMER_NAMES, r"^classifier\.(?=(?:weight|bias)$)": "classifier.output_projection."}


def name_today(name: str) -> str:
    """Return what a weight of a head is called now, of its name in a checkpoint that may be an old one."""
    for former, today in FORMER_NAMES.items():
        name = re.sub(former, today, name)
    return name


def without_rounding(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what moves or casts a tensor as `fn` does, but does not round float32 to half precision."""

    def moved_alone(values: Tensor) -> Tensor:
        moved = fn(values)
        is_cut = values.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
        return values.to(moved.device) if is_cut else moved

    return moved_alone


class FeatureStandardization(nn.Module):
    """Tokens times a scale plus a shift: what differs between images gets a mean square of 1 in each channel.

    At large timesteps the fixed noise outweighs that by far. Without statistics the tokens stay as they are. Tokens
    of several taps and timesteps are concatenated, and each channel has its own statistics.

    Args:
        width: Width D of the tokens, of all taps and timesteps together.
        grid: Rows and columns of the token grid that the statistics are of; None where there are none yet.
    """

    scale: Tensor | None  # (D,), float32 in half precision, too
    shift: Tensor | None  # (rows, columns, D)

    def __init__(self, width: int, grid: Sequence[int] | None) -> None:
        super().__init__()
        self.register_buffer("scale", None if grid is None else torch.ones(width, dtype=torch.float32))
        self.register_buffer("shift", None if grid is None else torch.zeros((*grid, width), dtype=torch.float32))

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return standardized tokens, (B, N, D), or means of tokens, (B, D), in their own dtype.

        Args:
            tokens: What is standardized.
            grid: Rows and columns of the tokens; None for those that the statistics are of.

        Raises:
            ValueError: If `grid` is None and the tokens are fewer.
        """
        if self.scale is None or self.shift is None:
            return tokens
        shift, own = self.shift.to(tokens.device), (self.shift.shape[0], self.shift.shape[1])
        if tokens.ndim == 2:
            shift = shift.mean((0, 1))[None, None]
        elif (grid or own) != own:
            shift = interpolate(shift.permute(2, 0, 1)[None], size=grid, mode="bilinear")[0].permute(1, 2, 0)
        elif tokens.shape[1] != own[0] * own[1]:
            raise ValueError(f"`features` have {tokens.shape[1]} tokens, but the head's statistics {own[0]}×{own[1]}.")
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        return (wide * self.scale.to(tokens.device) + shift.flatten(0, 1)).to(tokens.dtype)

    def mean(self, tokens: Tensor) -> Tensor:
        """Return the mean of the standardized tokens, (B, D), of tokens, (B, N, D), of any grid."""
        # Not rounded before it is standardized.
        mean = tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        return self.forward(mean).to(tokens.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as torch does, but stay in float32: rounded statistics do not fit the tokens."""
        moved: Self = super()._apply(without_rounding(fn), recurse)
        return moved

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load as torch does; statistics of another grid, or where there were none, come with their sizes."""
        for name in ("scale", "shift"):
            loaded, own = state_dict.get(prefix + name), getattr(self, name)
            if loaded is not None and (own is None or own.shape != loaded.shape):
                setattr(self, name, torch.empty_like(loaded, dtype=torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *args)


def pooled_tokens(tokens: Tensor, pooling: str, grid: Sequence[int] | None = None) -> Tensor:
    """Return what is left of tokens, (B, N, D), when they are pooled: S statistics of each channel, (B, S, D).

    Half precision is pooled in float32, which comes back.

    Args:
        tokens: Tokens in row-major order.
        pooling: "mean"; "mean_std", the mean and the deviation between the tokens of an image; "regions", the means
            of the upper left, upper right, lower left and lower right quarter, and that deviation.
        grid: Rows and columns of the tokens; an odd number's middle row or column is in both halves.

    Raises:
        ValueError: If "regions" are asked for and `grid` is not that of the tokens.
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if pooling == "regions":
        if grid is None or grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"`features` have {tokens.shape[1]} tokens, but pooling='regions' needs their grid.")
        halves = [(slice(0, (side + 1) // 2), slice(side // 2, None)) for side in grid]
        placed = wide.unflatten(1, tuple(grid))
        means = [placed[:, rows, columns].mean((1, 2)) for rows in halves[0] for columns in halves[1]]
    else:
        means = [wide.mean(1)]
    if pooling != "mean":
        # The square root has no gradient at 0.
        means.append((wide.var(1, correction=0) + 1e-12).sqrt())
    return torch.stack(means, dim=1)


class LinearHead(nn.Module):
    """Pooling, layer norm (or none) and one linear layer.

    Args:
        hidden_size: Width D of the tokens.
        num_labels: Number of classes K.
        grid: Of `FeatureStandardization`.
        has_norm: Whether there is a layer norm.
        pooling: See `pooled_tokens`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        grid: Sequence[int] | None = None,
        has_norm: bool = True,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.standardization = FeatureStandardization(hidden_size, grid)
        self.in_features = hidden_size
        hidden_size *= POOLINGS[pooling]
        # The tokens of different taps and timesteps differ in scale by orders of magnitude. A head in closed form has
        # that in its weights.
        self.norm = nn.LayerNorm(hidden_size) if has_norm else nn.Identity()
        self.output_projection = nn.Linear(hidden_size, num_labels)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return logits, (B, K), of tokens, (B, N, D), of any grid, or of pooled ones, (B, S · D)."""
        logits: Tensor = self.output_projection(self.norm(self.pool(tokens, grid)))
        return logits

    def pool(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return what the norm reads: standardized and pooled tokens, (B, S · D); see `forward`."""
        if self.pooling == "mean":
            return self.standardization(tokens) if tokens.ndim == 2 else self.standardization.mean(tokens)
        if tokens.ndim == 2:
            return tokens
        own = self.standardization.shift
        # First, so that the deviation is not that of the noise.
        standardized = self.standardization(tokens, grid)
        pooled = pooled_tokens(standardized, self.pooling, grid or (None if own is None else own.shape[:2]))
        return pooled.flatten(1).to(tokens.dtype)


class AttentionHeadBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block without bias in its query, key and value projections.

    Args:
        hidden_size: Width D.
        num_attention_heads: Attention heads, a divisor of `hidden_size`.
        mlp_ratio: Width of the MLP as a multiple of `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.up_projection = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.activation = nn.GELU()
        self.down_projection = nn.Linear(mlp_ratio * hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, num_outputs: int | None = None) -> Tensor:
        """Return the block's output for the first `num_outputs` tokens (default: all), (B, n, D), of (B, N, D)."""
        normed = self.attention_norm(hidden_states)
        split = self.query_key_value(normed).unflatten(-1, (3, self.num_attention_heads, -1))  # (B, N, 3, heads, d)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        mixed = nn.functional.scaled_dot_product_attention(query[:, :, :num_outputs], key, value)
        hidden_states = hidden_states[:, :num_outputs] + self.projection(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden_states)
        output: Tensor = hidden_states + self.down_projection(self.activation(self.up_projection(normed)))
        return output


class AttentionHead(nn.Module):
    """A small transformer that reads the tokens into one class token.

    A linear layer to the head's width, a class token that starts at zero, pre-norm blocks, and a linear layer from the
    class token; no position embedding (the tokens know their place), no dropout, no final norm.

    Args:
        input_size: Width of the tokens.
        num_labels: Number of classes K.
        hidden_size: Width of the head.
        num_layers: Number of blocks.
        num_attention_heads: Attention heads in each.
        mlp_ratio: Width of their MLPs as a multiple of `hidden_size`.
        grid: Of `FeatureStandardization`.

    Source: the head of the A-SelecT authors' published code (arXiv 2603.25758), 16,766,600 parameters at the defaults
    of `ASelectConfig` with 1536 in and 200 classes.
    """

    def __init__(
        self,
        input_size: int,
        num_labels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: int,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = input_size
        self.standardization = FeatureStandardization(input_size, grid)
        self.input_projection = nn.Linear(input_size, hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.blocks = nn.ModuleList(
            AttentionHeadBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.output_projection = nn.Linear(hidden_size, num_labels)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return logits, (B, K), of tokens, (B, N, D), of rows and columns `grid`; see `FeatureStandardization`."""
        hidden_states = self.input_projection(self.standardization(tokens, grid))
        class_tokens = self.class_token.expand(tokens.shape[0], -1, -1)
        hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            # Of the last block only the class token is read: the others need no query and no MLP.
            hidden_states = block(hidden_states, num_outputs=1 if index == last else None)
        logits: Tensor = self.output_projection(hidden_states[:, 0])
        return logits


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Return tokens, (B, N, D) each, side by side along their channels; of one alone itself."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def token_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return tokens, (B, N, D), as a map, (B, D, rows, columns)."""
    grid: Tensor = tokens.transpose(1, 2).unflatten(-1, (rows, columns))
    return grid.contiguous()
