import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import HEAD
from datasets import load_dataset
from huggingface_hub.errors import StrictDataclassError
from pipelines import lumina2
from torch import nn

import hf_aselect
from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTBackbone,
    DiTForImageClassification,
    DiTModel,
    TimestepSelection,
    select_timestep,
)
from hf_aselect.model.denoiser import zero_channels
from hf_aselect.selection.massive_channels import FACTOR, MASSIVE_FEATURES, SHARE, massive_channels, outlier_share

GENERATOR = torch.Generator().manual_seed(0)


def tokens(width=64):
    return torch.randn(4, 16, width, generator=torch.Generator().manual_seed(0))


def test_a_channel_that_is_large_in_every_token_is_massive():
    values = tokens()
    values[..., 7] = 50
    values[..., 9] *= 3  # large, and no outlier
    assert massive_channels([outlier_share(values)]) == [7]


def test_a_token_that_is_large_in_every_channel_has_no_massive_channel():
    values = tokens()
    values[0, 0] *= 1000
    assert massive_channels([outlier_share(values)]) == []


def test_a_channel_that_is_large_in_a_few_tokens_is_not_massive():
    values = tokens()
    values[:, :4, 7] = 500
    assert float(outlier_share(values)[7]) == 0.25
    assert massive_channels([outlier_share(values)]) == []


def test_normal_values_have_none_at_any_scale():
    for scale in (1e-3, 1.0, 1e3):
        assert massive_channels([outlier_share(scale * torch.randn(100, 4096, generator=GENERATOR))]) == []


def test_a_channel_must_be_massive_at_half_of_the_timesteps():
    large, plain = tokens(), tokens()
    large[..., 7] = 500
    shares = [outlier_share(large), outlier_share(plain)]
    assert massive_channels(shares) == [7]
    assert massive_channels([*shares, outlier_share(plain)]) == []


def test_zeroing_leaves_the_given_tokens_alone():
    values = tokens()
    zeroed = zero_channels(values, [3, 5])
    assert not zeroed[..., [3, 5]].any() and values[..., 3].all()
    kept = [channel for channel in range(64) if channel not in (3, 5)]
    assert torch.equal(zeroed[..., kept], values[..., kept])
    assert zero_channels(values, []) is values


@pytest.fixture(scope="module")
def dominated(pixel_folder, tmp_path_factory):
    """A DiT whose block 1 adds a constant of 1000 to channel 3, as large transformers do."""
    model = DiTModel.from_pretrained(pixel_folder, timestep=5)
    with torch.no_grad():
        feed_forward = model.denoiser.transformer.transformer_blocks[0].ff.net[2]
        nn.init.zeros_(feed_forward.weight[3])
        feed_forward.bias[3] = 1e4
    folder = tmp_path_factory.mktemp("dominated")
    model.save_pretrained(folder)
    return folder


LOADED = {}


def load(folder, pixels, **fields):
    """The model whose timestep is selected from `pixels`, the same each time: selected once, and copied."""
    fields = {"timestep": "auto", "block": 1, "feature": "hidden", **fields}
    if str(fields) not in LOADED:
        LOADED[str(fields)] = DiTModel.from_pretrained(folder, calibration_images=pixels, **fields)
    return copy.deepcopy(LOADED[str(fields)])


def test_massive_channels_are_found_with_the_timestep_recorded_and_zeroed(dominated, pixels, tmp_path):
    model = load(dominated, pixels)
    assert model.config.selection["massive_channels"] == [3]
    assert model.config.zeroed_channels == {"1.hidden": [3]}
    found = model(pixels).last_hidden_state
    raw = model._base().denoiser(
        model.add_noise(model.encode(pixels), model.config.timestep), torch.full((7,), 0), 1, "hidden"
    )
    assert not found[..., 3].any() and raw[..., 3].abs().min() > 30 * raw.abs().median()
    # Another tap has channels of its own.
    assert model.extract_features(pixels, feature="query")[..., 3].any()
    model.save_pretrained(tmp_path / "saved")
    again = DiTModel.from_pretrained(tmp_path / "saved")
    assert again.config.zeroed_channels == {"1.hidden": [3]}
    assert torch.equal(again(pixels).last_hidden_state, found)


