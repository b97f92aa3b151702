"""What `from_pretrained` takes from diffusers' files, and what it refuses of what was loaded."""

import os
from pathlib import Path
from typing import Any

import torch

from ..model.checks import short
from ..model.configuration_aselect import OWN_FIELDS, ASelectConfig
from .atomic import finish_files
from .diffusers import DTYPES, find_diffusers, load_diffusers
from .empty_prompt import TEXT_PARTS
from .hub_files import HubOptions
from .licenses import license_on_card

# Keywords that name a value of the configuration but are no field of ours.
HOST_FIELDS = {"num_labels", "id2label", "label2id", "problem_type"}
# What diffusers' files tell, and where they come from.
TOLD_BY_FILES = {"transformer", "vae", "scheduler", "prompt_shapes", "folded", "folded_layout"}
TOLD_BY_FILES |= {"base_model", "base_license", "out_features", "out_indices"}
TOLD_BY_CONFIG = (OWN_FIELDS - TOLD_BY_FILES) | {"id2label", "label2id", "problem_type"}
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "variant")


def take_source(source: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> bool:
    """Put what diffusers saved into the keywords of `from_pretrained`; return False for an hf_aselect checkpoint.

    Args:
        source: Folder or id on the Hub; None where nothing is loaded.
        kwargs: The keywords, of which those of text encoders are taken out.

    Raises:
        ValueError: If the source is neither, is broken, or has no text encoders though some are named.
        OSError: If a repository is not found or may not be read, or the Hub cannot be reached.
    """
    text = {name: kwargs.pop(name) for name in (*TEXT_PARTS, "prompt_embeds") if name in kwargs}
    folder = None
    if source is not None:
        if os.path.isdir(source):
            finish_files(source)
        folder = find_diffusers(
            source,
            HubOptions(**{name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}),
            without=[name for name in text if name != "prompt_embeds"],
            has_prompt=text.get("prompt_embeds") is not None,
        )
    if source is not None and folder is not None:
        take_diffusers(source, folder, text, kwargs)
        return True
    if text:
        raise ValueError(
            f"{', '.join(text)} can only be given with a diffusers pipeline; in a checkpoint of ours the empty "
            "prompt's embeddings are among the weights."
        )
    return False


def take_diffusers(source: str | os.PathLike[str], folder: Path, text: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Put the configuration and weights that diffusers saved in a folder into the keywords of `from_pretrained`.

    Of a configuration that is given, as an adapter's, the fields are taken that the files do not tell.
    """
    config = kwargs.pop("config", None)
    if config is not None and not (isinstance(config, ASelectConfig) and not config.folded):
        raise ValueError(
            "`config=` must be an ASelectConfig that is not folded where diffusers saved the model, whose files say "
            f"what it is, got {type(config).__name__}. Or give fields as keywords (`timestep=`, `block=`, ...)."
        )
    if config is not None:
        if {"num_labels", "id2label"} & set(kwargs):
            raise ValueError("Give `num_labels` and `id2label`, or a `config=` that names the classes, not both.")
        told = {name: getattr(config, name) for name in TOLD_BY_CONFIG}
        kwargs |= {name: value for name, value in told.items() if name not in kwargs}
    if given := [name for name, value in text.items() if name != "prompt_embeds" and value is not None]:
        raise ValueError(
            f"{', '.join(given)} can only be None, which does without it; another text encoder cannot be given. Pass "
            "`prompt_embeds=`, the empty prompt's embeddings by name."
        )
    options = {name: kwargs.pop(name, None) for name in HUB_OPTIONS}
    kwargs["dtype"] = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
    own_fields = OWN_FIELDS | HOST_FIELDS
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own_fields}
    fields.setdefault("name_or_path", str(source))
    if not os.path.exists(source):  # an id on the Hub; the path of a machine is nobody's business
        fields.setdefault("base_model", str(source))
    fields.setdefault("base_license", license_on_card(folder))
    kwargs["config"], weights = load_diffusers(
        folder,
        variant=options["variant"],
        # "auto" is what the weights are in, which is known when they are read.
        dtype=kwargs["dtype"]
        if isinstance(kwargs["dtype"], torch.dtype)
        else DTYPES.get(str(kwargs["dtype"]), torch.float32),
        without=tuple(name for name in text if name != "prompt_embeds"),
        prompt_embeds=text.get("prompt_embeds"),
        **fields,
    )
    if config is not None and _of_transformer(config) != _of_transformer(kwargs["config"]):
        raise ValueError(
            f"`config=` is of another transformer than {str(source)!r}: {short(_of_transformer(config))} in place of "
            f"{short(_of_transformer(kwargs['config']))}."
        )
    kwargs["state_dict"] = dict(weights)


def _of_transformer(config: ASelectConfig) -> dict[str, Any]:
    """Return what makes a transformer, whoever saved it."""
    record = config.transformer or {}
    return {name: value for name, value in record.items() if name not in ("_diffusers_version", "_name_or_path")}
