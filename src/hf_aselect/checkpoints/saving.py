"""What is kept of a model in which diffusers, peft or accelerate changed something: what can be loaded again."""

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..model.checks import HEADS, WEIGHT_DTYPES
from ..model.denoisers import build_denoiser, build_vae_encoder

logger = logging.getLogger(__name__)

# Projections that diffusers fuses: the fused one, and those that it concatenates.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_FUSED_NAME = re.compile(rf"(.*\.)({'|'.join(_FUSED)})\.(weight|bias)")
# The name that torch.compile adds to a submodule that was compiled alone.
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
_ADAPTERS = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module|ia3_\w+)\.")

_OF_ADAPTERS = (
    "The model has adapters. Save them alone (`peft.get_peft_model` instead of `inject_adapter_in_model`, or "
    "`save_lora_adapter` of the transformer), merge them (`merge_and_unload()` of peft, or `fuse_lora()` and "
    "`unload_lora()` of the transformer), or remove them "
    "(`diffusers.utils.recurse_remove_peft_layers(transformer)`)."
)


def with_whole_state(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `save_pretrained`, with weights as they can be loaded again where the model's are not.

    Weights that accelerate offloaded are brought in, those that diffusers stores in a smaller dtype are in the one
    that they compute in, and projections that it fused are left out, as their parts are there.

    Args:
        model: The model, of any head.
        kwargs: The keywords; `state_dict`, if given, is what is looked at.

    A head of another number of classes than the configuration says changes that; one that could not be built again is
    told of.

    Raises:
        ValueError: If there is something in the backbone that its configuration does not have, or the other way round,
            so that it could not be loaded; the message says what to undo.
    """
    # Adapters that transformers put in are saved alone, and quantized weights by their quantizer.
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None:
        return kwargs
    given = kwargs.get("state_dict")
    state = dict(model.state_dict() if given is None else given)
    base = model._base()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    whole = _as_built(model, state)
    with torch.device("meta"):
        built = nn.ModuleDict({"denoiser": build_denoiser(base.config)})
        if (vae := build_vae_encoder(base.config)) is not None:
            built["vae"] = vae
    _check_names({name.removeprefix(prefix) for name in whole if name.startswith(prefix)}, built)
    if adapted := sorted(name for name in whole if not name.startswith(prefix) and _ADAPTERS.search(name)):
        raise ValueError(f"The saved head could not be loaded again: {_some('it also has', adapted)}. {_OF_ADAPTERS}")
    if part := next((each for each in HEADS.values() if hasattr(model, each)), None):
        _settle_head(model, part, {name: value for name, value in whole.items() if name.startswith(f"{part}.")})
    _warn_of_processors(base, built)
    _check_kinds(
        {name: value for name, value in whole.items() if name.startswith((f"{prefix}denoiser.", f"{prefix}vae."))}
    )
    if not hasattr(model, "hf_device_map"):  # else transformers brings them in, a file at a time
        whole = {name: in_memory(model, name, value) for name, value in whole.items()}
    is_same = whole.keys() == state.keys() and all(value is state[name] for name, value in whole.items())
    return kwargs if is_same else {**kwargs, "state_dict": whole}


def weights_of(part: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the weights of an object of diffusers as its files would have them, one after the other.

    Args:
        part: What it was given as, for the error: "transformer" or "vae".
        module: The object.

    Raises:
        ValueError: If it has adapters, fused projections that were trained, or weights that nobody knows the place of.
    """
    state = _as_built(module, module.state_dict())
    if adapted := sorted(name for name in state if _ADAPTERS.search(name)):
        raise ValueError(
            f"`{part}=` has weights of adapters: {_some('it also has', adapted)}. Merge them (`fuse_lora()` and "
            "`unload_lora()`), or remove them (`diffusers.utils.recurse_remove_peft_layers`)."
        )
    if any(_parts_of(name, state) for name in state):
        raise ValueError(
            f"`{part}=` has fused projections that were trained. Copy them to the separate projections, and call "
            "`unfuse_qkv_projections()`."
        )
    return ((name, in_memory(module, name, value)) for name, value in state.items())


def _as_built(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state by the names and in the dtypes that a model has before torch and diffusers change it in place."""
    whole = _without_fused({_COMPILED.sub(r"\1", name): value for name, value in state.items()})
    _cast_as_computed(model, whole)
    return whole


def in_memory(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a tensor of a model's state; one that accelerate offloaded is brought in.

    Raises:
        ValueError: If nobody knows where it is.
    """
    if value.device.type != "meta":
        return value
    # Whoever has offloaded weights has it, and nobody else needs it.
    from accelerate.utils import align_module_device

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if hasattr(module, "_hf_hook"):
        with align_module_device(module, torch.device("cpu")):
            value = getattr(module, own).detach()
    if value.device.type == "meta":
        raise ValueError(f"The weight {name!r} is not in memory and has no accelerate hook to load it.")
    return value


def bring_in(module: nn.Module, device: torch.device) -> None:
    """Keep in memory from now on what accelerate offloaded of a module, so that it can be written to.

    Raises:
        ValueError: If nobody knows where it is.
    """
    state = {name: in_memory(module, name, value) for name, value in module.state_dict(keep_vars=True).items()}
    if all(value.device.type != "meta" for value in module.state_dict().values()):
        return
    # Whoever has offloaded weights has it, and nobody else needs it.
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    remove_hook_from_module(module, recurse=True)
    for name, value in state.items():
        set_module_tensor_to_device(module, name, device, value=value.detach())


def _without_fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the projections that are fused of others, as long as they are equal to those."""
    kept = {}
    for name, value in state.items():
        parts = _parts_of(name, state)
        if not parts or not _are_equal(torch.cat(parts), value):
            kept[name] = value
    return kept


def _parts_of(name: str, state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the projections that one is fused of, if it is one and all of them are there."""
    found = _FUSED_NAME.fullmatch(name)
    parts = [state.get(f"{found[1]}{part}.{found[3]}") for part in _FUSED[found[2]]] if found else []
    there = [part for part in parts if part is not None]
    return there if len(there) == len(parts) else []


def _are_equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (second.device.type == "meta" or torch.equal(first.to(second), second))


def _cast_as_computed(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Cast the weights that diffusers' layerwise casting stores in a smaller dtype: a larger one holds them all."""
    for owner, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if (dtype := getattr(hook, "compute_dtype", None)) is None:
                continue
            for name, _ in module.named_parameters():
                name = _COMPILED.sub(r"\1", f"{owner}.{name}".removeprefix("."))
                if name in state:
                    state[name] = state[name].to(dtype)


def _check_names(names: set[str], built: nn.Module) -> None:
    """Raise for a backbone that has other weights than one that is built of its configuration.

    Raises:
        ValueError: If it has; the message says what to undo.
    """
    expected = set(built.state_dict())
    parts = tuple(f"{name}." for name, _ in built.named_children())
    more = sorted(name for name in names - expected if name.startswith((*parts, "vae.")))
    missing = sorted(expected - names)
    if not more and not missing:
        return
    remedy = "Restore the modules that were replaced."
    if any(_ADAPTERS.search(name) for name in more):
        remedy = _OF_ADAPTERS
    elif any(_FUSED_NAME.fullmatch(name) for name in more):
        remedy = (
            "Its fused projections were trained. Copy them to the separate projections, and call "
            "`unfuse_qkv_projections()` of the transformer."
        )
    elif any("parametrizations." in name for name in more):
        remedy = "Remove the parametrizations (`torch.nn.utils.parametrize.remove_parametrizations`)."
    elif any(name.endswith(("_g", "_v")) for name in more):
        remedy = "Remove the weight normalization (`torch.nn.utils.remove_weight_norm`)."
    elif any(name.endswith("_mask") for name in more):
        remedy = "Make the pruning permanent (`torch.nn.utils.prune.remove`)."
    elif any("_packed_params" in name or name.endswith(("scale", "zero_point", ".SCB")) for name in more):
        remedy = (
            "Its layers are quantized. Save the model before quantization, and quantize it at loading "
            "(`quantization_config=`)."
        )
    raise ValueError(
        "The backbone does not match its configuration and could not be loaded again: "
        f"{_some('it also has', more)}{' and ' if more and missing else ''}{_some('it lacks', missing)}. {remedy}"
    )


def _settle_head(model: Any, part: str, state: Mapping[str, Tensor]) -> None:
    """Let the configuration say how many classes a head has, and warn of one that is not built of a configuration."""
    # A class of the user's own builds its own head.
    if type(model).__module__.rpartition(".")[2] not in ("modeling_classification", "modeling_segmentation"):
        return
    head, config = getattr(model, part), model.config
    if isinstance(head, nn.Linear):
        return  # a linear head without a norm, as it is loaded
    expected = _head_of(model, part)
    if state.keys() == expected.keys():
        changed = [(state[name].shape, shape) for name, shape in expected.items() if state[name].shape != shape]
        counts = {found[0] for found, _ in changed}
        is_of_classes = all(found[1:] == shape[1:] and shape[0] == config.num_labels for found, shape in changed)
        if len(counts) <= 1 and is_of_classes:
            config.num_labels = counts.pop() if counts else config.num_labels
            return
    logger.warning(
        "The head is a custom %s, which `from_pretrained` cannot build. To load this checkpoint, pass "
        "`ignore_mismatched_sizes=True`, set `model.%s` to such a module, and call "
        '`model.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.',
        type(head).__name__,
        part,
    )


def _head_of(model: Any, part: str) -> dict[str, torch.Size]:
    """Return the names and shapes of the head that a model's configuration builds."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = None  # else building logs a message
    with torch.device("meta"), no_init_weights():
        built = getattr(type(model)(config), part)
    return {f"{part}.{name}": value.shape for name, value in built.state_dict().items()}


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _warn_of_processors(base: nn.Module, built: nn.Module) -> None:
    """Log which attention processors are not those that the model is loaded with, as no checkpoint has them."""
    usual = {name: type(module.processor) for name, module in built.named_modules() if hasattr(module, "processor")}
    found = {
        type(module.processor).__name__
        for name, module in base.named_modules()
        if name in usual and hasattr(module, "processor") and type(module.processor) is not usual[name]
    }
    if others := sorted(name for name in found if not name.startswith("Fused")):
        logger.warning(
            "Attention processors are not saved. The loaded model has diffusers' default processors instead of %s, "
            "so set yours again with `set_attn_processor`.",
            ", ".join(others),
        )


def _check_kinds(state: Mapping[str, Tensor]) -> None:
    """Raise for weights that are quantized in place, whose kind of tensor or dtype is none that is loaded.

    Raises:
        ValueError: If there are any.
    """
    for name, value in state.items():
        is_plain = type(value) in (Tensor, nn.Parameter) or hasattr(value, "device_mesh")
        is_number = value.dtype in WEIGHT_DTYPES.values()
        if not is_plain or not is_number:
            kind = type(value).__name__ if not is_plain else value.dtype
            raise ValueError(
                f"The weight {name!r} is quantized ({kind}) and could not be loaded again. Save the model before "
                "quantization, and quantize it at loading (`quantization_config=`)."
            )
