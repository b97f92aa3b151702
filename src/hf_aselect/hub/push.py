"""The road to the Hub: a saved model, its image processor, its card and its curve, in one commit."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from ..model.configuration_aselect import ASelectConfig
from ..model.modeling_aselect import __file__ as MODELING_FILE
from ..model.modeling_aselect import save_image_processor
from ..selection.record import TimestepSelection
from .card import YOURS, CardFacts, own_words, refuse_unknown_facts, write_card

logger = logging.getLogger(__name__)

PUSH_OPTIONS = (
    *("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"),
)
CURVE, HEAT_MAP = "timestep_curve.png", "timestep_curve_heat_map.png"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# The code of a pushed model.
CODE = tuple(path.name for path in sorted(Path(MODELING_FILE).parent.glob("[!_]*.py")))
# What pushes of 0.1.0's first layout left beside it, one flat package.
# fmt: off
FORMER_CODE = (
    "calibration.py", "card_template.py", "consensus.py", "criteria.py", "decoders.py", "denoiser_dit.py",
    "denoiser_flux.py", "denoiser_lumina2.py", "denoiser_pixart.py", "denoiser_sana.py", "denoiser_sd3.py",
    "diffusers_checkpoint.py", "diffusers_files.py", "empty_prompt.py", "field_checks.py", "folded_layout.py",
    "folded_lumina2.py", "folded_parts.py", "folded_sana.py", "folding.py", "generation.py", "input_checks.py",
    "loading.py", "massive_channels.py", "model_card.py", "plots.py", "probe.py", "publishing.py",
    "selection_record.py", "sharing.py", "spectrum.py", "sweep.py", "taps.py", "timestep_curve.py",
    "timestep_selection.py", "transformer_layout.py", "whole_folder.py",
)
# fmt: on


def save_and_push(
    model: Any, folder: str | os.PathLike[str], *args: Any, include_code: bool | None = None, **kwargs: Any
) -> None:
    """Save a model into a folder and upload that; see its `save_pretrained`."""
    options = (*PUSH_OPTIONS, *CardFacts.__dataclass_fields__)
    given = {name: kwargs.pop(name) for name in options if name in kwargs}
    # First: wrong facts and a wrong token are to be known before gigabytes are written.
    name = given.pop("repo_id", None) or Path(folder).resolve().name
    facts = {name: value for name, value in given.items() if name not in PUSH_OPTIONS}
    CardFacts(**{"model_name": name, **model.card_facts, **facts})
    repo_id = create_repository(name, given.get("token"), given.pop("private", None))
    saved = model._save(folder, *args, include_code=include_code is not False, **kwargs)
    if kwargs.get("is_main_process", True):
        _publish(model, repo_id, folder, saved, **given)


def push_model(model: Any, repo_id: str, private: bool | None, max_shard_size: int | str, **given: Any) -> Any:
    """Upload a model with all that belongs to it as one commit; see its `push_to_hub`.

    Args:
        model: The model.
        repo_id: Repository, made if it is missing.
        private: Whether a new repository is private.
        max_shard_size: Weights beyond this are written as several files.
        given: Its other arguments, and the facts of its card.

    Returns:
        The Hub's `CommitInfo`.
    """
    facts = {name: value for name, value in given.items() if name not in PUSH_OPTIONS}
    refuse_unknown_facts(facts)
    CardFacts(**{"model_name": repo_id, **model.card_facts, **facts})  # before anything is made on the Hub
    repo_id = create_repository(repo_id, given["token"], private)
    with TemporaryDirectory() as folder:
        model._save(folder, max_shard_size=max_shard_size, include_code=True)
        return _publish(model, repo_id, folder, _files_of(folder), **given)


def _publish(
    model: Any,
    repo_id: str,
    folder: str | os.PathLike[str],
    saved: Iterable[str],
    tags: Sequence[str] | str = (),
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **facts: Any,
) -> Any:
    """Write image processor, card and curve beside a saved model, and upload that and what was saved."""
    name = repo_id.rpartition("/")[2]
    known = {**model.card_facts, "model_name": name, "tags": (tags,) if isinstance(tags, str) else tuple(tags)}
    keep_own_words(repo_id, folder, token, revision)
    before = _files_of(folder)
    save_image_processor(model, folder)
    write_model_card(model, folder, **{**known, **facts, "repo_id": repo_id})
    written = [name for name, when in _files_of(folder).items() if before.get(name) != when]
    files = sorted({*saved, *written})
    return upload(repo_id, folder, files, token, revision, create_pr, commit_message, commit_description)


def create_repository(repo_id: str, token: Any, private: bool | None) -> str:
    """Create a repository of the Hub, if there is none, and return its whole id.

    Raises:
        ValueError: If the token cannot be one; it is not said.
    """
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "`token` has characters that no token of the Hub has: a space, perhaps, or the end of a line."
        )
    return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def upload(
    repo_id: str,
    folder: str | os.PathLike[str],
    files: Sequence[str],
    token: Any,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Upload a saved model as one commit, which appears when all of it is there; what it no longer has is deleted.

    Args:
        repo_id: The repository.
        folder: Where the saved model is.
        files: Names of its files; what else lies in the folder is left alone.
        token: Token of the Hub; None or True: the one that is stored.
        revision: Branch, made if it is missing. Default: the main one.
        create_pr: Whether to propose it as a pull request.
        commit_message: What was done. Default: "Upload model".
        commit_description: More on it.

    Returns:
        The Hub's `CommitInfo`.
    """
    api = HfApi(token=token)
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        allow_patterns=list(files),
        ignore_patterns=["*/*"],
        # What an earlier push may have left and this one may not have; no file that is the user's own.
        delete_patterns=[*WEIGHTS, CURVE, HEAT_MAP, *CODE, *FORMER_CODE],
    )


