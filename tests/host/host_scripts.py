"""transformers' own example scripts for images, copied once and run unmodified on our checkpoints.

    git clone --depth 1 https://github.com/huggingface/transformers
    python tests/host/host_scripts.py transformers

copies the four scripts out of a checkout of transformers, `examples/pytorch` (Apache License 2.0, HuggingFace;
its source distribution has none of them), into the cache folder, and prints which version of transformers each asks
for: those of 4.56.0.dev0 ran with transformers 5.24. `pytest tests/host` then runs them, and skips them before; none
is kept in this repository. With

    python tests/host/host_scripts.py SCRIPT.py [WORDS ...]

one is run as it is, with small stand-ins for what it imports and this project does not need: torchvision's transforms,
albumentations, and the metrics that `evaluate` fetches from the Hub.
"""

import importlib
import os
import random
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LICENSE = "Apache License, Version 2.0"
SCRIPTS = (
    "image-classification/run_image_classification.py",
    "image-classification/run_image_classification_no_trainer.py",
    "semantic-segmentation/run_semantic_segmentation.py",
    "semantic-segmentation/run_semantic_segmentation_no_trainer.py",
)


def folder() -> Path:
    """Where the scripts of the installed version are kept."""
    import transformers

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hf_aselect" / f"transformers-{transformers.__version__}-scripts"


def copy(checkout: Path) -> dict[str, str]:
    """Copy the scripts out of a checkout of transformers, and return the version that each asks for.

    Raises:
        ValueError: If one is not there, or not under the licence that is named above.
    """
    texts = {}
    for path in SCRIPTS:
        script = checkout / "examples" / "pytorch" / path
        texts[script.name] = script.read_text(encoding="utf-8") if script.is_file() else ""
        if LICENSE not in texts[script.name]:
            raise ValueError(f"{script} is no script of transformers under the {LICENSE}.")
    folder().mkdir(parents=True, exist_ok=True)
    versions = {}
    for name, text in texts.items():
        (folder() / name).write_text(text, encoding="utf-8")
        asked = re.search(r'check_min_version\("([^"]+)"\)', text)
        versions[name] = asked[1] if asked else "any"
    return versions


class Compose:
    """Transforms one after the other: torchvision's of an image, albumentations' of image and mask."""

    def __init__(self, transforms, **_):
        self.transforms = transforms

    def __call__(self, image=None, mask=None):
        for each in self.transforms:
            image, mask = each(image, mask)
        return image if mask is None else {"image": image, "mask": mask}


def one(transform):
    """Make a transform of images out of a function of an image."""
    return lambda image, mask: (transform(image), mask)


def resized(size):
    height, width = (size, size) if isinstance(size, int) else size
    return one(lambda image: image.resize((width, height)))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def normalize(mean, std, max_pixel_value=1.0, **_):
    def of_arrays(image):
        return ((image / max_pixel_value - np.array(mean)) / np.array(std)).astype(np.float32)

    def of_tensors(image):
        return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    return one(lambda image: of_arrays(image) if isinstance(image, np.ndarray) else of_tensors(image))


def both(transform):
    """Make a transform of arrays, image and mask, out of one that both go through."""
    return lambda image, mask: (transform(image), transform(mask))


def resized_arrays(height, width, **_):
    def resize(array):
        kind = Image.Resampling.NEAREST if array.ndim == 2 else Image.Resampling.BILINEAR
        return np.array(Image.fromarray(array).resize((width, height), kind))

    return both(resize)


def stand_in_for_torchvision():
    module = types.ModuleType("torchvision.transforms")
    module.Compose, module.Normalize = Compose, normalize
    module.RandomResizedCrop = module.Resize = resized
    module.CenterCrop = lambda size: one(lambda image: image)
    module.RandomHorizontalFlip = lambda p=0.5: one(lambda image: image)
    module.ToTensor, module.Lambda = lambda: one(to_tensor), one
    return {"torchvision": types.ModuleType("torchvision"), "torchvision.transforms": module}


def stand_in_for_albumentations():
    module, tensors = types.ModuleType("albumentations"), types.ModuleType("albumentations.pytorch")
    module.Compose, module.Normalize = Compose, normalize
    module.Lambda = lambda name, mask=None, p=1.0: lambda image, given: (image, mask(given) if mask else given)
    module.PadIfNeeded = lambda **_: both(lambda array: array)
    module.RandomCrop = module.Resize = resized_arrays
    module.HorizontalFlip = lambda p=0.5: both(lambda array: array[:, ::-1].copy() if random.random() < 0 else array)
    tensors.ToTensorV2 = lambda: (
        lambda image, mask: (
            torch.from_numpy(image).permute(2, 0, 1),
            torch.from_numpy(np.array(mask)),
        )
    )
    return {"albumentations": module, "albumentations.pytorch": tensors}


class Metric:
    """Share of right answers, under the names that a metric of the scripts has: accuracy or mean_iou.

    Args:
        name: Of the metric.
    """

    def __init__(self, name, **_):
        self.name, self.pairs = name, []

    def add_batch(self, predictions, references):
        self.pairs.append((np.asarray(predictions), np.asarray(references)))

    def compute(self, predictions=None, references=None, num_labels=2, **_):
        if predictions is not None:
            self.add_batch(predictions, references)
        right = np.concatenate([(one == other).ravel() for one, other in self.pairs])
        share, self.pairs = float(right.mean()), []
        if self.name == "accuracy":
            return {"accuracy": share}
        every = np.full(num_labels, share)
        shares = dict.fromkeys(("mean_iou", "mean_accuracy", "overall_accuracy"), share)
        return {**shares, "per_category_iou": every, "per_category_accuracy": every}


def run(script, words):
    """Run a script as it is."""
    import diffusers.utils
    import evaluate
    import huggingface_hub
    import transformers

    # Asked before there is a stand-in, which has no more of torchvision than the scripts want.
    assert not diffusers.utils.is_torchvision_available() and not transformers.utils.is_torchvision_available()
    if os.environ.get("HAS_PACKAGE") != "0":
        importlib.import_module("hf_aselect")
    sys.modules.update({**stand_in_for_torchvision(), **stand_in_for_albumentations()})
    evaluate.load = Metric
    # The names of the classes, which are fetched from the Hub even of a dataset that is a folder.
    huggingface_hub.hf_hub_download = lambda repo_id, name, **_: str(Path(repo_id, name))
    transformers.utils.send_example_telemetry = lambda *_, **__: None
    if not hasattr(transformers.TrainingArguments, "overwrite_output_dir"):
        transformers.TrainingArguments.overwrite_output_dir = True  # of scripts from before transformers 5
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1].endswith(".py"):
        run(sys.argv[1], sys.argv[2:])
    else:
        print(folder(), copy(Path(sys.argv[1])))
