"""The training and the evaluation split of what a training script is given: a dataset, a folder or files."""

import math
from collections import Counter
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, load_dataset

from ..images.sources import read_folder


def read_splits(
    *,
    dataset_name: str | None = None,
    train_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    columns: Sequence[str] = (),
    streaming: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """Return all splits of the one source that is given, `train` among them.

    Args:
        dataset_name: Dataset of the Hub, or a local folder of it.
        train_dir: Folder with one subfolder of images per class; see `images.sources.read_folder`.
        train_file: Parquet file, or WebDataset shards (`*.tar`); it becomes the `train` split.
        validation_file: The same, of the `validation` split; it goes with `train_file`.
        columns: Columns that the training split must have.
        streaming: Read rows as they are asked for, and keep none.

    Raises:
        ValueError: If there is not exactly one source, or it lacks a `train` split or one of `columns`.
    """
    if sum(source is not None for source in (dataset_name, train_dir, train_file)) != 1:
        raise ValueError("Pass exactly one of --dataset_name, --train_dir and --train_file.")
    if dataset_name:
        splits = load_dataset(dataset_name, streaming=streaming)
    elif train_dir:
        splits = read_folder(train_dir, streaming)
    else:
        splits = _read_files({"train": train_file, "validation": validation_file}, streaming)
    if "train" not in splits:
        raise ValueError(f"The dataset has no train split, only {sorted(splits)}.")
    train = splits["train"]
    # The columns of some streams are only known from their rows.
    found = train.column_names or list(next(iter(train)))
    for column in columns:
        if column not in found:
            raise ValueError(f"The dataset has no column {column!r}, only {found}.")
    return splits


def _read_files(files: dict[str, str | None], streaming: bool) -> DatasetDict | IterableDatasetDict:
    # One by one: read together, all of them would get the classes of the first, in its order.
    splits = {
        name: load_dataset(
            "webdataset" if path.endswith(".tar") else "parquet", data_files=path, split="train", streaming=streaming
        )
        for name, path in files.items()
        if path
    }
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def train_and_validation(splits: DatasetDict, seed: int, label_column: str | None = None) -> tuple[Dataset, Dataset]:
    """Return the training and the evaluation split: `validation`, else `test`, else a tenth of the training split.

    The tenth has as many images as there are classes at least.

    Args:
        splits: Splits by name, `train` among them.
        seed: Seed of the tenth.
        label_column: Column with class indices or names; both splits get the class indices of the training split, and
            the tenth has each class in its proportion.

    Raises:
        ValueError: If the evaluation split has classes that the training split lacks, or a tenth is to be held out and
            a class has one image.
    """
    train = splits["train"]
    if label_column and not isinstance(train.features[label_column], ClassLabel):
        train = train.class_encode_column(label_column)
    held_out = splits.get("validation", splits.get("test"))
    if held_out is None:
        size = math.ceil(0.1 * len(train))
        if label_column:
            counts = Counter(train[label_column][:])
            size = max(size, len(counts))
            if lonely := [name for name, count in counts.items() if count == 1]:
                name = train.features[label_column].int2str(lonely[0])
                raise ValueError(
                    f"Of class {name!r} there is one image, which cannot be in a training and an evaluation split. "
                    "Pass a validation split, or more images."
                )
        parts = train.train_test_split(size, seed=seed, stratify_by_column=label_column)
        return parts["train"], parts["test"]
    return train, with_classes_of(train, held_out, label_column) if label_column else held_out


def with_classes_of(train: Dataset, other: Dataset, column: str) -> Dataset:
    """Return another split with the class indices of the training split: each split alone may lack some classes.

    Args:
        train: Training split, whose `column` is a `ClassLabel`.
        other: Split with the same classes, by index or by name.
        column: Column with the classes.

    Raises:
        ValueError: If the other split has classes that the training split lacks.
    """
    classes = train.features[column]
    if other.features[column] == classes:
        return other
    kind = other.features[column]
    spell = kind.int2str if isinstance(kind, ClassLabel) else str
    names = [spell(value) for value in other[column]]
    if unknown := sorted(set(names) - set(classes.names)):
        raise ValueError(
            f"The evaluation split has {len(unknown)} classes that the training split lacks, among them "
            f"{unknown[:3]}. The training split has {classes.names[:10]}."
        )
    indices = [classes.str2int(name) for name in names]
    return other.remove_columns(column).add_column(column, indices).cast_column(column, classes)
