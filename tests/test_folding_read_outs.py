"""Folding of several taps and timesteps: one set of weights, read as the model that it was made from."""

import copy
import json

import pytest
import torch
from conftest import enable_checkpointing, example
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from pipelines import LOAD_OPTIONS, PIPELINES, distance, dit_transformer, images_of, sd35
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_aselect import (
    ASelectConfig,
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    cache_features,
)
from hf_aselect.cli import main
from hf_aselect.model.folded_blocks import StepNorms
from hf_aselect.model.layouts import FEATURES, FoldedLayout

TIMESTEPS = [141, 7, 800]
HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1, "num_labels": 3}
SEVERAL = {"timestep": TIMESTEPS, "block": "all", "feature": ["hidden", "query"]}
# At each timestep another tap, and another depth.
UNEVEN = [[30, 0, "query"], [700, 2, "hidden"], [30, 1, "normed"], [2, 0, "attention"], [5, 1, "value"]]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a family's tiny pipeline as a model; made and converted when it is first asked for."""
    folders = {}

    def get(name, kind=DiTModel, **options):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name]().save_pretrained(folders[name] / "pipeline")
            given = {"timestep": 5, "zeroed_channels": [], **LOAD_OPTIONS.get(name, {})}
            # Loaded once with text encoders; then from what it is saved as.
            DiTModel.from_pretrained(folders[name] / "pipeline", **given).save_pretrained(folders[name] / "model")
        return kind.from_pretrained(folders[name] / "model", **options)

    return get


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DiT of eight blocks on pixels, in diffusers' layout."""
    made = tmp_path_factory.mktemp("dit")
    dit_transformer(num_layers=8, in_channels=3, out_channels=3).save_pretrained(made)
    return made


def difference(folded, model, given=None):
    """The relative difference of what two models say of the same images."""
    given = images_of(model) if given is None else given
    with torch.no_grad():
        outputs, expected = folded(given), model(given)
    if hasattr(expected, "feature_maps"):
        pairs = zip(outputs.feature_maps, expected.feature_maps, strict=True)
        return max(distance(found, wanted) for found, wanted in pairs)
    name = "logits" if hasattr(expected, "logits") else "last_hidden_state"
    return distance(outputs[name], expected[name])


def taps_of(config):
    return [
        (block, feature)
        for block in range(config.num_hidden_layers)
        for feature in FEATURES
        if feature != "attention" or block < config.layout.num_attention_outputs
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_tap_at_three_timesteps_is_that_of_the_model(load, name, tmp_path):
    model = load(name, timestep=TIMESTEPS)
    read_out = [[timestep, *tap] for timestep in TIMESTEPS for tap in taps_of(model.config)]
    model = load(name, read_out=read_out)
    folded = model.fold()
    with torch.no_grad():
        found, expected = (each._read(each.config.read_outs(), images_of(model))[0] for each in (folded, model))
    assert found.keys() == expected.keys() and len(found) == len(read_out)
    assert max(distance(found[each], expected[each]) for each in found) <= 1e-5
    folded.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is DiTModel and again.config.read_outs() == model.config.read_outs()
    state, other = folded.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    assert difference(again, folded) <= 1e-6


@pytest.mark.parametrize("name", PIPELINES)
def test_each_timestep_is_run_as_deep_as_it_is_read(load, name):
    model = load(name, read_out=UNEVEN)
    folded = model.fold()
    assert difference(folded, model) <= 1e-5
    calls = []
    for index, block in enumerate(folded.denoiser.blocks):
        block.register_forward_hook(lambda _module, inputs, _output, index=index: calls.append((inputs[3], index)))
    folded(images_of(model))
    # Timesteps 30, 700, 2 and 5.
    assert calls == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)]


