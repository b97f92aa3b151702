"""What `from_pretrained` takes from diffusers' files."""

import os
from pathlib import Path
from typing import Any

import torch

from ..model.checks import short
from ..model.configuration_aselect import OWN_FIELDS, TAKEN, ASelectConfig
from .atomic import finish_files
from .diffusers import DTYPES, find_diffusers, load_diffusers
from .empty_prompt import TEXT_PARTS
from .hub_files import HubOptions, named_vae
from .licenses import license_on_card

# What transformers' own loading takes out of the keywords.
OF_LOADING = {"dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config"}
# What diffusers' files say, and where they come from.
TOLD_BY_FILES = {"transformer", "vae", "scheduler", "prompt_shapes", "folded", "folded_layout"}
TOLD_BY_FILES |= {"base_model", "base_license", "out_features", "out_indices"}
TOLD_BY_CONFIG = (OWN_FIELDS - TOLD_BY_FILES) | {"id2label", "label2id", "problem_type", "output_attentions"}
TOLD_BY_CONFIG |= {"output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"}
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
    if kwargs.get("layout") is not None:
        raise ValueError(
            f"`layout={kwargs['layout']!r}` is for research weights, but {str(source)!r} is an hf_aselect "
            "checkpoint. Omit it."
        )
    if isinstance(kwargs.get("vae"), str | os.PathLike):
        raise ValueError(
            f"`vae={str(kwargs['vae'])!r}` cannot be used, because {str(source)!r} is an hf_aselect checkpoint. To "
            "change its VAE, convert its source again (`hf-aselect convert --vae`)."
        )
    if text:
        raise ValueError(
            f"{', '.join(text)} can only be used with a diffusers pipeline. An hf_aselect checkpoint already "
            "contains the empty prompt's embeddings."
        )
    return False


def take_diffusers(source: str | os.PathLike[str], folder: Path, text: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Put the configuration and weights that diffusers saved in a folder into the keywords of `from_pretrained`.

    Of a configuration that is given, as an adapter's, the fields are taken that the files do not say.

    Raises:
        ValueError: If the configuration is folded, of another transformer or model type, a text encoder is given,
            or as `load_diffusers`.
    """
    given = kwargs.pop("config", None)
    if given is not None:
        _take_config(given, kwargs)
    if encoders := [name for name, value in text.items() if name != "prompt_embeds" and value is not None]:
        raise ValueError(
            f"{', '.join(encoders)} must be None, which skips loading it. To use another text encoder, pass its "
            "embeddings of the empty prompt as a dictionary, `prompt_embeds=`."
        )
    options = HubOptions(**{name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs})
    kwargs["dtype"] = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
    research = {name: kwargs.pop(name, None) for name in ("layout", "num_attention_heads")}
    research["check_layout"] = kwargs.pop("check_layout", True)
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in TAKEN - OF_LOADING}
    vae_folder = named_vae(fields, options)
    fields.setdefault("name_or_path", str(source))
    if not os.path.exists(source):
        # An id on the Hub; the path of a machine is nobody's business.
        fields.setdefault("base_model", str(source))
    fields.setdefault("base_license", license_on_card(folder))
    kwargs["config"], weights = load_diffusers(
        folder,
        variant=options.variant,
        vae_folder=vae_folder,
        dtype=_prompt_dtype(kwargs["dtype"]),
        without=tuple(name for name in text if name != "prompt_embeds"),
        prompt_embeds=text.get("prompt_embeds"),
        **research,
        **fields,
    )
    if given is not None:
        _check_same_transformer(given, kwargs["config"], source)
    kwargs["state_dict"] = dict(weights)


def _take_config(config: Any, kwargs: dict[str, Any]) -> None:
    """Add the fields of a given configuration to the keywords, unless the files or the keywords have them.

    Raises:
        ValueError: If it is not an `ASelectConfig`, is folded, or the keywords name classes as well.
    """
    # By its name: a checkpoint's own code has a class of its own.
    if getattr(config, "model_type", None) != ASelectConfig.model_type or config.folded:
        raise ValueError(
            "`config` of a diffusers checkpoint must be an ASelectConfig that is not folded, got "
            f"{type(config).__name__}. You can also pass its fields as keyword arguments (`timestep=`, `block=`, "
            "...)."
        )
    if {"num_labels", "id2label"} & set(kwargs):
        raise ValueError(
            "`num_labels` and `id2label` cannot be used together with a `config` that names the classes. Pass one "
            "of them."
        )
    for name in TOLD_BY_CONFIG - kwargs.keys():
        kwargs[name] = getattr(config, name)


def _prompt_dtype(dtype: Any) -> torch.dtype:
    """Return the dtype of the empty prompt's embeddings; "auto" is what the weights are in, which is not known yet."""
    return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)


def _check_same_transformer(given: ASelectConfig, found: ASelectConfig, source: str | os.PathLike[str]) -> None:
    """Check that a given configuration is of the transformer that was found.

    Raises:
        ValueError: If it is not.
    """
    if _of_transformer(given) != _of_transformer(found):
        raise ValueError(
            f"`config` does not match the transformer of {str(source)!r}: it has {short(_of_transformer(given))}, "
            f"expected {short(_of_transformer(found))}."
        )


def _of_transformer(config: ASelectConfig) -> dict[str, Any]:
    """Return what makes a transformer, whoever saved it."""
    record = config.transformer or {}
    return {name: value for name, value in record.items() if name not in ("_diffusers_version", "_name_or_path")}
