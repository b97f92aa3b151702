"""What is taken of configurations, images and weights, whoever wrote them; everything else is rejected by name."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .layouts import TransformerLayout, plain

logger = logging.get_logger(__name__)
NUM_TIMESTEPS = 1000


def check_timestep(timestep: Any) -> None:
    """Reject anything but an integer timestep in [0, 1000).

    Raises:
        ValueError: If `timestep` is not an integer or lies outside [0, 1000).
    """
    timestep = plain(timestep)
    if isinstance(timestep, bool) or not isinstance(timestep, int) or not 0 <= timestep < NUM_TIMESTEPS:
        raise ValueError(
            f"`timestep` must be an integer in [0, {NUM_TIMESTEPS}) or 'auto' (0 = least noise), got {timestep!r}."
        )


def check_count(name: str, count: Any) -> None:
    """Reject anything but a positive integer.

    Raises:
        ValueError: If `count` is none.
    """
    count = plain(count)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {count!r}.")


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
    """Reject what no weights are in; transformers looks it up in torch, whatever it is.

    Raises:
        ValueError: If `dtype` is neither None nor float32, bfloat16, float16 or float64, of torch or by name.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found in WEIGHT_DTYPES.values()):
        return
    raise ValueError(f"`dtype` must be float32, bfloat16, float16 or float64, got {short(dtype)}.")


def class_maps(fields: dict[str, Any], num_labels: Any) -> dict[str, dict[Any, Any]]:
    """Return `id2label` and `label2id` by name, each derived from the other where it is not given; none of neither.

    Args:
        fields: Of a configuration, those two among them.
        num_labels: How many there are, where that is said.

    Raises:
        ValueError: If one of them is invalid: classes are numbered from 0, and each has a name.
    """
    names, numbers = (plain(fields.get(name)) for name in ("id2label", "label2id"))
    if num_labels is not None and (isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"`num_labels` must be a positive integer, got {short(num_labels)}.")
    if numbers is not None and not isinstance(numbers, dict):
        raise ValueError(f"`label2id` must be a dictionary from class names to indices, got {short(numbers)}.")
    given, shown = "id2label", names
    if names is None and numbers:
        given, shown, names = "label2id", numbers, {str(number): name for name, number in numbers.items()}
    if names is None:
        return {}
    # JSON has words for keys.
    keys = {str(key) for key in names} if isinstance(names, dict) else set()
    if not keys or keys != {str(number) for number in range(len(keys))} or len(keys) != len(shown):
        raise ValueError(f"`{given}` must number the classes from 0 without gaps or repeats, got {short(shown)}.")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(f"`num_labels` is {num_labels}, but `{given}` names {len(names)} classes: {shown}.")
    named = {int(number): name for number, name in names.items()}
    named = dict(sorted(named.items())) if given == "label2id" else named
    return {"id2label": named, "label2id": numbers or {name: number for number, name in named.items()}}


