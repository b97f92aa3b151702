import numpy as np
import pytest
import torch
from PIL import Image

from hf_aselect import ASelectConfig, ASelectImageProcessor

RED = Image.new("RGB", (20, 12), (255, 0, 0))


def values_of(picture, **arguments):
    return ASelectImageProcessor(**arguments)(picture, return_tensors="pt").pixel_values


def test_pixels_span_minus_one_to_one():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = values_of(Image.fromarray(ramp), size=16, num_channels=1)
    torch.testing.assert_close(found[0, 0], torch.from_numpy(ramp / 127.5 - 1).float(), rtol=0, atol=1e-6)


def test_a_picture_of_the_right_size_is_not_resampled():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    found = values_of(Image.fromarray(picture), size={"height": 8, "width": 12})
    torch.testing.assert_close(found[0].permute(1, 2, 0), torch.from_numpy(picture / 127.5 - 1).float())


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "LA"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_pictures_of_any_mode_are_taken(mode, num_channels):
    found = values_of(Image.new(mode, (9, 7)), size=8, num_channels=num_channels)
    assert found.shape == (1, num_channels, 8, 8)
    assert bool(found.isfinite().all())


def test_red_becomes_grey_by_its_luminance():
    assert values_of(RED, size=8, num_channels=1).unique().tolist() == pytest.approx([76 / 127.5 - 1], abs=1e-6)


def test_an_array_becomes_grey_as_a_picture_does():
    arrays = values_of(np.asarray(RED), size=8, num_channels=1)
    torch.testing.assert_close(arrays, values_of(RED, size=8, num_channels=1))


def test_grey_becomes_three_equal_channels():
    found = values_of(np.full((1, 8, 8), 255, dtype=np.uint8), size=8, num_channels=3)
    assert found.shape == (1, 3, 8, 8)
    assert found.unique().tolist() == [1.0]


def test_sixteen_bits_are_scaled_not_clipped():
    picture = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    assert values_of(picture, size=8, num_channels=1).unique().tolist() == pytest.approx([128 / 127.5 - 1], abs=1e-6)


def test_the_middle_is_cut_out():
    picture = Image.new("L", (30, 10))
    picture.paste(255, (10, 0, 20, 10))
    assert values_of(picture, size=10, num_channels=1).unique().tolist() == [1.0]


def test_without_centre_crop_the_whole_picture_is_squeezed():
    picture = Image.new("L", (30, 10))
    picture.paste(255, (10, 0, 20, 10))
    found = values_of(picture, size=10, num_channels=1, do_center_crop=False)
    assert float(found.min()) == -1.0


def test_pictures_may_be_wide():
    assert values_of([RED, RED], size={"height": 8, "width": 24}).shape == (2, 3, 8, 24)


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_tiny_and_thin_pictures_are_taken(size):
    assert values_of(Image.new("RGB", size), size=8).shape == (1, 3, 8, 8)


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.new("L", (16, 16))
    picture.paste(255, (0, 0, 16, 8))  # white above
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "p.jpg", exif=exif)
    with Image.open(tmp_path / "p.jpg") as stored:
        found = values_of(stored, size=16, num_channels=1)[0, 0]
    assert float(found[0].mean()) < -0.9
    assert float(found[-1].mean()) > 0.9


def test_a_processor_fits_its_model():
    vae = {"_class_name": "AutoencoderKL", "in_channels": 1, "block_out_channels": [8, 8]}
    processor = ASelectImageProcessor.from_model_config(ASelectConfig(vae=vae, image_size=[32, 64]))
    assert processor(RED, return_tensors="pt").pixel_values.shape == (1, 1, 32, 64)


def test_a_processor_comes_back_as_it_was_saved(tmp_path):
    processor = ASelectImageProcessor(size=28, num_channels=1)
    processor.save_pretrained(tmp_path)
    assert ASelectImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_a_call_may_ask_for_another_size():
    processor = ASelectImageProcessor(size=28)
    assert processor(RED, size=8, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)


def test_nan_pictures_are_refused():
    with pytest.raises(ValueError, match=r"values in \[0, 255\], got NaN or infinite values"):
        values_of(np.full((8, 8, 3), np.nan))


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"`num_channels` must be 1 .grey. or 3 .RGB., got 2"):
        values_of(RED, num_channels=2)


@pytest.mark.parametrize("picture", [np.full((9, 9), 255, np.uint8), torch.full((9, 9), 255.0)])
@pytest.mark.parametrize("wrap", [lambda picture: picture, lambda picture: [picture]])
def test_grey_arrays_need_no_axis_of_channels(picture, wrap):
    found = ASelectImageProcessor(size=8, num_channels=1)(wrap(picture), return_tensors="pt").pixel_values
    assert found.shape == (1, 1, 8, 8)
    assert found.eq(1).all()


@pytest.mark.parametrize(("dtype", "value"), [(np.int32, 255), (np.int32, 65535), (np.float32, 255)])
def test_pictures_of_32_bits_are_taken(dtype, value):
    assert values_of(Image.fromarray(np.full((8, 8), value, dtype)), num_channels=1, size=8).eq(1).all()


@pytest.mark.parametrize("num_channels", [2, 5])
def test_arrays_of_other_numbers_of_channels_are_refused(num_channels):
    with pytest.raises(
        ValueError, match=r"must have 1, 3 or 4 channels, in its first or last dimension, got shape \(9, 9, "
    ):
        values_of(np.zeros((9, 9, num_channels), np.uint8))


def test_a_size_without_height_and_width_is_refused():
    with pytest.raises(
        ValueError,
        match=r"must be an integer or have `height` and `width`, because all images get one shape, got .'shortest",
    ):
        values_of(RED, size={"shortest_edge": 8}, do_center_crop=False)
