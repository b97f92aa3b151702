r"""Write Fashion-MNIST as `train.parquet` and `test.parquet` with an `image` and a `label` column.

Fashion-MNIST (MIT licence, https://github.com/zalandoresearch/fashion-mnist) comes as gzipped IDX files; on Debian,
`apt-get install dataset-fashion-mnist` puts them in /usr/share/datasets/fashion-mnist. The other scripts of this
folder read parquet, so this is the first step of training the embedded DiT again:

    python examples/pretraining/fashion_mnist_to_parquet.py /usr/share/datasets/fashion-mnist fashion-mnist
    python examples/pretraining/fashion_mnist_to_parquet.py /usr/share/datasets/fashion-mnist sample \
        --num_train 4000 --num_test 2000

The second command makes the sample that ships in the package: the first images of each split, so its test images
are among the split that the embedded DiT never saw.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(path: Path, offset: int) -> np.ndarray:
    """Return the bytes of a gzipped IDX file after its header of `offset` bytes."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder with the four gzipped IDX files.")
    parser.add_argument("output", type=Path, help="Folder to write train.parquet and test.parquet to.")
    parser.add_argument("--num_train", type=int, default=60_000, help="Number of training images to keep.")
    parser.add_argument("--num_test", type=int, default=10_000, help="Number of test images to keep.")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split, prefix, count in (("train", "train", args.num_train), ("test", "t10k", args.num_test)):
        pictures = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
        labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz", 8)[:count]
        features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
        columns = {"image": [PILImage.fromarray(picture) for picture in pictures], "label": labels.tolist()}
        path = args.output / f"{split}.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path)
        print(f"{path}: {len(labels)} images, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
