"""Families that users describe: checked where they are registered, and again by the first pass of a transformer."""

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.checks import is_finite_number, short
from ..model.families import FAMILIES, Inputs, TransformerBlocks, TransformerFamily
from ..model.layouts import MAX_SIZE, TransformerLayout

_OF_PACKAGE = frozenset(FAMILIES)
# Transformers whose first pass was looked at.
_SEEN: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def register_family(family: TransformerFamily) -> None:
    """Let a class of transformers be read that the package does not know.

    Register it in each program before its checkpoints are loaded: a checkpoint names the class and does not contain
    the description. What can be told of the description alone is checked here; the rest when a configuration is read
    by it, and at the first pass of a transformer.

    Args:
        family: The description. It takes the place of one that was registered for the same class before.

    Raises:
        ValueError: If it is of a family of the package, a field is of the wrong kind, or there is no such class.

    Example:
        >>> from hf_aselect import TransformerBlocks, TransformerFamily, register_family, transformer_layout
        >>> register_family(
        ...     TransformerFamily(
        ...         "AllegroTransformer3DModel",
        ...         sizes=("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size"),
        ...         layout=lambda config: transformer_layout(config, sample_size=config["sample_size"][0]),
        ...         call=lambda inputs: inputs.keywords(inputs.timesteps, inputs.latents[:, :, None]),
        ...         blocks=(TransformerBlocks("transformer_blocks", "attn1"),),
        ...         prompt_fields={"prompt_embeds": "caption_channels"},
        ...         patch_embedding="pos_embed",
        ...     )
        ... )
    """
    if not isinstance(family, TransformerFamily) or not callable(family.call) or not callable(family.layout):
        raise ValueError(
            f"`family` must be a `TransformerFamily` whose `call` and `layout` are functions, got {family!r}."
        )
    # One that was registered before is checked once.
    given: dict[str, Any] = {name: _unchecked(name, getattr(family, name)) for name in _CHECKED}
    family = replace(family, **given)
    _check_fields(family)
    _check_class(family)
    checked: dict[str, Any] = {name: partial(check, family) for name, check in _CHECKED.items()}
    FAMILIES[family.name] = replace(family, **checked)


def _unchecked(name: str, value: Any) -> Any:
    is_checked = isinstance(value, partial) and value.func is _CHECKED[name]
    return getattr(value.args[0], name) if is_checked else value


