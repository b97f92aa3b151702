"""The road to the Hub: a saved model, its image processor, its card and its curve, in one commit."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from ..checkpoints.adapters import grid_of_base
from ..checkpoints.atomic import whole_files
from ..model.configuration_aselect import DIT_XL_2, ASelectConfig
from ..model.modeling_aselect import __file__ as MODELING_FILE
from ..model.modeling_aselect import save_image_processor
from ..selection.distribution import unwrapped
from ..selection.record import TimestepSelection
from .card import YOURS, CardFacts, own_words, refuse_unknown_facts, write_card

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Commit:
    """How a push becomes a commit; each as `push_to_hub` takes it.

    Args:
        token: Token of the Hub; None or True: the one that is stored.
        revision: Branch, made if it is missing. Default: the main one.
        create_pr: Whether to propose it as a pull request.
        commit_message: What was done. Default: "Upload model".
        commit_description: More on it.
    """

    token: bool | str | None = field(default=None, repr=False)
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None


COMMIT_OPTIONS = tuple(each.name for each in fields(Commit))
# What a push takes beside the facts of its card.
PUSH_OPTIONS = ("repo_id", "private", "tags", *COMMIT_OPTIONS)


def save_and_push(
    model: Any, folder: str | os.PathLike[str], *args: Any, include_code: bool | None = None, **kwargs: Any
) -> Any:
    """Save a model into a folder and upload that; see its `save_pretrained`."""
    given = {name: kwargs.pop(name) for name in (*PUSH_OPTIONS, *CardFacts.__dataclass_fields__) if name in kwargs}
    repo_id = given.pop("repo_id", None) or Path(folder).resolve().name
    return _push(model, folder, repo_id, given, *args, include_code=include_code is not False, **kwargs)


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

    Raises:
        ValueError: If a fact is unknown or wrong, or the token cannot be one, before anything is made on the Hub.
    """
    options = (*PUSH_OPTIONS, "max_shard_size")
    refuse_unknown_facts({name: value for name, value in given.items() if name not in PUSH_OPTIONS}, options)
    with TemporaryDirectory() as folder:
        given["private"] = private
        return _push(model, folder, repo_id, given, max_shard_size=max_shard_size, include_code=True)


def _push(
    model: Any, folder: str | os.PathLike[str], repo_id: str, given: dict[str, Any], *args: Any, **saving: Any
) -> Any:
    """Save a model into a folder with image processor, card and curve, and upload what was written.

    Args:
        model: The model.
        folder: The folder; what else lies in it stays where it is.
        repo_id: Repository, made if it is missing.
        given: Options of the push, and facts of the card.
        args: Passed on to the model's `_save`.
        saving: Passed on to it.

    Returns:
        The Hub's `CommitInfo`; None in a process that is not the main one.
    """
    facts = {name: value for name, value in given.items() if name not in PUSH_OPTIONS}
    commit = Commit(**{name: value for name, value in given.items() if name in COMMIT_OPTIONS})
    # First: wrong facts and a wrong token are to be known before gigabytes are written.
    CardFacts(**{"model_name": repo_id, **model.card_facts, **facts})
    repo_id = create_repository(repo_id, commit.token, given.get("private"))
    saved = model._save(folder, *args, **saving)
    if not saving.get("is_main_process", True):
        return None
    keep_own_words(repo_id, folder, commit)
    before = _files_of(folder)
    save_image_processor(model, folder, include_code=saving["include_code"])
    tags = given.get("tags", ())
    known = {"model_name": repo_id.rpartition("/")[2], "tags": (tags,) if isinstance(tags, str) else tuple(tags)}
    write_model_card(model, folder, **{**model.card_facts, **known, **facts, "repo_id": repo_id})
    written = [name for name, when in _files_of(folder).items() if before.get(name) != when]
    return upload(repo_id, folder, sorted({*saved, *written}), commit)


def create_repository(repo_id: str, token: Any, private: bool | None) -> str:
    """Create a repository of the Hub, if there is none, and return its whole id.

    Raises:
        ValueError: If the token cannot be one; it is not said.
    """
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("`token` contains characters that no Hub token has, such as a space or a line break.")
    return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def upload(repo_id: str, folder: str | os.PathLike[str], files: Sequence[str], commit: Commit) -> Any:
    """Upload a saved model as one commit, which appears when all of it is there; what it no longer has is deleted.

    Args:
        repo_id: The repository.
        folder: Where the saved model is.
        files: Names of its files; what else lies in the folder is left alone.
        commit: Where it goes, and what is said of it.

    Returns:
        The Hub's `CommitInfo`.
    """
    api = HfApi(token=commit.token)
    if commit.revision is not None and not commit.revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=commit.revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        revision=commit.revision,
        create_pr=commit.create_pr,
        commit_message=commit.commit_message or "Upload model",
        commit_description=commit.commit_description,
        allow_patterns=list(files),
        ignore_patterns=["*/*"],
        # What an earlier push may have left and this one may not have; no file that is the user's own.
        delete_patterns=[*WEIGHTS, CURVE, HEAT_MAP, *CODE, *FORMER_CODE],
    )