def test_channels_belong_to_their_tap_whatever_the_timestep(dominated, pixels, tmp_path):
    model = load(dominated, pixels)
    record = model.config.selection
    model.config.timestep = 500
    before = model(pixels).last_hidden_state
    assert not before[..., 3].any()
    model.save_pretrained(tmp_path / "saved")
    # Saving changes nothing of the model that is saved; the record of another timestep is not saved.
    assert model.config.selection == record
    assert torch.equal(model(pixels).last_hidden_state, before)
    again = DiTModel.from_pretrained(tmp_path / "saved")
    assert again.config.selection is None
    assert torch.equal(again(pixels).last_hidden_state, before)


def test_another_tap_has_channels_of_its_own(dominated, pixels, tmp_path):
    load(dominated, pixels).save_pretrained(tmp_path / "saved")
    moved = DiTModel.from_pretrained(tmp_path / "saved", feature="query")
    plain = DiTModel.from_pretrained(dominated, block=1, feature="query", timestep=moved.config.timestep)
    assert torch.equal(moved(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    assert moved.config.selection is None
    anew = DiTModel.from_pretrained(tmp_path / "saved", timestep="auto", block=2, calibration_images=pixels)
    assert set(anew.config.zeroed_channels) == {"1.hidden", "2.hidden"}
    assert anew.config.selection["massive_channels"] == anew.config.zeroed_channels["2.hidden"]


def test_a_backbone_zeroes_each_stage_s_own_channels(dominated, pixels):
    fields = {"block": 1, "feature": "hidden", "timestep": 5, "out_indices": [0, 1, 2, 3]}
    raw = DiTBackbone.from_pretrained(dominated, zeroed_channels=[], **fields)(pixels).feature_maps
    for given in ([3], {"1.hidden": [3]}):
        maps = DiTBackbone.from_pretrained(dominated, zeroed_channels=given, **fields)(pixels).feature_maps
        assert not maps[2][:, 3].any() and raw[2][:, 3].all()
        for stage in (0, 1, 3):
            assert torch.equal(maps[stage], raw[stage])
    both = {"0.hidden": [1], "2.hidden": [0, 5]}
    maps = DiTBackbone.from_pretrained(dominated, zeroed_channels=both, **fields)(pixels).feature_maps
    assert not maps[1][:, 1].any() and not maps[3][:, [0, 5]].any() and torch.equal(maps[2], raw[2])


def test_a_selection_is_applied_as_it_was_scored(dominated, pixels, tmp_path):
    """README's way: select, then take the selection with all that belongs to it."""
    expected = load(dominated, pixels)
    model = DiTModel.from_pretrained(dominated, timestep=0, block=1, feature="hidden")
    model.apply_selection(select_timestep(model, pixels))
    assert model.config.zeroed_channels == {"1.hidden": [3]}
    assert model.config.timestep == expected.config.timestep
    assert torch.equal(model(pixels).last_hidden_state, expected(pixels).last_hidden_state)
    model.save_pretrained(tmp_path / "saved")
    again = DiTModel.from_pretrained(tmp_path / "saved")
    assert again.config.selection["timestep"] == again.config.timestep


def test_a_selection_of_another_tap_moves_the_tap(dominated, pixels):
    model = DiTForImageClassification.from_pretrained(
        dominated, timestep=0, freeze_backbone=False, block=0, num_labels=2, **HEAD
    )
    assert not any(p.requires_grad for p in model.backbone.denoiser.blocks[1].parameters())
    labels = [0, 1, 0, 1, 0, 1, 0]
    record = select_timestep(model, pixels, criterion="probe", labels=labels, block=[2], feature=["hidden"])
    model.apply_selection(record)
    assert (model.config.block, model.config.feature) == (2, "hidden")
    assert all(p.requires_grad for p in model.backbone.denoiser.blocks[1].parameters())
    assert model(pixels).logits.shape == (7, 2)


def test_another_choice_keeps_what_an_earlier_one_found_in_its_record(dominated, pixels, tmp_path):
    load(dominated, pixels).save_pretrained(tmp_path / "saved")
    again = DiTModel.from_pretrained(tmp_path / "saved", timestep="auto", calibration_images=pixels)
    assert again.config.selection["massive_channels"] == [3]
    assert again.config.zeroed_channels == {"1.hidden": [3]}


@pytest.mark.parametrize("channels", [[9999], [-1], "auto", {"1.hidden": [16]}])
def test_channels_set_later_are_checked_where_they_are_used(dominated, pixels, channels):
    model = DiTModel.from_pretrained(dominated, timestep=5, block=1, feature="hidden", zeroed_channels=[])
    model.config.zeroed_channels = channels
    with pytest.raises(
        ValueError, match=r"`zeroed_channels` must be integers in \[0, 16\) once the timestep is selected"
    ):
        model(pixels)


def test_channels_that_were_named_stay_at_their_tap(dominated, pixels):
    model = DiTModel.from_pretrained(dominated, timestep=5, block=0, feature="hidden", zeroed_channels=[2, 4])
    record = select_timestep(model, pixels, criterion="hfr", block=1, timesteps=[5, 500])
    assert record.massive_channels == [3]  # at another tap nothing was named, so they are looked for
    model.apply_selection(record)
    assert model.config.zeroed_channels == {"0.hidden": [2, 4], "1.hidden": [3]}
    model.apply_selection(select_timestep(model, pixels, criterion="hfr", feature="query", timesteps=[5, 500]))
    assert model(pixels).last_hidden_state[..., [2, 3, 4]].all()


def test_a_selection_that_the_head_cannot_read_is_refused(tmp_path):
    lumina2().save_pretrained(tmp_path)
    pixel_values = torch.rand(3, 3, 64, 64)
    model = DiTForImageClassification.from_pretrained(tmp_path, timestep=5, num_labels=2, **HEAD)
    record = select_timestep(model, pixel_values, criterion="hfr", feature="key", timesteps=[5, 500])
    with pytest.raises(ValueError, match=r"The head reads tokens of 32 channels, but 'key' has 16. Load the"):
        model.apply_selection(record)
    assert (model.config.feature, model.config.timestep) == ("query", 5)


def test_a_fixed_timestep_in_the_residual_stream_of_a_large_transformer_is_warned_of(dominated, caplog, monkeypatch):
    with caplog.at_level("WARNING", logger="hf_aselect"):
        DiTModel.from_pretrained(dominated, timestep=5, block=1, feature="hidden")
    assert not caplog.records  # a small one has no such channels
    monkeypatch.setattr("hf_aselect.selection.apply.LARGE", 8)

    def warning(**fields):
        caplog.clear()
        with caplog.at_level("WARNING", logger="hf_aselect"):
            DiTModel.from_pretrained(dominated, timestep=5, block=1, **fields)
        return "none is set to zero in hidden of block 1" in caplog.text

    assert warning(feature="hidden")
    assert not warning(feature="hidden", zeroed_channels=[])
    assert not warning(feature="hidden", zeroed_channels={"1.hidden": [3]})
    assert warning(feature="hidden", zeroed_channels={"0.hidden": [3]})
    assert not warning(feature="query")


def test_pictures_count_alike_in_the_search_whatever_the_batch(pixel_folder, pixels, monkeypatch):
    """Seven images in batches of three: the last one must not weigh as much as three."""
    model = DiTModel.from_pretrained(pixel_folder, timestep=5, block=1, feature="hidden")
    found = []
    monkeypatch.setattr(
        "hf_aselect.selection.massive_channels.massive_channels",
        lambda shares: found.append(torch.stack(shares)) or [],
    )
    # Each image has a share of its own.
    monkeypatch.setattr(
        "hf_aselect.selection.massive_channels.outlier_share",
        lambda tokens: tokens.float().std(dim=-2).flatten(0, 1).double().mean(0),
    )
    for batch_size in (7, 3):
        select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500], batch_size=batch_size)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("feature", ["query", "key", "value"])
