"""The image processor by torchvision gives what the one by PIL gives, and either loads what the other saved.

Most of it is skipped where torchvision is not installed (`pip install 'hf_aselect[vision]'`).
"""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils.import_utils import is_torchvision_available

from hf_aselect import ASelectImageProcessor, ASelectImageProcessorPil

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
GENERATOR = np.random.default_rng(0)
NOISE = GENERATOR.integers(0, 256, (33, 58, 3), dtype=np.uint8)
GREY = NOISE[..., 0]
RAMP = np.linspace(0, 65535, 33 * 58).reshape(33, 58)


def turned(array, kind="PNG"):
    image, stream = Image.fromarray(array), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(stream, kind, exif=exif)
    return stream.getvalue()


def transparent():
    image = Image.fromarray(NOISE).convert("P")
    image.info["transparency"] = 3
    return image


IMAGES = {
    **{mode: Image.fromarray(NOISE).convert(mode) for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV")},
    **{"RGB": Image.fromarray(NOISE), "palette with transparency": transparent(), "turned": turned(NOISE)},
    "16 bits": Image.fromarray(RAMP.astype(np.uint16)),
    "32 bits": Image.fromarray(RAMP.astype(np.int32)),
    "mode F": Image.fromarray((RAMP / 257).astype(np.float32)),
    "array": NOISE,
    "channels first": NOISE.transpose(2, 0, 1),
    "grey": GREY,
    "four channels": np.dstack([NOISE, GREY]),
    "backwards": NOISE[::-1, ::-1],
    "read-only": np.frombuffer(NOISE.tobytes(), np.uint8).reshape(NOISE.shape),
    "array of 16 bits": (NOISE.astype(np.uint16) * 257).astype(">u2"),
    "int64": NOISE.astype(np.int64),
    **{f"[0, 1] in {kind}": (NOISE / 255).astype(kind) for kind in ("float16", "float32", "float64")},
    "[0, 1] that are no bytes": (RAMP / 65535).astype(np.float32),
    "[0, 255] in float32": NOISE.astype(np.float32) * 0.99,
    "whole numbers in float64": NOISE.astype(np.float64),
    "tensor": torch.from_numpy(NOISE),
    "tensor, channels first": torch.from_numpy(NOISE).permute(2, 0, 1),
    "tensor in bfloat16": torch.from_numpy(NOISE).to(torch.bfloat16),
    "tensor of 16 bits": torch.from_numpy(NOISE.astype(np.uint16) * 257),
    "tensor in int64": torch.from_numpy(NOISE).long(),
    "tensor in [0, 1]": torch.from_numpy(NOISE).permute(2, 0, 1) / 255,
    "batch": np.stack([NOISE, NOISE[::-1]]),
    "several sizes": [NOISE, NOISE[:20], Image.fromarray(NOISE[:, :9]), torch.from_numpy(NOISE)],
    "several ranges": [NOISE, NOISE / 255],
}
OPTIONS = {
    "squeezed": {"do_center_crop": False},
    "as it is": {"do_resize": False, "do_center_crop": False},
    "cut out": {"do_resize": False, "size": {"height": 21, "width": 30}},
    "cut out of more than there is": {"do_resize": False, "size": {"height": 40, "width": 31}},
    "resized and cut": {"size": {"height": 24, "width": 32}, "crop_size": {"height": 17, "width": 21}},
    "larger": {"size": {"height": 64, "width": 96}},
    "no normalizing": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "channels of their own": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]},
    "one channel": {"num_channels": 1},
    "not turned": {"do_exif_transpose": False},
    "one by one": {"disable_grouping": True},
    **{resample.name: {"resample": resample} for resample in Image.Resampling},
}


def pixel_values(kind, images, **fields):
    processor = kind(**{"size": {"height": 16, "width": 24}, **fields})
    return processor(images, return_tensors="pt").pixel_values


