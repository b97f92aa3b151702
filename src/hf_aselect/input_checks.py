"""What pictures and latents a model takes, and what it says to others."""

import math
from typing import Any

import torch
from torch import Tensor

from .configuration_aselect import ASelectConfig
from .transformer_layout import TransformerLayout

MAX_PIXEL_VALUE = 10.0


def check_floats(name: str, values: Any) -> None:
    """Refuse what is no tensor of floating-point numbers in memory: others are numbers that stand for something else.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(values).__name__}.")
    if torch.compiler.is_compiling():
        return
    if not values.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point numbers, got {values.dtype}. Pictures of bytes go through "
            "`ASelectImageProcessor.from_model_config(model.config)` first."
        )
    if values.is_meta or values.layout != torch.strided:
        kind = "one without data, on the device meta" if values.is_meta else str(values.layout)
        raise ValueError(f"`{name}` must be a dense tensor with data, got {kind}.")


def check_latents(latents: Tensor, layout: TransformerLayout) -> None:
    """Refuse latents that a transformer cannot read.

    Args:
        latents: What was given as latents, to be (B, C, h, w).
        layout: Of the transformer.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    check_floats("latents", latents)
    side, limit = layout.patch_size, layout.max_grid
    if latents.ndim != 4 or latents.shape[1] != layout.num_channels:
        raise ValueError(
            f"`latents` must have shape (B, {layout.num_channels}, h, w), got {tuple(latents.shape)}. "
            "`cache_features(..., what='latents')` and `encode` make them."
        )
    height, width = latents.shape[-2:]
    if height < side or width < side or height % side or width % side:
        raise ValueError(f"Height and width of `latents` must be multiples of {side}, got {height}×{width}.")
    if limit is not None and max(height, width) > limit * side:
        raise ValueError(
            f"Height and width of `latents` must be at most {limit * side}, where the position table of this "
            f"transformer ends, got {height}×{width}."
        )
    if torch.compiler.is_compiling():
        return
    if not len(latents):
        raise ValueError("`latents` are an empty batch; give those of one picture or more.")
    if not bool(latents.isfinite().all()):
        raise ValueError("`latents` hold NaN or infinite values.")


def check_pixel_values(pixel_values: Tensor, config: ASelectConfig) -> None:
    """Refuse pictures that a model cannot read.

    Args:
        pixel_values: What was given as pictures, to be (B, C, H, W) in [-1, 1].
        config: Of the model.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    check_floats("pixel_values", pixel_values)
    if pixel_values.ndim != 4:
        raise ValueError(f"`pixel_values` must have shape (B, C, H, W), got {tuple(pixel_values.shape)}.")
    num_channels, height, width = pixel_values.shape[1:]
    if num_channels != config.num_channels:
        raise ValueError(
            f"The model takes pictures of {config.num_channels} channels, got {num_channels}. Use "
            f"`ASelectImageProcessor.from_model_config(model.config)`, which converts them."
        )
    side, limit = config.patch_pixels, config.layout.max_grid
    if limit is not None and max(height, width) > limit * side:
        raise ValueError(
            f"Height and width must be at most {limit * side} pixels, where the position table of this "
            f"transformer ends, got {height}×{width}."
        )
    if height < side or width < side or height % side or width % side:
        raise ValueError(
            f"Height and width must be multiples of {side} pixels (a token's side), got {height}×{width}. Use "
            f"`ASelectImageProcessor.from_model_config(model.config)`, which resizes to "
            f"{'×'.join(map(str, config.image_height_width))}."
        )
    # A compiled graph cannot branch on values.
    if torch.compiler.is_compiling():
        return
    if not len(pixel_values):
        raise ValueError("`pixel_values` are an empty batch; give one picture or more.")
    largest = float(pixel_values.detach().abs().max())
    if not math.isfinite(largest):
        raise ValueError("`pixel_values` hold NaN or infinite values; expected values in [-1, 1].")
    # Another processor's mean and standard deviation give no more than 3.
    if largest > MAX_PIXEL_VALUE:
        raise ValueError(
            f"`pixel_values` must be in [-1, 1], got values up to {largest:g}. Use "
            "`ASelectImageProcessor.from_model_config(model.config)`, which scales them."
        )
