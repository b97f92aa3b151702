"""Where a timestep is selected for a model that reads several taps, and what the model reads once it is applied."""

import copy
from collections.abc import Sequence
from typing import Any

from ..model.configuration_aselect import ASelectConfig
from ..model.layouts import ReadOut, Tap


def selected_at(config: ASelectConfig) -> Tap:
    """Return the tap at which timesteps are selected where none is named: the first of those that are read.

    It stands for all of them. One in the middle block was tried, and is no better: see model_cards/read-outs. Another
    rule for several taps has its place here.
    """
    return config.taps()[0]


def taps_read_together(model: Any) -> list[Tap]:
    """Return the taps of a model that reads several timesteps, blocks or features side by side; none of a single one.

    A selected timestep is for all of them: massive channels are found at each. A backbone's stem has none.
    """
    # What only reads tokens has no base.
    if not hasattr(model, "_base") or len(model.config.read_outs()) < 2:
        return []
    return [tap for tap in model._base().taps() if tap[0] >= 0]


def moved(config: ASelectConfig, timesteps: Sequence[int], tap: Tap) -> ASelectConfig:
    """Return a copy of a configuration that is read at the timesteps, one or several, which were selected at a tap.

    They take the place of all that were read. Where several taps are read they stay; a single one becomes that of the
    selection.
    """
    config, taps = copy.copy(config), config.taps()
    config.timestep, config.num_timesteps = timesteps[0] if len(timesteps) == 1 else list(timesteps), len(timesteps)
    if config.read_out is not None:
        (config.block, config.feature), config.timestep = taps[0], timesteps[0]
        config.read_out = [[timestep, *each] for timestep in timesteps for each in taps]
    if len(taps) == 1:
        config.read_out = None
        if taps != [tap]:  # else the block stays as it was written, perhaps counted from the end
            config.block, config.feature = tap
    return config


def stages_once_moved(model: Any, timesteps: Sequence[int], tap: Tap) -> list[list[ReadOut]]:
    """Return what a model's head reads, map by map, once a selection is applied; nothing without a head."""
    # What only reads tokens has none.
    if not getattr(model, "_standardizations", list)():
        return []
    stages: list[list[ReadOut]] = model._base().stages(moved(model.config, timesteps, tap))
    return stages
