"""The parts of a cache of features on disk: their sizes, who writes which, and the dataset that they make up."""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, DatasetInfo, Features, Value
from tqdm.auto import tqdm

from ..checkpoints.atomic import whole_file
from ..selection.reader import eval_mode
from .cache_origin import DESCRIPTION
from .feature_reader import FeatureReader

logger = logging.getLogger(__name__)
# A killed process loses the part that it was writing, so parts are small. There are enough of them for several
# processes to share.
PART_BYTES, MIN_PARTS, MIN_PART_ROWS, MAX_PART_ROWS = 2**27, 16, 256, 2048
# Of each batch that is written, in bytes.
HEADER_BYTES = 512
# Of a finished cache: it is written last, as it says that all the rest is there.
STATE = "state.json"


class FeatureParts:
    """How a cache is divided into parts, and what their rows hold.

    Args:
        reader: What reads the features.
        kept: Columns that are kept, and their kinds.
        batch_size: Images in one forward pass.
        stored: Dataset that the kept columns come from, without a format; None where they are those of the rows that
            the images are read from.
    """

    def __init__(
        self, reader: FeatureReader, kept: dict[str, Any], batch_size: int, stored: Dataset | None = None
    ) -> None:
        self.reader = reader
        self.stored = stored
        self.kept = kept
        self.batch_size = batch_size
        self.num_rows = len(reader.views)
        shared = max(MIN_PART_ROWS, -(-self.num_rows // MIN_PARTS))
        self.part_rows = max(1, min(PART_BYTES // reader.row_bytes, shared, MAX_PART_ROWS))
        self.num_parts = -(-self.num_rows // self.part_rows)

    @property
    def name(self) -> str:
        """Column of the features."""
        return self.reader.name

    def rows(self, number: int) -> range:
        """Return the rows of a part."""
        return range(number * self.part_rows, min((number + 1) * self.part_rows, self.num_rows))

    def num_rows_of(self, numbers: Sequence[int]) -> int:
        """Return how many rows some parts have together."""
        return sum(len(self.rows(number)) for number in numbers)

    def path(self, folder: Path, number: int) -> Path:
        """Return the path of a part."""
        return folder / part_name(number, self.num_parts)

    def disk_row_bytes(self) -> int:
        """Return how much of a disk a row takes, rounded up: values, places of nested lists, kept columns."""
        shape = self.reader.shape
        nested = [int(np.prod(shape[:depth])) for depth in range(len(shape))] if len(shape) > 1 else []
        table = self.stored.select_columns(list(self.kept)).data if self.stored is not None and self.kept else None
        kept = -(-table.nbytes // max(1, table.num_rows)) if table is not None else 0
        return self.reader.row_bytes + 4 * sum(nested) + kept + -(-HEADER_BYTES // self.batch_size)

    def schema(self) -> Features:
        """Return the columns of the result."""
        features = {self.name: self.reader.kind, **self.kept}
        return Features({**features, "view": Value("int32")} if self.reader.views.num_views > 1 else features)

    def columns(self, rows: Sequence[int]) -> dict[str, Any]:
        """Compute some rows, and return them by column."""
        places = [self.reader.views.index_and_view(row) for row in rows]
        columns: dict[str, Any] = {self.name: list(self.reader.read(rows))}
        if self.stored is None:
            columns |= {name: self.reader.views.values(rows, name) for name in self.kept}
        elif self.kept:
            columns |= self.stored.select_columns(list(self.kept))[[index for index, _ in places]]
        if self.reader.views.num_views > 1:
            columns["view"] = [view for _, view in places]
        return columns


def part_name(number: int, num_parts: int) -> str:
    """Return the name of the file of a part."""
    return f"data-{number:05d}-of-{num_parts:05d}.arrow"


def is_finished(target: Path) -> bool:
    """Return whether a folder holds a finished cache."""
    return (target / STATE).is_file()


def write_parts(parts: FeatureParts, target: Path, fingerprint: dict[str, Any]) -> None:
    """Compute the parts that are missing; the folder appears when it is complete.

    Raises:
        ValueError: If processes differ in what they cache, or as `FeatureReader.read`.
        OSError: If the disk has too little space, or parts are missing in the end.
        RuntimeError: If another process failed.
    """
    processes = _processes()
    _check_agreement(target)
    # One answer for all processes: somebody else may be finishing the same cache.
    if broadcast_object_list([is_finished(target)])[0]:
        return
    unfinished = target.with_name(f"{target.name}.incomplete")
    unfinished.mkdir(parents=True, exist_ok=True)
    missing = _missing_parts(parts, unfinished)
    needed = parts.num_rows_of(missing) * parts.disk_row_bytes()
    _in_step(lambda: _check_space(unfinished, needed))
    mine = missing[processes.process_index :: processes.num_processes]
    with (
        tqdm(
            total=parts.num_rows_of(mine),
            desc=f"Caching {parts.reader.what}, {_size(needed)}",
            unit="image",
            disable=not processes.is_local_main_process,
        ) as bar,
        eval_mode(parts.reader.model),
        torch.no_grad(),
    ):
        _write_shares(parts, missing, unfinished, target, bar)
    finish = partial(_finish, parts, unfinished, target, fingerprint)
    _in_step(lambda: processes.is_main_process and _is_done_by_another(target, finish))


def _processes() -> PartialState:
    """Return accelerate's view of the processes that share the work."""
    # Without an accelerator it joins a group of processes only if `cpu` is True.
    return PartialState(cpu=True) if not torch.accelerator.is_available() else PartialState()


def _check_agreement(target: Path) -> None:
    if len(set(gather_object([target.name]))) > 1:
        raise ValueError(
            "The processes disagree on the dataset or the model, so their caches would not match. Give all "
            "processes the same dataset (a shuffle needs a seed) and the same weights."
        )


def _missing_parts(parts: FeatureParts, unfinished: Path) -> list[int]:
    """Return the parts that are still to be written, the same in all processes."""
    found = [number for number in range(parts.num_parts) if not parts.path(unfinished, number).is_file()]
    missing: list[int] = broadcast_object_list([found])[0]
    if len(missing) < parts.num_parts:
        num_there = parts.num_parts - len(missing)
        logger.info("Resuming in %s: %d of %d parts are already cached.", unfinished, num_there, parts.num_parts)
    return missing


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _check_space(folder: Path, needed: int) -> None:
    """Raise an error before writing more than fits on the disk.

    Raises:
        OSError: If there is too little space.
    """
    free = shutil.disk_usage(folder).free
    # What lies beside the features, labels above all, and the space that other programs need.
    if needed * 1.02 + 2**20 > free:
        raise OSError(
            errno.ENOSPC,
            f"The cache needs {_size(needed)}, but {str(folder)!r} has {_size(free)} left. Pass another `cache_dir`, "
            "or use what='pooled', fewer views, or a smaller `image_size`",
        )


def _write_shares(parts: FeatureParts, missing: list[int], unfinished: Path, target: Path, bar: Any) -> None:
    """Write the missing parts, one a process at a time, unless somebody else finishes the cache meanwhile."""
    processes = _processes()
    # Part by part: one that fails tells the others, and nobody waits longer than a part takes.
    for start in range(0, len(missing), processes.num_processes):
        share = missing[start : start + processes.num_processes][processes.process_index :][:1]
        steps = [partial(_write_part, parts, number, parts.path(unfinished, number), bar) for number in share]
        if _in_step(partial(_is_done_by_another, target, *steps)):
            break


def _in_step(step: Callable[[], bool | None]) -> bool:
    """Run a step in all processes and return whether one of them returned True; where one fails, all do.

    Raises:
        RuntimeError: If the step failed in another process.
    """
    found, failure = False, None
    try:
        found = bool(step())
    # Of any kind: the others must hear of it.
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes = gather_object([(found, text)])
    if failure is not None:
        raise failure
    failures = [text for _, text in outcomes if text is not None]
    if failures:
        raise RuntimeError(
            f"Another process failed ({failures[0]}). Finished parts are kept, so run this again to resume."
        )
    return any(found for found, _ in outcomes)


def _is_done_by_another(target: Path, *steps: Callable[[], None]) -> bool:
    """Run steps; return whether somebody else, who writes the same, gave the folder its name meanwhile."""
    try:
        for step in steps:
            step()
    except FileNotFoundError:
        # It may be about to.
        for _ in range(50):
            if is_finished(target):
                return True
            time.sleep(0.1)
        raise
    return False


def _write_part(parts: FeatureParts, number: int, path: Path, bar: Any) -> None:
    """Write one part; it appears when it is whole."""
    schema = parts.schema()
    with whole_file(path) as unfinished:
        with pa.ipc.new_stream(str(unfinished), schema.arrow_schema) as writer:
            for rows in _batches(parts.rows(number), parts.batch_size):
                table = Dataset.from_dict(parts.columns(rows), features=schema).data.table
                writer.write_table(table.cast(schema.arrow_schema))
                bar.update(len(rows))
        # After a power cut a part that is there must be whole.
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _finish(parts: FeatureParts, unfinished: Path, target: Path, fingerprint: dict[str, Any]) -> None:
    """Write what makes a dataset of the parts, and give the folder its name."""
    _check_parts(parts, unfinished)
    info = DatasetInfo(description=DESCRIPTION + json.dumps(fingerprint, sort_keys=True), features=parts.schema())
    info.write_to_directory(str(unfinished))
    _write_json(unfinished / "fingerprint.json", fingerprint)
    _write_json(unfinished / STATE, _state(parts, target.name[:16]))
    _give_name(unfinished, target)
    # Of processes that were killed.
    for leftover in target.glob(".*"):
        leftover.unlink(missing_ok=True)


def _check_parts(parts: FeatureParts, unfinished: Path) -> None:
    paths = [parts.path(unfinished, number) for number in range(parts.num_parts)]
    missing = [path.name for path in paths if not path.is_file()]
    if not unfinished.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder of the cache was removed", str(unfinished))
    if missing:
        raise OSError(
            f"{len(missing)} of {parts.num_parts} parts are missing in {str(unfinished)!r}, among them {missing[0]}. "
            "All processes must see the same `cache_dir`; run this again to resume"
        )


def _state(parts: FeatureParts, fingerprint: str) -> dict[str, Any]:
    """Return what `datasets.load_from_disk` reads."""
    return {
        "_data_files": [{"filename": part_name(number, parts.num_parts)} for number in range(parts.num_parts)],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def _give_name(unfinished: Path, target: Path) -> None:
    """Rename the folder of a finished cache, unless somebody else finished the same meanwhile: it holds the same.

    Raises:
        OSError: If there is something else of that name.
    """
    try:
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_finished(target):
            raise OSError(
                f"The features are complete in {str(unfinished)!r}, but {str(target)!r} exists and is not a cache. "
                "Remove it, and run this again: the features are not computed again"
            ) from error
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
