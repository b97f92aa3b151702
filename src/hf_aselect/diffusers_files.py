"""The files of a diffusers checkpoint: found in a folder, or fetched from the Hub as far as needed, and read."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG = "config.json"
MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
TRANSFORMER_CONFIG = f"transformer/{CONFIG}"
# What diffusers and transformers call their weights, without and with a variant, whole and in shards.
_STEMS = "(?:diffusion_pytorch_model|model)"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAPPED_BYTES = 2**27
# What the safetensors library takes at the most: whoever says more wants the memory, not the names.
_MAX_HEADER_BYTES = 100_000_000
# Of a configuration, an index or a card; the index of the largest model has a few.
_MAX_TEXT_BYTES = 50_000_000
# What weights are in, by the names of safetensors; others are numbers that stand for something else.
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What the client raises where it gets no answer: `HTTPError` of the HTTP library that its version uses.
_NO_ANSWER: type[Exception] = HfHubHTTPError.__mro__[1]


class PickledWeightsError(ValueError):
    """There are weights, but all of them are pickles."""


@dataclass(frozen=True)
class HubOptions:
    """How files are fetched from the Hub; what each means is `huggingface_hub.snapshot_download`'s.

    Args:
        revision: Branch, tag or commit.
        subfolder: Folder in the repository, or in the local folder, that holds the checkpoint.
        token: Token of the user, or whether to take the one that is logged in.
        cache_dir: Folder of downloads.
        local_files_only: Whether to take what was downloaded before and ask the Hub nothing.
        force_download: Whether to download again what was downloaded before.
        variant: Weights whose file names have this in them, as "fp16", where there are any.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    variant: str | None = None

    def of_a_download(self) -> dict[str, Any]:
        """Return those that every download takes."""
        names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        return {name: getattr(self, name) for name in names}


