"""What the values of a configuration may be, whoever wrote them: a user, another version or a stranger's file."""

from typing import Any

import torch

from .diffusers_files import WEIGHT_DTYPES
from .transformer_layout import MAX_SIZE

NUM_TIMESTEPS = 1000
# By class of the VAE: the field whose length is the number of its resolutions. Nobody has a VAE of more than so many.
VAE_LEVELS = {"AutoencoderKL": "block_out_channels", "AutoencoderDC": "encoder_block_out_channels"}
_MAX_VAE_LEVELS = 16


def check_timestep(timestep: Any) -> None:
    """Refuse anything but an integer timestep in [0, 1000).

    Raises:
        ValueError: If `timestep` is not an integer or lies outside [0, 1000).
    """
    if isinstance(timestep, bool) or not isinstance(timestep, int) or not 0 <= timestep < NUM_TIMESTEPS:
        raise ValueError(
            f"`timestep` must be an integer in [0, {NUM_TIMESTEPS}) or 'auto' (0 = least noise), got {timestep!r}."
        )


def check_vae(vae: dict[str, Any] | None) -> None:
    """Refuse a VAE that is none of those we can encode with.

    Raises:
        ValueError: If `vae` is no configuration of one of them.
    """
    if vae is None:
        return
    name = vae.get("_class_name")
    if not isinstance(name, str) or name not in VAE_LEVELS:
        raise ValueError(f"Unsupported VAE {name!r}; supported are {', '.join(VAE_LEVELS)}.")
    if missing := [field for field in ("in_channels", VAE_LEVELS[name]) if vae.get(field) is None]:
        raise ValueError(
            f"`vae` lacks {', '.join(missing)}: give the whole configuration that diffusers saved "
            "(`dict(vae.config)`)."
        )
    if not isinstance(vae[VAE_LEVELS[name]], list | tuple):
        raise ValueError(f"`vae` must have a list as `{VAE_LEVELS[name]}`, got {vae[VAE_LEVELS[name]]!r}.")
    channels, levels = vae["in_channels"], vae[VAE_LEVELS[name]]
    if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels <= MAX_SIZE:
        raise ValueError(f"`in_channels` of the `vae` must be an integer from 1 on, got {short(channels)}.")
    if not 1 <= len(levels) <= _MAX_VAE_LEVELS:
        raise ValueError(
            f"`{VAE_LEVELS[name]}` of the `vae` must have 1 to {_MAX_VAE_LEVELS} entries, one a resolution, got "
            f"{len(levels)}."
        )
    # Latents would be nothing, or infinite.
    if not is_finite_number(vae.get("scaling_factor", 1.0)) or not vae.get("scaling_factor", 1.0):
        raise ValueError(
            f"`scaling_factor` of the `vae` must be a number, got {short(vae['scaling_factor'])}; finite and not 0."
        )
    if not is_finite_number(vae.get("shift_factor") or 0):
        raise ValueError(f"`shift_factor` of the `vae` must be a finite number, got {short(vae['shift_factor'])}.")
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ValueError(
            "A VAE with `latents_mean` and `latents_std` is not supported: none of the supported transformers was "
            "trained on latents that were scaled channel by channel."
        )


def is_finite_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold, and neither NaN nor infinite."""
    # An integer of JSON may have any number of digits.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -1e300 <= value <= 1e300


def short(value: Any) -> str:
    """Return a value for an error, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end, or an integer of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_dtype(dtype: Any) -> None:
    """Refuse what no weights are in; the host looks it up in torch, whatever it is.

    Raises:
        ValueError: If `dtype` is neither None nor float32, bfloat16, float16 or float64, of torch or by name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found in WEIGHT_DTYPES.values()):
        return
    raise ValueError(f"`dtype` must be float32, bfloat16, float16 or float64, got {short(dtype)}.")


def check_classes(names: Any, numbers: Any, num_labels: Any) -> None:
    """Refuse classes that are not counted from 0 on, or not named each.

    Args:
        names: The field `id2label`.
        numbers: The field `label2id`.
        num_labels: How many there are, where that is said.

    Raises:
        ValueError: If one of them is not what it must be.
    """
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"`num_labels` must be an integer from 1 on, got {short(num_labels)}.")
    if numbers is not None and not isinstance(numbers, dict):
        raise ValueError(f"`label2id` must be a dictionary of classes by name, got {short(numbers)}.")
    if names is None:
        return
    # JSON has words for keys.
    keys = {str(key) for key in names} if isinstance(names, dict) else set()
    if not keys or keys != {str(number) for number in range(len(keys))} or len(keys) != len(names):
        raise ValueError(
            f"`id2label` must name the classes by their numbers, from 0 on and each once, got {short(names)}."
        )
