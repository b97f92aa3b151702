"""Where images lie: a folder, files, or a dataset of the Hub; as splits of `datasets`, or one of them."""

import glob
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

# What a folder that has nothing else at its top has splits for: by these names `datasets` knows them.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def read_folder(folder: str | Path, streaming: bool = False) -> Any:
    """Return the images below a folder by split: all of them, whatever files and folders are called.

    A folder has splits where all that lies in it are folders with names of splits, which hold folders and no images
    themselves, as `train/cat/1.png` and `test/cat/2.png`; else all images are the training split. Their classes are
    the names of the folders that they lie in, where there are several, all as deep.

    Args:
        folder: The folder.
        streaming: Read rows as they are asked for, and keep none.

    Raises:
        ValueError: If it holds no images, or folders of several splits with images beside these or their classes.
    """
    folder = Path(folder)
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"{str(folder)!r} holds no images.")
    inside = _folders_in(folder)
    splits = {path: _SPLITS.get(path.name.lower()) for path in inside}
    is_divided = len(inside) > 0 and all(splits.values()) and any(_folders_in(path) for path in inside)
    strays = [image for place in (folder, *inside) for image in _images_in(place)] if is_divided else []
    if strays:
        if len(set(splits.values())) > 1:
            raise ValueError(
                f"{str(folder)!r} has the splits {', '.join(path.name for path in inside)}, and {strays[0].name!r} "
                "lies beside folders of classes. Move it, or name the folder of one split."
            )
        is_divided = False
    patterns: dict[str, list[str]] = {}
    for path, split in splits.items() if is_divided else [(folder, "train")]:
        patterns.setdefault(str(split), []).append(f"{glob.escape(str(path.resolve()))}/**")
    # Of several splits `datasets` would look at the first alone to find out whether there are classes.
    labels = {"drop_labels": False} if is_divided else {}
    try:
        return load_dataset("imagefolder", data_files=patterns, streaming=streaming, **labels)
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} cannot be read as images: {error.__cause__ or error}") from error


def _folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _images_in(folder: Path) -> list[Path]:
    """Return the images that lie in a folder itself; other files, as a README, are none."""
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in ImageFolder.EXTENSIONS]


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
        raise ValueError(f"There is no file {source!r}.")
    try:
        if path.is_dir() and not list(path.glob("**/*.parquet")):
            splits = read_folder(path)
            if split not in splits:
                raise ValueError(f"it has no split {split!r}, only {', '.join(splits)}")
            return splits[split]
        if path.suffix == ".parquet":
            return load_dataset("parquet", data_files=source, split="train")
        return load_dataset(source, split=split)
    except (DatasetsError, ValueError) as error:
        # It says that something is wrong with the data; its cause says what.
        raise ValueError(f"{source!r} cannot be read as images: {error.__cause__ or error}") from error