def locate(
    source: str | os.PathLike[str],
    model_type: str,
    options: HubOptions,
    text_parts: Callable[[dict[str, Any]], Iterable[str]],
) -> Path | None:
    """Return the folder of a diffusers checkpoint, fetched from the Hub if need be; None for a checkpoint of ours.

    Args:
        source: Local folder, or id on the Hub.
        model_type: What the `config.json` of a checkpoint of ours names as its `model_type`.
        options: How to fetch.
        text_parts: Which folders of a pipeline that encode a text are to be fetched, by the configuration of its
            transformer; raises `ValueError` for a transformer that is not supported. Asked before any weights are
            fetched.

    Raises:
        ValueError: If a local folder is neither; if the only weights are pickles or of another variant; if the
            repository holds another model.
        OSError: If a repository, revision or file is not found, may not be read, or the Hub cannot be reached; the
            message says what to do.
    """
    folder = Path(source, options.subfolder or "")
    if folder.is_dir():
        return folder if _is_diffusers(folder, source, model_type) else None
    if os.path.isdir(source):
        raise ValueError(f"{str(source)!r} has no folder {options.subfolder!r}, which `subfolder=` names.")
    if os.path.exists(source):
        raise ValueError(f"{str(source)!r} is a file; expected a folder or an id on the Hub.")
    nothing = f"{str(source)!r} is neither a local folder nor an id on the Hub, which has the form 'owner/name'."
    if re.match(r"[/.~]|\w:", str(source)):
        raise OSError(nothing)
    try:
        return _fetch(str(source), model_type, options, text_parts)
    except HFValidationError as error:
        raise OSError(nothing) from error
    except GatedRepoError as error:
        raise OSError(
            f"{str(source)!r} is gated: accept its conditions at https://huggingface.co/{source}, then log in with "
            "`hf auth login` or pass `token=`."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{str(source)!r} has no revision {options.revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{str(source)!r} is neither a local folder nor a repository of the Hub that you may read. Check the "
            "name; if it is private, log in with `hf auth login` or pass `token=`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        revision = f" --revision {options.revision}" if options.revision else ""
        raise OSError(
            f"{str(source)!r} is no local folder, the Hub cannot be reached (or may not be: `local_files_only`, "
            f"`HF_HUB_OFFLINE`), and it was not downloaded before. Run `hf download "
            f"{source}{revision}` where there is a network, or give the folder of a checkpoint."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"The Hub did not give {str(source)!r}: {error}") from error


def _is_diffusers(folder: Path, source: str | os.PathLike[str], model_type: str) -> bool:
    """Return whether a local folder holds a transformer of diffusers, rather than a checkpoint of ours."""
    if (folder / "transformer").is_dir():
        return True  # what else lies beside it is nobody's weights
    refuse_pickles(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        return True
    if config.get("model_type") == model_type:
        return False
    raise ValueError(
        f"{str(source)!r} holds nothing that can be loaded: expected a checkpoint of hf_aselect ({CONFIG} with "
        f"model_type {model_type!r}), a folder with transformer/ and scheduler/, or a diffusers "
        f"transformer ({CONFIG} with `_class_name`); found {sorted(path.name for path in folder.iterdir())[:10]}."
    )


def _fetch(
    repo_id: str,
    model_type: str,
    options: HubOptions,
    text_parts: Callable[[dict[str, Any]], Iterable[str]],
) -> Path | None:
    """Return the folder of a diffusers checkpoint of the Hub, with the files that are needed; None for one of ours."""
    prefix = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    # The cache alone knows nothing of what the Hub would say: a file that is not in it may be there.
    is_offline = options.local_files_only or constants.HF_HUB_OFFLINE
    how = options.of_a_download()
    for name in (MODEL_INDEX, CONFIG):
        try:
            path = Path(hf_hub_download(repo_id, prefix + name, **how))
        except LocalEntryNotFoundError:
            if name == CONFIG:
                raise
            # A Hub that did not answer is not waited for a second time.
            is_offline, how["local_files_only"] = True, True
            continue
        except EntryNotFoundError:
            continue
        found = read_json(path)
        if "_class_name" in found:
            break
        if found.get("model_type") == model_type:
            return None
        if name == CONFIG:
            raise ValueError(
                f"{repo_id!r} is a checkpoint of {found.get('model_type') or 'another kind'}; expected one of "
                "hf_aselect, a pipeline of diffusers with a transformer, or a transformer of diffusers."
            )
    else:
        raise ValueError(
            f"{repo_id!r} has neither {MODEL_INDEX} nor {CONFIG} in "
            f"{options.subfolder or 'its first folder'}: it is no checkpoint in diffusers' layout. Where the original "
            "weights are in one repository, diffusers' are often in another, whose name ends in '-diffusers'; a part "
            "of a repository is named by `subfolder=`."
        )
    if name == MODEL_INDEX:
        if not _is_listed(found, "transformer"):
            raise ValueError(
                f"{repo_id!r} is a {found['_class_name']}, which has no `transformer`: features are read from "
                "diffusion transformers only."
            )
        found_transformer = read_json(Path(hf_hub_download(repo_id, prefix + TRANSFORMER_CONFIG, **how)))
    else:
        found_transformer = found
    wanted_text = tuple(text_parts(found_transformer))
    files = [] if is_offline else _files_of(repo_id, options)
    if not files:
        return path.parent
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    try:
        needed = needed_files(inside, found if name == MODEL_INDEX else None, options.variant, wanted_text)
    except PickledWeightsError as error:
        raise ValueError(f"{error}{_safetensors_elsewhere(repo_id, options)}") from error
    logger.info("Fetching %d of the %d files of %s.", len(needed), len(files), repo_id)
    wanted = [prefix + file for file in needed]
    wanted += [f"{prefix}README.md", "README.md"]  # they say the licence
    return Path(snapshot_download(repo_id, allow_patterns=wanted, **options.of_a_download())) / prefix


def _files_of(repo_id: str, options: HubOptions) -> list[str]:
    """Return the paths of all files of a repository; none where the Hub does not answer, and the cache has to do."""
    try:
        return list(HfApi(token=options.token).list_repo_files(repo_id, revision=options.revision))
    except HfHubHTTPError:
        raise
    except (OSError, _NO_ANSWER) as error:
        logger.warning("The Hub does not answer (%s): what was downloaded of %s before is taken.", error, repo_id)
        return []


def _safetensors_elsewhere(repo_id: str, options: HubOptions) -> str:
    """Return a sentence that names the pull requests of a repository which add safetensors; an empty one if none."""
    try:
        pulls = HfApi(token=options.token).get_repo_discussions(repo_id, discussion_type="pull_request")
        found = [pull for pull in pulls if "safetensors" in pull.title.lower() and pull.status in ("open", "draft")]
    except (OSError, _NO_ANSWER, KeyError, ValueError):
        return ""  # it would have been a help, no more
    if not found:
        return ""
    named = ", ".join(f"`revision='{pull.git_reference}'` (by {pull.author})" for pull in found[:3])
    return f" Or take the safetensors that a pull request offers, if you trust who made it: {named}."


def needed_files(
    files: list[str], model_index: dict[str, Any] | None, variant: str | None, text_parts: tuple[str, ...] = ()
) -> list[str]:
    """Return which files of a repository are needed of a pipeline, or of a bare transformer.

    Args:
        files: Paths of all files.
        model_index: What the pipeline's `model_index.json` says; None for a bare transformer.
        variant: The variant of the weights.
        text_parts: Folders that encode a text; taken where the pipeline has them.

    Raises:
        ValueError: If the transformer has no safetensors, or none of the variant.
    """
    if model_index is None:
        return [CONFIG, *_weights_of("", files, variant)]
    needed = [MODEL_INDEX, *(file for file in files if file.startswith("scheduler/"))]
    parts = [part for part in ("transformer", "vae", *text_parts) if _is_listed(model_index, part)]
    for part in parts:
        inside = [file for file in files if file.startswith(f"{part}/")]
        needed += [file for file in inside if ".safetensors" not in file and not file.endswith(_PICKLES)]
        if not part.startswith("tokenizer"):
            needed += _weights_of(part, inside, variant, fall_back=part != "transformer")
    # Notes and weights of other frameworks have no use here; the pickles' index ends as their files do not.
    useless = (".md", ".msgpack", ".h5", ".onnx", ".onnx_data", ".bin.index.json")
    return sorted({file for file in needed if not file.endswith(useless)})


def _is_listed(model_index: dict[str, Any], part: str) -> bool:
    """Return whether a pipeline has a part: its index then names library and class, else nulls or nothing."""
    named = model_index.get(part)
    return isinstance(named, list) and bool(named) and bool(named[0])


def _weights_of(
    part: str, files: Iterable[str], variant: str | None, fall_back: bool = False, where: str = "the repository"
) -> list[str]:
    """Return the files of a part's weights, in the variant asked for."""
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
            f"{where!r} has no weights {wanted!r}, whole or in shards; it has {', '.join(there[:4]) or 'none'}. "
            "Save or download them again, or name the variant that there is by `variant=`."
        )
    return [prefix + name for name in found]


def _is_weights(name: str, variant: str | None) -> bool:
    tag = rf"\.{re.escape(variant)}" if variant else ""
    shard = r"(?:-\d+-of-\d+)?"
    whole = rf"{_STEMS}{tag}{shard}\.safetensors|{_STEMS}{shard}{tag}\.safetensors"
    index = rf"{_STEMS}\.safetensors\.index{tag}\.json"
    return re.fullmatch(f"{whole}|{index}", name) is not None


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: If it is no file (a pipe would be waited for, a device never ends), larger than any of its kind, or
            not in UTF-8.
        OSError: If it is missing or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no file.")
    if (size := path.stat().st_size) > _MAX_TEXT_BYTES:
        raise ValueError(f"{str(path)!r} has {size} bytes; at most {_MAX_TEXT_BYTES} are read.")
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
            f"{str(path)!r} is missing; save the model again with diffusers' `save_pretrained`."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets without end
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Save or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, expected an object of fields.")
    return content


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
    names = _weights_of("", there, variant, fall_back, where=str(folder))
    indices = [name for name in names if name.endswith(".json")]
    if indices:
        return shards_of(folder / indices[0])
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no weights {name!r}. Save or download them again.")
    return [folder / name for name in names]


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index of weights names: safetensors beside it, and nothing else.

    A link is followed, as the cache of the Hub is made of links.

    Raises:
        ValueError: If there are none, or one is missing, lies in another folder, or is no safetensors by its name.
    """
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{str(index)!r} has no `weight_map`. Save or download it again.")
    folder = index.parent
    for name in content.values():
        is_plain = isinstance(name, str) and re.fullmatch(r"[^/\\\x00]+\.safetensors", name) is not None
        if not is_plain:
            raise ValueError(
                f"{str(index)!r} names {str(name)[:100]!r} for weights, and only safetensors beside it are read. Save "
                "or download them again."
            )
        if len(name) > 255 or not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no weights {name[:100]!r}. Save or download them again.")
    return [folder / name for name in sorted(set(content.values()))]


def refuse_other_than_safetensors(files: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse weights that are no safetensors by their names, before one of them is opened.

    Raises:
        PickledWeightsError: If there are any.
    """
    if others := [os.path.basename(name) for name in files if not str(name).endswith(".safetensors")]:
        raise PickledWeightsError(
            f"Weights are read from safetensors alone, and pickles never unpickled, as they can run any code; got "
            f"{', '.join(sorted(others)[:4])}. Save the model again with `save_pretrained`, which writes safetensors."
        )


def check_parts(folder: Path, wanted: Iterable[str]) -> None:
    """Refuse a pipeline that lacks a part which its `model_index.json` lists: without it, it is another model.

    Args:
        folder: The pipeline; one without that file may hold what it likes.
        wanted: The parts that are needed, where they are listed.

    Raises:
        ValueError: If one is missing.
    """
    if not (folder / MODEL_INDEX).is_file():
        return
    index = read_json(folder / MODEL_INDEX)
    listed = [part for part in wanted if _is_listed(index, part)]
    missing = [part for part in listed if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        is_text = all(part.startswith(("text_encoder", "tokenizer")) for part in missing)
        instead = "pass `prompt_embeds=`, the empty prompt's embeddings by name" if is_text else ""
        instead = instead or "if it was left out of a folder of your own on purpose, write [null, null] for it there"
        raise ValueError(
            f"{str(folder)!r} lacks {', '.join(f'{part}/' for part in missing)}, which its {MODEL_INDEX} lists. "
            f"Download or copy the whole pipeline, or {instead}."
        )


def tensor_bytes(files: Iterable[Path]) -> dict[str, int]:
    """Return the size in bytes of each tensor of some safetensors, of whatever dtype, by name.

    A file that cannot be read counts nothing.
    """
    sizes: dict[str, int] = {}
    for path in files:
        try:
            with path.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if length > _MAX_HEADER_BYTES:
                    raise ValueError(f"its header has {length} bytes")
                header = json.loads(opened.read(length))
            found = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            for name, (start, end) in found.items():
                if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start <= end < 2**63:
                    raise ValueError(f"{name} lies nowhere")
            sizes |= {name: end - start for name, (start, end) in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, RecursionError):
            logger.warning("The size of %s is unknown: it is no safetensors file.", path.name)
    return sizes


def refuse_other_than_weights(name: str, dtype: str | torch.dtype) -> None:
    """Refuse a tensor that cannot be a weight as it is: integers and 8-bit numbers want a scale that is elsewhere.

    Raises:
        ValueError: If `dtype`, torch's or the name that safetensors has for it, is none of `WEIGHT_DTYPES`.
    """
    if dtype not in WEIGHT_DTYPES and dtype not in WEIGHT_DTYPES.values():
        raise ValueError(
            f"The weight {name!r} is in {dtype}, expected float32, bfloat16, float16 or float64. Quantized weights "
            "are loaded where their `quantization_config` stands in the configuration."
        )


def iterate_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor of some safetensors, one after the other.

    A value is a part of the mapped file. A file is mapped anew every `_MAPPED_BYTES`, so that what was read before
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
            raise ValueError(
                f"{str(path)!r} is truncated or no safetensors file ({error}). Save or download it again."
            ) from error


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles: unpickling runs whatever code they hold.

    Raises:
        PickledWeightsError: If it is one.
    """
    if folder.is_dir():
        refuse_pickled_names(str(folder), [path.name for path in folder.iterdir()])


def refuse_pickled_names(where: str, names: Iterable[str]) -> None:
    """Refuse files whose only weights are pickles; see `refuse_pickles`.

    Raises:
        PickledWeightsError: If they are.
    """
    names = list(names)
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if any("model" in name for name in pickles) and not any(name.endswith(".safetensors") for name in names):
        raise PickledWeightsError(
            f"{where!r} has only pickled weights ({', '.join(pickles)}), which are never unpickled, as "
            "they can run any code. If you trust them, load the pipeline with diffusers and save it again, which "
            "writes safetensors: `DiffusionPipeline.from_pretrained(source).save_pretrained(folder)`."
        )
