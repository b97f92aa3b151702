"""Adapters of peft in a folder of their own, loaded with the model that they were trained on."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..model.checks import check_files, read_json, short
from .hub_files import ADAPTER_CONFIG
from .weight_files import CONFIG


@dataclass(frozen=True)
class Adapter:
    """An adapter, and what it belongs to.

    Args:
        folder: Its folder, or its id on the Hub.
        base: The model that it was trained on: a folder, or an id on the Hub.
        options: How it is put in, by the names of transformers' `load_adapter`.
    """

    folder: str
    base: str
    options: dict[str, Any]


def find_adapter(source: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> Adapter | None:
    """Return the adapter that a source is, with what Auto classes found of it; None where it is a model.

    Args:
        source: Folder or id on the Hub; None where nothing is loaded.
        kwargs: The keywords of `from_pretrained`, of which those of an adapter are taken out.

    Raises:
        ValueError: If the adapter is a pickle or does not say what it belongs to.
    """
    options = dict(kwargs.get("adapter_kwargs") or {})
    found = options.pop("_adapter_model_path", None)
    folder = Path(source or "", kwargs.get("subfolder") or "")
    if source is not None and _is_adapter_alone(folder):
        check_files(source, kwargs.get("subfolder"))
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not isinstance(base, str) or not base or _is_adapter_alone(Path(base)):
            raise ValueError(
                f"{str(folder / ADAPTER_CONFIG)!r} must name the base model as `base_model_name_or_path`, got "
                f"{short(base)}. Load the base model first, then the adapter with `load_adapter`."
            )
        kwargs.pop("subfolder", None)
        path = str(folder)
    elif found is not None and str(found) != str(source):
        # An Auto class was here first.
        base, path = str(source), str(found)
    else:
        return None
    kwargs.pop("adapter_kwargs", None)
    given = {"adapter_name": kwargs.pop("adapter_name", "default")}
    if os.path.isdir(path):
        options = {}  # revision and token are for the Hub
        kwargs.pop("revision", None)
    return Adapter(path, base, {**given, "adapter_kwargs": options})


def _is_adapter_alone(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    return is_adapter and not any(folder.glob("model*.safetensors*")) and not (folder / "transformer").is_dir()


def load_with_adapter(kind: Any, adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load a model and put an adapter into it; see the model's `from_pretrained`.

    Where a configuration lies beside the adapter, as our card's code reads it, the model is built by that: timestep,
    tap and classes belong to what was trained.

    Args:
        kind: The model's class.
        adapter: The adapter.
        args: Arguments of its `from_pretrained`, but for the first.
        kwargs: Its keywords.

    Raises:
        OSError: If the model that the adapter belongs to is not found.
    """
    with_info = kwargs.pop("output_loading_info", False)
    config = kwargs.pop("config", None)
    if config is None and (Path(adapter.folder) / CONFIG).is_file():
        config, kwargs = kind.config_class.from_pretrained(adapter.folder, return_unused_kwargs=True, **kwargs)
    if config is not None:
        # Statistics of the adapter's head come with it.
        kwargs["config"] = config = copy.deepcopy(config)
        config.standardized_grid = grid_of_base(kind.config_class, adapter.base, kwargs)
    try:
        model, info = kind.from_pretrained(adapter.base, *args, output_loading_info=True, **kwargs)
    except OSError as error:
        raise OSError(f"The base model of the adapter {adapter.folder!r} cannot be loaded. {error}") from error
    model.load_adapter(adapter.folder, **adapter.options)
    return (model, info) if with_info else model


def grid_of_base(kind: Any, base: str, kwargs: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return the token grid that the statistics of a base model's own head are of; None where it has none.

    Args:
        kind: The configuration's class.
        base: Folder of the base model, or its id on the Hub.
        kwargs: How to fetch it, by the names of `from_pretrained`.
    """
    options = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
    try:
        return kind.get_config_dict(base, **options)[0].get("standardized_grid")
    except OSError:  # diffusers saved it
        return None