def levels_apart(images, **fields):
    """By how many steps of 255 the two are apart, of each value."""
    found, expected = (
        pixel_values(kind, images, **fields) for kind in (ASelectImageProcessor, ASelectImageProcessorPil)
    )
    assert found.dtype == expected.dtype and found.shape == expected.shape
    one = 1 if fields.get("do_rescale", True) else 255
    step = 1 / 255 if not fields.get("do_normalize", True) else 1 / (255 * min(np.ravel(fields.get("image_std", 0.5))))
    return (found.double() - expected.double()).abs() / (step * one)


@needs_torchvision
@pytest.mark.parametrize("name", IMAGES)
def test_both_backends_make_the_same_of_images_as_people_have_them(name):
    apart = levels_apart(IMAGES[name])
    # Weights of the filter are whole numbers in both, of fewer bits in torch: a step was seen, of 3 values in 100.
    assert apart.max() <= 1.01 and (apart > 0.01).double().mean() <= 0.05


@needs_torchvision
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["RGB", "turned", "tensor", "[0, 1] that are no bytes"])
def test_both_backends_read_each_setting_alike(name, options):
    image = IMAGES[name]
    if options == "channels of their own" or options == "as it is":
        image = [image]
    apart = levels_apart(image, **OPTIONS[options])
    # Enlarged, 2 steps were seen, of 1 value in 100.
    bound = 2.01 if options == "larger" else 1.01
    assert apart.max() <= (0.01 if "no bytes" in name else bound)
    # Bilinear under torch 2.6 rounds otherwise: 17 values in 100. All else 3, under both.
    assert (apart > 0.01).double().mean() <= 0.2


@needs_torchvision
@pytest.mark.parametrize("shape", [(500, 375), (17, 9), (31, 200), (256, 256)])
@pytest.mark.parametrize("size", [(32, 32), (256, 256)])
def test_the_bound_holds_for_images_of_several_sizes(shape, size):
    image = GENERATOR.integers(0, 256, (*shape, 3), dtype=np.uint8)
    apart = levels_apart(image, size=size)
    assert apart.max() <= 2.01 and (apart > 0.01).double().mean() <= 0.05
    # Floating-point values are rounded by neither.
    assert levels_apart(image.astype(np.float32) * 0.99, size=size).max() < 1e-3


MASK = GENERATOR.integers(0, 5, (33, 58)).astype(np.uint8)
MASK[:5] = 255
MASKS = {
    "image": Image.fromarray(MASK),
    "array": MASK,
    "int64": MASK.astype(np.int64),
    "many classes": MASK.astype(np.int32) * 100,
    "tensor": torch.from_numpy(MASK),
    "tensor with an axis of channels": torch.from_numpy(MASK)[None].long(),
    "encoded and turned": turned(MASK),
}
FIELDS = {
    "resized": {},
    "squeezed": {"do_center_crop": False},
    "reduced": {"do_reduce_labels": True},
    "as it is": {"do_resize": False, "do_center_crop": False},
    "resized and cut": {"size": {"height": 24, "width": 32}, "crop_size": {"height": 17, "width": 21}},
    "cut out of more than there is": {"do_resize": False, "size": {"height": 40, "width": 61}},
}


@needs_torchvision
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("name", MASKS)
def test_both_backends_make_equal_labels(name, fields):
    if name == "many classes" and fields == "reduced":
        pytest.skip("is rejected: 255 stands for no class")
    image = turned(NOISE) if "turned" in name else NOISE
    found, expected = (
        kind(**{"size": {"height": 16, "width": 24}, **FIELDS[fields]})([image], [MASKS[name]], return_tensors="pt")
        for kind in (ASelectImageProcessor, ASelectImageProcessorPil)
    )
    assert torch.equal(found["labels"], expected["labels"]) and found["labels"].dtype == torch.int64
    assert found["labels"].shape[-2:] == found["pixel_values"].shape[-2:]
    if name == "image":
        assert 255 in found["labels"], "no class stays no class"


