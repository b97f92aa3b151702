"""Images and masks as people have them: what transformers' own image processors make of them is the measure.

Of each kind one case was met in somebody's script; its siblings are named by the ids of the tests.
"""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_transformer, take_one_step
from diffusers import DDPMScheduler
from PIL import Image
from transformers import SegformerImageProcessor
from transformers.utils import logging

from hf_aselect import ASelectConfig, ASelectImageProcessor, DiTForSemanticSegmentation
from hf_aselect.model.modeling_aselect import save_image_processor

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def values_of(image, size=8, call=None, **fields):
    return ASelectImageProcessor(size=size, **fields)(image, return_tensors="pt", **call or {}).pixel_values


def file_of(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(image, orientation):
    """The image as a camera stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.open(io.BytesIO(file_of(image, exif=exif)))


@pytest.fixture
def warnings(caplog):
    logging.enable_propagation()
    logging.get_logger().warning_once.__func__.cache_clear()
    yield lambda: [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    logging.disable_propagation()


@pytest.mark.parametrize(
    "image",
    [
        pytest.param((PIXELS / 255).astype(np.float32), id="fractions"),
        pytest.param(PIXELS / 255, id="fractions-float64"),
        pytest.param(torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, id="as-ToTensor"),
        pytest.param((torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).double(), id="tensor-float64"),
        pytest.param(torch.from_numpy(PIXELS / 255).permute(2, 0, 1)[None], id="a-batch"),
        pytest.param(PIXELS.astype(np.float32), id="whole-floats"),
        pytest.param(PIXELS.astype(np.uint16) * 257, id="16-bits"),
        pytest.param(torch.from_numpy(PIXELS.astype(np.uint16) * 257), id="16-bits-tensor"),
        pytest.param(file_of(IMAGE), id="encoded"),
        pytest.param({"bytes": file_of(IMAGE), "path": None}, id="undecoded"),
        pytest.param(bytearray(file_of(IMAGE)), id="bytearray"),
    ],
)
def test_an_image_of_any_kind_has_the_values_of_its_pil_image(image):
    assert torch.equal(values_of(image), values_of(IMAGE))
    assert torch.equal(values_of([image] if not isinstance(image, torch.Tensor) else image), values_of(IMAGE))


def test_a_file_is_read_by_its_path(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert torch.equal(values_of(path), values_of(IMAGE))
        assert torch.equal(values_of([path, IMAGE]), values_of([IMAGE, IMAGE]))


def test_no_address_is_fetched():
    with pytest.raises(ValueError, match="URLs are not fetched"):
        values_of(["http://127.0.0.1:9/a.png"])


def test_fractions_are_judged_together():
    """A dark image among floats in [0, 255] stays dark."""
    dark = np.full((12, 10, 3), 0.8, np.float32)
    bright = PIXELS.astype(np.float32)
    assert values_of([dark, bright])[0].max() < -0.99
    assert values_of([dark, dark])[0].min() > 0.5


@pytest.mark.parametrize("others", [np.float32, np.float64])
def test_fractions_beside_larger_floats_are_said(warnings, others):
    fractions, bright = np.full((12, 10, 3), 0.8), PIXELS.astype(others)
    values_of([fractions, bright])
    assert len(warnings()) == 1 and "multiply it by 255" in warnings()[0]


def test_a_black_image_is_one_in_any_range(warnings):
    for fine in (
        [np.zeros((12, 10, 3)), PIXELS.astype(float)],
        [PIXELS / 255, PIXELS],
        [np.ones((9, 9, 3)), PIXELS * 1.0],
    ):
        values_of(fine)
    values_of(PIXELS / 255, call={"rescale_factor": 1.0})
    assert warnings() == []


def test_whoever_scales_already_says_so_as_before():
    fractions = (PIXELS / 255).astype(np.float32)
    scaled = values_of(fractions, size={"height": 12, "width": 10}, do_rescale=False)
    assert torch.allclose(scaled, values_of(fractions, size={"height": 12, "width": 10}), atol=1e-6)
    by_factor = values_of(fractions, size={"height": 12, "width": 10}, call={"rescale_factor": 1.0})
    assert torch.allclose(by_factor, scaled, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "dtype", "value"),
    [
        *(("I", np.int32, 128 * 257), ("I;16", np.uint16, 128 * 257), ("F", np.float32, 128 * 257.0)),
        *(("I;16", np.uint16, 128), ("I;16B", np.dtype(">u2"), 128), ("I;16B", np.dtype(">u2"), 128 * 257)),
        *(("F", np.float32, 128 / 255), ("F", np.float32, 128.0), ("L", np.uint8, 128), ("I", np.int32, 128)),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_grey_of_any_depth_is_as_bright(mode, dtype, value, num_channels):
    image = Image.fromarray(np.full((8, 8), value, dtype))
    assert image.mode == mode
    assert values_of(image, num_channels=num_channels).unique().tolist() == pytest.approx([128 / 127.5 - 1], abs=1e-6)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "LAB", "HSV", "YCbCr", "I;16B", "I;16L"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_of_rare_modes_are_taken(mode, num_channels):
    found = values_of(Image.new(mode, (9, 7)), num_channels=num_channels)
    assert found.shape == (1, num_channels, 8, 8) and bool(found.isfinite().all())


def test_a_palette_gives_its_colours():
    palette = IMAGE.convert("P", palette=Image.Palette.ADAPTIVE)
    assert torch.equal(values_of(palette), values_of(palette.convert("RGB")))
    expected = values_of(palette)
    palette.info["transparency"] = bytes(range(256))  # of which PIL warns
    assert torch.equal(values_of(palette), expected)


def test_a_mean_is_taken_from_any_library():
    expected = values_of(IMAGE, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7])
    given = {"image_mean": np.array([0.5, 0.4, 0.3]), "image_std": torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)}
    assert torch.equal(values_of(IMAGE, **given), expected)
    assert torch.equal(values_of(IMAGE, call=given), expected)
    with pytest.raises(ValueError, match="`image_mean` must be finite numbers"):
        values_of(IMAGE, image_mean=np.array([np.nan] * 3))


def test_an_open_file_is_read(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        assert torch.equal(values_of(file), values_of(IMAGE))
    assert torch.equal(values_of([io.BytesIO(file_of(IMAGE))]), values_of(IMAGE))


@pytest.mark.parametrize("size", [(8, 4), [8, 4], (np.int64(8), 4), {"height": np.int64(8), "width": 4}])
def test_a_size_is_taken_in_the_constructor_as_in_a_call(size):
    expected = values_of(IMAGE, size={"height": 8, "width": 4})
    assert torch.equal(values_of(IMAGE, size=size), expected)
    assert torch.equal(values_of(IMAGE, call={"size": size}), expected)


def test_a_shortest_edge_is_the_side_of_what_is_cropped():
    assert torch.equal(values_of(IMAGE, size={"shortest_edge": 8}), values_of(IMAGE))
    with pytest.raises(ValueError, match="all images get one shape"):
        values_of(IMAGE, size={"shortest_edge": 8}, do_center_crop=False)


def test_a_crop_is_cut_out_of_what_was_resized():
    whole = values_of(IMAGE, size=12)
    for found in (values_of(IMAGE, size=12, crop_size=8), values_of(IMAGE, size=12, call={"crop_size": (8, 8)})):
        assert torch.equal(found, whole[..., 2:10, 2:10])
    mask = np.arange(120, dtype=np.uint8).reshape(12, 10)
    processor = ASelectImageProcessor(size=12, crop_size=8)
    labels = processor(IMAGE, mask, return_tensors="pt").labels
    assert torch.equal(labels, ASelectImageProcessor(size=12)(IMAGE, mask, return_tensors="pt").labels[:, 2:10, 2:10])


def test_a_mask_lies_where_the_crop_was_cut_out():
    expected = torch.arange(64).view(8, 8) % 2
    logits = torch.nn.functional.one_hot(expected, 2).movedim(-1, 0)[None].float()
    processor = ASelectImageProcessor(size=12, crop_size=8)
    (found,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(12, 12)])
    assert torch.equal(found[2:10, 2:10], expected)


@pytest.mark.parametrize("name", ["do_centre_crop", "num_channel", "crop"])
def test_a_misspelt_field_is_refused_in_constructor_and_call(name):
    for call in (lambda: ASelectImageProcessor(**{name: 1}), lambda: values_of(IMAGE, call={name: 1})):
        with pytest.raises(ValueError, match=f"ASelectImageProcessor has no field '{name}'. Did you mean"):
            call()


def test_a_field_of_a_file_that_is_not_known_is_kept(tmp_path):
    processor = ASelectImageProcessor(size=8)
    processor.of_a_later_version = {"x": 1}
    processor.save_pretrained(tmp_path)
    assert ASelectImageProcessor.from_pretrained(tmp_path).of_a_later_version == {"x": 1}
    with pytest.raises(ValueError, match="no field 'sizes'"):
        ASelectImageProcessor.from_pretrained(tmp_path, sizes=8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(16, 16), (16, 8)])
def test_a_mask_of_stored_pixels_stays_on_its_image(orientation, size):
    """Orientation 3 was met; mirrored and square ones are its siblings."""
    stored = Image.new("L", size)
    stored.paste(255, (0, 0, size[0], size[1] // 2))
    stored.paste(255, (0, 0, 2, size[1]))
    mask = (np.asarray(stored) > 0).astype(np.uint8)
    for upright in (True, False):
        processor = ASelectImageProcessor(size=16, do_center_crop=False, num_channels=1, do_exif_transpose=upright)
        for each in (mask, Image.fromarray(mask), torch.from_numpy(mask)):
            made = processor(turned(stored, orientation), each, return_tensors="pt")
            assert torch.equal(made.pixel_values[0, 0] > 0, made.labels[0] == 1)
    # As transformers' processors, which turn nothing.
    theirs = SegformerImageProcessor(size=16, resample=0)(turned(stored.convert("RGB"), orientation), mask)
    assert np.array_equal(made.labels[0].numpy(), theirs["labels"][0])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_upright_image_is_left_as_it_is(orientation):
    stored = turned(Image.new("RGB", (16, 8)), orientation)
    mask = np.arange(128, dtype=np.uint8).reshape(16, 8)
    made = ASelectImageProcessor(size={"height": 16, "width": 8})(stored, mask, return_tensors="pt")
    assert np.array_equal(made.labels[0].numpy(), mask)


def test_masks_of_a_segmenter_are_of_the_stored_pixels(tmp_path):
    config = ASelectConfig(transformer=build_transformer(), scheduler=DDPMScheduler(), timestep=1, num_labels=2)
    save_image_processor(DiTForSemanticSegmentation(config), tmp_path)
    processor = ASelectImageProcessor.from_pretrained(tmp_path)
    image = turned(Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 16, (8, 1))), 6)
    found = processor(image, return_tensors="pt").pixel_values[0, 0]
    assert bool((found.diff(dim=1) > 0).all())  # bright at the right, as it is stored


@pytest.mark.parametrize("value", [255, 0])
def test_no_class_stays_no_class_where_labels_are_reduced(value):
    mask = np.array([[1, 2], [3, value]], np.uint8).repeat(4, 0).repeat(4, 1)
    image = Image.new("RGB", (8, 8))
    ours = ASelectImageProcessor(size=8, do_reduce_labels=True)(image, mask, return_tensors="np")
    theirs = SegformerImageProcessor(size=8, do_reduce_labels=True)(image, mask.copy(), return_tensors="np")
    assert np.array_equal(ours.labels, theirs["labels"])
    assert ours.labels.max() == 255 and ours.labels.min() == 0


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda mask: [mask[..., None]], id="last"),
        pytest.param(lambda mask: [mask[None]], id="first"),
        pytest.param(lambda mask: mask[..., None], id="one-alone"),
        pytest.param(lambda mask: mask[None, ..., None], id="a-batch"),
        pytest.param(lambda mask: torch.from_numpy(mask)[..., None], id="a-tensor"),
        pytest.param(lambda mask: [torch.from_numpy(mask)[..., None]], id="tensors"),
    ],
)
def test_a_mask_may_have_an_axis_of_one_channel(given):
    mask = np.arange(120).reshape(12, 10)
    processor = ASelectImageProcessor(size={"height": 12, "width": 10}, do_center_crop=False)
    found = processor([IMAGE], given(mask), return_tensors="np").labels
    assert np.array_equal(found[0], mask)


@pytest.mark.parametrize("value", [-1, -100])
def test_a_negative_value_may_stand_for_no_class(value, pixel_folder):
    mask = np.where(np.arange(64).reshape(8, 8) % 3 == 0, value, 1)
    processor = ASelectImageProcessor(size=8, do_center_crop=False)
    made = processor([PIXELS[:8, :8]], [mask], return_tensors="pt")
    assert torch.equal(made.labels[0], torch.from_numpy(mask))
    options = {"timestep": 5, "num_labels": 2}
    model = DiTForSemanticSegmentation.from_pretrained(pixel_folder, semantic_loss_ignore_index=value, **options)
    assert model(**made).loss.item() > 0
    with pytest.raises(ValueError, match=rf"or 255 for pixels without a class, got \[{value}\]"):
        DiTForSemanticSegmentation.from_pretrained(pixel_folder, **options)(**made)
    with pytest.raises(ValueError, match="`do_reduce_labels` requires 0 for pixels without a class"):
        processor([PIXELS[:8, :8]], [mask], do_reduce_labels=True)


def test_more_classes_than_255_cannot_be_reduced_to_255():
    mask = np.full((8, 8), 299, np.int32)
    with pytest.raises(ValueError, match="but a mask has the class 299"):
        ASelectImageProcessor(size=8, do_reduce_labels=True)(Image.new("RGB", (8, 8)), mask)
    assert ASelectImageProcessor(size=8)(Image.new("RGB", (8, 8)), Image.fromarray(mask)).labels[0].max() == 299


@pytest.mark.parametrize("ignored", [255, 7])
def test_a_class_that_is_left_out_of_the_loss_is_said(warnings, ignored):
    config = ASelectConfig(
        transformer=build_transformer(), timestep=1, num_labels=300, semantic_loss_ignore_index=ignored
    )
    DiTForSemanticSegmentation(config)
    assert f"Class {ignored} of 300 is never learned" in " ".join(warnings())


def test_a_value_that_no_class_has_is_left_out_in_silence(warnings):
    config = ASelectConfig(
        transformer=build_transformer(), timestep=1, num_labels=300, semantic_loss_ignore_index=65535
    )
    model = DiTForSemanticSegmentation(config)
    labels = torch.full((1, 8, 8), 65535)
    labels[:, 0] = 255
    assert model(torch.zeros(1, 3, 8, 8), labels=labels).loss > 0
    assert not [each for each in warnings() if "left out" in each or "foreground" in each]


def test_masks_of_0_and_255_are_said_to_have_no_foreground(warnings):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6] = 255
    ASelectImageProcessor(size=8)(Image.new("RGB", (8, 8)), mask)
    assert "If 255 is the foreground, use masks of 0 and 1" in " ".join(warnings())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_masks_of_0_and_255_are_said_so_without_the_processor(warnings, dtype):
    model = DiTForSemanticSegmentation(ASelectConfig(transformer=build_transformer(), timestep=1, num_labels=2))
    labels = torch.zeros(1, 8, 8, dtype=dtype)
    labels[:, 2:6] = 255
    model(torch.zeros(1, 3, 8, 8), labels=labels)
    assert "If 255 is the foreground" in " ".join(warnings())


def test_a_mask_with_pixels_of_no_class_is_taken_in_silence(warnings):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6], mask[7] = 255, 1
    ASelectImageProcessor(size=8)(Image.new("RGB", (8, 8)), mask)
    assert not warnings()


@pytest.mark.parametrize(("decoder", "size"), [("upernet", 8), ("linear", 2), ("upernet", 2)])
def test_a_segmenter_trains_with_one_image_in_a_batch(decoder, size, tmp_path):
    """UperNet on one image was met; a linear decoder on a single token is its sibling."""
    torch.manual_seed(0)
    options = {"decoder_hidden_size": 8, "auxiliary_hidden_size": 4, "image_size": size}
    transformer = build_transformer(num_layers=4)
    model = DiTForSemanticSegmentation(
        ASelectConfig(transformer=transformer, timestep=1, num_labels=2, decoder=decoder, **options)
    )
    before = {name: value.clone() for name, value in model.decode_head.named_parameters()}
    rows = [{"pixel_values": torch.rand(3, size, size), "labels": torch.ones(size, size).long()} for _ in range(2)]
    take_one_step(model, rows, 1, tmp_path)
    moved = [name for name, value in model.decode_head.named_parameters() if not torch.equal(value, before[name])]
    assert "classifier.weight" in moved or "head.classifier.weight" in moved
    assert all(bool(value.isfinite().all()) for value in model.decode_head.state_dict().values())