@pytest.mark.parametrize("name", PIPELINES)
def test_all_that_is_trained_is_used(load, name):
    config = load(name).config
    every = [[timestep, *tap] for timestep in (5, 60) for tap in taps_of(config)]
    last = config.num_hidden_layers - 1
    for read_out in (every, every[: len(every) // 2], UNEVEN, [[1, last, "value"], [2, last, "key"]]):
        options = {"freeze_backbone": False, "read_out": read_out, **HEAD}
        folded = load(name, DiTForImageClassification, **options).fold().train()
        folded(images_of(folded), labels=torch.tensor([0, 1])).loss.backward()
        unused = [key for key, value in folded.named_parameters() if value.requires_grad and value.grad is None]
        assert not unused
        kinds = {type(part) for part in folded.backbone.denoiser.modules() if not list(part.children())}
        plain = {nn.Linear, nn.LayerNorm, nn.Conv2d, nn.GELU, nn.SiLU, nn.RMSNorm}
        assert kinds <= (plain if read_out == every[: len(every) // 2] else plain | {StepNorms})


def test_several_timesteps_share_the_weights_and_one_has_the_layout_of_before(load, tmp_path):
    one, three = (load("dit", **{**SEVERAL, "timestep": timesteps}) for timesteps in (7, TIMESTEPS))
    single, several = one.fold(), three.fold()
    width, depth = one.config.hidden_size, one.config.num_hidden_layers
    # A weight and a bias of two norms, two gates; and what is added behind the gate of attention.
    assert several.num_parameters() - single.num_parameters() == depth * (6 * len(TIMESTEPS) + 1) * width
    assert "others" not in single.config.folded_layout
    assert single.config.folding.timesteps == (7,) and several.config.folding.timesteps == tuple(TIMESTEPS)
    several.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert {name for name in weights.keys() if "blocks.0.picture.query" in name} == {  # noqa: SIM118
            "denoiser.blocks.0.picture.query_key_value.weight",
            "denoiser.blocks.0.picture.query_key_value.bias",
        }


@pytest.mark.parametrize("head", ["attention", "linear"])
def test_a_classifier_is_loaded_folded_saved_and_trained(folder, tmp_path, head):
    options = {"head": head, "freeze_backbone": False, **HEAD, **SEVERAL, "timestep": [141, 7]}
    model = DiTForImageClassification.from_pretrained(folder, **options)
    model.standardize(images_of(model, num=8))
    folded = model.fold()
    assert type(folded) is DiTForImageClassification and folded.num_parameters() < model.num_parameters()
    assert difference(folded, model) <= 1e-5
    folded.save_pretrained(tmp_path / "folded")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "folded")
    assert difference(again, folded) <= 1e-6
    before = copy.deepcopy(again.state_dict())
    rows = [{"pixel_values": each, "labels": index % 3} for index, each in enumerate(images_of(model, num=6))]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", learning_rate=1e-2
    )
    Trainer(again, arguments, train_dataset=rows).train()
    moved = {name for name, value in again.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, value in again.named_parameters() if value.requires_grad} <= moved
    again.save_pretrained(tmp_path / "trained")
    assert difference(AutoModelForImageClassification.from_pretrained(tmp_path / "trained"), again.eval()) <= 1e-6


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_a_segmenter_is_folded(folder, tmp_path, decoder):
    options = {"decoder": decoder, "decoder_hidden_size": 8, "num_labels": 3, **SEVERAL, "timestep": [5, 60]}
    model = DiTForSemanticSegmentation.from_pretrained(folder, **{**options, "block": [1, -2]})
    folded = model.fold()
    assert difference(folded, model) <= 1e-5
    assert len(folded.backbone.denoiser.blocks) == 7
    folded.save_pretrained(tmp_path)
    assert difference(DiTForSemanticSegmentation.from_pretrained(tmp_path), folded) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"timestep": [5, 60], "feature": ["hidden", "key"], "out_indices": [0, 2, 5]},
        {"timestep": [5, 60], "feature": "normed", "out_indices": [0]},
        {"timestep": [5, 60], "block": 1, "feature": "hidden", "zeroed_channels": [3], "out_indices": [4]},
        {"timestep": 5, "block": "all", "feature": ["query", "value"], "out_indices": [1, 2]},
        {"read_out": [[5, 0, "query"], [60, 1, "value"], [60, 7, "value"]], "out_indices": [2, 3]},
        {"read_out": [[5, 6, "query"], [60, 7, "value"]], "out_indices": [0]},
    ],
)
def test_a_backbone_is_folded(folder, tmp_path, options):
    model = DiTBackbone.from_pretrained(folder, **options)
    folded = model.fold()
    assert difference(folded, model) <= 1e-5
    assert len(folded.denoiser.blocks) == max(options["out_indices"][-1], 1)
    folded.save_pretrained(tmp_path)
    assert difference(DiTBackbone.from_pretrained(tmp_path), folded) <= 1e-6