# Of a configuration, an index or a card; the index of the largest model has a few.
_MAX_TEXT_BYTES = 50_000_000
# What weights are in, by the names of safetensors; others are numbers that stand for something else.
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PickledWeightsError(ValueError):
    """There are weights, but all of them are pickles."""


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: If it is not a regular file (a pipe would block, a device never ends), is larger than any of its
            kind, or is not UTF-8.
        OSError: If it is missing or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file.")
    if (size := path.stat().st_size) > _MAX_TEXT_BYTES:
        raise ValueError(f"{str(path)!r} has {size} bytes, but at most {_MAX_TEXT_BYTES} are read.")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ValueError: If it is missing, or no JSON object.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(path)!r} is missing. Save the model again with diffusers' `save_pretrained`."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Save or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must contain a JSON object, got a {type(content).__name__}.")
    return content


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index of weights names: safetensors beside it, and nothing else.

    Links are followed, because the files in the Hub's cache are links.

    Raises:
        ValueError: If there are none, or one is missing, lies in another folder, or is not a safetensors by its name.
    """
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{str(index)!r} has no `weight_map`. Save or download it again.")
    folder = index.parent
    for name in content.values():
        is_plain = isinstance(name, str) and re.fullmatch(r"[^/\\\x00]+\.safetensors", name) is not None
        if not is_plain:
            raise ValueError(
                f"{str(index)!r} lists the weight file {str(name)[:100]!r}, but only safetensors files in the same "
                "folder are read. Save or download them again."
            )
        if len(name) > 255 or not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no weights {name[:100]!r}. Save or download them again.")
    return [folder / name for name in sorted(set(content.values()))]


def refuse_other_than_safetensors(files: Iterable[str | os.PathLike[str]]) -> None:
    """Reject weights whose file names are not safetensors, before one of them is opened.

    Raises:
        PickledWeightsError: If there are any.
    """
    if others := [os.path.basename(name) for name in files if not str(name).endswith(".safetensors")]:
        raise PickledWeightsError(
            "Weights are only read from safetensors, because pickles can run any code, got "
            f"{', '.join(sorted(others)[:4])}. Save the model again with `save_pretrained`."
        )


def refuse_other_than_weights(name: str, dtype: str | torch.dtype) -> None:
    """Reject a tensor that cannot be a weight as it is: integers and 8-bit numbers want a scale that is elsewhere.

    Raises:
        ValueError: If `dtype`, torch's or the name that safetensors has for it, is none of `WEIGHT_DTYPES`.
    """
    if dtype not in WEIGHT_DTYPES and dtype not in WEIGHT_DTYPES.values():
        raise ValueError(
            f"The weight {name!r} has dtype {dtype}, expected float32, bfloat16, float16 or float64. Quantized "
            "weights need a `quantization_config` in the configuration."
        )


MAX_PIXEL_VALUE = 10.0
# What torch and transformers leave out of a loss.
IGNORED_LABEL = -100


def is_readable(values: Tensor) -> bool:
    """Return whether the values of a tensor may be looked at: where they lie in this machine's memory.

    An accelerator would be waited for, a graph that is compiled cannot branch on values, and kinds of tensors beyond
    torch's own (sharded, traced, without data) may have none. There the image processor, `cache_features` and
    `select_timestep` have looked at them before, on the CPU.
    """
    return type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_floats(name: str, values: Any) -> None:
    """Reject values that are not a floating-point tensor in memory.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(values).__name__}.")
    if torch.compiler.is_compiling():
        return
    if not values.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point numbers, got {values.dtype}. Convert 8-bit images with "
            "`ASelectImageProcessor.from_model_config(model.config)` first."
        )
    if values.is_meta or values.layout != torch.strided:
        kind = "one on the meta device, without data" if values.is_meta else str(values.layout)
        raise ValueError(f"`{name}` must be a dense tensor with data, got {kind}.")


NO_VAE = (
    "The model takes latents of {} channels and no images: it has no VAE. Load or convert it with one (`vae=`, "
    "`hf-aselect convert --vae`), a folder or an id on the Hub, or give `latents`."
)


def check_latents(latents: Tensor, layout: TransformerLayout) -> None:
    """Reject latents that a transformer cannot read.

    Args:
        latents: What was given as latents, to be (B, C, h, w).
        layout: Of the transformer.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    check_floats("latents", latents)
    side, limit = layout.patch_size, layout.max_grid
    if latents.ndim != 4 or latents.shape[1] != layout.num_channels:
        raise ValueError(
            f"`latents` must have shape (B, {layout.num_channels}, h, w), got {tuple(latents.shape)}. `encode` and "
            "`cache_features(..., what='latents')` return such latents."
        )
    _check_sides(latents, side, limit, "Height and width of `latents`")
    if not torch.compiler.is_compiling() and not len(latents):
        raise ValueError("`latents` must hold at least one image, got an empty batch.")
    if is_readable(latents) and not bool(latents.isfinite().all()):
        raise ValueError("`latents` must be finite, got NaN or infinite values.")


def _check_sides(images: Tensor, side: int, limit: int | None, what: str, unit: str = "", remedy: str = "") -> None:
    """Reject sides that are not multiples of a token's, or longer than `limit` tokens, where positions end."""
    height, width = images.shape[-2:]
    if limit is not None and max(height, width) > limit * side:
        raise ValueError(
            f"{what} must be at most {limit * side}{unit}, the size of this transformer's position table, got "
            f"{height}×{width}."
        )
    if height < side or width < side or height % side or width % side:
        raise ValueError(f"{what} must be multiples of {side}{unit} (a token's size), got {height}×{width}.{remedy}")