def _check_fields(family: TransformerFamily) -> None:
    """Reject fields of the wrong kind.

    Raises:
        ValueError: If there is one.
    """
    if not _is_word(family.name):
        raise ValueError(f"`name` of a family must be a class name (a string), got {family.name!r}.")
    if family.name in _OF_PACKAGE:
        raise ValueError(f"{family.name} is supported by hf_aselect already and cannot be registered again.")

    def check(is_fit: bool, name: str, wanted: str) -> None:
        if not is_fit:
            raise ValueError(f"`{name}` of {family.name} must be {wanted}, got {short(getattr(family, name))}.")

    def are_words(values: Any) -> bool:
        return isinstance(values, tuple | list) and all(map(_is_word, values))

    is_list = isinstance(family.blocks, tuple | list) and bool(family.blocks)
    is_list = is_list and all(isinstance(part, TransformerBlocks) for part in family.blocks)
    check(is_list, "blocks", "a tuple of `TransformerBlocks`")
    check(are_words(family.sizes), "sizes", "a tuple of names of fields")
    check(callable(family.tokens), "tokens", "a function, such as `last_tokens`")
    check(callable(family.output), "output", "a function of what `forward` returns and the `Inputs`")
    prompt, timed = family.prompt_fields, family.timestep_modules
    is_prompt = isinstance(prompt, Mapping) and all(map(_is_word, prompt))
    is_prompt = is_prompt and all(isinstance(value, str) for value in prompt.values())
    check(is_prompt, "prompt_fields", "a dictionary of names of embeddings and fields of the configuration")
    is_timed = isinstance(timed, Mapping) and all(map(_is_word, timed))
    is_timed = is_timed and all(is_finite_number(value) and value > 0 for value in timed.values())
    check(is_timed, "timestep_modules", "a dictionary of names of modules and numbers above 0")
    check(_is_word(family.patch_embedding), "patch_embedding", "the name of a module")
    check(isinstance(family.num_classes, str), "num_classes", 'the name of a field, or ""')
    check(isinstance(family.pipeline, str), "pipeline", 'the name of a pipeline of diffusers, or ""')
    check(isinstance(family.output_module, str), "output_module", 'the name of a module, or ""')
    check(are_words(family.whole_modules), "whole_modules", "a tuple of names of modules")
    check(are_words(family.timestep_embeddings), "timestep_embeddings", "a tuple of names")
    check(family.prepare is None or callable(family.prepare), "prepare", "a function, or None")
    check(family.encode_prompt is None or callable(family.encode_prompt), "encode_prompt", "a function, or None")
    if bool(family.pipeline) != (family.encode_prompt is not None):
        raise ValueError(
            f"`pipeline` and `encode_prompt` of {family.name} must be given together. Pass both or neither."
        )
    for part in family.blocks:
        names = part.projections
        is_whole = _is_word(part.path) and _is_word(part.attention) and _is_index(part.hidden)
        if not is_whole or not (callable(names) or (are_words(names) and len(names) == 3)):
            raise ValueError(
                f"`blocks` of {family.name} must have module names as `path` and `attention`, an integer >= 0 as "
                f"`hidden`, and three names or a function as `projections`, got {part!r}."
            )


def _check_class(family: TransformerFamily) -> None:
    """Reject a class that is none of diffusers' kind, or is not there.

    Raises:
        ValueError: If it is.
    """
    kind = family.transformer_class
    if kind is None:
        # It takes seconds to import, and whoever registers a family loads one, too.
        import diffusers

        if not hasattr(diffusers, family.name):
            raise ValueError(
                f"diffusers {diffusers.__version__} has no class {family.name}. Pass the class as "
                "`transformer_class`, or install a version of diffusers that has it."
            )
    elif not isinstance(kind, type) or not issubclass(kind, nn.Module) or not hasattr(kind, "from_config"):
        raise ValueError(
            f"`transformer_class` of {family.name} must inherit from diffusers' `ModelMixin` and `ConfigMixin`, got "
            f"{kind!r}."
        )
    elif kind.__name__ != family.name:
        raise ValueError(
            f"`name` of a family must equal the name of its class, because checkpoints store it, got {family.name!r} "
            f"for the class {kind.__name__!r}."
        )


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_index(value: Any, smallest: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= MAX_SIZE


def _checked_layout(family: TransformerFamily, config: Mapping[str, Any]) -> TransformerLayout:
    """Return the layout that a description reads off a configuration.

    Raises:
        ValueError: If it fails, is none, or contradicts the description.
    """
    if torch.compiler.is_compiling():
        return family.layout(config)  # checked when the configuration was made
    try:
        found = family.layout(config)
    except KeyError as error:
        raise ValueError(
            f"The `layout` of {family.name} reads {error}, which the configuration does not have. Pass fields with "
            "other names to `transformer_layout` (`patch_size=...`), and list the required ones in `sizes`."
        ) from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"The `layout` of {family.name} failed ({type(error).__name__}: {error}).") from error
    # By its name: a checkpoint's own code has a class of its own.
    if type(found).__name__ != TransformerLayout.__name__:
        raise ValueError(
            f"The `layout` of {family.name} must return a `TransformerLayout`, such as `transformer_layout(config)`, "
            f"got {type(found).__name__}."
        )
    values = {each.name: getattr(found, each.name) for each in fields(TransformerLayout)}
    optional = {"max_grid": values["max_grid"] is None, "needs_prompt": isinstance(values["needs_prompt"], bool)}
    smallest = {"num_attention_outputs": 0}
    for name, value in values.items():
        if not (optional.get(name) or (name != "needs_prompt" and _is_index(value, smallest.get(name, 1)))):
            wanted = "True or False" if name == "needs_prompt" else f"an integer >= {smallest.get(name, 1)}"
            raise ValueError(f"The `layout` of {family.name} must have {wanted} as `{name}`, got {value!r}.")
    if found.needs_prompt != bool(family.prompt_fields):
        raise ValueError(
            f"The `layout` of {family.name} has `needs_prompt={found.needs_prompt}`, but its `prompt_fields` are "
            f"{', '.join(family.prompt_fields) or 'empty'}. Set both for a transformer with a prompt, and neither "
            "for one without."
        )
    for name in filter(None, (family.num_classes, *family.prompt_fields.values())):
        if not _is_index(config.get(name), 1):
            raise ValueError(
                f"The description of {family.name} names the field {name!r}, which must be a positive number in the "
                f"configuration, got {config.get(name)!r}."
            )
    return found


