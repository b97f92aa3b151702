"""Bad input is rejected in words that say what is wrong, and odd input gives what PIL gives; whatever it is."""

import io
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_input_table import CASES, World, file_of, outcome, table, text_of
from datasets import Dataset, Features, List, disable_progress_bars
from datasets import Image as datasets_image
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    ASelectImageProcessorPil,
    DiTForImageClassification,
    NoiseSchedule,
    TimestepSelection,
    cache_features,
    select_timestep,
)
from hf_aselect.model.configuration_aselect import DDPM_LINEAR, DIT_XL_2
from hf_aselect.model.layouts import FEATURES

NUM_CASES = 60  # at the least
MANY = [25, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    disable_progress_bars()
    return World(tmp_path_factory.mktemp("world"))


def test_there_are_enough_of_them_and_each_is_another():
    assert len({(case.kind, case.what) for case in CASES}) == len(CASES) >= NUM_CASES
    contributing = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"holds {len(CASES)} bad inputs" in contributing


# An image of mode P with transparency, among others, has PIL warn.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}: {case.what}" for case in CASES])
def test_bad_input_is_refused_in_words(case, world):
    error = outcome(case, world)
    assert isinstance(error, case.error)
    assert re.search(case.words, text_of(error)), text_of(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_table_has_a_row_of_each(tmp_path):
    assert len(table(World(tmp_path)).splitlines()) == len(CASES) + 2


def noise(mode, width=9, height=7):
    """An image of noise."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode in ("P", "1", "PA"):
        return Image.fromarray(values[..., :3]).convert("P" if mode == "PA" else mode).convert(mode)
    if mode in ("L", "LA", "F", "I"):
        return Image.fromarray(values[..., 0]).convert(mode)
    return Image.fromarray(values if mode == "RGBA" else values[..., :3]).convert(mode)


def expected(picture, num_channels):
    """What PIL makes of it, in [-1, 1]."""
    array = np.asarray(picture.convert("L" if num_channels == 1 else "RGB"), np.float32) / 127.5 - 1
    return torch.from_numpy(array[None] if num_channels == 1 else array.transpose(2, 0, 1).copy())


def of_the_processor(picture, num_channels=3):
    size = {"height": picture.height, "width": picture.width}
    processor = ASelectImageProcessor(size=size, num_channels=num_channels)
    return processor(picture, return_tensors="pt").pixel_values[0]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_pictures_of_every_mode_are_what_pil_converts_them_to(mode, num_channels):
    picture = noise(mode)
    assert picture.mode == mode
    same(of_the_processor(picture, num_channels), expected(picture, num_channels))


def test_sixteen_bits_are_the_upper_eight():
    picture = noise("I;16")
    upper = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    same(of_the_processor(picture), expected(upper, 3))


def test_transparency_does_not_show():
    picture = noise("RGB")
    for alpha in (0, 128):
        hidden = picture.copy()
        hidden.putalpha(alpha)
        same(of_the_processor(hidden), expected(picture, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_exif_entry_says(orientation):
    picture, exif = noise("RGB", 8, 16), Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(file_of(picture, "PNG", exif=exif)))
    upright = ImageOps.exif_transpose(stored)
    assert (upright.size == (16, 8)) == (orientation > 4)
    size = {"height": upright.height, "width": upright.width}
    found = ASelectImageProcessor(size=size)(stored, return_tensors="pt").pixel_values[0]
    same(found, expected(upright, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # PIL says so
@pytest.mark.parametrize("broken", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_broken_metadata_do_no_harm(broken):
    picture = Image.open(io.BytesIO(file_of(noise("RGB"), "JPEG", exif=broken)))
    same(of_the_processor(picture), expected(picture, 3))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_frame_that_is_shown_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = Image.open(io.BytesIO(file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)))
    for number, frame in enumerate(frames):
        moving.seek(number)
        same(of_the_processor(moving), expected(frame, 3))


def test_one_pixel_fills_the_picture():
    found = ASelectImageProcessor(size=8)(Image.new("RGB", (1, 1), (255, 0, 51)), return_tensors="pt").pixel_values[0]
    same(found, torch.tensor([1.0, -1.0, 51 / 127.5 - 1])[:, None, None].expand(3, 8, 8))


@pytest.mark.parametrize("size", [(10000, 3), (3, 10000)])
def test_of_a_thin_picture_the_middle_square_is_taken(size):
    picture = noise("RGB", *size)
    left, top = ((side - 3) // 2 for side in size)
    middle = picture.crop((left, top, left + 3, top + 3)).resize((8, 8), Image.Resampling.BICUBIC)
    # By PIL: torchvision's filter may differ by one step of 255.
    found = ASelectImageProcessorPil(size=8)(picture, return_tensors="pt").pixel_values[0]
    same(found, expected(middle, 3))


def test_a_view_of_a_tensor_is_read_as_its_copy(world):
    turned = world.pixels.transpose(2, 3)
    assert not turned.is_contiguous()
    with torch.no_grad():
        found, wanted = (world.model(each).last_hidden_state for each in (turned, turned.contiguous()))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pixel_values_of_other_precision_are_taken(world, dtype):
    with torch.no_grad():
        found = world.model(world.pixels.to(dtype)).last_hidden_state
        wanted = world.model(world.pixels.to(dtype).float()).last_hidden_state
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers_give_the_same_loss(world, dtype):
    labels = torch.tensor([1, 3])
    with torch.no_grad():
        losses = [world.classifier(world.pixels, labels=each).loss for each in (labels, labels.to(dtype))]
    assert torch.equal(*losses)


def test_refused_labels_leave_the_model_as_it_was(world):
    before = world.classifier.config.to_dict()
    with pytest.raises(ValueError, match="must be class indices"):
        world.classifier(world.pixels, labels=torch.tensor([0.5, 1.0]))
    assert world.classifier.config.to_dict() == before


def test_class_numbers_may_be_large(world):
    small = select_timestep(world.model, world.pictures, criterion="probe", labels=[0, 1] * 3, timesteps=[10, 500])
    large = select_timestep(world.model, world.pictures, criterion="probe", labels=[7, 10**9] * 3, timesteps=[10, 500])
    assert small.scores == large.scores
    masks = [np.random.default_rng(each).integers(0, 2, (10, 12)) for each in range(6)]
    both = [[mask * factor for mask in masks] for factor in (1, 10**9)]
    choices = [
        select_timestep(world.model, world.pictures, criterion="patch_probe", labels=each, timesteps=[10, 500])
        for each in both
    ]
    assert choices[0].scores == choices[1].scores


@pytest.mark.parametrize("scale", [0.9, 1.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_picture_of_fractions_is_near_to_that_of_bytes(dtype, scale):
    """Resizing keeps them as they are; transformers would take whole numbers alone."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    processor = ASelectImageProcessor(size=8)
    found = processor((values * dtype(scale)).astype(dtype), return_tensors="pt").pixel_values
    wanted = processor(Image.fromarray((values * scale).round().astype(np.uint8)), return_tensors="pt").pixel_values
    assert float((found - wanted).abs().max()) < 2.5 / 127.5


def test_a_picture_in_0_to_1_is_resized_smoothly_whatever_it_holds():
    halves = np.zeros((8, 8, 3), dtype=np.float32)
    halves[:, 4:] = 1
    processor = ASelectImageProcessor(size=16, do_rescale=False)
    found = processor(halves, return_tensors="pt").pixel_values[0, 0, 0]
    assert float((found + 1).frac().abs().max()) > 0 and float(found.min()) >= -1 and float(found.max()) <= 1


def test_labels_left_out_altogether_give_no_loss_and_no_gradient(world):
    """As in one small batch of several whose gradients are accumulated."""
    output = world.classifier(world.pixels, labels=torch.tensor([-100, -100]))
    output.loss.backward()
    gradients = [each.grad for each in world.classifier.classifier.parameters() if each.grad is not None]
    assert float(output.loss.detach()) == 0 and gradients and all(not each.any() for each in gradients)
    world.classifier.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_labels_of_several_classes_may_be_of_any_dtype(world, dtype):
    labels = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    config = ASelectConfig.from_dict(
        {**world.classifier.config.to_dict(), "problem_type": "multi_label_classification"}
    )
    torch.manual_seed(0)
    model = DiTForImageClassification(config).eval()
    output = model(world.pixels, labels=labels.to(dtype))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels.float())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("num_labels", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_labels_of_a_regression_may_be_of_any_dtype(world, num_labels, dtype):
    fields = {**world.classifier.config.to_dict(), "problem_type": "regression"}
    names = {number: str(number) for number in range(num_labels)}
    model = DiTForImageClassification(ASelectConfig.from_dict({**fields, "id2label": names, "label2id": None})).eval()
    labels = torch.tensor([[2] * num_labels, [0] * num_labels]).to(dtype)
    output = model(world.pixels, labels=labels)
    torch.testing.assert_close(output.loss, ((output.logits - labels.float()) ** 2).mean())


def test_a_regression_to_minus_100_is_learnt(world):
    """Only of classes it means that they are left out."""
    fields = {**world.classifier.config.to_dict(), "problem_type": "regression"}
    model = DiTForImageClassification(ASelectConfig.from_dict(fields)).eval()
    with torch.no_grad():
        assert float(model(world.pixels, labels=torch.full((2, 4), -100.0)).loss) > 1000


@pytest.mark.parametrize("kind", [int, str])
def test_names_of_classes_given_on_loading_are_taken_whole(world, kind):
    names = {kind(number): name for number, name in enumerate("abcd")}
    model = DiTForImageClassification.from_pretrained(world.saved, id2label=names)
    assert model.config.id2label == dict(enumerate("abcd"))
    assert model.config.label2id == {name: number for number, name in enumerate("abcd")}
    two = DiTForImageClassification.from_pretrained(
        world.saved, id2label={kind(0): "x", kind(1): "y"}, ignore_mismatched_sizes=True
    )
    assert two.config.label2id == {"x": 0, "y": 1} and two.config.num_labels == 2
    with torch.no_grad():
        assert two(world.pixels).logits.shape == (2, 2)


def test_safetensors_may_be_left_to_the_host(world):
    assert DiTForImageClassification.from_pretrained(world.saved, use_safetensors=None).config.timestep == 50


def test_a_mask_is_turned_as_its_picture():
    """Both as a camera that was held upside down stores them."""
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = [Image.open(io.BytesIO(file_of(noise(mode, 8, 16), "PNG", exif=exif))) for mode in ("RGB", "L")]
    found = ASelectImageProcessor(size={"height": 16, "width": 8})(*stored, return_tensors="np").labels[0]
    assert np.array_equal(found, np.asarray(noise("L", 8, 16))[::-1, ::-1])


def test_stages_named_in_a_file_do_not_replace_those_of_the_transformer(world):
    values = {**world.classifier.config.to_dict(), "stage_names": ["a", "b"]}
    assert ASelectConfig.from_dict(values).stage_names == world.classifier.config.stage_names


def test_a_column_of_lists_of_pictures_is_not_kept(world, tmp_path):
    lists = Dataset.from_dict(
        {"image": world.pictures, "more": [[picture] for picture in world.pictures]},
        features=Features(image=datasets_image(), more=List(datasets_image())),
    )
    assert cache_features(world.model, lists, tmp_path).column_names == ["features"]


def hold(check, examples, *strategies):
    """Let hypothesis try a check on examples; the same each time."""
    suppressed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=suppressed
    )
    chosen(given(*strategies)(check))()


# What a JSON file may hold.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted(name for name in ASelectConfig.__annotations__ if not name.startswith("_") and name != "model_type")
TINY = {**DIT_XL_2, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.mark.parametrize("examples", MANY)
def test_any_configuration_is_refused_or_comes_back(examples):
    def check(values):
        try:
            made = ASelectConfig.from_dict(values)
        except (ValueError, StrictDataclassError) as error:
            cause = error.__cause__ if type(error).__name__ == "StrictDataclassClassValidationError" else None
            assert cause is None or isinstance(cause, ValueError), values
            assert text_of(error)
            return
        again = ASelectConfig.from_dict(json.loads(json.dumps(made.to_dict())))
        assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(made.to_dict(), sort_keys=True)

    hold(check, examples, st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))


@pytest.mark.parametrize("examples", MANY)
def test_a_configuration_in_range_comes_back_as_it_was(examples):
    def check(timestep, block, feature, grid, seed, num_labels):
        size = [2 * side for side in grid]
        fields = {"timestep": timestep, "block": block, "feature": feature, "image_size": size, "noise_seed": seed}
        made = ASelectConfig(transformer=TINY, num_labels=num_labels, **fields)
        again = ASelectConfig.from_dict(json.loads(json.dumps(made.to_dict())))
        assert {name: getattr(again, name) for name in fields} == fields
        assert again.num_labels == num_labels and again.block_index() == block % 4

    grids = st.tuples(st.integers(1, 64), st.integers(1, 64))
    timesteps = st.integers(0, 999) | st.just("auto")
    taps = st.integers(-4, 3), st.sampled_from(FEATURES)
    hold(check, examples, timesteps, *taps, grids, st.integers(0, 2**32 - 1), st.integers(1, 50))


@pytest.mark.parametrize("examples", MANY)
def test_any_scheduler_is_refused_or_makes_noise(examples):
    def check(values):
        try:
            made = NoiseSchedule.from_config({**DDPM_LINEAR, **values})
        except ValueError:
            return
        assert bool((made.alphas.diff() <= 0).all() and (made.sigmas.diff() >= 0).all())
        assert made.alphas.isfinite().all() and made.sigmas.isfinite().all() and float(made.sigmas.max()) > 0
        assert all(0 <= timestep < 1000 for timestep in made.even_timesteps(5))

    names = ["_class_name", "beta_start", "beta_end", "beta_schedule", "trained_betas", "shift", "prediction_type"]
    names += ["num_train_timesteps", "rescale_betas_zero_snr", "use_flow_sigmas"]
    near = JSON | st.floats(0, 1) | st.sampled_from(["scaled_linear", "sigmoid", "FlowMatchEulerDiscreteScheduler"])
    hold(check, examples, st.dictionaries(st.sampled_from(names), near, max_size=4))


@pytest.mark.parametrize("examples", MANY)
def test_noise_levels_in_range_are_found_again(examples):
    def check(start, end, timestep):
        made = NoiseSchedule.from_config({**DDPM_LINEAR, "beta_start": start, "beta_end": end})
        level = float(made.log_snr(timestep))
        assert math.isclose(float(made.log_snr(made.timestep_at(level))), level, abs_tol=1e-9)
        assert math.isclose(float(made.alpha(timestep) ** 2 + made.sigma(timestep) ** 2), 1, abs_tol=1e-9)

    hold(check, examples, st.floats(1e-5, 1e-3), st.floats(2e-3, 5e-2), st.integers(0, 999))


RECORD = {"timestep": 5, "timesteps": [1, 5], "scores": [0.1, 0.2], "smoothed": [0.1, 0.2], "block": 1, "seed": 0}
RECORD |= {"intervals": [[0.0, 0.2], [0.1, 0.3]], "log_snr": [3.0, 1.0], "confidence": 0.9, "criterion": "hfr"}
RECORD |= {"settings": {}, "options": {}, "feature": "query", "num_images": 4, "pictures": "given", "num_forwards": 8}
RECORD |= {"stopped_by": "confidence", "seconds": 1.5, "warnings": [], "massive_channels": None, "table": None}


@pytest.mark.parametrize("examples", MANY)
def test_any_record_is_refused_or_comes_back(examples):
    def check(values, dropped):
        record = {name: value for name, value in {**RECORD, **values}.items() if name not in dropped}
        try:
            made = TimestepSelection.from_dict(record)
        except ValueError as error:
            assert str(error).startswith("A saved selection")
            return
        again = TimestepSelection.from_dict(json.loads(json.dumps(made.to_dict())))
        assert json.dumps(again.to_dict()) == json.dumps(made.to_dict())

    names = st.sampled_from(sorted(RECORD))
    hold(check, examples, st.dictionaries(names, JSON, max_size=3), st.sets(names, max_size=1))


@pytest.mark.parametrize("examples", MANY)
def test_any_array_is_refused_or_becomes_a_picture(examples):
    processor = ASelectImageProcessor(size=8)

    def check(array):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = processor(array, return_tensors="pt").pixel_values
            except ValueError as error:
                assert str(error)
                return
        assert found.shape[1:] == (3, 8, 8) and found.dtype == torch.float32
        assert bool((found.abs() <= 1 + 1e-6).all())

    kinds = arrays.scalar_dtypes() | st.sampled_from([np.dtype(np.uint8), np.dtype(np.float32)])
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12)
    channels = shapes | st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 2, 3, 4]))
    hold(check, examples, kinds.flatmap(lambda kind: arrays.arrays(kind, channels)))


