"""What `from_pretrained` takes from diffusers' files, and what it refuses of what was loaded."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from .configuration_aselect import OWN_FIELDS, ASelectConfig
from .diffusers_checkpoint import DTYPES, load_diffusers
from .diffusers_files import read_json, refuse_other_than_safetensors, refuse_other_than_weights, shards_of
from .field_checks import short
from .model_card import license_on_card

# Keywords that name a value of the configuration but are no field of ours.
HOST_FIELDS = {"num_labels", "id2label", "label2id", "problem_type"}
# What diffusers' files tell, and where they come from.
TOLD_BY_FILES = {"transformer", "vae", "scheduler", "prompt_shapes", "folded", "folded_layout"}
TOLD_BY_FILES |= {"base_model", "base_license", "out_features", "out_indices"}
TOLD_BY_CONFIG = (OWN_FIELDS - TOLD_BY_FILES) | {"id2label", "label2id", "problem_type"}
# Parts of our models that a checkpoint may lack altogether, and that are then new.
HEADS = ("head", "decoder")
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "variant")


class MismatchedSizesError(ValueError, RuntimeError):
    """A head of other shapes than the configuration says; the host's own is a `RuntimeError`, which some catch."""


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


def check_files(source: str | os.PathLike[str], subfolder: str | None) -> None:
    """Refuse a local folder whose adapter is none or a pickle, or an index of which leads elsewhere.

    The host joins such names to the folder as they are, and opens what it finds there. Of what comes from the Hub its
    client lets no file lie outside of its cache.

    Raises:
        ValueError: If there is one.
    """
    folder = Path(source, subfolder or "")
    if (folder / "adapter_config.json").exists():
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        if not isinstance(kind, str):
            raise ValueError(
                f"{str(folder / 'adapter_config.json')!r} is no configuration of an adapter: its `peft_type` must be "
                f"a word, got {short(kind)}."
            )
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        refuse_other_than_safetensors(folder.glob("adapter_model.*"))
    for index in sorted(folder.glob("*.index*.json")) if folder.is_dir() else ():
        if ".safetensors." in index.name:
            shards_of(index)


def check_dtypes(files: Iterable[str | os.PathLike[str]], model: PreTrainedModel) -> None:
    """Refuse weights in what is no floating-point dtype: the host would cast numbers that stand for something else.

    Raises:
        ValueError: If there are any.
    """
    weights = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in weights.intersection(opened.keys()):
                    refuse_other_than_weights(name, opened.get_slice(name).get_dtype())
        except (OSError, SafetensorError):  # the host says what is wrong with it
            return


def check_loaded(
    source: str | os.PathLike[str],
    info: dict[str, Any],
    model: PreTrainedModel,
    ignore_mismatched_sizes: bool,
    is_info_asked: bool,
) -> None:
    """Refuse a checkpoint whose backbone or head is incomplete or of other shapes.

    Args:
        source: Where it was loaded from, for the error.
        info: The host's loading info.
        model: What was loaded.
        ignore_mismatched_sizes: Whether a head of other shapes, or another kind of head, was asked to be replaced by
            a new one.
        is_info_asked: Whether the loading info goes to the caller, who then sees what is missing of the backbone.

    Raises:
        ValueError: If it is one.
    """
    _check_backbone_is_complete(source, info, is_info_asked)
    _check_head_is_whole(source, info, model, ignore_mismatched_sizes)
    if not ignore_mismatched_sizes:
        _check_head_fits(source, info)


def _check_backbone_is_complete(source: str | os.PathLike[str], info: dict[str, Any], is_info_asked: bool) -> None:
    """Refuse a checkpoint that lacks a part of the backbone or does not fit it: random weights would go unnoticed."""
    unfit = {entry[0] for entry in info["mismatched_keys"]}
    if not is_info_asked:
        unfit |= {*info["missing_keys"], *info["unexpected_keys"]}
    broken = {name for name in unfit if "denoiser." in name or "vae." in name}
    if broken:
        raise ValueError(
            f"The weights in {str(source)!r} do not fit their configuration: {len(broken)} tensors of the backbone "
            f"are missing, left over or of another shape, among them {sorted(broken)[:3]}."
        )


def _check_head_is_whole(
    source: str | os.PathLike[str], info: dict[str, Any], model: PreTrainedModel, ignore_mismatched_sizes: bool
) -> None:
    """Refuse a checkpoint with some but not all of the head: the rest would be random. None at all is a new head."""
    for part in HEADS:
        of_the_part = f"{part}."
        missing = {name for name in info["missing_keys"] if name.startswith(of_the_part)}
        whole = {name for name in model.state_dict() if name.startswith(of_the_part)}
        left_over = {name for name in info["unexpected_keys"] if name.startswith(of_the_part)}
        if missing and left_over:
            if not ignore_mismatched_sizes:
                raise ValueError(
                    f"The weights in {str(source)!r} hold another kind of {part}: they lack {sorted(missing)[:2]} and "
                    f"have {sorted(left_over)[:2]}. Pass `ignore_mismatched_sizes=True` to start with a new one, or "
                    f"leave `{part}` as it was saved."
                )
            _renew(model, part)
        elif missing and missing != whole:
            raise ValueError(
                f"The weights in {str(source)!r} hold a part of the {part} only: {len(missing)} of its {len(whole)} "
                f"tensors are missing, among them {sorted(missing)[:3]}. Save or download them again."
            )


def _renew(model: PreTrainedModel, part: str) -> None:
    """Initialise a head anew: some of its tensors may have been those of another kind of head, by the same names."""
    head: nn.Module = getattr(model, part)
    for tensor in (*head.parameters(), *head.buffers()):
        tensor._is_hf_initialized = False  # type: ignore[attr-defined]  # the host's mark of what was loaded
    head.apply(model._init_weights)


def _check_head_fits(source: str | os.PathLike[str], info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose head has other shapes than the configuration says."""
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise MismatchedSizesError(
            f"The head saved in {str(source)!r} does not fit the configuration: {name!r} has shape {tuple(found)}, "
            f"expected {tuple(expected)}. Pass `ignore_mismatched_sizes=True` to start with a new head, or leave "
            "`num_labels` and the sizes of the head as they were saved."
        )