def _checked_call(family: TransformerFamily, inputs: Inputs) -> dict[str, Any]:
    """Return the keywords of a transformer's `forward`, and look at its first pass.

    Raises:
        ValueError: If they are not keywords, or not those of its `forward`.
    """
    given = family.call(inputs)  # type: ignore[misc]
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"The `call` of {family.name} must return a dictionary of the keyword arguments of `forward`, got "
            f"{type(given).__name__}."
        )
    # What is traced is run without a graph first, or not at all.
    if not torch.compiler.is_compiling() and inputs.transformer not in _SEEN:
        _check_keywords(family, inputs.transformer, given)
        _check_widths(family, inputs.transformer)
        _watch(family, inputs)
        if not inputs.latents.is_meta:
            _explain(family, inputs.transformer, given)
        _SEEN.add(inputs.transformer)
    return given


def _check_keywords(family: TransformerFamily, transformer: Any, given: dict[str, Any]) -> None:
    known = inspect.signature(type(transformer).forward).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    unknown = [] if takes_all else [name for name in given if name not in known]
    needed = [name for name, each in known.items() if each.default is each.empty and each.kind < each.VAR_POSITIONAL]
    missing = [name for name in needed if name not in given and name != "self"]
    wrong = [f"returns {name}, which `forward` does not accept" for name in unknown]
    wrong += [f"does not return {name}" for name in missing]
    wrong += ["returns return_dict, which is set automatically"] if "return_dict" in given else []
    if wrong:
        names = ", ".join(name for name in known if name not in ("self", "return_dict"))
        raise ValueError(f"The `call` of {family.name} {' and '.join(wrong)}. Its `forward` accepts {names}.")


def _check_widths(family: TransformerFamily, transformer: Any) -> None:
    layout = family.layout(transformer.config)
    for part in family.blocks:
        blocks = transformer.get_submodule(part.path)
        if callable(part.projections) or not len(blocks):
            continue
        attention = blocks[0].get_submodule(part.attention)
        wanted = (layout.hidden_size, layout.key_value_size, layout.key_value_size)
        for name, width in zip(part.projections, wanted, strict=True):
            layer = attention.get_submodule(name)
            found = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
            if None not in found and found != (layout.hidden_size, width):
                raise ValueError(
                    f"The `layout` of {family.name} has {layout.hidden_size} channels for tokens and "
                    f"{layout.key_value_size} for keys and values, but {part.path}.0.{part.attention}.{name} maps "
                    f"{found[0]} channels to {found[1]}. Pass `hidden_size=` and `key_value_size=` to "
                    "`transformer_layout`."
                )