def write_model_card(model: Any, folder: str | os.PathLike[str], **facts: Any) -> None:
    """Write a model's card (README.md) into a folder, with the curve of its timestep's selection, if it has one.

    Args:
        model: The model, or peft's around it; its configuration tells timestep, tap and selection.
        folder: Folder for the files; made if it is missing.
        facts: Fields of `CardFacts` that the configuration does not tell.

    Raises:
        ValueError: If a fact is unknown or wrong.
    """
    model = unwrapped(model, keep_adapters=True)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        base, model = next(iter(model.peft_config.values())).base_model_name_or_path, model.get_base_model()
        # The path of a machine is nobody's business.
        facts = {"adapter_of": Path(base).resolve().name if os.path.exists(base) else base, **facts}
        _write_config(model, base, folder)
    write_card_of(model.config, type(model), folder, **facts)


def _write_config(model: Any, base: str, folder: str | os.PathLike[str]) -> None:
    """Write the configuration beside an adapter, which peft saves without.

    Timestep, tap and classes are part of the adapter, and the card's code reads them. The statistics of a head that
    the adapter brings along come with it: the configuration says what the model under it has.
    """
    config = copy.deepcopy(model.config)
    if any(".modules_to_save." in name and name.endswith("shift") for name, _ in model.named_buffers()):
        config.standardized_grid = grid_of_base(type(config), base)
    with whole_files(folder) as unfinished:
        config.save_pretrained(unfinished)


def write_card_of(config: ASelectConfig, kind: Any, folder: str | os.PathLike[str], **facts: Any) -> None:
    """Do the same by the configuration and the class of a model, whose weights are then not needed.

    Raises:
        ValueError: If a fact is unknown or wrong, before anything is written.
    """
    folder = Path(folder)
    record = TimestepSelection.from_dict(config.selection) if config.selection else None
    # After a timestep set by hand the record tells of another one.
    if record is not None and not record.is_of(config):
        record = None
    known = {"model_name": folder.resolve().name, **_facts_of_model(config, kind), **_facts_of_selection(record)}
    refuse_unknown_facts(facts)
    card = CardFacts(**{**known, **{name: value for name, value in facts.items() if value is not None}})
    folder.mkdir(parents=True, exist_ok=True)
    if record is None:
        _remove_curve(folder)
    elif _draw_curve(record, folder):
        card = replace(card, figure=CURVE)
    write_card(card, folder)


def _facts_of_model(config: ASelectConfig, kind: Any) -> dict[str, Any]:
    """Return the facts that a configuration and the model's class tell."""
    return {
        "task": kind.task,
        "auto_class": kind._auto_class,
        **_facts_of_read_out(config),
        "base_model": config.base_model,
        "base_license": "cc-by-nc-4.0" if _is_of_facebook(config) else config.base_license,
        "folded": config.folded or None,
        "has_processor": config.num_channels in (1, 3),
        "needs_diffusers": not config.folded or config.vae is not None,
    }


def _is_of_facebook(config: ASelectConfig) -> bool:
    """Return whether a configuration is that of the weights of facebookresearch/DiT, which are all of one size."""
    sizes = {name: value for name, value in DIT_XL_2.items() if name != "sample_size"}
    transformer = config.transformer or {}
    is_size = all(transformer.get(name) == value for name, value in sizes.items())
    return is_size and config.timestep_embedding == "original"


def _facts_of_read_out(config: ASelectConfig) -> dict[str, Any]:
    """Return the facts of a configuration's read-out: one timestep, block and feature, or several concatenated."""
    read_outs = config.read_outs()
    timesteps, blocks, features = (list(dict.fromkeys(each)) for each in zip(*read_outs, strict=True))
    known = [] if timesteps == ["auto"] else timesteps
    facts = {"timestep": known, "block": blocks, "feature": features}
    if len(read_outs) == 1:
        return {name: values[0] if values else None for name, values in facts.items()}
    is_product = len(timesteps) * len(blocks) * len(features) == len(read_outs)
    return {**facts, "channels": config.feature_size, "read_out": None if is_product else read_outs}


def _facts_of_selection(record: TimestepSelection | None) -> dict[str, Any]:
    """Return the facts in the record of a selection; none if there is no record."""
    if record is None:
        return {}
    selected = record.timesteps.index(record.timestep)
    names = ("criterion", "num_images", "pictures", "seconds", "confidence", "stopped_by", "warnings", "joint_scores")
    return {
        **{name: getattr(record, name) for name in names},
        "log_snr": record.log_snr[selected],
        "score": record.scores[selected],
        "interval": record.intervals[selected],
    }


def _draw_curve(record: TimestepSelection, folder: Path) -> bool:
    """Draw the curve of a selection beside its card; return whether it could be drawn."""
    try:
        record.plot(folder / CURVE)
    except ImportError as error:
        logger.warning("The card has no curve: %s", error)
        return False
    return True


def _remove_curve(folder: Path) -> None:
    """Remove the curve that an earlier card shows, of a selection that no longer holds."""
    card = folder / "README.md"
    if card.is_file() and f"]({CURVE})" in card.read_text(encoding="utf-8"):
        for name in (CURVE, HEAT_MAP):
            (folder / name).unlink(missing_ok=True)


def keep_own_words(repo_id: str, folder: str | os.PathLike[str], commit: Commit) -> None:
    """Put what a reader wrote on the repository's card into that of a folder, unless it has such words already.

    Raises:
        HfHubHTTPError: If the Hub does not answer, because its text would be lost.
    """
    path = Path(folder) / "README.md"
    here = path.read_text(encoding="utf-8") if path.exists() else ""
    if own_words(here):
        return
    # A new branch begins as the main one is.
    for place in dict.fromkeys((commit.revision, None)):
        try:
            with TemporaryDirectory() as cache:
                found = hf_hub_download(repo_id, "README.md", revision=place, token=commit.token, cache_dir=cache)
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