def test_nothing_is_zeroed_where_queries_keys_and_values_are_read(dominated, pixels, feature):
    model = load(dominated, pixels, feature=feature)
    assert model.config.zeroed_channels is None
    assert model.config.selection["massive_channels"] is None


def test_it_can_be_asked_for_anywhere_and_turned_off(dominated, pixels):
    assert load(dominated, pixels, feature="key", zeroed_channels="auto").config.zeroed_channels == {"1.key": []}
    off = load(dominated, pixels, zeroed_channels=[])
    assert off.config.zeroed_channels == [] and off.config.selection["massive_channels"] is None
    assert off(pixels).last_hidden_state[..., 3].any()


def test_given_channels_are_zeroed_at_a_fixed_timestep_and_in_a_selection(pixel_folder, pixels):
    model = DiTModel.from_pretrained(pixel_folder, timestep=5, zeroed_channels=[0, 2])
    assert not model(pixels).last_hidden_state[..., [0, 2]].any()
    other = DiTModel.from_pretrained(pixel_folder, timestep=5)
    scores = [select_timestep(each, pixels, timesteps=[5, 500], criterion="hfr").scores for each in (model, other)]
    assert scores[0] != scores[1]


def test_the_criterion_sees_what_is_used(dominated, pixels):
    """A constant of 1000 has no high frequency: it would drown all that the ratio asks for."""
    model = load(dominated, pixels)
    zeroed = select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500])
    model.config.zeroed_channels = []
    drowned = select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500])
    assert min(zeroed.scores) > 100 * max(drowned.scores)


