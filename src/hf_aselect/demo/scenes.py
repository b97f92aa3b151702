"""Scenes for the segmentation demo, composed of items of the embedded sample."""

import numpy as np
from datasets import Dataset
from PIL import Image

from .sample import load_embedded_split

# Pixels of a side: two items of the sample.
SIDE = 56
# In a scene.
NUM_ITEMS = 2
BACKGROUND = "background"
# The sample's images are black around the item, but for compression's specks.
DARK = 8


def compose_scenes(split: str, count: int) -> tuple[Dataset, list[str]]:
    """Return scenes of two items of the embedded sample each, with masks, and the classes' names.

    Items are at random places, the later ones over the earlier ones. A scene is much easier to segment than a
    photograph, because the background is black.

    Args:
        split: "train" or "test" of the sample; scenes of one have no item of the other.
        count: Scenes.

    Returns:
        Columns `image`, grey, 56 × 56, and `annotation`, class indices of that size: the sample's ten classes, and 10
        for the background. The same for the same arguments.
    """
    generator = np.random.default_rng([0, split == "test"])
    rows = load_embedded_split(split, 4000 if split == "train" else 2000)
    items = [np.asarray(picture) for picture in rows["image"][:]]
    labels = rows["label"][:]
    names = [*rows.features["label"].names, BACKGROUND]
    images, masks = [], []
    for _ in range(count):
        scene = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask = np.full((SIDE, SIDE), len(names) - 1, dtype=np.uint8)
        for number in generator.integers(len(items), size=NUM_ITEMS):
            item = items[number]
            top, left = generator.integers(SIDE - item.shape[0] + 1, size=2)
            here = np.s_[top : top + item.shape[0], left : left + item.shape[1]]
            scene[here] = np.where(item > DARK, item, scene[here])
            mask[here] = np.where(item > DARK, labels[number], mask[here])
        images.append(Image.fromarray(scene))
        masks.append(Image.fromarray(mask))
    return Dataset.from_dict({"image": images, "annotation": masks}), names