def write_model_card(model: Any, folder: str | os.PathLike[str], **facts: Any) -> None:
    """Write a model's card (README.md) into a folder, with the curve of its timestep's choice where it was chosen.

    Args:
        model: The model, or peft's around it; its configuration tells timestep, tap and selection.
        folder: Folder for the files; made if it is missing.
        facts: Fields of `CardFacts` that the configuration does not tell.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        base, model = next(iter(model.peft_config.values())).base_model_name_or_path, model.get_base_model()
        # The path of a machine is nobody's business.
        facts = {"adapter_of": Path(base).resolve().name if os.path.exists(base) else base, **facts}
        # An adapter is saved without: timestep, tap and classes are part of it, and the card's code reads them.
        os.makedirs(folder, exist_ok=True)
        with TemporaryDirectory(dir=folder) as unfinished:
            model.config.save_pretrained(unfinished)
            os.replace(os.path.join(unfinished, "config.json"), os.path.join(folder, "config.json"))
    write_card_of(model.config, type(model), folder, **facts)


def write_card_of(
    config: ASelectConfig,
    kind: Any,
    folder: str | os.PathLike[str],
    **facts: Any,
) -> None:
    """Do the same by the configuration and the class of a model, whose weights are then not needed."""
    folder = Path(folder)
    known: dict[str, Any] = {
        "model_name": folder.resolve().name,
        "task": kind.task,
        "auto_class": kind._auto_class,
        "timestep": None if config.timestep == "auto" else config.timestep,
        "block": config.block_index(),
        "feature": config.feature,
        "base_model": config.base_model,
        # By definition: that embedding is of no others' weights.
        "base_license": "cc-by-nc-4.0" if config.timestep_embedding == "original" else config.base_license,
        "folded": config.folded or None,
        "has_processor": config.num_channels in (1, 3),
        "needs_diffusers": not config.folded or config.vae is not None,
    }
    record = TimestepSelection.from_dict(config.selection) if config.selection else None
    # After a timestep set by hand the record tells of another one.
    if record is not None and record.is_of(config):
        chosen = record.timesteps.index(record.timestep)
        known |= {
            "criterion": record.criterion,
            "log_snr": record.log_snr[chosen],
            "num_images": record.num_images,
            "pictures": record.pictures,
            "seconds": record.seconds,
            "confidence": record.confidence,
            "stopped_by": record.stopped_by,
            "score": record.scores[chosen],
            "interval": record.intervals[chosen],
            "warnings": record.warnings,
        }
    refuse_unknown_facts(facts)
    told = CardFacts(**{**known, **{name: value for name, value in facts.items() if value is not None}})
    # Only now: what is wrong is said before anything is there.
    folder.mkdir(parents=True, exist_ok=True)
    if "criterion" in known:
        try:
            record.plot(folder / CURVE)  # type: ignore[union-attr]
            told = replace(told, figure=CURVE)
        except ImportError as error:
            logger.warning("The card has no curve: %s", error)
    elif (folder / "README.md").is_file() and f"]({CURVE})" in (folder / "README.md").read_text(encoding="utf-8"):
        for name in (CURVE, HEAT_MAP):  # of the earlier card, and of another choice
            (folder / name).unlink(missing_ok=True)
    write_card(told, folder)


def keep_own_words(
    repo_id: str,
    folder: str | os.PathLike[str],
    token: Any,
    revision: str | None,
) -> None:
    """Put what a reader wrote on the repository's card into that of a folder, unless it has such words already.

    Raises:
        HfHubHTTPError: If the Hub does not answer: what it has would be lost.
    """
    path = Path(folder) / "README.md"
    here = path.read_text(encoding="utf-8") if path.exists() else ""
    if own_words(here):
        return
    for place in dict.fromkeys((revision, None)):  # a new branch begins as the main one is
        try:
            with TemporaryDirectory() as cache:
                found = hf_hub_download(repo_id, "README.md", revision=place, token=token, cache_dir=cache)
                words = own_words(Path(found).read_text(encoding="utf-8"))
        except RevisionNotFoundError:
            continue
        except (EntryNotFoundError, UnicodeDecodeError):
            return
        path.write_text(f"{YOURS}\n{words}", encoding="utf-8")
        return


def _files_of(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the files of a folder, and when each was written; none if there is no folder."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {path.name: path.stat().st_mtime_ns for path in paths if path.is_file()}
