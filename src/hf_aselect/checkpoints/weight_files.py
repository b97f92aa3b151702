"""The weights of a diffusers checkpoint in a local folder: safetensors, whole or in shards."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model.checks import PickledWeightsError, read_json, shards_of

logger = logging.getLogger(__name__)

CONFIG = "config.json"
MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
# What diffusers and transformers call their weights, without and with a variant, whole and in shards.
_STEMS = "(?:diffusion_pytorch_model|model)"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAPPED_BYTES = 2**27


def is_listed(model_index: Mapping[str, Any], part: str) -> bool:
    """Return whether a pipeline has a part: its index then names library and class, else nulls or nothing."""
    named = model_index.get(part)
    return isinstance(named, list) and bool(named) and bool(named[0])


def transformer_part(model_index: Mapping[str, Any]) -> str:
    """Return the folder of a pipeline's transformer; of two (Wan 2.2) that of the one for little noise."""
    has_two = is_listed(model_index, "transformer_2") and model_index.get("boundary_ratio") is not None
    return "transformer_2" if has_two else "transformer"


def weights_of(
    part: str, files: Iterable[str], variant: str | None, fall_back: bool = False, where: str = "the repository"
) -> list[str]:
    """Return which files hold the weights of a part: shards and their index, or one file.

    Args:
        part: Folder of the part; "" for a bare model.
        files: Names of all files.
        variant: The variant of the weights.
        fall_back: Whether those without a variant do where there are none of it.
        where: What the files are of, for an error.

    Raises:
        ValueError: If there are none.
    """
    prefix = f"{part}/" if part else ""
    where = f"{part}/ of {where}" if part else where
    names = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    found = [name for name in names if _is_weights(name, variant)]
    if not found and fall_back and variant:
        found = [name for name in names if _is_weights(name, None)]
    # diffusers' own name wins where both are there.
    found = [name for name in found if name.startswith("diffusion_")] or found
    if not found:
        refuse_pickled_names(where, names)
        there = sorted(name for name in names if name.endswith(".safetensors"))
        wanted = f"diffusion_pytorch_model.{variant + '.' if variant else ''}safetensors"
        raise ValueError(
            f"{where!r} has no weights {wanted!r}, neither in one file nor in shards (found "
            f"{', '.join(there[:4]) or 'none'}). Save or download them again, or pass the `variant=` that exists."
        )
    return [prefix + name for name in found]


def _is_weights(name: str, variant: str | None) -> bool:
    tag = rf"\.{re.escape(variant)}" if variant else ""
    shard = r"(?:-\d+-of-\d+)?"
    whole = rf"{_STEMS}{tag}{shard}\.safetensors|{_STEMS}{shard}{tag}\.safetensors"
    index = rf"{_STEMS}\.safetensors\.index{tag}\.json"
    return re.fullmatch(f"{whole}|{index}", name) is not None


def weight_files(folder: Path, variant: str | None = None, fall_back: bool = False) -> list[Path]:
    """Return the safetensors of a model that diffusers saved, whole or in shards.

    Args:
        folder: Where they are.
        variant: The variant of the weights.
        fall_back: Whether those without a variant do where there are none of it.

    Raises:
        ValueError: If there are none, or one that the index names is missing or outside the folder.
    """
    refuse_pickles(folder)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = weights_of("", there, variant, fall_back, where=str(folder))
    indices = [name for name in names if name.endswith(".json")]
    if indices:
        return shards_of(folder / indices[0])
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no weights {name!r}. Save or download them again.")
    return [folder / name for name in names]


