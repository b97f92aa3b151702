"""A model takes a selection over: timestep, tap, record and massive channels."""

from typing import Any

from ..model.layouts import tap_key
from .record import TimestepSelection
from .select import select_timestep

MAX_TOKENS = 2**15  # in one forward pass of a selection that loading makes


def settle(model: Any, images: Any) -> None:
    """Select the timestep of a model that is loaded, and let it be read there.

    Args:
        model: The model.
        images: As in `select_timestep`.
    """
    height, width = (side // model.config.patch_pixels for side in model.config.image_height_width)
    # As many tokens at once as 32 images of 512 pixels have: large images would not fit many a machine.
    batch_size = max(1, min(32, MAX_TOKENS // (height * width)))
    model.apply_selection(select_timestep(model, images, batch_size=batch_size))


def apply_selection(model: Any, selection: TimestepSelection) -> None:
    """Let a model be read at the timestep and tap of a selection; see its `apply_selection`."""
    if not isinstance(selection, TimestepSelection):
        raise ValueError(f"`selection` must be what `select_timestep` returned, got {type(selection).__name__}.")
    config, base = model.config, model._base()
    width = config.width_of(selection.feature)
    if model is not base and width != config.feature_size:
        raise ValueError(
            f"The head reads tokens of {config.feature_size} channels, but {selection.feature!r} has {width}. "
            f"Load the model with `feature={selection.feature!r}, block={selection.block}, "
            f"timestep={selection.timestep}`."
        )
    own = config.block_index(), config.feature
    is_another_tap = (selection.block, selection.feature) != own
    if is_another_tap and isinstance(config.zeroed_channels, list):
        config.zeroed_channels = {tap_key(*own): config.zeroed_channels}  # they stay where they are
    if is_another_tap:  # else the block stays as it was written, perhaps counted from the end
        config.block, config.feature = selection.block, selection.feature
    config.timestep, config.selection = selection.timestep, selection.to_dict()
    if selection.massive_channels is not None:
        known = config.zeroed_channels if isinstance(config.zeroed_channels, dict) else {}
        found = {tap_key(selection.block, selection.feature): selection.massive_channels}
        config.zeroed_channels = {**known, **found}
    if is_another_tap and not config.freeze_backbone:
        base.denoiser.requires_grad_(True)
        base.freeze()  # other blocks come after the tap