def check_pixel_values(pixel_values: Tensor, config: PreTrainedConfig) -> None:
    """Reject images that a model cannot read.

    Args:
        pixel_values: What was given as images, to be (B, C, H, W) in [-1, 1].
        config: Of the model.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    check_floats("pixel_values", pixel_values)
    if pixel_values.ndim != 4:
        raise ValueError(f"`pixel_values` must have shape (B, C, H, W), got {tuple(pixel_values.shape)}.")
    if (num_channels := pixel_values.shape[1]) != config.num_channels and config.takes_latents:
        raise ValueError(f"`pixel_values` have {num_channels} channels. {NO_VAE.format(config.num_channels)}")
    if num_channels != config.num_channels:
        raise ValueError(
            f"`pixel_values` must have {config.num_channels} channels, got {num_channels}. Use "
            "`ASelectImageProcessor.from_model_config(model.config)`, which converts images."
        )
    resizes_to = "×".join(map(str, config.image_height_width))
    remedy = f" Use `ASelectImageProcessor.from_model_config(model.config)`, which resizes to {resizes_to}."
    _check_sides(pixel_values, config.patch_pixels, config.layout.max_grid, "Height and width", " pixels", remedy)
    if not torch.compiler.is_compiling() and not len(pixel_values):
        raise ValueError("`pixel_values` must hold at least one image, got an empty batch.")
    if not is_readable(pixel_values):
        return
    largest = float(pixel_values.detach().abs().max())
    if not math.isfinite(largest):
        raise ValueError("`pixel_values` must be finite and in [-1, 1], got NaN or infinite values.")
    # Another processor's mean and standard deviation give no more than 3.
    if largest > MAX_PIXEL_VALUE:
        raise ValueError(
            f"`pixel_values` must be in [-1, 1], got values up to {largest:g}. Use "
            "`ASelectImageProcessor.from_model_config(model.config)`, which scales them."
        )


POOLED_UNSTANDARDIZED = (
    "the standard deviation over tokens cannot be standardized afterwards. Cache them with what='tokens', or load "
    "the model with `standardize_features=False`, which closed-form heads do not need."
)
# Parts of our models that a checkpoint may lack altogether, and that are then new.
# By the field of the configuration that says which.
HEADS = {"head": "classifier", "decoder": "decode_head"}


class MismatchedSizesError(ValueError, RuntimeError):
    """A head of other shapes than the configuration says; transformers' own is a `RuntimeError`, which some catch."""


