"""A diffusers checkpoint found in a folder, or fetched from the Hub as far as it is needed."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

from ..model.checks import PickledWeightsError, read_json
from ..model.vae import VAE_KINDS
from .research import research_in
from .weight_files import CONFIG, MODEL_INDEX, PICKLES, is_listed, refuse_pickles, transformer_part, weights_of

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# What remains to be said where there are files of weights that nothing describes.
PICKLES_OF_RESEARCH = (
    "To use weights of the DiT, SiT or REPA research code, convert the file: hf-aselect convert FILE OUTPUT "
    "--layout dit|sit|repa."
)
# What the client raises where it gets no answer: `HTTPError` of the HTTP library that its version uses.
_NO_ANSWER: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True)
class HubOptions:
    """How files are fetched from the Hub; what each means is `huggingface_hub.snapshot_download`'s.

    Args:
        revision: Branch, tag or commit.
        subfolder: Folder in the repository, or in the local folder, that holds the checkpoint.
        token: Token of the user, or whether to take the one that is logged in.
        cache_dir: Folder of downloads.
        local_files_only: Whether to use only downloaded files and not contact the Hub.
        force_download: Whether to download files again that are in the cache.
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
    text_parts: Callable[[dict[str, Any], str | None], Iterable[str]],
) -> Path | None:
    """Return the folder of a diffusers checkpoint, fetched from the Hub if need be; None for an hf_aselect checkpoint.

    Args:
        source: Local folder, or id on the Hub.
        model_type: What the `config.json` of an hf_aselect checkpoint names as its `model_type`.
        options: How to fetch.
        text_parts: Which folders of a pipeline that encode a text are to be fetched, by the configuration of its
            transformer and the name of the pipeline's class, None of a bare transformer; raises `ValueError` for a
            transformer that is not supported. Asked before any weights are fetched.

    Raises:
        ValueError: If a local folder is neither; if the only weights are pickles or of another variant; if the
            repository holds another model.
        OSError: If a repository, revision or file is not found, may not be read, or the Hub cannot be reached; the
            message says what to do.
    """
    folder = Path(source, options.subfolder or "")
    if folder.is_dir():
        return folder if _is_diffusers(folder, source, model_type, options.variant) else None
    if os.path.isdir(source):
        raise ValueError(f"{str(source)!r} has no folder {options.subfolder!r}. Check `subfolder`.")
    if os.path.exists(source):
        raise ValueError(f"{str(source)!r} is a file. Pass a folder or an id on the Hub.")
    with explained_hub_errors(source, options):
        return _fetch(str(source), model_type, options, text_parts)


