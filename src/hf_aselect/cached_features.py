"""The dataset that `cache_features` returns: what `datasets` has, and a card that says what it was made from."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, HfApi

DESCRIPTION = "Features of pictures, cached by hf_aselect. "


@cache
def cached_features_class() -> type:
    """Return the class of what `cache_features` returns; made late, as `datasets` is imported late."""
    from datasets import Dataset

    class CachedFeatures(Dataset):  # type: ignore[misc]
        """Features of pictures. Pushed to the Hub they have a card that says what they were made from."""

        def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's
            """Upload as `datasets.Dataset.push_to_hub` does, then the card, with the fingerprint; see there."""
            commit: Any = super().push_to_hub(repo_id, *args, **kwargs)
            if not self.info.description.startswith(DESCRIPTION):
                return commit  # made of several, or of others: what it says would not hold for all
            revision = commit.pr_revision or kwargs.get("revision")
            api = HfApi(token=kwargs.get("token"))
            where = {"repo_id": commit.repo_url.repo_id, "repo_type": "dataset", "revision": revision}
            path = api.hf_hub_download(filename="README.md", **where)
            card = _dataset_card(Path(path).read_text(encoding="utf-8"), repo_id, self.info.description)
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **where)
            return commit

    # As if it stood in this module: other processes find it by its name.
    CachedFeatures.__qualname__ = "CachedFeatures"
    return CachedFeatures


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    if name == "CachedFeatures":
        return cached_features_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _dataset_card(text: str, repo_id: str, description: str) -> str:
    """Return the card that `datasets` wrote, with what the features were made from."""
    card: Any = DatasetCard(text)
    card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), "hf_aselect", "a-select"]))
    fingerprint = json.loads(description.removeprefix(DESCRIPTION))
    lines = [f"# {repo_id.rpartition('/')[2]}", DESCRIPTION, "", "```python", "from datasets import load_dataset", ""]
    lines += [f'features = load_dataset("{repo_id}", split="train").with_format("torch")', "```", ""]
    lines += ["They are of use to a model with this fingerprint alone: another timestep, tap, noise, size or other"]
    lines += ["weights give other features.", "", "```json", json.dumps(fingerprint, indent=1, sort_keys=True), "```"]
    card.text = "\n" + "\n".join(lines) + "\n"
    return str(card)
