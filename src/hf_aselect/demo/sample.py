"""The embedded checkpoint: a small DiT, and the sample of Fashion-MNIST that it was trained on."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset

EMBEDDED = Path(__file__).parents[1] / "assets" / "fashion_mnist"


def load_embedded_split(split: str, size: int) -> Dataset:
    """Return the first `size` images of the embedded sample of Fashion-MNIST, columns `image` and `label`.

    Args:
        split: "train" (4,000 images) or "test" (2,000).
        size: Number of images.

    Raises:
        ValueError: If the sample has fewer images.
    """
    # Not through `load_dataset`, which would copy the sample into a cache.
    dataset = Dataset(pyarrow.parquet.read_table(EMBEDDED / f"{split}.parquet"))
    if not 1 <= size <= len(dataset):
        raise ValueError(
            f"`size` must be in [1, {len(dataset)}], the number of images in the embedded {split} sample, got {size}."
        )
    return dataset.select(range(size))


def classes_of(dataset: Dataset) -> dict[str, Any]:
    """Return the names of a sample's classes as `from_pretrained` takes them."""
    names = dataset.features["label"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
