"""The dataset that `cache_features` returns: `datasets`' own, read faster, with a card that says what it is of."""

import json
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from huggingface_hub import DatasetCard, HfApi
from torch import Tensor

from .cache_origin import DESCRIPTION

# Rows from this size on are copied one by one: a batch of them would be an allocation that the system hands out again,
# page by page, each time.
LARGE_ROW_BYTES = 2**14


@dataclass(frozen=True)
class _Column:
    """A column of numbers: the values of each piece of a table, where they lie (memory-mapped, as a rule).

    Args:
        pieces: Arrays (rows, ...), one after the other.
        tensors: The same, not to be written to.
        starts: First row of each.
    """

    pieces: list[np.ndarray]
    tensors: list[Tensor]
    starts: list[int]

    @classmethod
    def of(cls, chunks: Any, shape: tuple[int, ...]) -> "_Column | None":
        """Return the column, None where it is not whole rows of numbers."""
        pieces, starts, row = [], [], 0
        for chunk in chunks:
            values = getattr(chunk, "storage", chunk)
            num_nulls = values.null_count
            for _ in shape:
                values = values.flatten()
                num_nulls += values.null_count
            if num_nulls or len(values) != len(chunk) * int(np.prod(shape)):
                return None
            pieces.append(values.to_numpy(zero_copy_only=False).reshape(len(chunk), *shape))
            starts.append(row)
            row += len(chunk)
        if not shape and pieces:  # so little that it may as well lie in memory
            pieces, starts = [np.concatenate(pieces)], [0]
        with warnings.catch_warnings():  # that they cannot be written to
            warnings.simplefilter("ignore", UserWarning)
            return cls(pieces, [torch.from_numpy(piece) for piece in pieces], starts) if pieces else None

    def rows(self, keys: list[int]) -> Sequence[Tensor]:
        """Return some rows in the types in which `datasets` returns tensors."""
        first = self.tensors[0]
        dtype = torch.bool if first.dtype == torch.bool else torch.float32 if first.is_floating_point() else torch.long
        if first.ndim == 1:
            return first[keys].to(dtype).unbind()
        in_pieces = (np.searchsorted(self.starts, keys, "right") - 1).tolist()
        places = [(piece, key - self.starts[piece]) for key, piece in zip(keys, in_pieces, strict=True)]
        if first[0].nbytes >= LARGE_ROW_BYTES:
            return [self.tensors[piece][row].to(dtype, copy=True) for piece, row in places]
        found = np.empty((len(keys), *first.shape[1:]), self.pieces[0].dtype)
        for index, (piece, row) in enumerate(places):
            found[index] = self.pieces[piece][row]
        return torch.from_numpy(found).to(dtype).unbind()


def _shape(kind: Any) -> tuple[int, ...] | None:
    """Return the shape of a column's rows, None where they are not numbers."""
    if isinstance(kind, ClassLabel):
        return ()
    if isinstance(kind, Value):
        is_number = kind.dtype == "bool" or kind.dtype.startswith(("int", "uint", "float"))
        return () if is_number else None
    if isinstance(getattr(kind, "shape", None), tuple):
        return kind.shape if None not in kind.shape else None
    length, inner = getattr(kind, "length", -1), getattr(kind, "feature", None)
    return (length,) if length > 0 and isinstance(inner, Value) and _shape(inner) == () else None


# By the dataset, and not in it: `datasets` copies what is in one with all that it holds.
_known: weakref.WeakKeyDictionary[Any, tuple[Any, list[str], dict[str, _Column]]] = weakref.WeakKeyDictionary()


def _plain_columns(dataset: Any) -> dict[str, _Column]:
    """Return the columns of a dataset in torch format if all are numbers and in their order, else none."""
    form = dataset.format
    is_plain = form["type"] == "torch" and not form["format_kwargs"] and not form["output_all_columns"]
    if dataset._indices is not None or not is_plain:
        return {}
    table, names = dataset.data.table, list(form["columns"])
    known = _known.get(dataset)
    if known is None or known[0] is not table or known[1] != names:
        shapes = {name: _shape(dataset.features[name]) for name in names}
        columns = {
            name: column
            for name, shape in shapes.items()
            if shape is not None and (column := _Column.of(table.column(name).chunks, shape))
        }
        known = _known[dataset] = table, names, columns if len(columns) == len(names) else {}
    return known[2]


class CachedFeatures(Dataset):  # type: ignore[misc]
    """Features of images. Pushed to the Hub they have a card that says what they were made from."""

    @classmethod
    def of(cls, dataset: Dataset) -> "CachedFeatures":
        """Return a finished cache in torch format."""
        cached = cls(
            dataset.data,
            info=dataset.info,
            split=dataset.split,
            indices_table=dataset._indices,
            fingerprint=dataset._fingerprint,
        )
        cached.set_format("torch")
        return cached

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, as a `DataLoader` asks for them.

        The same as `datasets` returns. Numbers are taken where they lie; it would make a tensor of each row.
        """
        columns = _plain_columns(self)
        if not columns or not keys or min(keys) < 0 or max(keys) >= len(self):
            rows: list[dict[str, Any]] = super().__getitems__(keys)
            return rows
        values = [column.rows(keys) for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload as `datasets.Dataset.push_to_hub` does, then the card, with the fingerprint; see there."""
        commit: Any = super().push_to_hub(repo_id, *args, **kwargs)
        if not self.info.description.startswith(DESCRIPTION):
            # Made of several, or of others: what it says would not hold for all.
            return commit
        revision = commit.pr_revision or kwargs.get("revision")
        api = HfApi(token=kwargs.get("token"))
        where = {"repo_id": commit.repo_url.repo_id, "repo_type": "dataset", "revision": revision}
        path = api.hf_hub_download(filename="README.md", **where)
        card = _dataset_card(Path(path).read_text(encoding="utf-8"), repo_id, self.info.description)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **where)
        return commit


def _dataset_card(text: str, repo_id: str, description: str) -> str:
    """Return the card that `datasets` wrote, with what the features were made from."""
    card: Any = DatasetCard(text)
    card.data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), "hf_aselect", "a-select"]))
    fingerprint = json.loads(description.removeprefix(DESCRIPTION))
    lines = [f"# {repo_id.rpartition('/')[2]}", DESCRIPTION, "", "```python", "from datasets import load_dataset", ""]
    lines += [f'features = load_dataset("{repo_id}", split="train").with_format("torch")', "```", ""]
    lines += ["Only a model with this fingerprint can use them. Another timestep, tap, noise, size or set of"]
    lines += ["weights gives other features.", "", "```json", json.dumps(fingerprint, indent=1, sort_keys=True), "```"]
    card.text = "\n" + "\n".join(lines) + "\n"
    return str(card)
