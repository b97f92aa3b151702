"""What a cache says of where its features were read, and whether a model reads there."""

import json
from typing import Any

from ..model.checks import short
from ..model.layouts import tap_key

# What the description of a cache begins with; then comes its fingerprint.
DESCRIPTION = "Features of images, cached by hf_aselect. "


def facts_of_selection(config: Any) -> dict[str, Any]:
    """Return where and how features are read, which latents do not depend on."""
    read_outs = config.read_outs()
    channels = [config.channels_at(block, feature) for _, block, feature in read_outs]
    where: dict[str, Any] = {"read_out": read_outs, "zeroed_channels": channels}
    if len(read_outs) == 1:
        # Caches from before there were several have these names.
        ((timestep, *tap),) = read_outs
        where = {"timestep": timestep, "tap": tap_key(*tap), "zeroed_channels": channels[0]}
    return {
        **where,
        "noise_seed": config.noise_seed,
        "num_noise_draws": config.num_noise_draws,
        "scheduler": config.scheduler,
        "timestep_embedding": config.timestep_embedding,
        "guidance": config.guidance,
    }


def check_read_out(description: str, config: Any) -> None:
    """Reject features that were read elsewhere, or with other noise, than a model reads: their width may be the same.

    Args:
        description: That of the dataset; one that is none of a cache says nothing.
        config: The model's.

    Raises:
        ValueError: If they were.
    """
    if not description.startswith(DESCRIPTION):
        return
    try:
        made_from = json.loads(description.removeprefix(DESCRIPTION))
    except json.JSONDecodeError:  # of several caches, one after the other
        return
    own = json.loads(json.dumps(facts_of_selection(config)))
    for name in ("timestep", "tap", "read_out", "noise_seed", "num_noise_draws"):
        if name in made_from and made_from[name] != own.get(name):
            raise ValueError(
                f"The features were cached with `{name}` {short(made_from[name])}, and this model reads "
                f"{short(config.read_outs())}, with `noise_seed` {config.noise_seed} and `num_noise_draws` "
                f"{config.num_noise_draws}. Cache them with this model."
            )