@contextmanager
def explained_hub_errors(source: str | os.PathLike[str], options: HubOptions) -> Iterator[None]:
    """Say of what goes wrong with an id on the Hub what to do.

    Raises:
        OSError: In place of the errors of the client.
    """
    nothing = f"{str(source)!r} is neither a local folder nor an id on the Hub (such as 'owner/name')."
    if re.match(r"[/.~]|\w:", str(source)):
        raise OSError(nothing)
    try:
        yield
    except HFValidationError as error:
        raise OSError(nothing) from error
    except GatedRepoError as error:
        raise OSError(
            f"{str(source)!r} is gated. Accept its conditions at https://huggingface.co/{source}, then log in with "
            "`hf auth login` or pass `token=`."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{str(source)!r} has no revision {options.revision!r} on the Hub. Check `revision`.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{str(source)!r} is neither a local folder nor a repository on the Hub that you can access. Check the "
            "name, and for a private repository log in with `hf auth login` or pass `token=`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        revision = f" --revision {options.revision}" if options.revision else ""
        raise OSError(
            f"{str(source)!r} is neither a local folder nor in the cache, and the Hub cannot be reached (or "
            f"`local_files_only` or `HF_HUB_OFFLINE` is set). Run `hf download {source}{revision}` with a network "
            "connection, or pass a local checkpoint folder."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"{str(source)!r} could not be downloaded from the Hub: {error}") from error


def locate_vae(source: str | os.PathLike[str], options: HubOptions) -> Path:
    """Return the folder of a VAE that diffusers saved, alone or as `vae/` of a pipeline, fetched if need be.

    Args:
        source: Local folder, or id on the Hub.
        options: How to fetch.

    Raises:
        ValueError: If a folder holds no VAE.
        OSError: If a repository is not found or may not be read, or the Hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_file():
        raise ValueError(
            f"`vae` must be a folder saved by diffusers or an id on the Hub, got the file {str(source)!r}."
        )
    if not folder.is_dir():
        with explained_hub_errors(source, options):
            folder = Path(
                snapshot_download(str(source), allow_patterns=_vae_files(source, options), **options.of_a_download())
            )
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("_class_name") not in VAE_KINDS:
        raise ValueError(
            f"{str(source)!r} has no supported VAE: `_class_name` in {CONFIG} or vae/{CONFIG} must be "
            f"{' or '.join(VAE_KINDS)}, got {config.get('_class_name')!r}."
        )
    return folder


def named_vae(fields: dict[str, Any], options: HubOptions) -> Path | None:
    """Return the folder of the VAE that the fields of a configuration name, and take the name out; None without one.

    Args:
        fields: The fields, of which `vae` may be a folder or an id on the Hub.
        options: How to fetch, but for the revision.

    Raises:
        ValueError: As `locate_vae`.
        OSError: As `locate_vae`.
    """
    if not isinstance(fields.get("vae"), str | os.PathLike):
        return None
    return locate_vae(fields.pop("vae"), replace(options, revision=None, subfolder=None))


def _vae_files(source: str | os.PathLike[str], options: HubOptions) -> list[str] | None:
    """Return the files of a repository that are needed of its VAE; None where the cache has to do.

    Raises:
        ValueError: If it has no weights as safetensors.
    """
    # The cache alone knows nothing of what the Hub would say.
    files = [] if options.local_files_only or constants.HF_HUB_OFFLINE else _files_of(str(source), options)
    if not files:
        return None
    part = "vae" if f"vae/{CONFIG}" in files else ""
    config = f"{part}/{CONFIG}" if part else CONFIG
    inside = [file for file in files if os.path.dirname(file) == part]
    # Whatever it is, its configuration says.
    has_weights = any(file.endswith((".safetensors", *PICKLES)) for file in inside)
    return [config, *(weights_of(part, inside, options.variant, fall_back=True) if has_weights else [])]


def _is_diffusers(folder: Path, source: str | os.PathLike[str], model_type: str, variant: str | None) -> bool:
    """Return whether a local folder holds a transformer of diffusers, rather than an hf_aselect checkpoint."""
    if any((folder / part).is_dir() for part in ("transformer", "transformer_2")):
        return True  # what else lies beside it is nobody's weights
    refuse_pickles(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        return True
    if config.get("model_type") == model_type:
        return False
    if research_in(folder, variant) is not None:
        return True
    raise ValueError(
        f"{str(source)!r} is not a supported checkpoint: expected an hf_aselect checkpoint ({CONFIG} with model_type "
        f"{model_type!r}), a folder with transformer/ and scheduler/, or a diffusers transformer ({CONFIG} with "
        f"`_class_name`), found {sorted(path.name for path in folder.iterdir())[:10]}. "
        f"{PICKLES_OF_RESEARCH if any(path.suffix in PICKLES for path in folder.iterdir()) else ''}".rstrip()
    )


def _fetch(
    repo_id: str,
    model_type: str,
    options: HubOptions,
    text_parts: Callable[[dict[str, Any], str | None], Iterable[str]],
) -> Path | None:
    """Return the folder of a diffusers checkpoint of the Hub, with the needed files; None for one of hf_aselect."""
    prefix = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    path, found, options = _fetch_entry(repo_id, prefix, model_type, options)
    if "_class_name" not in found:
        return None
    transformer, index = found, None
    if path.name == MODEL_INDEX:
        transformer, index = _fetch_transformer_config(repo_id, prefix, found, options), found
    wanted_text = tuple(text_parts(transformer, None if index is None else index["_class_name"]))
    # The cache alone knows nothing of what the Hub would say: a file that is not in it may be there.
    is_offline = options.local_files_only or constants.HF_HUB_OFFLINE
    files = [] if is_offline else _files_of(repo_id, options)
    if not files:
        return path.parent
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    try:
        needed = needed_files(inside, index, options.variant, wanted_text)
    except PickledWeightsError as error:
        raise ValueError(f"{error}{_safetensors_elsewhere(repo_id, options)}") from error
    logger.info("Downloading %d of the %d files of %s.", len(needed), len(files), repo_id)
    # The cards say the licence.
    wanted = [*(prefix + file for file in needed), f"{prefix}README.md", "README.md"]
    return Path(snapshot_download(repo_id, allow_patterns=wanted, **options.of_a_download())) / prefix


def _fetch_entry(
    repo_id: str, prefix: str, model_type: str, options: HubOptions
) -> tuple[Path, dict[str, Any], HubOptions]:
    """Fetch the file that says what a repository holds: the index of a pipeline, or the configuration of a model.

    Returns:
        Its path, what it says, and how to fetch the rest: a Hub that did not answer is not waited for a second time.

    Raises:
        ValueError: If there is no such file, or it is of a model that cannot be loaded.
    """
    for name in (MODEL_INDEX, CONFIG, ADAPTER_CONFIG):
        try:
            path = Path(hf_hub_download(repo_id, prefix + name, **options.of_a_download()))
        except LocalEntryNotFoundError:
            if name == ADAPTER_CONFIG:
                raise
            options = replace(options, local_files_only=True)
            continue
        except EntryNotFoundError:
            continue
        found = read_json(path)
        if "_class_name" in found or found.get("model_type") == model_type or name == ADAPTER_CONFIG:
            return path, found, options
        if name == CONFIG:
            raise ValueError(
                f"{repo_id!r} is a checkpoint of {found.get('model_type') or 'another kind'}. Pass an hf_aselect "
                "checkpoint, or a pipeline or transformer of diffusers."
            )
    raise ValueError(
        f"{repo_id!r} has neither {MODEL_INDEX} nor {CONFIG} in {options.subfolder or 'its root folder'}, so it is "
        "not a diffusers checkpoint. Look for a repository whose name ends in '-diffusers', or pass the folder of "
        f"the checkpoint as `subfolder=`. {PICKLES_OF_RESEARCH}"
    )


def _fetch_transformer_config(repo_id: str, prefix: str, index: dict[str, Any], options: HubOptions) -> dict[str, Any]:
    """Return the configuration of a pipeline's transformer.

    Raises:
        ValueError: If the pipeline has none.
    """
    part = transformer_part(index)
    if not is_listed(index, part):
        raise ValueError(
            f"{repo_id!r} is a {index['_class_name']} without a `transformer`. Only diffusion transformers are "
            "supported."
        )
    return read_json(Path(hf_hub_download(repo_id, f"{prefix}{part}/{CONFIG}", **options.of_a_download())))


def _files_of(repo_id: str, options: HubOptions) -> list[str]:
    """Return the paths of all files of a repository; none where the Hub does not answer, and the cache has to do."""
    try:
        return list(HfApi(token=options.token).list_repo_files(repo_id, revision=options.revision))
    except HfHubHTTPError:
        raise
    except (OSError, _NO_ANSWER) as error:
        logger.warning("The Hub cannot be reached (%s). Using the files of %s in the cache.", error, repo_id)
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
    return f" Alternatively, load safetensors from a pull request whose author you trust: {named}."


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
        return [CONFIG, *weights_of("", files, variant)]
    needed = [MODEL_INDEX, *(file for file in files if file.startswith("scheduler/"))]
    transformer = transformer_part(model_index)
    parts = [part for part in (transformer, "vae", *text_parts) if is_listed(model_index, part)]
    for part in parts:
        inside = [file for file in files if file.startswith(f"{part}/")]
        needed += [file for file in inside if ".safetensors" not in file and not file.endswith(PICKLES)]
        if not part.startswith("tokenizer"):
            needed += weights_of(part, inside, variant, fall_back=part != transformer)
    # Notes and weights of other frameworks have no use here; the pickles' index ends as their files do not.
    useless = (".md", ".msgpack", ".h5", ".onnx", ".onnx_data", ".bin.index.json")
    return sorted({file for file in needed if not file.endswith(useless)})