@pytest.mark.parametrize("examples", MANY)
def test_any_picture_has_the_size_and_range_asked_for(examples):
    def check(mode, width, height, rows, columns, num_channels, crop):
        processor = ASelectImageProcessor(
            size={"height": rows, "width": columns}, num_channels=num_channels, do_center_crop=crop
        )
        found = processor(noise(mode, width, height), return_tensors="pt").pixel_values
        assert found.shape == (1, num_channels, rows, columns)
        assert bool((found.abs() <= 1 + 1e-6).all())

    sides = [st.integers(1, 40)] * 4
    modes = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
    hold(check, examples, modes, *sides, st.sampled_from([1, 3]), st.booleans())


@pytest.mark.parametrize("examples", MANY)
def test_any_tensor_is_refused_or_read(examples, world):
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]

    def check(shape, dtype, value, name):
        tensor = torch.full(shape, value).to(dtype)
        is_right = len(shape) == 4 and shape[0] > 0 and shape[1] == 3
        is_right = is_right and all(side and not side % 2 for side in shape[2:])
        is_right = is_right and dtype.is_floating_point and bool(tensor.isfinite().all())
        is_right = is_right and (name == "latents" or bool((tensor.abs() <= 10).all()))
        try:
            with torch.no_grad():
                found = world.model(**{name: tensor}).last_hidden_state
        except ValueError as error:
            assert not is_right, error
            return
        assert is_right
        assert found.shape == (shape[0], shape[2] * shape[3] // 4, 16)
        assert bool(found.isfinite().all())

    right = st.tuples(st.integers(0, 2), st.sampled_from([1, 3]), st.integers(0, 9), st.integers(0, 9))
    shapes = right | st.lists(st.integers(0, 5), max_size=5).map(tuple)
    values = st.sampled_from([0.0, 1.0, -1.0, 255.0, math.nan, math.inf])
    names = st.sampled_from(["pixel_values", "latents"])
    hold(check, examples, shapes, st.sampled_from(dtypes), values, names)


@pytest.mark.parametrize("examples", MANY)
def test_any_labels_are_refused_or_learnt_from(examples, world):
    dtypes = [torch.float32, torch.uint8, torch.int16, torch.int64, torch.bool]

    def check(labels, dtype, is_column):
        given_labels = torch.tensor(labels).to(dtype)
        given_labels = given_labels[:, None] if is_column and len(labels) else given_labels
        before = world.classifier.config.problem_type
        try:
            with torch.no_grad():
                loss = world.classifier(world.pixels, labels=given_labels).loss
        except (ValueError, RuntimeError, IndexError) as error:
            assert isinstance(error, ValueError), error
            world.classifier.config.problem_type = before
            return
        world.classifier.config.problem_type = before
        assert bool(loss.isfinite())

    hold(check, examples, st.lists(st.integers(-100, 5), max_size=4), st.sampled_from(dtypes), st.booleans())