def test_the_passes_that_find_channels_are_counted(dominated, pixels):
    model = DiTModel.from_pretrained(dominated, timestep=5, block=1, feature="hidden")
    with_search = select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500])
    model.config.zeroed_channels = [3]
    without = select_timestep(model, pixels, criterion="hfr", timesteps=[5, 500])
    assert with_search.num_forwards == without.num_forwards + 7 * 2
    assert with_search.scores == without.scores


def test_each_tap_of_a_comparison_has_channels_of_its_own(dominated, pixels):
    model = DiTModel.from_pretrained(dominated, timestep=5)
    record = select_timestep(
        model,
        pixels,
        criterion="probe",
        labels=[0, 1, 0, 1, 0, 1, 0],
        block=[0, 1],
        feature=["hidden", "query"],
        timesteps=[5, 500],
    )
    assert record.massive_channels == ([3] if record.feature == "hidden" else None)


def test_a_record_from_before_is_read(dominated, pixels):
    record = load(dominated, pixels).config.selection
    record.pop("massive_channels")
    assert TimestepSelection.from_dict(record).massive_channels is None


def test_bad_channels_are_refused(pixel_folder):
    for channels in ([16], [-1], "all", {"1.hidden": [16]}):
        with pytest.raises(
            StrictDataclassError, match=r"`zeroed_channels` must be 'auto', a list of channels in \[0, 16\)"
        ):
            DiTModel.from_pretrained(pixel_folder, timestep=5, zeroed_channels=channels)
    for key in ("hidden", "hidden.1", "1.secret", "-1.hidden", "01.hidden"):
        with pytest.raises(StrictDataclassError, match=r"must have keys 'BLOCK.FEATURE', such as '9.hidden', got"):
            DiTModel.from_pretrained(pixel_folder, timestep=5, zeroed_channels={key: [1]})
    with pytest.raises(StrictDataclassError, match=r"`block` must be in"):
        DiTModel.from_pretrained(pixel_folder, timestep=5, zeroed_channels={"99.hidden": [1]})
    with pytest.raises(
        ValueError, match=r"needs `timestep='auto'`, but the timestep is fixed at 5. Pass `timestep='auto'`"
    ):
        DiTModel.from_pretrained(pixel_folder, timestep=5, zeroed_channels="auto")


def test_a_classifier_takes_what_was_found(dominated, pixels):
    model = DiTForImageClassification.from_pretrained(
        dominated, timestep="auto", block=1, feature="hidden", calibration_images=pixels, num_labels=2, **HEAD
    )
    assert model.config.zeroed_channels == {"1.hidden": [3]}
    assert ASelectConfig(**model.config.to_dict()).zeroed_channels == {"1.hidden": [3]}
    assert bool(model(pixels).logits.isfinite().all())


@pytest.mark.process
def test_the_embedded_dit_has_none_by_a_margin():
    """What tells the rule's factor from what a small transformer does without massive channels."""
    assets = Path(hf_aselect.__file__).parent / "assets" / "fashion_mnist"
    model = DiTModel.from_pretrained(assets, timestep=0)
    rows = load_dataset("parquet", data_files=str(assets / "test.parquet"), split="train")[:16]["image"]
    processor = ASelectImageProcessor.from_model_config(model.config)
    latents = model.encode(processor(rows, return_tensors="pt").pixel_values)
    taps = list(product(range(model.config.num_hidden_layers), MASSIVE_FEATURES))
    largest = 0.0
    with torch.no_grad():
        for timestep in (0, 35, 400, 999):
            noised = model.add_noise(latents, timestep)
            read = model._read_taps(noised, torch.full((len(noised),), timestep), taps)
            for values in read.values():
                magnitudes = values.flatten(0, 1).abs()
                ratios = magnitudes / magnitudes.median(1, keepdim=True).values
                # What a channel exceeds in 90 % of the tokens.
                largest = max(largest, float(ratios.quantile(1 - SHARE, dim=0).max()))
    assert 10 < largest < FACTOR / 1.8