def checked_features(features: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return tokens, (B, N, D), that were read before; a linear head takes pooled ones, (B, S · D), too.

    Args:
        features: What was given as features.
        config: Of the classifier.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    check_floats("features", features)
    width, shape = config.feature_size, tuple(features.shape)
    if features.ndim == 2 and config.head != "linear":
        raise ValueError(
            f"An attention head needs tokens of shape (B, N, {width}), got pooled features of shape {shape}. Cache "
            "them with what='tokens', or use head='linear'."
        )
    if features.ndim == 2 and shape[1] != config.pooled_size:
        raise ValueError(
            f"`features` must be tokens of shape (B, N, {width}), or pooled with pooling={config.pooling!r} to (B, "
            f"{config.pooled_size}), got {shape}. Cache them again."
        )
    if features.ndim == 2 and not config.is_pooling_of_raw_tokens:
        raise ValueError(f"`features` are pooled to {shape}, but {POOLED_UNSTANDARDIZED}")
    if features.ndim != 2 and (features.ndim != 3 or shape[-1] != width):
        raise ValueError(f"`features` must be tokens of shape (B, N, {width}), got {shape}.")
    if not torch.compiler.is_compiling() and not features.numel():
        raise ValueError(f"`features` must hold at least one image, got {tuple(features.shape)}. Cache them again.")
    if is_readable(features) and not bool(features.isfinite().all()):
        raise ValueError("`features` must be finite, got NaN or infinite values. Cache them again.")
    return features


def checked_labels(labels: Tensor, count: int, config: PreTrainedConfig) -> Tensor:
    """Return the labels of a classifier: class indices, (B,), int64; targets or rows of 0 and 1, (B, K), as they are.

    Args:
        labels: What was given as labels.
        count: Number of images, B.
        config: Of the classifier; `problem_type` and `num_labels` say what the labels must be.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"`labels` must be a tensor, got {type(labels).__name__}.")
    if torch.compiler.is_compiling():
        return labels
    num_labels = int(config.num_labels or 0)
    if labels.is_meta or labels.layout != torch.strided or labels.is_complex():
        raise ValueError(f"`labels` must be a dense tensor of numbers, got {labels.layout}, {labels.dtype}.")
    if labels.is_floating_point() and is_readable(labels) and not bool(labels.isfinite().all()):
        raise ValueError("`labels` must be finite, got NaN or infinite values.")
    problem = config.problem_type or ("regression" if num_labels == 1 else None)
    is_table = problem is None and labels.numel() != count and labels.shape == (count, num_labels)
    if problem == "multi_label_classification" or (is_table and labels.is_floating_point()):
        return _checked_rows(labels, (count, num_labels))
    if problem == "regression":
        shapes = ((count,), (count, 1)) if num_labels == 1 else ((count, num_labels),)
        if tuple(labels.shape) not in shapes:
            raise ValueError(
                f"`labels` for regression must have shape {' or '.join(map(str, shapes))}, got {tuple(labels.shape)}."
            )
        return labels.to(torch.promote_types(labels.dtype, torch.float32))
    return _checked_indices(labels, count, num_labels)


def _checked_rows(labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return rows of several classes an image, of 0 and 1."""
    is_wrong = is_readable(labels) and not bool(((labels >= 0) & (labels <= 1)).all())
    if labels.shape != shape or is_wrong:
        largest = f" with values up to {float(labels.abs().max()):g}" if is_readable(labels) and labels.numel() else ""
        raise ValueError(
            f"`labels` for multi-label classification must be 0 or 1, {shape}, got {tuple(labels.shape)}{largest}."
        )
    return labels.to(torch.promote_types(labels.dtype, torch.float32))


def _checked_indices(labels: Tensor, count: int, num_labels: int) -> Tensor:
    """Return class indices, one an image."""
    if labels.ndim == 0 or labels.numel() != count:
        raise ValueError(
            f"`labels` must have one label for each of {count} images, got shape {tuple(labels.shape)}. If an image "
            "can have several classes, load the model with `problem_type='multi_label_classification'`."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        # transformers would take them for another kind of problem, from then on.
        raise ValueError(f"`labels` must be class indices, integers in [0, {num_labels}), got {labels.dtype}.")
    labels = labels.long()
    if outside := _outside(labels, num_labels, IGNORED_LABEL):
        raise ValueError(
            f"`labels` must be class indices in [0, {num_labels}), got {outside}. Load the model with `num_labels=` "
            "set to the number of classes in the dataset."
        )
    return labels


def check_masks(labels: Tensor, pixel_values: Tensor, config: PreTrainedConfig) -> None:
    """Reject masks that are not of these images, or name classes that a segmenter does not have.

    Args:
        labels: What was given as labels, to be (B, H, W) of any integer dtype.
        pixel_values: The images, (B, C, H, W).
        config: Of the segmenter.

    Raises:
        ValueError: If type, shape or values are wrong.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"`labels` must be a tensor, got {type(labels).__name__}.")
    expected = (len(pixel_values), *pixel_values.shape[-2:])
    if labels.shape != expected or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be class indices of shape {tuple(expected)}, one per pixel, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}. `ASelectImageProcessor` returns them for `segmentation_maps=`."
        )
    num_labels, ignored = int(config.num_labels or 0), config.semantic_loss_ignore_index
    if is_readable(labels) and labels.numel():
        warn_of_foreground(labels.long(), ignored)  # torch compares no 16-bit integers
    if outside := _outside(labels, num_labels, ignored):
        raise ValueError(
            f"`labels` must be class indices in [0, {num_labels}), or {ignored} for pixels without a class, got "
            f"{outside}. Load the model with `num_labels=` set to the number of classes and "
            "`semantic_loss_ignore_index=` set to the masks' value for pixels without a class."
        )


def warn_of_foreground(masks: Any, ignored: int) -> None:
    """Say so where masks, an array or tensor, are of 0 and 255 alone, and 255 stands for no class."""
    if ignored == 255 and masks.min() == 0 and masks.max() == 255 and bool(((masks == 0) | (masks == 255)).all()):
        logger.warning_once(
            "The masks contain only 0 and 255, and 255 marks pixels without a class, as in transformers. If 255 is "
            "the foreground, use masks of 0 and 1 (`mask > 0`)."
        )


def _outside(labels: Tensor, num_labels: int, ignored: int) -> list[int]:
    """Return the first of the labels that are neither classes nor ignored, as far as they may be looked at."""
    if not is_readable(labels):
        return []
    labels = labels.long()  # comparing small integers with a larger number is an error
    outside = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignored)]
    found: list[int] = outside.unique()[:5].tolist()
    return found


def is_of_diffusers(source: str | os.PathLike[str]) -> bool:
    """Return whether a local folder is, by its files, one that diffusers saved."""
    folder = Path(source)
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        return True
    return (folder / "config.json").is_file() and "_class_name" in read_json(folder / "config.json")


def check_files(source: str | os.PathLike[str], subfolder: str | None) -> None:
    """Reject a local folder whose adapter is none or a pickle, or an index of which leads elsewhere.

    Transformers joins such names to the folder as they are, and opens what it finds there. Of what comes from the
    Hub its client lets no file lie outside of its cache.

    Raises:
        ValueError: If there is one.
    """
    folder = Path(source, subfolder or "")
    if (folder / "adapter_config.json").exists():
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        if not isinstance(kind, str):
            raise ValueError(
                f"{str(folder / 'adapter_config.json')!r} is not an adapter configuration: its `peft_type` must be a "
                f"string, got {short(kind)}."
            )
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        refuse_other_than_safetensors(folder.glob("adapter_model.*"))
    for index in sorted(folder.glob("*.index*.json")) if folder.is_dir() else ():
        if ".safetensors." in index.name:
            shards_of(index)


def check_dtypes(files: Iterable[str | os.PathLike[str]], model: PreTrainedModel) -> None:
    """Reject weights of no floating-point dtype: transformers would cast numbers that stand for something else.

    Raises:
        ValueError: If there are any.
    """
    weights = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in weights.intersection(opened.keys()):
                    refuse_other_than_weights(name, opened.get_slice(name).get_dtype())
        except (OSError, SafetensorError):  # transformers says what is wrong with it
            return


def check_loaded(
    source: str | os.PathLike[str],
    info: dict[str, Any],
    model: PreTrainedModel,
    ignore_mismatched_sizes: bool,
    is_info_asked: bool,
) -> None:
    """Reject a checkpoint whose backbone or head is incomplete or of other shapes.

    Args:
        source: Where it was loaded from, for the error.
        info: Transformers' loading info.
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
    """Reject a checkpoint that lacks a part of the backbone or does not fit it: random weights would go unnoticed."""
    unfit = {entry[0] for entry in info["mismatched_keys"]}
    if not is_info_asked:
        unfit |= {*info["missing_keys"], *info["unexpected_keys"]}
    broken = {name for name in unfit if "denoiser." in name or "vae." in name}
    if broken:
        raise ValueError(
            f"The weights in {str(source)!r} do not fit their configuration: {len(broken)} tensors of the backbone "
            f"are missing, unexpected or of another shape, among them {sorted(broken)[:3]}."
        )


def _check_head_is_whole(
    source: str | os.PathLike[str], info: dict[str, Any], model: PreTrainedModel, ignore_mismatched_sizes: bool
) -> None:
    """Reject a checkpoint with some but not all of the head: the rest would be random. None at all is a new head."""
    for part, module in HEADS.items():
        of_the_part = f"{module}."
        missing = {name for name in info["missing_keys"] if name.startswith(of_the_part)}
        whole = {name for name in model.state_dict() if name.startswith(of_the_part)}
        left_over = {name for name in info["unexpected_keys"] if name.startswith(of_the_part)}
        # A linear head that was trained on normed tokens means nothing without its norm.
        has_other_norm = whole and any(name.startswith("classifier.norm.") for name in left_over)
        if left_over and (missing or has_other_norm):
            if not ignore_mismatched_sizes:
                raise ValueError(
                    f"The weights in {str(source)!r} have another kind of {part}: {sorted(missing)[:2]} are missing, "
                    f"and {sorted(left_over)[:2]} are unexpected. Pass `ignore_mismatched_sizes=True` to start with "
                    f"a new {part}, or load the model with the `{part}` it was saved with."
                )
            _renew(model, module)
        elif missing and missing != whole:
            raise ValueError(
                f"The weights in {str(source)!r} have only a part of the {part}: {len(missing)} of its {len(whole)} "
                f"tensors are missing, among them {sorted(missing)[:3]}. Save or download them again."
            )


def _renew(model: PreTrainedModel, part: str) -> None:
    """Initialise a head again: some of its tensors may have been those of another kind of head, by the same names."""
    head: nn.Module = getattr(model, part)
    for name, tensor in (*head.named_parameters(), *head.named_buffers()):
        # transformers' mark of what was loaded. The statistics of the tokens are the same for another head.
        tensor._is_hf_initialized = "standardization." in name  # type: ignore[attr-defined]
    head.apply(model._init_weights)


def _check_head_fits(source: str | os.PathLike[str], info: dict[str, Any]) -> None:
    """Reject a checkpoint whose head has other shapes than the configuration says."""
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise MismatchedSizesError(
            f"The head in {str(source)!r} does not fit the configuration: {name!r} has shape {tuple(found)}, "
            f"expected {tuple(expected)}. Pass `ignore_mismatched_sizes=True` to start with a new head, or load the "
            "model with the `num_labels` and head sizes it was saved with."
        )
