r"""Write scikit-learn's handwritten digits as `train.parquet` and `test.parquet` with an `image` and a `label` column.

1,797 real digits of 8 by 8 pixels ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).
They are enlarged and framed in black, so that shapes are as large and as smooth as those of MNIST: images whose
content survives much noise. The first 1,000 are for training, the rest for testing:

    python examples/pretraining/digits_to_parquet.py digits-32 --image_size 32
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits


def enlarge(values: np.ndarray, image_size: int) -> PILImage.Image:
    """Return 8 by 8 values in [0, 16] as an image whose inner three quarters hold the digit."""
    small = PILImage.fromarray((values / 16 * 255).round().astype(np.uint8))
    inner = round(0.75 * image_size)
    large = small.resize((inner, inner), PILImage.Resampling.BICUBIC)
    first = (image_size - inner) // 2
    last = image_size - inner - first
    return ImageOps.expand(large, (first, first, last, last))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="Folder for train.parquet and test.parquet.")
    parser.add_argument("--image_size", type=int, default=32, help="Side of the images in pixels.")
    parser.add_argument("--num_train", type=int, default=1000, help="Images to train on; the rest are for testing.")
    args = parser.parse_args()
    digits = load_digits()
    if args.image_size < 8:
        parser.error(f"--image_size must be at least 8, that of scikit-learn's images, got {args.image_size}")
    if not 0 < args.num_train < len(digits.images):
        parser.error(f"--num_train must be in [1, {len(digits.images) - 1}], got {args.num_train}")
    args.target.mkdir(parents=True, exist_ok=True)
    images = [enlarge(values, args.image_size) for values in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    for split, part in (("train", slice(args.num_train)), ("test", slice(args.num_train, None))):
        rows = {"image": images[part], "label": digits.target[part]}
        path = args.target / f"{split}.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(path)
        print(f"{path}: {len(rows['label'])} images")


if __name__ == "__main__":
    main()
