"""Heads that standardize what they read: measured with the selection, saved, trained, folded, cached, adapted."""

import copy
import json
import logging

import pytest
import torch
from conftest import HEAD, build_transformer, enable_checkpointing
from datasets import Dataset
from diffusers import DDPMScheduler
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_aselect import (
    ASelectConfig,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    TimestepSelection,
    cache_features,
    select_timestep,
)
from hf_aselect.model.heads import FeatureStandardization, token_map
from hf_aselect.model.modeling_segmentation import enlarge
from hf_aselect.selection.apply import apply_selection
from hf_aselect.selection.distribution import Share
from hf_aselect.selection.standardization import TokenMoments, read_moments, scale_and_shift

TIMESTEP = 300
# Where what the fixed noise does to the tokens is a hundred times what differs between images, or more.
LARGE = 900
UPERNET = {"decoder": "upernet", "decoder_hidden_size": 8, "auxiliary_hidden_size": 4}


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A DiT of eight blocks, which an UperNet can read."""
    folder = tmp_path_factory.mktemp("deep")
    build_transformer(num_layers=8).save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def images(count=24, size=8, seed=5):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def loaded(pixel_folder):
    torch.manual_seed(1)
    return DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=TIMESTEP, calibration_images=images(), num_labels=4, **HEAD
    )


@pytest.fixture
def standardized(loaded):
    """A classifier with a new head, standardized by 24 images."""
    return copy.deepcopy(loaded)


def logits(model, pixel_values=None, **given):
    model.eval()
    if pixel_values is None and not given:
        pixel_values = images(5, seed=6)
    with torch.no_grad():
        return model(pixel_values=pixel_values, **given).logits


def buffers(model):
    return {name: value for name, value in model.named_buffers() if "standardization" in name}


def between(tokens):
    """The mean square of what differs between images, of each channel."""
    return (tokens - tokens.mean(0)).square().mean((0, 1))


def test_what_differs_between_images_has_a_mean_square_of_one(pixel_folder):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=LARGE, calibration_images=images(), num_labels=4, **HEAD
    )
    with torch.no_grad():
        raw = model.extract_features(images())
        tokens = model.classifier.standardization(raw, (4, 4))
    # Not so before: the images' tokens are almost equal.
    assert float((between(raw) / raw.square().mean((0, 1))).max()) < 0.02
    torch.testing.assert_close(between(tokens), torch.ones(16), rtol=1e-3, atol=1e-3)
    assert model.config.standardized_grid == [4, 4]


def test_an_attention_head_learns_where_it_could_not(pixel_folder):
    """Classes differ in the mean colour. At a large timestep tokens are almost the same for all images."""
    train, labels = images(64), torch.arange(64) % 2
    train = (train * 0.5 + (labels * 1.0 - 0.5)[:, None, None, None]).clamp(-1, 1)
    losses = {}
    for given in (train, None):
        torch.manual_seed(0)
        model = DiTForImageClassification.from_pretrained(
            pixel_folder, timestep=990, calibration_images=given, num_labels=2, **HEAD
        )
        with torch.no_grad():
            features = model.extract_features(train)
        optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
        for _ in range(20):
            loss = model(features=features, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[given is None] = loss.item()
    assert losses[False] < 0.1 and losses[True] > 0.5, losses


def test_a_selection_standardizes_the_head(pixel_folder, pixels, tmp_path):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep="auto", calibration_images=pixels, num_labels=4, **HEAD
    )
    with torch.no_grad():
        tokens = model.classifier.standardization(model.extract_features(pixels), (4, 4))
    torch.testing.assert_close(between(tokens), torch.ones(16), rtol=1e-3, atol=1e-3)
    record = model.config.selection
    assert 0 < record["share_between_images"] < 1 and "standardization" not in record
    model.save_pretrained(tmp_path)
    for kind in (DiTForImageClassification, AutoModelForImageClassification):
        again = kind.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert again.config.standardized_grid == [4, 4]
        assert TimestepSelection.from_dict(again.config.selection) == TimestepSelection.from_dict(record)


def test_the_share_between_images_falls_as_noise_grows(model, pixels):
    little, much = (select_timestep(model, pixels, criterion="hfr", timesteps=[timestep]) for timestep in (0, 980))
    assert little.share_between_images > 5 * much.share_between_images > 0
    assert little.standardization is None, "a model without a head has nothing to standardize"


def test_statistics_are_of_all_noise_draws(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep="auto", calibration_images=pixels, num_noise_draws=3, num_labels=4, **HEAD
    )
    with torch.no_grad():
        tokens = model.classifier.standardization(model.extract_features(pixels))
    torch.testing.assert_close(between(tokens), torch.ones(16), rtol=1e-3, atol=1e-3)


def test_fresh_noise_in_training_leaves_positions_as_they_are(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder,
        timestep=300,
        calibration_images=pixels,
        resample_noise_in_training=True,
        num_labels=4,
        **HEAD,
    )
    shift = model.classifier.standardization.shift
    assert torch.equal(shift, shift[:1, :1].expand_as(shift))
    with torch.no_grad():
        tokens = model.classifier.standardization(model.extract_features(pixels))
    torch.testing.assert_close(tokens.mean((0, 1)), torch.zeros(16), rtol=0, atol=1e-4)


def test_zeroed_channels_stay_zero(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=300, calibration_images=pixels, zeroed_channels=[3], num_labels=4, **HEAD
    )
    with torch.no_grad():
        tokens = model.classifier.standardization(model.extract_features(pixels))
    assert not tokens[..., 3].any() and tokens[..., 2].any()


def test_parts_of_the_images_add_up_to_all():
    tokens = torch.randn(10, 6, 4) * 0.01 + torch.randn(6, 4) * 5
    whole = TokenMoments.from_origin(tokens[0])
    whole.add(tokens)
    parts = []
    for part in (tokens[3:7], tokens[:3], tokens[7:]):
        parts.append(TokenMoments.from_origin(part[0]))
        parts[-1].add(part)
    combined = TokenMoments.combined(parts)
    assert combined.count == 10
    for one, other in zip(scale_and_shift(whole), scale_and_shift(combined), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_process_without_images_has_the_statistics_of_the_others(standardized, monkeypatch):
    """Three processes of two images."""
    from hf_aselect.selection.images import CalibrationPictures
    from hf_aselect.selection.reader import Reader

    def read(share):
        pictures = CalibrationPictures(images(2), standardized.config, 2, seed=0)
        reader = Reader(standardized, pictures, {}, 0, 32, seed=0)
        with torch.no_grad():
            return read_moments(reader, [(TIMESTEP, 1, "query")], 2, share)

    gathered = []

    def gather(self, value):
        gathered.append(value)
        return [value]

    expected, grid = read(Share())
    monkeypatch.setattr(Share, "gather", gather)
    for rank in range(2):
        read(Share(rank, 3))
    gathered.append(({}, None))
    monkeypatch.setattr(Share, "gather", lambda self, value: gathered)
    found, also = read(Share(2, 3))
    assert also == grid == (4, 4)
    key = TIMESTEP, 1, "query"
    for one, other in zip(*(scale_and_shift(each[key]) for each in (expected, found)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_trained_head_is_saved_with_its_statistics(standardized, tmp_path):
    before = {name: value.clone() for name, value in buffers(standardized).items()}
    rows = [{"pixel_values": each, "labels": index % 4} for index, each in enumerate(images())]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, save_steps=3, use_cpu=True, report_to="none")
    Trainer(standardized, arguments, train_dataset=rows).train()
    assert all(torch.equal(value, before[name]) for name, value in buffers(standardized).items())
    again = DiTForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(logits(again), logits(standardized))


def test_two_saves_are_equal(standardized, tmp_path):
    standardized.save_pretrained(tmp_path / "first")
    DiTForImageClassification.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_without_statistics_nothing_changes(classifier):
    assert classifier.config.standardize_features and classifier.config.standardized_grid is None
    assert not [name for name in classifier.state_dict() if "standardization" in name]
    tokens = torch.randn(2, 16, 16)
    assert classifier.classifier.standardization(tokens, (4, 4)) is tokens


def test_a_checkpoint_from_before_is_not_standardized(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["standardize_features"] is True
    del content["standardize_features"], content["standardized_grid"]
    path.write_text(json.dumps(content), encoding="utf-8")
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert again.config.standardize_features is False
    assert torch.equal(logits(again), logits(classifier))
    again.save_pretrained(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["standardize_features"] is False
    found = DiTForImageClassification.from_pretrained(tmp_path, timestep="auto", calibration_images=pixels)
    assert found.config.standardized_grid is None and not buffers(found)
    assert DiTForImageClassification.from_pretrained(tmp_path, standardize_features=True).config.standardize_features


def test_it_can_be_turned_off(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep="auto", calibration_images=pixels, standardize_features=False, num_labels=4, **HEAD
    )
    assert model.config.standardized_grid is None and not buffers(model)
    assert model.config.selection["share_between_images"] > 0


@pytest.mark.parametrize("fields", [{"standardized_grid": [4]}, {"standardized_grid": [4, 0]}])
def test_a_grid_that_cannot_be_is_refused(fields):
    with pytest.raises(StrictDataclassError, match="must be None or two positive integers, the rows and columns"):
        ASelectConfig(**fields)


def test_a_model_built_of_its_configuration_has_no_holes(standardized):
    built = DiTForImageClassification(standardized.config)
    assert torch.equal(built.classifier.standardization.scale, torch.ones(16))
    assert torch.equal(built.classifier.standardization.shift, torch.zeros(4, 4, 16))
    for value in buffers(built).values():
        value.fill_(float("nan"))  # as memory that nobody wrote to
    built._init_weights(built.classifier.standardization)
    assert all(bool(value.isfinite().all()) for value in buffers(built).values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # peft's, of a base that diffusers saved
def test_an_adapter_brings_its_statistics(standardized, pixel_folder, tmp_path):
    # What diffusers saved has none; the adapter would be read on tokens that its head never saw.
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(standardized, config)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)

    def base():
        return DiTForImageClassification.from_pretrained(pixel_folder, timestep=TIMESTEP, num_labels=4, **HEAD)

    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), expected)
    # A second adapter, which is not the active one while it is loaded.
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = DiTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged)) and loaded.config.standardized_grid == [4, 4]


def test_a_state_brings_its_statistics(standardized, classifier):
    classifier.config.timestep = TIMESTEP
    classifier.load_state_dict(standardized.state_dict())
    assert torch.equal(logits(classifier), logits(standardized))
    assert classifier.config.standardized_grid == [4, 4]


def test_a_folded_model_gives_the_same(standardized, tmp_path):
    folded = standardized.fold()
    torch.testing.assert_close(logits(folded), logits(standardized), rtol=1e-5, atol=1e-5)
    folded.save_pretrained(tmp_path)
    assert torch.equal(logits(DiTForImageClassification.from_pretrained(tmp_path)), logits(folded))
    with pytest.raises(ValueError, match="A folded model cannot be standardized"):
        folded.standardize(images())


@pytest.mark.parametrize("head", ["attention", "linear"])
def test_cached_features_give_the_same(pixel_folder, tmp_path, head):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=TIMESTEP, calibration_images=images(), num_labels=4, head=head, **HEAD
    )
    values = (images(6).permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().astype("uint8")
    dataset = Dataset.from_dict({"image": [Image.fromarray(each) for each in values]})
    pixel_values = torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1
    expected = logits(model, pixel_values)
    for what in ["tokens", "pooled"] if head == "linear" else ["tokens"]:
        cached = cache_features(model, dataset, tmp_path, what=what, dtype="float32")
        torch.testing.assert_close(logits(model, features=cached[:]["features"]), expected, rtol=1e-5, atol=1e-5)
    raw = model.extract_features(pixel_values)
    cached = cache_features(model, dataset, tmp_path, dtype="float32")
    torch.testing.assert_close(cached[:]["features"], raw, rtol=1e-5, atol=1e-5)
    folders = set(tmp_path.iterdir())
    model._set_standardization(None)
    cache_features(model, dataset, tmp_path, dtype="float32")
    assert set(tmp_path.iterdir()) == folders, "the cache holds tokens as they are, whatever standardizes them"


def test_cached_features_of_another_size_are_refused(standardized):
    with pytest.raises(ValueError, match="`features` have 9 tokens, but the head's statistics 4×4"):
        standardized(features=torch.zeros(2, 9, 16))


@pytest.mark.parametrize("cast", ["loaded", "cast"])
def test_statistics_stay_in_float32(standardized, tmp_path, cast):
    standardized.save_pretrained(tmp_path)
    half = (
        DiTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        if cast == "loaded"
        else copy.deepcopy(standardized).to(torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    own = buffers(standardized)
    assert len(own) == 2 and all(torch.equal(value, own[name]) for name, value in buffers(half).items())
    assert all(value.dtype == torch.float32 for value in buffers(half).values())
    expected = logits(standardized)
    assert float((logits(half).float() - expected).abs().mean() / expected.std()) < 0.1
    half.half().float()
    assert all(torch.equal(value, own[name]) for name, value in buffers(half).items())


def test_other_sizes_are_read(standardized):
    larger, wide = images(3, size=16), images(3, size=16)[:, :, :8]
    for pixel_values, grid in ((larger, (8, 8)), (wide, (4, 8))):
        raw = standardized.extract_features(pixel_values)
        tokens = standardized.classifier.standardization(raw, grid)
        shift = standardized.classifier.standardization.shift.permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(shift, size=grid, mode="bilinear")[0].flatten(1).T
        torch.testing.assert_close(
            tokens - raw * standardized.classifier.standardization.scale, expected.expand_as(tokens)
        )
        assert logits(standardized, pixel_values).isfinite().all()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 follows no `hasattr` of a number")
def test_it_is_compiled_and_exported_whole(standardized):
    folded = standardized.fold().eval()
    pixel_values = images(3)
    with torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="eager")(pixel_values).logits
        torch.testing.assert_close(compiled, logits(folded, pixel_values))
        shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
        exported = torch.export.export(
            folded, (), kwargs={"pixel_values": pixel_values}, dynamic_shapes=shapes, strict=False
        )
        found = exported.module()(pixel_values=images(7)).logits
    torch.testing.assert_close(found, logits(folded, images(7)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, UPERNET], ids=["linear", "upernet"])
def test_segmenters_standardize_each_tap(deep_folder, tmp_path, fields):
    model = DiTForSemanticSegmentation.from_pretrained(
        deep_folder, timestep="auto", calibration_images=images(), num_labels=3, **fields
    )
    read_outs = model.backbone.read_outs()
    assert len(buffers(model)) == 2 * len(read_outs) == (8 if fields else 2)
    with torch.no_grad():
        read, grid = model._read(read_outs, images())
        for each, at in zip(model.decode_head.standardization, read_outs, strict=True):
            torch.testing.assert_close(between(each(read[at], grid)), torch.ones(16), rtol=1e-3, atol=1e-3)
        heads = zip(model.decode_head.standardization, read_outs, strict=True)
        found = model.decode_head([token_map(each(read[at], grid), *grid) for each, at in heads])[0]
    torch.testing.assert_close(logits(model, images()), enlarge(found, (8, 8)))
    model.save_pretrained(tmp_path)
    again = DiTForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(model.fold()), logits(model), rtol=1e-5, atol=1e-5)


def test_zeroed_channels_of_an_upernets_other_blocks_stay_zero(deep_folder):
    model = DiTForSemanticSegmentation.from_pretrained(
        deep_folder,
        timestep="auto",
        calibration_images=images(),
        zeroed_channels={"1.query": [2]},
        num_labels=3,
        **UPERNET,
    )
    assert model.backbone.taps()[0] == (1, "query") != (model.config.block, "query")
    with torch.no_grad():
        tokens = model.decode_head.standardization[0](model.extract_features(images(), block=1))
    assert not tokens[..., 2].any() and tokens[..., 3].any()


def test_tokens_and_maps_stay_raw(standardized, tmp_path):
    standardized.save_pretrained(tmp_path)
    expected = standardized.extract_features(images(3))
    tokens = DiTModel.from_pretrained(tmp_path)
    assert torch.equal(tokens(images(3)).last_hidden_state, expected)
    assert tokens.config.standardized_grid is None
    assert DiTBackbone.from_pretrained(tmp_path).config.standardized_grid is None


def test_another_task_begins_without_the_statistics_of_a_head(standardized, tmp_path):
    standardized.save_pretrained(tmp_path)
    segmenter = DiTForSemanticSegmentation.from_pretrained(tmp_path)
    assert segmenter.config.standardized_grid is None and not buffers(segmenter)
    segmenter = DiTForSemanticSegmentation.from_pretrained(tmp_path, calibration_images=images())
    assert segmenter.config.standardized_grid == [4, 4] and len(buffers(segmenter)) == 2


def test_another_head_keeps_the_statistics(standardized, tmp_path):
    standardized.save_pretrained(tmp_path)
    linear = DiTForImageClassification.from_pretrained(tmp_path, head="linear", ignore_mismatched_sizes=True)
    own = buffers(standardized)
    assert len(own) == 2 and all(torch.equal(value, own[name]) for name, value in buffers(linear).items())
    seven = DiTForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert all(torch.equal(value, own[name]) for name, value in buffers(seven).items())


@pytest.mark.parametrize(
    "change", [{"timestep": 5}, {"block": 0}, {"feature": "key"}, {"noise_seed": 1}, {"num_noise_draws": 2}]
)
def test_statistics_of_what_is_not_read_any_more_are_left_out(standardized, tmp_path, caplog, change):
    standardized.save_pretrained(tmp_path)
    model = DiTForImageClassification.from_pretrained(tmp_path, **change)
    assert model.config.standardized_grid is None and not buffers(model)
    assert "belong to another timestep or tap" in caplog.text
    model = DiTForImageClassification.from_pretrained(tmp_path, calibration_images=images(), **change)
    assert len(buffers(model)) == 2


def test_the_same_by_another_name_keeps_its_statistics(standardized, tmp_path):
    standardized.save_pretrained(tmp_path)
    block = standardized.config.block - standardized.config.num_hidden_layers
    model = DiTForImageClassification.from_pretrained(tmp_path, timestep=TIMESTEP, block=block, image_size=8)
    assert torch.equal(logits(model), logits(standardized))


def test_a_saved_record_removes_the_statistics_of_another_timestep(standardized, caplog):
    record = select_timestep(standardized, images(), criterion="hfr", timesteps=[5, TIMESTEP])
    saved = TimestepSelection.from_dict(record.to_dict())
    assert saved == record and saved.standardization is None
    here, elsewhere = copy.copy(record.to_dict()), copy.copy(record.to_dict())
    here["timestep"], elsewhere["timestep"] = TIMESTEP, 5
    before = logits(standardized)
    standardized.apply_selection(TimestepSelection.from_dict(here))
    assert torch.equal(logits(standardized), before) and "removed" not in caplog.text
    standardized.apply_selection(TimestepSelection.from_dict(elsewhere))
    assert standardized.config.standardized_grid is None and not buffers(standardized)
    assert caplog.text.count("belong to another timestep or tap, and a saved selection has none") == 1


def test_models_do_not_share_the_statistics_of_a_selection(standardized, classifier):
    record = select_timestep(standardized, images(), criterion="hfr", timesteps=[TIMESTEP])
    for model in (standardized, classifier):
        model.apply_selection(record)
    classifier.load_state_dict({name: value * 2 for name, value in classifier.state_dict().items()})
    own, others = buffers(standardized), buffers(classifier)
    assert len(own) == 2 and all(torch.equal(value * 2, others[name]) for name, value in own.items())
    measured = record.standardization[TIMESTEP, 1, "query"]
    assert all(torch.equal(*pair) for pair in zip(measured, own.values(), strict=True))


def test_a_training_that_goes_on_keeps_its_statistics(standardized, classifier):
    """Trainer loads the weights of a checkpoint, and then the callback takes the selection that they began with."""
    record = select_timestep(standardized, images(), criterion="hfr", timesteps=[TIMESTEP])
    standardized.apply_selection(record)
    classifier.config.timestep = "auto"
    classifier.load_state_dict(standardized.state_dict())
    classifier.apply_selection(TimestepSelection.from_dict(record.to_dict()))
    assert torch.equal(logits(classifier), logits(standardized))


def test_a_training_that_follows_the_selection_keeps_its_statistics(standardized, classifier):
    """The model was made at the first timestep, and the weights of the checkpoint are of a later one."""
    record = select_timestep(standardized, images(), criterion="hfr", timesteps=[TIMESTEP])
    classifier.standardize(images())
    classifier.load_state_dict(standardized.state_dict())
    apply_selection(classifier, TimestepSelection.from_dict(record.to_dict()), are_statistics_kept=True)
    assert torch.equal(logits(classifier), logits(standardized))


def test_a_new_head_at_a_fixed_timestep_says_that_it_is_not_standardized(pixel_folder, caplog):
    with caplog.at_level(logging.INFO, logger="hf_aselect"):
        model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4, **HEAD)
    (said,) = [each for each in caplog.records if "are not standardized" in each.getMessage()]
    assert said.levelno == logging.INFO and "model.standardize(images)" in said.getMessage()
    with torch.no_grad():
        raw = logits(model)
    model.standardize(images())
    assert len(buffers(model)) == 2 and not torch.equal(logits(model), raw)


def test_standardizing_in_memory_is_the_same_as_while_loading(standardized, pixel_folder):
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=TIMESTEP, num_labels=4, **HEAD)
    model.standardize(images())
    own = buffers(standardized)
    assert all(torch.equal(value, own[name]) for name, value in buffers(model).items())
    model.standardize(images(), max_images=7)
    assert not any(torch.equal(value, own[name]) for name, value in buffers(model).items())


def test_nothing_else_is_touched(pixel_folder, pixels):
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=LARGE, num_labels=4, **HEAD).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.random.get_rng_state()
    model.standardize(pixels)
    assert model.training and torch.equal(torch.random.get_rng_state(), numbers)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (DiTModel, {}, "a DiTModel has no head"),
        (DiTBackbone, {}, "a DiTBackbone has no head"),
        (DiTForImageClassification, {}, "the head was trained with the statistics that it has"),
        (
            DiTForImageClassification,
            {"standardize_features": False},
            "`standardize_features=False` leaves no other use",
        ),
    ],
)
def test_images_without_a_use_are_refused(standardized, tmp_path, kind, fields, words):
    standardized.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the timestep is fixed at {TIMESTEP}. Pass `timestep='auto'` .*: {words}"):
        kind.from_pretrained(tmp_path, calibration_images=images(), **fields)


def test_a_head_that_was_trained_on_tokens_as_they_are_is_left_alone(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the head was trained on features that are not standardized"):
        DiTForImageClassification.from_pretrained(tmp_path, calibration_images=images())


def test_what_cannot_be_standardized_is_refused(model, classifier):
    with pytest.raises(ValueError, match="A DiTModel has no head, so there are no features to standardize"):
        model.standardize(images())
    with pytest.raises(ValueError, match="at least 2 images to standardize features, got 1"):
        classifier.standardize(images(1))
    with pytest.raises(ValueError, match="`max_images` must be a positive integer, got 0"):
        classifier.standardize(images(), max_images=0)
    with pytest.raises(ValueError, match="`images` is empty"):
        classifier.standardize([])
    classifier.config.timestep = "auto"
    with pytest.raises(ValueError, match="still 'auto'"):
        classifier.standardize(images())
    classifier.config.standardize_features = False
    with pytest.raises(ValueError, match=r"`config\.standardize_features` is False"):
        classifier.standardize(images())
    assert not buffers(classifier)


def test_one_image_selects_and_standardizes_nothing(pixel_folder):
    selection = select_timestep(
        DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4, **HEAD),
        images(1),
        criterion="hfr",
        timesteps=[5, 500],
    )
    assert selection.share_between_images is None and selection.standardization is None


def test_a_record_from_before_still_loads(model, pixels):
    record = select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500]).to_dict()
    del record["share_between_images"]
    assert TimestepSelection.from_dict(record).share_between_images is None
    with pytest.raises(ValueError, match="unknown \\['standardization'\\]"):
        TimestepSelection.from_dict({**record, "standardization": None})


def test_a_mean_is_standardized_as_the_mean_of_tokens():
    each = FeatureStandardization(4, (3, 2))
    each.scale, each.shift = torch.rand(4) + 0.5, torch.randn(3, 2, 4)
    tokens = torch.randn(5, 6, 4)
    torch.testing.assert_close(each.mean(tokens), each(tokens).mean(1))
    torch.testing.assert_close(each(tokens.mean(1)), each(tokens).mean(1))


def test_a_frozen_or_trained_backbone_gets_its_gradients(pixel_folder):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=LARGE, calibration_images=images(), freeze_backbone=False, num_labels=4, **HEAD
    ).train()
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            enable_checkpointing(model)
        model(images(4), labels=torch.arange(4)).loss.backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert len(gradients[0]) > 20
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("standardize_features", [True, False])
def test_a_timestep_at_which_images_look_alike_is_warned_of(pixel_folder, standardize_features, caplog):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=TIMESTEP, standardize_features=standardize_features, num_labels=4, **HEAD
    )
    with caplog.at_level(logging.WARNING):
        selection = select_timestep(model, images(), timesteps=[998])
    assert selection.share_between_images < 0.02
    (warning,) = [text for text in selection.warnings if "of the variance" in text]
    assert warning in caplog.text
    assert f"{selection.share_between_images:.2%}" in warning
    assert ("only in float32" in warning) == standardize_features
    assert ("`standardize_features=True`" in warning) != standardize_features


def test_a_timestep_at_which_images_differ_is_not_warned_of(loaded):
    selection = select_timestep(loaded, images(), timesteps=[10])
    assert selection.share_between_images > 0.02
    assert not any("of the variance" in text for text in selection.warnings)
