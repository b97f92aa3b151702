"""Folders that appear whole or not at all, and files that take the place of others when all of them are written."""

import errno
import glob
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


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

    A process that is killed leaves a hidden `.NAME.incomplete-...` behind, which the next one removes.

    Args:
        target: The folder to write; see `checked_output`.

    Raises:
        FileExistsError: If somebody else wrote it meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target.parent, f".{target.name}.incomplete")
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


@contextmanager
def whole_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder in a folder; its files take the place of those there when all went well, else they go.

    A disk that is full, an error or a signal while they are written leaves what was there before. Only between the
    renames, which take no time, can a process that is killed leave some of both.

    Args:
        folder: The folder to write into, made if it is missing; its other files stay.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target, ".incomplete")
    try:
        yield unfinished
        for path in sorted(unfinished.iterdir()):
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(parent: Path, stem: str) -> Path:
    """Make a hidden folder with a name that tells whose it is, and remove those of processes that were killed."""
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())
    for path in parent.glob(f"{glob.escape(stem)}-{host}-*"):
        process = path.name.removeprefix(f"{stem}-{host}-").partition("-")[0]
        if process.isdigit() and int(process) != os.getpid() and not _is_running(int(process)):
            logger.warning("Removing %s, which a process that was killed left unfinished.", path)
            shutil.rmtree(path, ignore_errors=True)
    # A name of its own: somebody else may be writing the same, and a folder of a fixed name may be somebody's.
    unfinished = parent / f"{stem}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    return unfinished


def _is_running(process: int) -> bool:
    """Return whether there is a process of a number on this machine."""
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
