"""Rows of a training set, looked at before the training begins."""

import random
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..images.rows import is_stream


def first_rows(dataset: Any, num: int) -> list[Any]:
    """Return the first rows of a stream; of a training set of known size some from all over, as it may be sorted.

    Processes may each have a stream of their own: all get the rows of the first. No random state is touched.
    """
    # Devices draw nothing here, and torch warns of forking those of several.
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        rows = _rows_of_stream(dataset, num) if is_stream(dataset) else _spread_rows(dataset, num)
        random.setstate(states[0])
        np.random.set_state(states[1])
    return rows


def label_of(row: Any) -> Any:
    """Return the label of a row by one of the names that Trainer knows.

    Raises:
        ValueError: If it has none.
    """
    for name in ("labels", "label", "label_ids"):
        if name in row:
            value = row[name]
            return value.tolist() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
    raise ValueError(f"The criterion needs labels, but the training set has none, only {', '.join(row)}.")


def _spread_rows(dataset: Any, num: int) -> list[Any]:
    return [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // num))[:num]]


def _rows_of_stream(dataset: Any, num: int) -> list[Any]:
    """Return the first rows of the first process's stream, in all processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(islice(iter(dataset), num))
    rows: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            rows = [list(islice(iter(dataset), num))]
        # The others wait for it.
        except Exception as error:
            rows = [error]
    distributed.broadcast_object_list(rows)
    if isinstance(rows[0], Exception):
        raise rows[0]
    found: list[Any] = rows[0]
    return found
