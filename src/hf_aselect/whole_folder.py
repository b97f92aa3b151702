"""Folders that appear whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def checked_output(output: str | os.PathLike[str]) -> Path:
    """Return the folder to write, with links followed; refuse one that holds something or cannot be replaced.

    Raises:
        FileExistsError: If it exists and is not empty, is the current folder or a mount point, or lies in a file.
    """
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(output)!r} exists and is not empty; name another folder, or remove it.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise FileExistsError(f"{str(output)!r} cannot be made: {str(above)!r} is a file.")
    if target == Path.cwd() or os.path.ismount(target):
        raise FileExistsError(
            f"{str(output)!r} is the current folder or a mount point, which cannot be replaced at once by a finished "
            "one; name a folder in it."
        )
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside a folder; it becomes that folder when all went well, else it goes.

    A process that is killed leaves a hidden `.NAME.incomplete-...` behind.

    Args:
        target: The folder to write; see `checked_output`.

    Raises:
        FileExistsError: If somebody else wrote it meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: somebody else may be writing the same, and a folder of a fixed name may be somebody's.
    unfinished = target.with_name(f".{target.name}.incomplete-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            os.replace(unfinished, target)  # an empty folder of that name goes
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            message = f"{str(target)!r} was written by somebody else meanwhile, and is left alone."
            raise FileExistsError(message) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