def test_what_is_no_longer_there_is_not_read(folder, tmp_path):
    model = DiTModel.from_pretrained(folder, timestep=[5, 60], block=[1, 3], feature=["hidden", "query"])
    folded, given = model.fold(), images_of(model)
    # Any of them, alone and together.
    for asked in ({"timestep": 60}, {"block": 3, "feature": "query"}, {"timestep": [60, 5], "block": 1}):
        with torch.no_grad():
            found, expected = (each.extract_features(given, **asked) for each in (folded, model))
        assert distance(found, expected) <= 1e-5
    with pytest.raises(ValueError, match="folded at timestep 5 or 60 and cannot be read at 7"):
        folded.extract_features(given, timestep=[5, 7])
    for asked in ({"block": 2}, {"feature": "key"}, {"block": "all"}):
        with pytest.raises(ValueError, match=r"was folded to be read at 1\.hidden, 1\.query, 3\.hidden, 3\.query"):
            folded.extract_features(given, **asked)
    with pytest.raises(ValueError, match=r"must be one of \[5, 60\], at which this transformer was folded"):
        folded.denoiser(given, torch.full((2,), 5), 1, "query")
    folded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is already folded"):
        folded.fold()
    with pytest.raises(StrictDataclassError, match="cannot be read at 7"):
        DiTModel.from_pretrained(tmp_path, timestep=[5, 7])
    assert DiTModel.from_pretrained(tmp_path, timestep=60, block=3, feature="query").config.feature_size == 32


@pytest.mark.parametrize("others", [[5], [1000], [-1], ["60"], [60, 60], 60, {"60": 1}, [True], [None]])
def test_further_timesteps_that_are_none_are_refused(folder, others):
    layout = DiTModel.from_pretrained(folder, timestep=[5, 60], block=0).fold().config.folded_layout
    assert FoldedLayout.from_dict(layout).timesteps == (5, 60) and layout["others"] == [60]
    with pytest.raises(ValueError, match="`folded_layout` must have"):
        FoldedLayout.from_dict({**layout, "others": others})


def test_massive_channels_and_noise_draws_go_along(load):
    zeroed = {"1.hidden": [3], "2.hidden": [5], "0.query": [1]}
    options = {"block": [1, 0], "feature": ["hidden", "query"], "zeroed_channels": zeroed, "num_noise_draws": 3}
    model = load("dit", timestep=[5, 60], **options)
    folded = model.fold()
    assert folded.config.zeroed_channels == {"1.hidden": [3], "0.query": [1]}
    assert difference(folded, model) <= 1e-5
    # Of a single tap at several timesteps they may be a list.
    model = load("dit", timestep=[5, 60], block=1, feature="hidden", zeroed_channels=[3])
    assert difference(model.fold(), model) <= 1e-5
    assert not model.fold()(images_of(model)).last_hidden_state[..., [3, 35]].any()


@pytest.mark.family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_in_half_precision(load, dtype):
    """It is no further from float32 than the half-precision model that it was made from."""
    for name in ("dit", "sd3", "sana", "lumina2"):
        exact, half = (load(name, **SEVERAL, dtype=each) for each in (torch.float32, dtype))
        # Sana's attention divides by sums that may be small: its errors are of few tokens.
        error = difference(half, exact) * (2 if name == "sana" else 1)
        for folded in (half.fold(), exact.fold().to(dtype)):
            assert {value.dtype for value in folded.denoiser.parameters()} == {dtype}
            assert difference(folded, exact) <= 2 * error + 1e-4


