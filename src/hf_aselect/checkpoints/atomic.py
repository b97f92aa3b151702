"""Folders that appear whole or not at all, and files that take the place of others when all of them are written."""

import errno
import filecmp
import glob
import json
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
STEM = ".incomplete"  # of a hidden folder of files
NOTE = ".complete"  # in it when all is written: the names of files that are to go


def checked_output(output: str | os.PathLike[str]) -> Path:
    """Return the folder to write, with links followed; reject one that holds something or cannot be replaced.

    Raises:
        FileExistsError: If it exists and is not empty, is the current folder or a mount point, or lies in a file.
    """
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(output)!r} exists and is not empty. Pass another folder, or remove this one.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise FileExistsError(f"{str(output)!r} cannot be created, because {str(above)!r} is a file.")
    if target == Path.cwd() or os.path.ismount(target):
        raise FileExistsError(
            f"{str(output)!r} is the current folder or a mount point, which cannot be replaced in one step. Pass a "
            "folder inside it."
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
            message = f"{str(target)!r} was written by another process in the meantime and is left as it is."
            raise FileExistsError(message) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside a file, which replaces the file on success and is removed otherwise.

    Args:
        path: The file to write, in an existing folder.
    """
    target = Path(path)
    # A unique name, because two processes may write at once.
    unfinished = target.with_name(f".{target.stem}.incomplete-{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: str | os.PathLike[str], replaces: str | None = None) -> Iterator[Path]:
    """Give a temporary folder in a folder; its files replace those of the folder on success, else they are removed.

    A full disk, an error or a signal during writing leaves the folder unchanged. A process that is killed while it
    moves the files leaves a note, by which the next process, or `finish_files`, completes the move.

    Args:
        folder: The folder to write into, made if it is missing; its other files stay.
        replaces: Pattern of names in the folder that go unless they are written again, where one such is written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target, STEM)
    try:
        yield unfinished
        written = {path.name for path in unfinished.iterdir()}
        stale = []
        if replaces and any(re.fullmatch(replaces, name) for name in written):
            stale = [path.name for path in target.iterdir() if re.fullmatch(replaces, path.name)]
        note = unfinished / f"{NOTE}.incomplete"
        note.write_text(json.dumps([name for name in stale if name not in written]), encoding="utf-8")
        os.replace(note, unfinished / NOTE)
        _move(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def finish_files(folder: str | os.PathLike[str]) -> None:
    """Move the files that a killed process had written completely; remove those that it had not.

    Args:
        folder: A folder that `whole_files` writes into.
    """
    _end_left_overs(Path(folder), STEM)


def _move(unfinished: Path, target: Path) -> None:
    """Move the files of a folder that has its note, and remove those that the note names."""
    stale = _names_on(unfinished / NOTE)
    for path in sorted(unfinished.iterdir()):
        there = target / path.name
        # Most files of code are unchanged, and moving fewer files takes less time.
        if path.name != NOTE and not (there.is_file() and _are_small_and_equal(path, there)):
            os.replace(path, there)
    for name in stale:
        (target / name).unlink(missing_ok=True)


def _names_on(note: Path) -> list[str]:
    """Return the names of files on a note; a folder may come from others, and so may a note in it.

    Raises:
        ValueError: If it holds anything but names of files in the folder.
    """
    try:
        names = json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(note)!r} was not written by hf_aselect ({error}). Remove its folder.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{str(note)!r} was not written by hf_aselect. Remove its folder.")
    if outside := [name for name in names if Path(name).name != name or name in ("", ".", "..") or "\0" in name]:
        raise ValueError(
            f"{str(note)!r} was not written by hf_aselect: it names {outside[0][:100]!r}, which is not in its "
            "folder. Remove its folder."
        )
    return names


def _are_small_and_equal(first: Path, second: Path) -> bool:
    return first.stat().st_size < 1_000_000 and filecmp.cmp(first, second, shallow=False)


def _unfinished(parent: Path, stem: str) -> Path:
    """Create a hidden folder whose name identifies the process, and finish or remove those of killed processes."""
    _end_left_overs(parent, stem)
    # A unique name: another process may write the same, and a fixed name may be a user's folder.
    unfinished = parent / f"{stem}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    return unfinished


def _end_left_overs(parent: Path, stem: str) -> None:
    for path in parent.glob(f"{glob.escape(stem)}-{_host()}-*"):
        process = path.name.removeprefix(f"{stem}-{_host()}-").partition("-")[0]
        if path.is_symlink() or not re.fullmatch(r"[0-9]{1,9}", process):
            continue
        if int(process) == os.getpid() or _is_running(int(process)):
            continue
        if (path / NOTE).is_file():
            logger.warning("Completing an interrupted save to %s, whose files had all been written.", path.parent)
            _move(path, parent)
        else:
            logger.warning("Removing %s, which an interrupted process left incomplete.", path)
        shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


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
