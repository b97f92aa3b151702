"""Where images lie: a folder, files, or a dataset of the Hub; as splits of `datasets`, or one of them."""

import glob
import logging
import os
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

# What a folder that has nothing else at its top has splits for: by these names `datasets` knows them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What `datasets` says of a folder that it cannot read, and what it lets through of archives.
_BROKEN = (
    DatasetsError,
    OSError,
    ValueError,
    BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


def read_folder(folder: str | Path, streaming: bool = False) -> Any:
    """Return the images below a folder by split: all of them, whatever files and folders are called.

    A folder has splits where all that lies in it are folders with names of splits, which hold folders or a
    `metadata.csv`, as `train/cat/1.png` and `test/cat/2.png`; else all images are the training split. Their classes
    are the names of the folders that they lie in, where there are several, all as deep.

    `load_dataset("imagefolder")` also guesses splits from the names of files, and leaves out folders like `__x__`.
    All else is as there: hidden files are left out, zip archives are opened, and `metadata.csv` (or `.jsonl`,
    `.parquet`) lists the images, with columns instead of classes. A warning is logged if that
    leaves out images or classes.

    Args:
        folder: The folder.
        streaming: Read rows as they are asked for, and keep none.

    Raises:
        ValueError: If it holds no images, folders of several splits with images beside these or their classes, or an
            archive or table that cannot be read.
    """
    folder = Path(folder)
    files = _files_below(folder)
    if not any(_is_image(path) or path.suffix.lower() == ".zip" for path in files):
        raise ValueError(f"{str(folder)!r} contains no images.")
    splits, is_divided = _splits_of(folder, files)
    patterns: dict[str, list[str]] = {}
    for path, split in splits.items():
        patterns.setdefault(split, []).extend(f"{glob.escape(str(each))}/**" for each in _roots(path.resolve()))
    metadata = [path for path in files if path.name in ImageFolder.METADATA_FILENAMES]
    is_all_seen = not _has_archive(files)
    # Of several splits `datasets` would look at the first alone to find out whether there are classes.
    labels = {"drop_labels": False} if is_divided else {}
    if is_all_seen and not metadata:
        labels["drop_labels"] = not _has_classes(folder, files, is_divided)
    try:
        found = load_dataset("imagefolder", data_files=patterns, streaming=streaming, **labels)
    except _BROKEN as error:
        hint = "" if is_all_seen else ". Unpack its archives."
        raise ValueError(f"{str(folder)!r} cannot be read as images: {_said(error)}{hint}") from error
    if metadata and is_all_seen and not streaming:
        _tell_of_metadata(metadata[0], found, sum(map(_is_image, files)))
    return found


def _files_below(folder: Path) -> list[Path]:
    """Return the paths of all files below a folder, but for hidden ones, and those in hidden folders."""
    files = []
    for place, inside, names in os.walk(folder, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _splits_of(folder: Path, files: list[Path]) -> tuple[dict[Path, str], bool]:
    """Return the folders to read, with the split of each, and whether they are splits by their names.

    Raises:
        ValueError: If an image lies beside the folders of several splits, or beside those of their classes.
    """
    inside = sorted({folder / path.relative_to(folder).parts[0] for path in files} - {*files})
    splits = {path: _SPLITS.get(path.name.lower(), "") for path in inside}
    told = {path.parent for path in files if path.name in ImageFolder.METADATA_FILENAMES}
    has_classes = any(path.parent not in (folder, *inside) for path in files)
    if not inside or not all(splits.values()) or folder in told or not (has_classes or told.intersection(inside)):
        return {folder: "train"}, False
    strays = [path for path in files if _is_image(path) and path.parent in {folder, *inside} - told]
    if strays and len(set(splits.values())) > 1:
        raise ValueError(
            f"{str(folder)!r} has the splits {', '.join(path.name for path in inside)}, but {strays[0].name!r} is "
            "beside the class folders. Move it, or pass the folder of one split."
        )
    return ({folder: "train"}, False) if strays else (splits, True)


def _roots(folder: Path) -> list[Path]:
    """Return a folder, and those below it that `datasets` leaves out for their names, unless they are named."""
    walk = os.walk(folder, followlinks=True)
    special = [Path(place, name) for place, inside, _ in walk for name in inside if name.startswith("__")]
    return [folder, *(path for path in special if _files_below(path))]


def _is_image(path: Path) -> bool:
    """Return whether a file is an image by its name; others, as a README, are none."""
    return path.suffix.lower() in ImageFolder.EXTENSIONS


def _has_archive(files: list[Path]) -> bool:
    """Return whether there is an archive, and warn where images in folders of classes lie beside it."""
    archives = [path.name for path in files if path.suffix.lower() == ".zip"]
    if archives and len({path.parent for path in files if _is_image(path)}) > 1:
        logger.warning(
            "The images in the archive %s have other paths than the images beside it, so they may get no classes, "
            "as in `datasets`. Unpack the archive.",
            archives[0],
        )
    return bool(archives)


def _has_classes(folder: Path, files: list[Path], is_divided: bool) -> bool:
    """Return whether images lie in folders of classes: several, or at least one of splits, all as deep."""
    places: dict[int, Path] = {}
    for path in files:
        if _is_image(path):
            places.setdefault(len(path.parts), path.relative_to(folder))
    if len(places) > 1:
        shallow, deep = places[min(places)], places[max(places)]
        logger.warning(
            "Images are in folders of different depths, such as %s and %s, so they have no classes, as in "
            "`datasets`. Move all images of a class directly into one folder.",
            shallow,
            deep,
        )
        return False
    return is_divided or len({path.parent.name for path in files if _is_image(path)}) > 1


def _tell_of_metadata(metadata: Path, splits: Any, num_images: int) -> None:
    """Warn where a file of metadata leaves out images, as `datasets` has it."""
    num_read = sum(len(split) for split in splits.values())
    if num_read < num_images:
        logger.warning(
            "%s lists %d of the %d images in its folder. The others are ignored, as in `datasets`. Remove or rename "
            "the file to read all images and take their classes from the folders.",
            metadata.name,
            num_read,
            num_images,
        )


def _said(error: BaseException) -> str:
    """Return what is wrong with the data: the error says that something is, its cause says what."""
    said = error.__cause__ or error
    return f"an archive is damaged ({said})" if isinstance(said, BadZipFile | zlib.error | EOFError) else str(said)


def read_images(source: str, split: str = "train") -> Any:
    """Return a dataset of images: a folder's, a parquet file's, or one of the Hub.

    Args:
        source: Folder, parquet file, or id of a dataset.
        split: Which split, of a folder or a dataset of the Hub.

    Raises:
        ValueError: If it cannot be read as images, or has no such split.
        OSError: If the Hub cannot be reached.
    """
    path = Path(source)
    if path.suffix == ".parquet" and not path.exists():
        raise ValueError(f"The file {source!r} does not exist.")
    try:
        if path.is_dir() and not list(path.glob("**/*.parquet")):
            splits = read_folder(path)
            if split not in splits:
                raise ValueError(f"it has no split {split!r}. Its splits are {', '.join(splits)}")
            return splits[split]
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=source, split="train")
        return load_dataset(source, split=split)
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"{source!r} cannot be read as images: {_said(error)}{_missing_here(path)}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{error}{_missing_here(path)}") from error


def _missing_here(path: Path) -> str:
    """Return what to say where a name was taken for one of the Hub because nothing of this name exists here."""
    return "" if path.exists() else f". No folder or file {str(path)!r} exists here."