@pytest.mark.parametrize("name", ["dit", "sd35", "flux", "sana", "lumina2"])
def test_gradients_with_checkpoints_are_those_without(load, name):
    folded = load(name, DiTForImageClassification, freeze_backbone=False, read_out=UNEVEN, **HEAD).fold().train()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            enable_checkpointing(folded)
        folded.zero_grad()
        folded(images_of(folded), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({key: value.grad for key, value in folded.named_parameters() if value.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by its old name
def test_lora_trains_the_shared_layers(load, tmp_path):
    folded = load("dit", DiTForImageClassification, **SEVERAL, **HEAD).fold()
    adapted = get_peft_model(folded, LoraConfig(target_modules=["query_key_value", "down_projection"], r=2))
    adapted(images_of(folded), labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    blocks = {name.split("blocks.")[1].split(".")[0] for name in trained if "denoiser.blocks" in name}
    assert blocks == {"0", "1", "2"}
    assert all(value.grad is not None for value in adapted.parameters() if value.requires_grad)


def test_a_head_is_fitted_on_images_and_on_a_cache_of_a_folded_model(folder, tmp_path):
    options = {"head": "linear", "head_norm": False, "num_labels": 3, **SEVERAL}
    model = DiTForImageClassification.from_pretrained(folder, **options)
    values = (images_of(model, num=24).permute(0, 2, 3, 1) * 127.5 + 127.5).numpy().astype("uint8")
    rows = {"image": [Image.fromarray(each) for each in values], "label": [index % 3 for index in range(24)]}
    dataset, folded = Dataset.from_dict(rows), model.fold()
    cached = cache_features(folded, dataset, tmp_path, what="pooled", dtype="float32")
    given = torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        assert distance(cached[:]["features"], model.extract_features(given).mean(1)) <= 1e-5
    errors = []
    for each, data in ((model, dataset), (folded, dataset), (folded, cached)):
        errors.append(each.fit_head(data).error)
        # More features than images: what little the folds differ by is magnified.
        assert difference(each, model, given) <= 1e-2
    assert errors[1:] == pytest.approx(errors[:1] * 2, rel=1e-3)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 writes code that lacks torch")
@pytest.mark.process
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
@pytest.mark.parametrize("name", ["dit", "sd35"])
def test_compiled_without_graph_breaks_and_exported_with_a_free_batch(load, name):
    folded = load(name, DiTForImageClassification, read_out=UNEVEN, **HEAD).fold()
    given = images_of(folded, num=3)
    with torch.no_grad():
        expected = folded(given).logits
        compiled = torch.compile(folded, fullgraph=True, backend="eager")
        assert distance(compiled(pixel_values=given).logits, expected) <= 1e-6
        batch = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
        program = torch.export.export(folded, (), {"pixel_values": given}, dynamic_shapes=batch)
        for size in (1, 3):
            assert distance(program.module()(pixel_values=given[:size])["logits"], expected[:size]) <= 1e-5


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 takes no free batch here")
@pytest.mark.process
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
def test_written_as_onnx(load, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime", reason="the `export` extra is not installed")
    load("dit", DiTForImageClassification, **SEVERAL, **HEAD).save_pretrained(tmp_path / "whole")
    arguments = ["--model_name_or_path", str(tmp_path / "whole"), "--output", str(tmp_path / "whole.onnx")]
    monkeypatch.setattr("sys.argv", ["export_onnx.py", *arguments])
    example("features/export_onnx.py").main()
    assert "of torch's" in capsys.readouterr().out and (tmp_path / "whole.onnx").is_file()


def test_folded_on_the_command_line(folder, tmp_path, capsys):
    model = DiTForImageClassification.from_pretrained(folder, **SEVERAL, **HEAD)
    model.save_pretrained(tmp_path / "whole")
    assert main(["fold", str(tmp_path / "whole"), str(tmp_path / "folded")]) == 0
    assert "It reads hidden, query of all blocks at timestep 141, 7, 800." in capsys.readouterr().out
    folded = AutoModelForImageClassification.from_pretrained(tmp_path / "folded")
    assert difference(folded, model) <= 1e-5
    assert "yes, so only these timesteps can be read" in (tmp_path / "folded/README.md").read_text()
    words = ["--timestep", "5", "--timestep", "60", "--block", "1", "--block", "2", "--feature", "key"]
    assert main(["fold", str(folder), str(tmp_path / "key"), *words]) == 0
    config = ASelectConfig.from_pretrained(tmp_path / "key")
    assert config.folding.timesteps == (5, 60) and config.folding.taps == ("1.key", "2.key")


def test_a_norm_of_keys_that_nothing_reads_is_not_trained(tmp_path):
    sd35().save_pretrained(tmp_path)
    model = DiTModel.from_pretrained(tmp_path, timestep=5, block=2, feature=["value", "key"], freeze_backbone=False)
    frozen = [key for key, value in model.fold().denoiser.named_parameters() if not value.requires_grad]
    assert frozen == ["blocks.2.picture.key_norm.weight"]


def test_a_folded_configuration_of_several_timesteps_is_json(folder):
    config = DiTModel.from_pretrained(folder, read_out=UNEVEN).fold().config
    again = ASelectConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.folding == config.folding and again.read_outs() == config.read_outs()