def check_parts(folder: Path, wanted: Iterable[str]) -> None:
    """Reject a pipeline that lacks a part which its `model_index.json` lists: without it, it is another model.

    Args:
        folder: The pipeline; one without that file may hold what it likes.
        wanted: The parts that are needed, where they are listed.

    Raises:
        ValueError: If one is missing.
    """
    if not (folder / MODEL_INDEX).is_file():
        return
    index = read_json(folder / MODEL_INDEX)
    listed = [part for part in wanted if is_listed(index, part)]
    missing = [part for part in listed if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        is_text = all(part.startswith(("text_encoder", "tokenizer")) for part in missing)
        instead = "pass the empty prompt's embeddings as a dictionary, `prompt_embeds=`" if is_text else ""
        instead = instead or "list it there as [null, null] if you left it out on purpose"
        raise ValueError(
            f"{str(folder)!r} lacks {', '.join(f'{part}/' for part in missing)}, which {MODEL_INDEX} lists. Download "
            f"or copy the whole pipeline, or {instead}."
        )


def tensor_bytes(files: Iterable[Path]) -> dict[str, int]:
    """Return the size in bytes of each tensor of some safetensors, of whatever dtype, by name.

    A file that cannot be read counts nothing.
    """
    sizes: dict[str, int] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                sizes |= {name: prod(each.get_shape()) * _bits(each.get_dtype()) // 8 for name, each in found.items()}
        except (OSError, SafetensorError, ValueError):
            logger.warning("The size of %s is unknown, because it is not a safetensors file.", path.name)
    return sizes


def _bits(dtype: str) -> int:
    """Return the bits of a number of a dtype by its name in a safetensors file, as "BF16" and "F8_E4M3"."""
    found = re.match(r"[A-Z]+(\d+)", dtype)
    return int(found[1]) if found else 8  # "BOOL"


def iterate_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor of some safetensors, one after the other.

    A value is a part of the mapped file. A file is mapped again every `_MAPPED_BYTES`, so that what was read before
    leaves memory, unless somebody holds on to it.

    Raises:
        ValueError: If a file is truncated or no safetensors.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                waiting = list(opened.keys())
            while waiting:
                mapped = 0
                with safe_open(path, framework="pt") as opened:
                    while waiting and mapped < _MAPPED_BYTES:
                        name = waiting.pop(0)
                        value = opened.get_tensor(name)
                        mapped += value.nbytes
                        yield name, value
                        del value
        except SafetensorError as error:
            raise unreadable(path, f"safetensors file ({error})", error) from error


def unreadable(path: Path, wanted: str, error: Exception) -> ValueError:
    """Return what to raise of a file of weights that cannot be read: what it is by its first bytes, and what to do.

    Args:
        path: The file.
        wanted: What it was read as.
        error: The error of its reader.
    """
    with path.open("rb") as opened:
        head = opened.read(256)
    what, remedy = f"truncated or not a {wanted}", "Save or download it again."
    if not head:
        what = "empty"
    elif head.startswith(b"version https://git-lfs"):
        what, remedy = "a Git LFS pointer instead of the file itself", ("Download the file: `git lfs pull`.")
    elif path.suffix == ".safetensors" and (head.startswith(b"PK") or head[:1] == b"\x80"):
        what = "a pickle (saved by `torch.save`) instead of safetensors"
        remedy = (
            "If it has research weights, rename it to .pt and run `hf-aselect convert FILE OUTPUT --layout ... "
            "--allow-pickle`."
        )
    elif path.suffix != ".safetensors" and head[8:9] == b"{":
        what, remedy = "a safetensors file", "Rename it to .safetensors, which needs no `--allow-pickle`."
    elif all(each in b"\t\n\r" or 32 <= each < 127 for each in head):
        what = f"a text file instead of a {wanted}"  # a link may lead to one that is nobody's business
    elif head.startswith(b"PK") and b"/data.pkl" not in head:
        what = f"a zip archive instead of a {wanted}"
    elif "mmap can only be used" in str(error):
        what, remedy = "damaged or saved before torch 1.6", "Load it and save it again with a newer torch."
    return ValueError(f"{str(path)!r} is {what}. {remedy}")


def refuse_pickles(folder: Path) -> None:
    """Reject a folder whose only weights are pickles: unpickling runs whatever code they hold.

    Raises:
        PickledWeightsError: If it is one.
    """
    if folder.is_dir():
        refuse_pickled_names(str(folder), [path.name for path in folder.iterdir()])


def refuse_pickled_names(where: str, names: Iterable[str]) -> None:
    """Reject files whose only weights are pickles; see `refuse_pickles`.

    Raises:
        PickledWeightsError: If they are.
    """
    names = list(names)
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if any("model" in name for name in pickles) and not any(name.endswith(".safetensors") for name in names):
        raise PickledWeightsError(
            f"{where!r} has only pickled weights ({', '.join(pickles)}), which are not loaded because a pickle can "
            "run arbitrary code. If you trust them, save safetensors with diffusers: "
            "`DiffusionPipeline.from_pretrained(source).save_pretrained(folder)`. Weights of the DiT, SiT or REPA "
            "research code are converted with `hf-aselect convert FILE OUTPUT --layout ...`."
        )
