"""Models that read several timesteps, blocks and features: tokens side by side, from one pass a timestep."""

import json
from collections import Counter

import pytest
import torch
from conftest import HEAD, build_transformer, enable_checkpointing, example
from datasets import Dataset
from diffusers import DDPMScheduler
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from pipelines import PIPELINES
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_aselect import (
    ASelectCallback,
    ASelectConfig,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    TimestepSelection,
    cache_features,
    select_timestep,
)
from hf_aselect.cli import main
from hf_aselect.hub.push import write_model_card
from hf_aselect.model.configuration_aselect import DIT_XL_2
from hf_aselect.training.config_arguments import ConfigArguments, given_fields, resumed_fields, write_config

# Two timesteps, two blocks, two features: eight reads of 16 channels, and no warning of channels that nobody named.
FIELDS = {"timestep": [60, 5], "block": [2, 0], "feature": ["hidden", "query"], "zeroed_channels": []}
ORDER = [(t, block, feature) for t in (60, 5) for block in (2, 0) for feature in ("hidden", "query")]
# At timestep 5 block 0 alone, at 60 up to block 6.
LISTED = [[60, 6, "hidden"], [5, 0, "key"], [60, -8, "value"]]
UPERNET = {"decoder": "upernet", "decoder_hidden_size": 8, "auxiliary_hidden_size": 4}
SMALL = {**DIT_XL_2, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiT of eight blocks, 16 wide, on RGB images of 8 × 8."""
    made = tmp_path_factory.mktemp("deep")
    build_transformer(num_layers=8).save_pretrained(made / "transformer")
    DDPMScheduler().save_pretrained(made / "scheduler")
    return made


@pytest.fixture(scope="module")
def single(folder):
    return DiTModel.from_pretrained(folder, timestep=5)


def images(count=24, size=8, seed=5):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def classifier(folder, **fields):
    torch.manual_seed(1)
    given = {} if "read_out" in fields else FIELDS
    return DiTForImageClassification.from_pretrained(folder, num_labels=4, **{**given, **HEAD, **fields})


def logits(model, pixel_values=None, **given):
    if pixel_values is None and not given:
        pixel_values = images(5)
    with torch.no_grad():
        return model.eval()(pixel_values=pixel_values, **given).logits


def side_by_side(model, read_outs, pixel_values):
    """What single reads give, one after the other."""
    with torch.no_grad():
        each = [model.extract_features(pixel_values, timestep=t, block=b, feature=f) for t, b, f in read_outs]
    return torch.cat(each, dim=-1)


def count_calls(model):
    """How often each block is run to its feed-forward layer, which `hidden` needs and `query` does not."""
    calls = Counter()
    for index, block in enumerate(model._base().denoiser.blocks):
        block.ff.register_forward_hook(lambda *_, index=index: calls.update([index]))
    return calls


# What is read, and in which order.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"block": "all", "feature": "hidden"}, [(5, block, "hidden") for block in range(8)]),
        ({"block": [-1, 2], "feature": "query"}, [(5, 7, "query"), (5, 2, "query")]),
        ({"timestep": [60, 5]}, [(60, 3, "query"), (5, 3, "query")]),
        (FIELDS, ORDER),
        ({"read_out": LISTED, "timestep": "auto"}, [(60, 6, "hidden"), (5, 0, "key"), (60, 0, "value")]),
    ],
    ids=["all blocks", "blocks", "timesteps", "product", "listed"],
)
def test_the_tokens_are_those_of_single_reads_in_the_documented_order(folder, single, fields, expected):
    model = DiTModel.from_pretrained(folder, **{"timestep": 5, "zeroed_channels": [], **fields})
    assert model.config.read_outs() == expected
    assert model.config.feature_size == 16 * len(expected)
    with torch.no_grad():
        output = model(images(3))
    assert torch.equal(output.last_hidden_state, side_by_side(single, expected, images(3)))
    assert torch.equal(output.pooler_output, output.last_hidden_state.mean(1))


def test_extract_features_takes_lists(folder, single):
    with torch.no_grad():
        found = single.extract_features(images(3), timestep=[60, 5], block=(2, 0), feature=["hidden", "query"])
        everywhere = single.extract_features(images(3), block="all", feature="hidden", num_noise_draws=2)
        assert torch.equal(found, side_by_side(single, ORDER, images(3)))
        draws = [
            single.extract_features(images(3), block=block, feature="hidden", num_noise_draws=2) for block in range(8)
        ]
        assert torch.equal(everywhere, torch.cat(draws, dim=-1))
        # What is not named is the configuration's.
        model = DiTModel.from_pretrained(folder, **FIELDS)
        expected = side_by_side(single, [(60, 1, "key"), (5, 1, "key")], images(3))
        assert torch.equal(model.extract_features(images(3), block=1, feature="key"), expected)


def test_one_pass_a_timestep_no_deeper_than_its_last_tap(folder):
    model = DiTModel.from_pretrained(folder, read_out=LISTED, zeroed_channels=[])
    calls = count_calls(model)
    model(images(2))
    # At 5 the key of block 0 is read before that is run.
    assert calls == {block: 1 for block in range(7)}
    calls.clear()
    model.extract_features(images(2), timestep=[60, 5, 7], block=[0, 2], feature=["query", "hidden"])
    assert calls == {0: 3, 1: 3, 2: 3}
    calls.clear()
    model.extract_features(images(2), timestep=[60, 5], block=[0, 2], feature="query", num_noise_draws=3)
    assert calls == {0: 6, 1: 6}


def test_images_are_encoded_once(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=[5, 60, 100], block="all")
    calls = []
    model.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert model(images(2, size=16)).last_hidden_state.shape == (2, 16, 9 * 16)
    assert len(calls) == 1


def test_the_timesteps_share_the_noise_of_a_draw(folder):
    """Fresh noise of training, too: a model of two timesteps draws as many numbers as a model of one."""
    both = DiTModel.from_pretrained(
        folder, timestep=[60, 5], resample_noise_in_training=True, num_noise_draws=2
    ).train()
    found = {}
    for timestep in ([60, 5], 60, 5):
        torch.manual_seed(0)
        found[str(timestep)] = both.extract_features(images(3), timestep=timestep)
    assert torch.equal(found["[60, 5]"], torch.cat([found["60"], found["5"]], dim=-1))


def test_the_hidden_states_are_those_of_the_first_timestep(folder, single):
    model = DiTModel.from_pretrained(folder, **FIELDS)
    calls = count_calls(model)
    with torch.no_grad():
        stem, *blocks = model(images(3), output_hidden_states=True).hidden_states
        assert len(blocks) == 8
        for block, hidden_states in enumerate(blocks):
            expected = single.extract_features(images(3), timestep=60, block=block, feature="hidden")
            assert torch.equal(hidden_states, expected)
    assert stem.shape == (3, 16, 16)
    assert calls == {**{block: 2 for block in range(3)}, **{block: 1 for block in range(3, 8)}}


def test_maps_of_several_timesteps_lie_side_by_side(folder, single):
    model = DiTModel.from_pretrained(folder, timestep=[60, 5])
    with torch.no_grad():
        (found,) = model.extract_maps(images(3), [(1, "key")]).values()
    expected = side_by_side(single, [(60, 1, "key"), (5, 1, "key")], images(3))
    assert torch.equal(found.flatten(2).transpose(1, 2), expected)


def test_channels_are_zeroed_at_each_tap_by_itself(folder, single):
    model = DiTModel.from_pretrained(folder, **{**FIELDS, "zeroed_channels": {"2.hidden": [3], "0.query": [1, 15]}})
    found, raw = model(images(3)).last_hidden_state, side_by_side(single, ORDER, images(3))
    zeroed = [16 * ORDER.index((t, block, feature)) + channel for t in (60, 5) for block, feature, channel in
              ((2, "hidden", 3), (0, "query", 1), (0, "query", 15))]  # fmt: skip
    assert not found[..., zeroed].any() and raw[..., zeroed].any()
    kept = [channel for channel in range(128) if channel not in zeroed]
    assert torch.equal(found[..., kept], raw[..., kept])


# Configurations.


def test_a_configuration_comes_back_as_it_was_saved(tmp_path):
    for fields in (FIELDS, {"block": "all"}, {"read_out": [[5, -1, "key"], [7, 0, "query"]]}):
        config = ASelectConfig(transformer=SMALL, **fields)
        config.save_pretrained(tmp_path)
        again = ASelectConfig.from_pretrained(tmp_path)
        assert again.read_outs() == config.read_outs()
        for name in ("timestep", "block", "feature", "read_out"):
            assert getattr(again, name) == getattr(config, name), name
    assert (again.timestep, again.block, again.feature) == (5, -1, "key"), "those of the first entry"
    assert again.block_index() == 3 and again.taps() == [(3, "key"), (0, "query")]


def test_a_single_value_is_saved_as_before(tmp_path):
    ASelectConfig(timestep=5, block=-1, feature="key").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (saved["timestep"], saved["block"], saved["feature"]) == (5, -1, "key") and "read_out" not in saved


def test_a_read_out_takes_the_place_of_what_was_saved(tmp_path):
    ASelectConfig(transformer=SMALL, **FIELDS).save_pretrained(tmp_path)
    config = ASelectConfig.from_pretrained(tmp_path, read_out=[[7, 1, "key"]])
    assert (config.timestep, config.block, config.feature) == (7, 1, "key")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`read_out` replaces .*got timestep as well"):
        ASelectConfig.from_pretrained(tmp_path, timestep="auto")
    config = ASelectConfig.from_pretrained(tmp_path, timestep=9, read_out=None)
    assert config.read_outs() == [(9, 1, "key")]


def test_without_a_timestep_the_width_is_known(folder):
    config = ASelectConfig(transformer=SMALL, block="all", feature=["hidden", "key"])
    assert config.read_outs()[:2] == [("auto", 0, "hidden"), ("auto", 0, "key")]
    assert config.feature_size == 4 * 2 * 16
    model = DiTForImageClassification(config)
    with pytest.raises(ValueError, match="still 'auto': pass `calibration_images=`"):
        model(images(1, size=32)[:, :1].expand(-1, 4, -1, -1))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"timestep": []}, "`timestep` must name at least one timestep, got an empty list"),
        ({"block": []}, "`block` must name at least one block, got an empty list"),
        ({"feature": []}, "`feature` must name at least one feature"),
        ({"timestep": [5, 1000]}, r"`timestep` must be an integer in \[0, 1000\) .* got 1000"),
        ({"timestep": [5, 6.0]}, "got 6.0"),
        ({"timestep": [5, True]}, "got True"),
        ({"timestep": [5, "auto"]}, "'auto' cannot be in a list"),
        ({"timestep": ["auto"]}, "'auto' cannot be in a list"),
        ({"timestep": [5, [6]]}, r"got \[6\]"),
        ({"timestep": {"at": 5}}, "'timestep'"),
        ({"block": [0, 4]}, r"`block` must be in \[-4, 4\) for a transformer of 4 blocks, got 4"),
        ({"block": [0, "all"]}, "`block` must be an integer, a list of integers or 'all', got 'all'"),
        ({"block": "auto"}, "`block` must be an integer, a list of integers or 'all', got 'auto'"),
        ({"block": [False]}, "got False"),
        ({"block": 1.5}, "'block'"),
        ({"feature": ["hidden", "q"]}, "`feature` must be one of hidden, .* got 'q'"),
        ({"feature": ["hidden", ["key"]]}, r"got \['key'\]"),
        (
            {"block": [1, -3], "timestep": 7},
            "`query` of block 1 is listed twice at timestep 7. List each",
        ),
        ({"timestep": [5, 60, 5]}, "is listed twice at timestep 5"),
        ({"feature": ["key", "key"]}, "`key` of block 1 is listed twice"),
        ({"timestep": list(range(1000)), "block": "all", "feature": ["key", "query"]}, "At most 4096 .* got 8000"),
        ({"read_out": []}, r"`read_out` must be a list of 1 to 4096 entries \[timestep, block, feature\]"),
        ({"read_out": [[5, 1]]}, r"with integer timesteps, got \[\[5, 1\]\]"),
        ({"read_out": [5, 1, "key"]}, "must be a list of 1 to 4096 entries"),
        ({"read_out": [["auto", 1, "key"]]}, "with integer timesteps"),
        ({"read_out": [[5, 1, "key"], [1000, 1, "key"]]}, "got 1000"),
        ({"read_out": [[5, 1, "key"], [5, 9, "key"]]}, "4 blocks, got 9"),
        ({"read_out": [[5, 1, "key"], [5, -3, "key"]]}, "`key` of block 1 is listed twice"),
        (
            {"read_out": [[5, 1, "key"]], "block": [0, 1]},
            r"`read_out` replaces .*got 5, \[0, 1\], 'key' as well. Omit them",
        ),
        ({"read_out": [[5, 1, "key"]], "timestep": 6}, "got 6, 1, 'key' as well.*pass `read_out=None`"),
        ({"read_out": "all"}, "'read_out'"),
        (
            {"zeroed_channels": [3], "block": [0, 1]},
            r"must have one list per tap if several .*'0.query': \[3, 71\].*got \[3\]",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(fields, words):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){words}"):
        ASelectConfig(**{"transformer": SMALL, **fields})


def test_a_field_that_is_set_beside_a_read_out_is_refused_when_it_is_read(folder):
    model = DiTModel.from_pretrained(folder, read_out=LISTED, zeroed_channels=[])
    model.config.timestep = 7
    with pytest.raises(ValueError, match="got 7, 6, 'hidden' as well"):
        model(images(1))


@pytest.mark.parametrize("name", ["block", "timestep", "feature", "read_out"])
def test_forward_takes_no_place_to_read(folder, name):
    with pytest.raises(ValueError, match=f"takes no {name}"):
        classifier(folder)(images(1), **{name: [1]})


# Heads.


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_a_classifier_saves_and_comes_back(folder, tmp_path, head):
    model = classifier(folder, head=head, calibration_images=images())
    assert {name: tuple(value.shape) for name, value in model.named_buffers() if "standardization" in name} == {
        "classifier.standardization.scale": (128,),
        "classifier.standardization.shift": (4, 4, 128),
    }
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(tmp_path)(images(5)).last_hidden_state
    assert torch.equal(logits(model, features=tokens), logits(model))
    assert torch.equal(logits(model, latents=images(5)), logits(model))
    # Fewer taps are another head's.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        DiTForImageClassification.from_pretrained(tmp_path, timestep=5)


def test_each_tap_has_the_statistics_that_it_has_alone(folder):
    model = classifier(folder, calibration_images=images())
    scale, shift = (
        model.classifier.standardization.scale.split(16),
        model.classifier.standardization.shift.split(16, dim=-1),
    )
    for (timestep, block, feature), own_scale, own_shift in zip(ORDER, scale, shift, strict=True):
        alone = classifier(folder, timestep=timestep, block=block, feature=feature, calibration_images=images())
        assert torch.equal(own_scale, alone.classifier.standardization.scale)
        assert torch.equal(own_shift, alone.classifier.standardization.shift)


def test_calibration_is_one_pass_a_timestep(folder):
    model = classifier(folder)
    calls = count_calls(model)
    model.standardize(images(20))
    assert calls == {block: 2 for block in range(3)}  # both timesteps of up to 16 images together, then 4


@pytest.mark.parametrize(
    "change", [{"block": [2, 1]}, {"feature": ["query", "hidden"]}, {"timestep": [5, 60]}], ids=str
)
def test_statistics_of_another_read_out_are_left_out(folder, tmp_path, caplog, change):
    classifier(folder, calibration_images=images()).save_pretrained(tmp_path)
    model = DiTForImageClassification.from_pretrained(tmp_path, **change)
    assert model.config.standardized_grid is None and model.classifier.standardization.scale is None
    assert "belong to another timestep or tap" in caplog.text
    same = DiTForImageClassification.from_pretrained(tmp_path, block=[-6, -8])
    assert same.config.standardized_grid == [4, 4]


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_a_few_steps_of_trainer_train_the_head_alone(folder, tmp_path, head):
    model = classifier(folder, head=head, block="all", feature="hidden", calibration_images=images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"pixel_values": each, "labels": index % 4} for index, each in enumerate(images())]
    arguments = TrainingArguments(str(tmp_path), max_steps=3, save_steps=3, use_cpu=True, report_to="none")
    Trainer(model, arguments, train_dataset=rows, callbacks=[ASelectCallback()]).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("classifier.") and "standardization" not in name for name in moved)
    again = DiTForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(logits(again), logits(model))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| timestep | 60, 5 |" in card and "| block | 0 to 7 |" in card and "| feature | hidden |" in card
    assert "| channels | 256, concatenated in this order: every timestep, block and feature |" in card


def test_what_comes_after_the_last_tap_of_any_timestep_is_frozen(folder):
    listed = [[60, 1, "hidden"], [5, 4, "key"], [5, 0, "value"]]
    model = classifier(folder, read_out=listed, freeze_backbone=False).train()
    model(images(4), labels=torch.arange(4)).loss.backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    of_block = {block: {name for name in trained if f"transformer_blocks.{block}." in name} for block in range(8)}
    assert all(of_block[block] for block in range(5)) and not any(of_block[block] for block in range(5, 8))
    assert not any(part in name for name in of_block[4] for part in ("to_q", "to_v", "to_out", ".ff."))
    assert any(".ff." in name for name in of_block[3])


def test_checkpointed_blocks_have_the_same_gradients(folder):
    model = classifier(folder, freeze_backbone=False, calibration_images=images()).train()
    gradients = []
    for is_checkpointed in (False, True):
        model.zero_grad()
        if is_checkpointed:
            enable_checkpointing(model)
        model(images(4), labels=torch.arange(4)).loss.backward()
        trained = {name: value for name, value in model.named_parameters() if value.grad is not None}
        gradients.append({name: value.grad.clone() for name, value in trained.items()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@pytest.mark.parametrize(("head", "what"), [("attention", "tokens"), ("linear", "tokens"), ("linear", "pooled")])
def test_cached_features_give_the_same(folder, tmp_path, head, what):
    model = classifier(folder, head=head, calibration_images=images())
    values = (images(6).permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().astype("uint8")
    dataset = Dataset.from_dict({"image": [Image.fromarray(each) for each in values]})
    cached = cache_features(model, dataset, tmp_path, what=what, dtype="float32")[:]["features"]
    assert cached.shape == ((6, 16, 128) if what == "tokens" else (6, 128))
    pixel_values = torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(logits(model, features=cached), logits(model, pixel_values), rtol=1e-5, atol=1e-5)
    # In another order they are other features.
    model.config.timestep = [5, 60]
    cache_features(model, dataset, tmp_path, what=what, dtype="float32")
    assert len(list(tmp_path.iterdir())) == 2
    (one, other) = (json.loads(path.read_text()) for path in tmp_path.glob("*/fingerprint.json"))
    assert {name for name in one if one[name] != other[name]} == {"read_out"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_tokens_change_by_rounding_alone(folder, tmp_path, dtype):
    exact = classifier(folder, calibration_images=images())
    exact.save_pretrained(tmp_path)
    half = DiTForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert half.classifier.standardization.scale.dtype == half.classifier.standardization.shift.dtype == torch.float32
    with torch.no_grad():
        expected, found = exact.extract_features(images(5)), half.extract_features(images(5))
        one = half.extract_features(images(5), timestep=5, block=0, feature="query")
    assert found.dtype == dtype and torch.equal(found[..., -16:], one)
    assert float((found.float() - expected).norm() / expected.norm()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert logits(half).isfinite().all()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_by_the_host_it_gives_the_same(folder, tmp_path, place):
    model = classifier(folder, calibration_images=images())
    model.save_pretrained(tmp_path / "saved")
    spread = DiTForImageClassification.from_pretrained(
        tmp_path / "saved", device_map={"backbone": place, "classifier": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(logits(spread), logits(model))


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 compiles no model of transformers")
@pytest.mark.process
def test_it_is_compiled_and_exported_whole(folder):
    model = classifier(folder, calibration_images=images()).eval()
    expected = logits(model)  # the fixed noise is made, which a graph cannot
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images(5)).logits
        shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
        exported = torch.export.export(
            model, (), kwargs={"pixel_values": images(5)}, dynamic_shapes=shapes, strict=False
        )
        found = exported.module()(pixel_values=images(7)).logits
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(found, logits(model, images(7)), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 warns of its own graph")
@pytest.mark.process
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_it_is_written_as_onnx(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="the `export` extra is not installed")
    fields = {"timestep": [60, 5], "block": [0, 1], "feature": "hidden", "head": "linear"}
    classifier(folder, calibration_images=images(), **fields).save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "model.onnx")]
    monkeypatch.setattr("sys.argv", ["export_onnx.py", *words])
    example("features/export_onnx.py").main()
    assert "within" in capsys.readouterr().out and (tmp_path / "model.onnx").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # peft's, of a base that diffusers saved
def test_an_adapter_goes_up_to_the_last_tap_and_brings_its_statistics(folder, tmp_path):
    model = classifier(folder, calibration_images=images(), freeze_backbone=False)
    layers = model.lora_targets()
    blocks = "backbone.denoiser.transformer.transformer_blocks"
    assert layers == [f"{blocks}.{block}.attn1.{name}" for block in range(3) for name in ("to_q", "to_v")]
    config = LoraConfig(r=2, target_modules=layers, modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(folder), tmp_path)
    assert torch.equal(logits(again), expected)


# Dense models.


def test_a_linear_segmenter_reads_all_of_them(folder, single, tmp_path):
    model = DiTForSemanticSegmentation.from_pretrained(folder, num_labels=3, calibration_images=images(), **FIELDS)
    assert model.decode_head.classifier.in_channels == 128
    tokens = side_by_side(single, ORDER, images(4))
    with torch.no_grad():
        tokens = model.decode_head.standardization[0](tokens, (4, 4)).transpose(1, 2).unflatten(-1, (4, 4))
        expected = nn.functional.interpolate(model.decode_head([tokens])[0], size=(8, 8), mode="bilinear")
    torch.testing.assert_close(logits(model, images(4)), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(DiTForSemanticSegmentation.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("out_indices", [None, [0, 2, 4, 6]], ids=["blocks", "stem"])
def test_upernet_reads_each_timestep_and_feature_at_its_stages(folder, single, tmp_path, out_indices):
    fields = {**FIELDS, **UPERNET, "out_indices": out_indices}
    model = DiTForSemanticSegmentation.from_pretrained(folder, num_labels=3, calibration_images=images(), **fields)
    stages = model.backbone.stages()
    blocks = [index - 1 for index in model.config.out_indices]
    for block, stage in zip(blocks, stages, strict=True):
        features = ("hidden", "query") if block >= 0 else ("hidden",)  # the stem has no other
        assert stage == [(t, block, feature) for t in (60, 5) for feature in features]
    assert [each.scale.numel() for each in model.decode_head.standardization] == [16 * len(stage) for stage in stages]
    seen = []
    model.decode_head.register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    calls = count_calls(model)
    labels = torch.zeros(4, 8, 8, dtype=torch.long)
    loss = model.train()(images(4), labels=labels).loss
    loss.backward()
    assert loss.isfinite() and max(calls) == blocks[-1] and set(calls.values()) == {2}
    if blocks[0] >= 0:
        for each, own, stage in zip(model.decode_head.standardization, seen, stages, strict=True):
            expected = each(side_by_side(single, stage, images(4)), (4, 4))
            assert torch.equal(own.flatten(2).transpose(1, 2), expected)
    model.save_pretrained(tmp_path)
    again = DiTForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(logits(again, images(4)), logits(model, images(4)))


def test_a_backbone_gives_maps_of_all_of_them(folder, single):
    backbone = DiTBackbone.from_pretrained(folder, out_indices=[0, 2, 8], **FIELDS)
    assert backbone.channels == [32, 64, 64] and backbone.config.block == [2, 0]
    with torch.no_grad():
        found = backbone(images(3), output_hidden_states=True)
    for maps, stage in zip(found.feature_maps[1:], ((1, 2), (7, 8)), strict=True):
        expected = side_by_side(single, [(t, stage[0], f) for t in (60, 5) for f in ("hidden", "query")], images(3))
        assert torch.equal(maps.flatten(2).transpose(1, 2), expected)
    assert found.feature_maps[0].shape == (3, 32, 4, 4) and len(found.hidden_states) == 9
    listed = DiTBackbone.from_pretrained(folder, read_out=LISTED, out_indices=[3], zeroed_channels=[])
    assert listed.read_outs() == [(60, 2, "hidden"), (5, 2, "key"), (60, 2, "value")]


def test_upernet_of_the_host_stands_on_it(folder, tmp_path):
    backbone = DiTBackbone.from_pretrained(folder, out_indices=[2, 4, 6, 7], **FIELDS)
    config = UperNetConfig(backbone_config=backbone.config, hidden_size=16, auxiliary_channels=8, num_labels=3)
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    loss = model.train()(images(4), labels=torch.zeros(4, 8, 8, dtype=torch.long)).loss
    loss.backward()
    assert loss.isfinite() and model.decode_head.in_channels == [64] * 4
    model.eval().save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


# Selections.


@pytest.mark.parametrize("fields", [{}, UPERNET], ids=["linear", "upernet"])
def test_a_segmenters_timestep_is_selected_for_all_of_them(folder, fields):
    given = {**FIELDS, **fields, "timestep": "auto"}
    model = DiTForSemanticSegmentation.from_pretrained(folder, num_labels=3, calibration_images=images(), **given)
    assert isinstance(model.config.timestep, int) and model.config.block == [2, 0]
    assert model.config.standardized_grid == [4, 4]
    fixed = {**given, "timestep": model.config.timestep}
    other = DiTForSemanticSegmentation.from_pretrained(folder, num_labels=3, calibration_images=images(), **fixed)
    for one, same in zip(model.decode_head.standardization, other.decode_head.standardization, strict=True):
        torch.testing.assert_close(one.scale, same.scale)
        torch.testing.assert_close(one.shift, same.shift)


def test_one_timestep_is_selected_for_all_taps_at_the_first(folder, tmp_path):
    fields = {"timestep": "auto", "block": "all", "feature": "hidden"}
    model = classifier(folder, **{**fields, "zeroed_channels": None}, calibration_images=images())
    config = model.config
    assert (config.block, config.feature) == ("all", "hidden") and isinstance(config.timestep, int)
    assert (config.selection["block"], config.selection["feature"]) == (0, "hidden")
    assert config.is_selection_in_use() and TimestepSelection.from_dict(config.selection).is_of(config)
    assert config.feature_size == 128 and config.standardized_grid == [4, 4]
    # Of every tap it was asked which channels dwarf all others.
    assert config.zeroed_channels == {f"{block}.hidden": [] for block in range(8)}
    alone = classifier(folder, timestep=config.timestep, block=6, feature="hidden", calibration_images=images())
    torch.testing.assert_close(model.classifier.standardization.scale[96:112], alone.classifier.standardization.scale)
    model.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.config.selection == config.selection


def test_massive_channels_are_found_at_each_tap(folder):
    model = DiTModel.from_pretrained(folder, timestep=5)
    with torch.no_grad():
        feed_forward = model.denoiser.blocks[1].ff.net[2]
        nn.init.zeros_(feed_forward.weight[3])
        feed_forward.bias[3] = 1e4
    model.config.block, model.config.feature = [0, 1, 2], ["query", "hidden"]
    selection = select_timestep(model, images(), timesteps=[5, 60])
    assert (selection.block, selection.feature, selection.massive_channels) == (0, "query", None)
    assert selection.other_massive_channels == {"0.hidden": [], "1.hidden": [3], "2.hidden": [3]}
    record = json.loads(json.dumps(selection.to_dict()))
    assert TimestepSelection.from_dict(record) == selection
    model.apply_selection(selection)
    tokens = dict(zip(model.config.taps(), model(images(2)).last_hidden_state.split(16, dim=-1), strict=True))
    for (block, feature), own in tokens.items():
        assert own[..., 3].any() != (block >= 1 and feature == "hidden"), (block, feature)
    for wrong in ({"1.hidden": 3}, {"x": [3]}, {"-1.hidden": [3]}, [3]):
        with pytest.raises(ValueError, match="values of another kind in other_massive_channels"):
            TimestepSelection.from_dict({**record, "other_massive_channels": wrong})


@pytest.mark.parametrize("fields", [FIELDS, {"read_out": LISTED, "zeroed_channels": []}], ids=["product", "listed"])
def test_a_selected_timestep_takes_the_place_of_several(folder, single, fields):
    model = DiTModel.from_pretrained(folder, **fields)
    taps = model.config.taps()
    selection = select_timestep(model, images(), criterion="hfr", timesteps=[7], block=1)
    assert (selection.block, selection.feature) == (1, "hidden")
    model.apply_selection(selection)
    assert model.config.read_outs() == [(7, *tap) for tap in taps], "the taps stay"
    assert torch.equal(model(images(2)).last_hidden_state, side_by_side(single, model.config.read_outs(), images(2)))
    head = classifier(folder, **fields)
    before = head.config.read_outs()
    if "read_out" in fields:  # each tap at one timestep: as many channels as before
        head.apply_selection(selection)
        assert head.config.read_outs() == [(7, *tap) for tap in taps] and logits(head).isfinite().all()
        return
    with pytest.raises(
        ValueError, match=r"reads tokens of 128 channels, but the taps at timestep 7 alone have 64. Load"
    ):
        head.apply_selection(selection)
    assert head.config.read_outs() == before


def test_a_record_of_another_timestep_removes_the_statistics(folder, caplog):
    model = classifier(folder, timestep=5, calibration_images=images())
    here, elsewhere = (select_timestep(model, images(), criterion="hfr", timesteps=[each]) for each in (5, 60))
    expected = logits(model)
    model.apply_selection(TimestepSelection.from_dict(here.to_dict()))
    assert torch.equal(logits(model), expected)
    model.apply_selection(TimestepSelection.from_dict(elsewhere.to_dict()))
    assert model.classifier.standardization.scale is None and "a saved selection has none" in caplog.text
    model.apply_selection(here)
    torch.testing.assert_close(logits(model), expected)


def test_the_callback_selects_for_all_of_them_and_does_not_follow_with_several(folder, tmp_path):
    rows = [{"pixel_values": each, "labels": index % 4} for index, each in enumerate(images())]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    model = classifier(folder, timestep=5)
    model.config.timestep = "auto"
    Trainer(model, arguments, train_dataset=rows, callbacks=[ASelectCallback(max_images=8)]).train()
    assert isinstance(model.config.timestep, int) and model.config.standardized_grid == [4, 4]
    trained = classifier(folder, freeze_backbone=False)
    callback = ASelectCallback(reselect_epochs=1, follow=True)
    with pytest.raises(ValueError, match=r"its head was built for \[60, 5\]. Omit `follow`"):
        Trainer(trained, arguments, train_dataset=rows, callbacks=[callback]).train()


# Folding, cards, command lines.


def test_a_model_that_was_folded_at_a_list_of_one_reads_nothing_else(folder):
    single = classifier(folder, timestep=[5], block=[2], feature=["hidden"])
    folded = single.fold()
    torch.testing.assert_close(logits(folded), logits(single), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"folded at timestep 5 and cannot be read at 60"):
        folded.extract_features(images(1), timestep=[5, 60])
    with pytest.raises(ValueError, match=r"was folded to be read at 2\.hidden"):
        folded.extract_features(images(1), block=[2, 1])
    with pytest.raises(StrictDataclassError, match="cannot be read at 60"):
        ASelectConfig.from_dict({**folded.config.to_dict(), "timestep": [5, 60]})


def test_the_command_line_selects_among_several_blocks(folder, tmp_path, capsys):
    DiTModel.from_pretrained(folder, read_out=LISTED, zeroed_channels=[]).save_pretrained(tmp_path)
    parquet = tmp_path / "images.parquet"
    values = (images(8).permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().astype("uint8")
    Dataset.from_dict({"image": [Image.fromarray(each) for each in values]}).to_parquet(parquet)
    words = ["select", str(tmp_path), "--images", str(parquet), "--timesteps", "5", "300", "--max-images", "8"]
    assert main([*words, "--block", "1", "--block", "3", "--feature", "key"]) == 0
    assert "for key of block" in capsys.readouterr().out
    assert main(words) == 0
    assert "for hidden of block 6" in capsys.readouterr().out


def test_the_card_of_a_listed_read_out_names_each(folder, tmp_path):
    write_model_card(DiTModel.from_pretrained(folder, read_out=LISTED, zeroed_channels=[]), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    each = "hidden of block 6 at t = 60, key of block 0 at t = 5, value of block 0 at t = 60"
    assert f"| channels | 48, concatenated in this order: {each} |" in card
    assert "| timestep | 60, 5 |" in card and "| feature | hidden, key, value |" in card


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--timestep", "19", "61", "--block", "all", "--feature", "hidden", "query"],
            {"timestep": [19, 61], "block": "all", "feature": ["hidden", "query"]},
        ),
        (["--timestep", "auto", "--block", "-1"], {"timestep": "auto", "block": -1}),
        (["--block", "0", "-1", "--feature", "key"], {"block": [0, -1], "feature": "key"}),
    ],
)
def test_a_training_script_takes_several(words, expected):
    parser = HfArgumentParser(ConfigArguments)
    assert given_fields(*parser.parse_args_into_dataclasses(words)) == expected


def test_a_training_that_is_resumed_reads_what_it_read(folder, tmp_path):
    for fields in (FIELDS, {"read_out": LISTED, "zeroed_channels": []}):
        config = DiTModel.from_pretrained(folder, **fields).config
        write_config(config, tmp_path)
        again = DiTModel.from_pretrained(folder, **resumed_fields({}, tmp_path)).config
        assert again.read_outs() == config.read_outs()
    with pytest.raises(ValueError, match=r"This training started with timestep 60, got --timestep \[5, 60\]"):
        resumed_fields({"timestep": [5, 60]}, tmp_path)


# Other families.


@pytest.mark.parametrize(
    ("name", "fields", "width"),
    [
        ("sd3", {"block": "all", "feature": ["hidden", "attention"]}, 2 * 3 * 2 * 32),
        ("flux", {"block": "all", "feature": ["hidden", "key"]}, 2 * 4 * 2 * 32),
        # Its keys are half as wide as its queries.
        ("lumina2", {"block": [0, -1], "feature": ["key", "query", "value"]}, 2 * 2 * (16 + 32 + 16)),
        ("sana", {"block": "all", "feature": ["normed", "value"]}, 2 * 3 * 2 * 32),
        ("pixart_alpha", {"block": [1], "feature": ["hidden", "attention"]}, 2 * 2 * 48),
    ],
)
def test_every_family_is_read_at_several(tmp_path, name, fields, width):
    PIPELINES[name]().save_pretrained(tmp_path)
    fields = {"timestep": [141, 7], "image_size": 32, "zeroed_channels": [], **fields}
    torch.manual_seed(0)
    model = DiTForImageClassification.from_pretrained(
        tmp_path, num_labels=3, calibration_images=images(4, size=32), freeze_backbone=False, **HEAD, **fields
    )
    assert model.config.feature_size == width == model.classifier.standardization.scale.numel()
    pixel_values = images(2, size=32)
    with torch.no_grad():
        found = model.extract_features(pixel_values)
    assert torch.equal(found, side_by_side(model, model.config.read_outs(), pixel_values))
    model.train()(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    unlike = {n for n, value in model.named_parameters() if (value.grad is not None) != value.requires_grad}
    # A table of the transformer's output, which no module holds alone.
    assert unlike <= {"backbone.denoiser.transformer.scale_shift_table"}


def test_a_tap_that_a_family_lacks_is_refused(tmp_path):
    PIPELINES["flux"]().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"(?s)Block 2 has no `attention`, because only the first 2 blocks"):
        DiTModel.from_pretrained(tmp_path, timestep=5, block="all", feature="attention", image_size=32)
    model = DiTModel.from_pretrained(tmp_path, timestep=5, block=[0, 1], feature="attention", image_size=32)
    assert model(images(1, size=32)).last_hidden_state.shape[-1] == 64