def _explain(family: TransformerFamily, transformer: Any, given: dict[str, Any]) -> None:
    """Let the next call of a transformer say what it was called with if it fails.

    Raises:
        ValueError: In that call, if the transformer fails.
    """
    run, former = transformer.forward, vars(transformer).get("forward")

    def explained(*args: Any, **kwargs: Any) -> Any:
        vars(transformer).pop("forward", None)
        if former is not None:
            transformer.forward = former  # of a hook of accelerate
        try:
            return run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            _SEEN.discard(transformer)  # the next pass is no better
            shapes = [f"{key} {tuple(value.shape)}" for key, value in given.items() if isinstance(value, Tensor)]
            raise ValueError(
                f"{family.name} failed ({type(error).__name__}: {error}) after `call` returned {', '.join(shapes)}. "
                "Return what diffusers' pipeline calls the transformer with."
            ) from error

    transformer.forward = explained


def _watch(family: TransformerFamily, inputs: Inputs) -> None:
    """Look at what the patch embedding and the first block of each list return, when they are called next."""
    layout = family.layout(inputs.transformer.config)
    height, width = inputs.latents.shape[-2:]
    rows, columns = height // layout.patch_size, width // layout.patch_size

    def look_at_patches(output: Any) -> None:
        if not isinstance(output, Tensor) or layout.hidden_size not in output.shape:
            return  # whoever packs several images has a list
        found = output.numel() / (len(inputs.latents) * layout.hidden_size)
        smaller = [(height // side) * (width // side) for side in range(1, layout.patch_size)]
        # Of other numbers that are larger, some are padding.
        if found < rows * columns or found in smaller:
            raise ValueError(
                f"The `layout` of {family.name} has `patch_size={layout.patch_size}`, which splits {height}×{width} "
                f"latents into {rows}×{columns} tokens, but `patch_embedding` ({family.patch_embedding}) returns "
                f"{found:g}. Pass `patch_size=` to `transformer_layout`."
            )

    def look_at_block(part: TransformerBlocks, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        if part.hidden >= len(outputs) or not isinstance(outputs[part.hidden], Tensor):
            raise ValueError(
                f"`hidden` of the blocks {part.path} of {family.name} is {part.hidden}, but a block returns "
                f"{', '.join(type(each).__name__ for each in outputs)}. Set it to the 0-based position of the image "
                "tokens among them."
            )

    transformer = inputs.transformer
    _once(transformer, family.patch_embedding, look_at_patches)
    for part in family.blocks:
        if len(transformer.get_submodule(part.path)):
            _once(transformer, f"{part.path}.0", partial(look_at_block, part))


def _once(transformer: nn.Module, path: str, look: Callable[[Any], None]) -> None:
    """Look at what a module returns when it is called next, before anybody else does."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        handle.remove()
        try:
            look(output)
        except ValueError:
            _SEEN.discard(transformer)  # the next pass is no better
            raise

    handle = transformer.get_submodule(path).register_forward_hook(hook, prepend=True)


def _checked_tokens(family: TransformerFamily, sequence: Tensor, num_tokens: int) -> Tensor:
    """Return the image's tokens of a sequence.

    Raises:
        ValueError: If they are not as many as the grid has.
    """
    found = family.tokens(sequence, num_tokens)
    if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[1] != num_tokens:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The `tokens` of {family.name} must return the {num_tokens} image tokens (B, N, D) from a sequence of "
            f"shape {tuple(sequence.shape)}, got {shape}. Check `patch_size` of the `layout` and `hidden` of the "
            "`blocks`, which must point to the image tokens."
        )
    return found


def _checked_output(family: TransformerFamily, output: Any, inputs: Inputs) -> Tensor:
    """Return the prediction.

    Raises:
        ValueError: If it is none of the latents' shape.
    """
    found = family.output(output, inputs)
    if not isinstance(found, Tensor) or found.shape != inputs.latents.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"The `output` of {family.name} must return the prediction with the shape of the latents, "
            f"{tuple(inputs.latents.shape)}, got {shape}."
        )
    return found


_CHECKED: dict[str, Callable[..., Any]] = {
    "layout": _checked_layout,
    "call": _checked_call,
    "tokens": _checked_tokens,
    "output": _checked_output,
}
