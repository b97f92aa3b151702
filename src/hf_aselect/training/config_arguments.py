"""The fields of `ASelectConfig` on the command line of a training script, and the configuration in its folder."""

import os
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.atomic import whole_files
from ..model.configuration_aselect import ASelectConfig

# Another selection would not fit the head that was trained so far.
SELECTED = (
    *("timestep", "num_timesteps", "block", "feature", "read_out", "zeroed_channels", "selection"),
    "standardize_features",
)
# Fields of which several values can be given.
SEVERAL = ("timestep", "block", "feature")
# Fields that cannot be given as one word on a command line: records of diffusers and of this package.
_RECORDS = (
    *("transformer", "vae", "scheduler", "selection", "model_type", "prompt_shapes", "read_out"),
    *("folded", "folded_layout", "standardized_grid"),
)


def int_or_word(value: str) -> int | str:
    """Return the integer that a word spells, else the word."""
    return int(value) if value.lstrip("-").isdigit() else value


def one_or_several(values: list[Any]) -> Any:
    """Return the values of an option that takes several: a single value as it is, several as a list."""
    return values[0] if len(values) == 1 else values


def _kind_of(name: str, kind: Any) -> Any:
    """Return the value of a field's option that `HfArgumentParser` parses from its words."""
    if name in SEVERAL:
        return list[int_or_word]  # type: ignore[valid-type]
    return kind if kind in (bool, float) else int_or_word


# One option for each field, for `HfArgumentParser`; None where it is not given.
ConfigArguments = make_dataclass(
    "ConfigArguments",
    [
        (
            name,
            _kind_of(name, kind),
            field(default=None, metadata={"help": "Field of ASelectConfig."}),
        )
        for name, kind in ASelectConfig.__annotations__.items()
        if not name.startswith("_") and name not in _RECORDS
    ],
)


def given_fields(arguments: Any) -> dict[str, Any]:
    """Return the fields that were given, of `ConfigArguments`, by name."""
    given = {name: value for name, value in asdict(arguments).items() if value is not None}
    return {name: one_or_several(value) if name in SEVERAL else value for name, value in given.items()}


def needs_timestep(source: str, given: dict[str, Any]) -> bool:
    """Return whether a timestep is to be selected: "auto" was given, or nothing was and the source has none.

    Args:
        source: An hf_aselect checkpoint, or what diffusers saved: folder or id on the Hub.
        given: Fields that were given, by name.
    """
    if "timestep" in given:
        return bool(given["timestep"] == "auto")
    try:
        saved, _ = ASelectConfig.get_config_dict(source)
    except OSError:
        # A folder of diffusers has no `config.json` at its top.
        return True
    return bool(saved.get("timestep", "auto") == "auto")


def needs_images(source: str, given: dict[str, Any]) -> bool:
    """Return whether calibration images are of use: to select a timestep, or to standardize what a new head reads.

    Args:
        source: An hf_aselect checkpoint, or what diffusers saved: folder or id on the Hub.
        given: Fields that were given, by name.
    """
    if needs_timestep(source, given):
        return True
    try:
        saved, _ = ASelectConfig.get_config_dict(source)
    except OSError:
        saved = {}
    is_of_ours = "model_type" in saved
    has_head = any("For" in name for name in saved.get("architectures") or ())
    is_on = given.get("standardize_features", saved.get("standardize_features", not is_of_ours))
    return bool(is_on) and not has_head


def resumed_fields(given: dict[str, Any], *folders: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the given fields with the selection of the training that is resumed in place of a new one.

    Args:
        given: Fields that were given, by name.
        folders: Where the configuration of that training may be; the first that has one is read. If none has, `given`
            is returned.

    Raises:
        ValueError: If another timestep, block or feature is given than the training began with.
    """
    for folder in folders:
        if Path(folder, "config.json").is_file():
            config = ASelectConfig.from_pretrained(folder)
            break
    else:
        return given
    for name in SEVERAL:
        before = getattr(config, name)
        if given.get(name, "auto") not in ("auto", before):
            raise ValueError(
                f"This training started with {name} {before}, got --{name} {given[name]}. Pass the same value to "
                "resume it."
            )
    return given | {name: getattr(config, name) for name in SELECTED}


def write_config(config: ASelectConfig, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` into a folder, whole or not at all; a training that is resumed needs its selection.

    Args:
        config: Configuration to write.
        folder: An existing folder.
    """
    with whole_files(folder) as unfinished:
        config.save_pretrained(unfinished)