@needs_torchvision
def test_tensors_are_not_brought_to_the_cpu(monkeypatch):
    image = torch.from_numpy(NOISE).permute(2, 0, 1)
    expected = pixel_values(ASelectImageProcessor, [image, image / 255])

    def copied(*_):
        raise AssertionError("the image was copied to the CPU")

    for name in ("cpu", "numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, copied)
    assert torch.equal(pixel_values(ASelectImageProcessor, [image, image / 255]), expected)


@needs_torchvision
@pytest.mark.gpu
@pytest.mark.parametrize("resample", [2, 3, 0])
def test_tensors_on_a_device_stay_there(resample):
    processor = ASelectImageProcessor(size=16, resample=resample)
    image, mask = torch.from_numpy(NOISE).cuda(), torch.from_numpy(MASK).cuda()
    found = processor([image], [mask], return_tensors="pt")
    assert {each.device for each in found.values()} == {image.device}
    expected = ASelectImageProcessorPil(size=16, resample=resample)([NOISE], [MASK], return_tensors="pt")
    assert torch.equal(found["labels"].cpu(), expected["labels"])
    assert (found["pixel_values"].cpu() - expected["pixel_values"]).abs().max() <= 2.01 / 127.5
    # Images of other kinds go where the call says.
    assert processor([NOISE], [MASK], device="cuda", return_tensors="pt")["labels"].is_cuda


@pytest.mark.parametrize("kind", [ASelectImageProcessor, ASelectImageProcessorPil])
def test_what_comes_back_is_of_the_kind_that_is_asked_for(kind):
    processor = kind(size=8)
    assert isinstance(processor([NOISE], [MASK], return_tensors="np")["labels"], np.ndarray)
    found = processor([NOISE, NOISE[:9]], [MASK, MASK[:9]])
    wanted = torch.Tensor if processor.backend == "torchvision" else np.ndarray
    assert all(isinstance(each, wanted) for values in found.values() for each in values)
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is kind and again.to_dict() == processor.to_dict()


def test_without_torchvision_both_names_stand_for_pil():
    assert ASelectImageProcessorPil().backend == "pil"
    assert ASelectImageProcessor().backend == ("torchvision" if is_torchvision_available() else "pil")
    assert (ASelectImageProcessor is ASelectImageProcessorPil) != is_torchvision_available()
    assert "Example:" in ASelectImageProcessor.__doc__


@pytest.mark.parametrize("kind", [ASelectImageProcessor, ASelectImageProcessorPil])
def test_a_file_of_either_backend_is_loaded_by_both(kind, tmp_path):
    kind(size=8, do_reduce_labels=True).save_pretrained(tmp_path)
    file = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    # The name that those know who have saved it so far, and that older versions of the package look for.
    assert file["image_processor_type"] == "ASelectImageProcessor" and "backend" not in file
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ASelectImageProcessor
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is ASelectImageProcessorPil and loaded.do_reduce_labels and loaded.size["height"] == 8
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision")) is ASelectImageProcessor
    for each in (ASelectImageProcessor, ASelectImageProcessorPil):
        assert each.from_pretrained(tmp_path).to_dict() == kind.from_pretrained(tmp_path).to_dict()


STRANGER = """
import sys
sys.modules["hf_aselect"] = None
if sys.argv[2] == "pil":
    sys.modules["torchvision"] = None
from transformers import AutoImageProcessor
from PIL import Image
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert processor.backend == sys.argv[2], processor.backend
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
processor(Image.new("RGB", (9, 9)), return_tensors="pt").pixel_values
processor.save_pretrained(sys.argv[3])
assert AutoImageProcessor.from_pretrained(sys.argv[3], trust_remote_code=True).to_dict() == processor.to_dict()
by_pil = AutoImageProcessor.from_pretrained(sys.argv[3], trust_remote_code=True, backend="pil")
assert by_pil.backend == "pil" and by_pil.to_dict() == processor.to_dict()
"""


@pytest.mark.process
@pytest.mark.parametrize("backend", ["pil", pytest.param("torchvision", marks=needs_torchvision)])
def test_code_that_came_with_a_processor_needs_no_torchvision_and_uses_it(backend, tmp_path, monkeypatch):
    ASelectImageProcessor(size=8).save_pretrained(tmp_path / "saved", include_code=True)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    words = [sys.executable, "-c", STRANGER, tmp_path / "saved", backend, tmp_path / "again"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        json.loads((tmp_path / name / "preprocessor_config.json").read_text(encoding="utf-8"))
        for name in ("saved", "again")
    )
    assert first == second
