"""How a model is saved and pushed: as whole folders and whole commits, with what strangers need beside the weights."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from .configuration_aselect import ASelectConfig
from .model_card import CardFacts, refuse_unknown_facts
from .publishing import create_repository, keep_own_words, upload, write_for_strangers
from .selection_record import TimestepSelection
from .whole_folder import whole_files

PUSH_OPTIONS = (
    *("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"),
)
OWN_WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


class ShareableModel(PreTrainedModel):
    """A model that is saved with its code and the choice of its timestep, and pushed with its card."""

    config: ASelectConfig
    # Fields of `CardFacts` that a training found out.
    card_facts: Mapping[str, Any] = MappingProxyType({})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save configuration, weights and the code of the model, as the host does.

        The code lets the folder be loaded where this package is not installed, with `trust_remote_code=True`. The
        record of a choice that is not in use is left out. What lies in the folder is replaced when all is written: a
        full disk or an interruption leaves what was there.

        Args:
            save_directory: Folder to write.
            args: Passed on to the host.
            push_to_hub: Whether to upload the folder, too, with image processor, card and curve, as `push_to_hub`
                does, whose arguments can be given; `repo_id` is by default the name of the folder.
            kwargs: Passed on to the host.
        """
        options = (*PUSH_OPTIONS, *CardFacts.__dataclass_fields__)
        given = {name: kwargs.pop(name) for name in options if name in kwargs} if push_to_hub else {}
        if push_to_hub:
            # First: wrong facts and a wrong token are to be known before gigabytes are written.
            name = given.pop("repo_id", None) or Path(save_directory).resolve().name
            facts = {name: value for name, value in given.items() if name not in PUSH_OPTIONS}
            CardFacts(**{"model_name": name, **self.card_facts, **facts})
            repo_id = create_repository(name, given.get("token"), given.pop("private", None))
        config = self.config
        record = config.selection
        if not self._is_selection_in_use():
            config.selection = None
        # What it was loaded from may have been of another class, whose code is not in this folder.
        config.auto_map = {}
        try:
            if os.path.isfile(save_directory):  # of which the host says what is wrong
                super().save_pretrained(save_directory, *args, **kwargs)
            else:
                # Weights of an earlier save in more shards, or fewer, go, as the host has it.
                with whole_files(save_directory, None if kwargs.get("variant") else OWN_WEIGHTS) as unfinished:
                    super().save_pretrained(unfinished, *args, **kwargs)
                    saved = [path.name for path in unfinished.iterdir()]
        finally:
            config.selection = record
        if push_to_hub and kwargs.get("is_main_process", True):
            self._publish(repo_id, save_directory, saved, **given)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] | str = (),
        **facts: Any,
    ) -> Any:
        """Upload configuration, weights, code, image processor, card and curve as one commit.

        It appears when all of it is there: an upload that is interrupted leaves what was there before. What an earlier
        push left and this model does not have (weights in more shards, say) is deleted by the same commit.

        Args:
            repo_id: Repository, made if it is missing.
            commit_message: What was done. Default: "Upload model".
            commit_description: More on it.
            private: Whether a new repository is private.
            token: Token of the Hub. Default: the one that is stored.
            revision: Branch, made if it is missing.
            create_pr: Whether to propose it as a pull request.
            max_shard_size: Weights beyond this are written as several files.
            tags: Further tags of the card.
            facts: Fields of `CardFacts` that the model does not know: `dataset=`, `accuracy=`, `license=`, ...; those
                of a training by `ASelectCallback` are known.

        Returns:
            The Hub's `CommitInfo`.

        Raises:
            HfHubHTTPError: If the Hub refuses: a wrong token, no right to write, a name that is none.
            ValueError: If a fact is unknown or of no such kind, before anything is made on the Hub.
        """
        refuse_unknown_facts(facts)
        CardFacts(**{"model_name": repo_id, **self.card_facts, **facts})  # before anything is made on the Hub
        repo_id = create_repository(repo_id, token, private)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self._publish(
                repo_id,
                folder,
                _files_of(folder),
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
                **facts,
            )

    def _publish(
        self,
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
        """Write what strangers need beside a saved model, and upload that and what was saved."""
        name = repo_id.rpartition("/")[2]
        known = {**self.card_facts, "model_name": name, "tags": (tags,) if isinstance(tags, str) else tuple(tags)}
        keep_own_words(repo_id, folder, token, revision)
        before = _files_of(folder)
        write_for_strangers(self, folder, **{**known, **facts, "repo_id": repo_id})
        written = [name for name, when in _files_of(folder).items() if before.get(name) != when]
        files = sorted({*saved, *written})
        return upload(repo_id, folder, files, token, revision, create_pr, commit_message, commit_description)

    def _is_selection_in_use(self) -> bool:
        """Return whether the record of a choice, if any, is of the timestep and tap that are read."""
        record = self.config.selection
        return record is None or TimestepSelection.from_dict(record).is_of(self.config)


def _files_of(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the files of a folder, and when each was written; none if there is no folder."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {path.name: path.stat().st_mtime_ns for path in paths if path.is_file()}
