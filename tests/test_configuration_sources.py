"""Configurations as users of transformers write them: from any source, with values of any library.

What ViT's configuration takes is the measure. Of each kind one case was met in somebody's script; its siblings are
named by the ids of the tests.
"""

import json
import os

import accelerate
import numpy as np
import peft
import pytest
import torch
from conftest import build_transformer, build_vae
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, UperNetConfig, ViTConfig

from hf_aselect import ASelectConfig, DiTForImageClassification, DiTModel, NoiseSchedule, convert_diffusers

# Fields of `PreTrainedConfig`, and keywords that it takes beside.
OF_TRANSFORMERS = {
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": False,
    "problem_type": "regression",
    "architectures": ["A"],
    "tie_word_embeddings": False,
    # Of transformers 4.
    "pruned_heads": {},
    "task_specific_params": {"x": 1},
    "torchscript": False,
}


@pytest.fixture(scope="module")
def converted(pixel_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_diffusers(pixel_folder, folder, timestep=50)
    return folder


def of_constructor(_converted, _diffusers, **fields):
    return ASelectConfig(**fields)


def of_file(converted, _diffusers, **fields):
    return ASelectConfig.from_pretrained(converted, **fields)


def of_auto(converted, _diffusers, **fields):
    return AutoConfig.from_pretrained(converted, **fields)


def of_model(converted, _diffusers, **fields):
    return DiTForImageClassification.from_pretrained(converted, **fields).config


def of_diffusers(_converted, diffusers, **fields):
    return DiTForImageClassification.from_pretrained(
        diffusers, **({} if "read_out" in fields else {"timestep": 50}) | fields
    ).config


SOURCES = [of_constructor, of_file, of_auto, of_model, of_diffusers]


@pytest.fixture(params=SOURCES, ids=lambda source: source.__name__)
def config_of(request, converted, pixel_folder):
    return lambda **fields: request.param(converted, pixel_folder, **fields)


def test_every_field_of_transformers_is_taken_from_any_source(config_of):
    config, vit = config_of(**OF_TRANSFORMERS), ViTConfig(**OF_TRANSFORMERS)
    for name in OF_TRANSFORMERS.keys() - {"architectures"}:  # a model has its own name there
        assert getattr(config, name) == getattr(vit, name), name


@pytest.mark.parametrize(
    ("given", "names", "numbers"),
    [
        pytest.param({"id2label": {0: "a", 1: "b", 2: "c"}}, "abc", {"a": 0, "b": 1, "c": 2}, id="id2label"),
        pytest.param({"label2id": {"b": 1, "a": 0, "c": 2}}, "abc", {"a": 0, "b": 1, "c": 2}, id="label2id"),
        # Siblings: as JSON has them, as numpy has them, beside the number of them, as transformers' script spells it.
        pytest.param({"id2label": {"0": "a", "1": "b"}}, "ab", {"a": 0, "b": 1}, id="words-for-keys"),
        pytest.param({"label2id": {"a": "0", "b": "1"}}, "ab", {"a": "0", "b": "1"}, id="words-for-values"),
        pytest.param({"label2id": {"a": np.int64(0), "b": np.int64(1)}}, "ab", {"a": 0, "b": 1}, id="numpy"),
        pytest.param(
            {"num_labels": 3, "label2id": {"a": 0, "b": 1, "c": 2}, "i2label": {0: "a"}, "finetuning_task": "x"},
            "abc",
            {"a": 0, "b": 1, "c": 2},
            id="no-trainer-script",
        ),
    ],
)
def test_label_maps_are_derived_from_each_other(config_of, given, names, numbers):
    config = config_of(**given)
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == numbers
    assert config.num_labels == len(names)


@pytest.mark.parametrize("given", [{"label2id": {"a": 1, "b": 2}}, {"label2id": {"a": 0}, "num_labels": 3}])
def test_classes_that_are_not_counted_from_0_are_named(config_of, given):
    with pytest.raises(ValueError, match="`label2id`"):
        config_of(**given)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor, np.array], ids=["int64", "int32", "torch", "0-d"])
def test_integers_of_any_library_are_taken(config_of, kind, tmp_path):
    """Those of numpy were met; siblings: other widths, tensors, arrays of no axis."""
    fields = {"block": 1, "noise_seed": 7, "head_num_layers": 1, "num_labels": 3, "image_size": 16}
    config = config_of(**{name: kind(value) for name, value in fields.items()}, timestep=kind(9))
    for name, value in {**fields, "timestep": 9}.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is int, name
    config.save_pretrained(tmp_path)
    assert ASelectConfig.from_pretrained(tmp_path).timestep == 9


def test_an_integer_of_numpy_may_be_set_afterwards():
    config = ASelectConfig()
    config.timestep, config.image_size = np.int64(5), (32, 64)
    assert (type(config.timestep), config.image_size) == (int, [32, 64])


@pytest.mark.parametrize("value", [1, np.int64(1), np.float32(1), torch.tensor(1)])
def test_whole_numbers_are_taken_for_floats(value):
    config = ASelectConfig(guidance=value, auxiliary_loss_weight=value)
    assert config.guidance == config.auxiliary_loss_weight == 1.0
    with pytest.raises(StrictDataclassError, match="guidance"):
        ASelectConfig(guidance=True)


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(3.0), torch.tensor(3.5)])
def test_other_numbers_of_a_library_are_still_refused(value):
    with pytest.raises(StrictDataclassError, match="timestep"):
        ASelectConfig(timestep=value)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("image_size", (32, 64), [32, 64]),
        ("timestep", (1, 2), [1, 2]),
        ("block", np.arange(2), [0, 1]),
        ("block", range(2), [0, 1]),
        ("feature", ("query", "key"), ["query", "key"]),
        ("read_out", ((1, 2, "key"), (2, 1, "query")), [[1, 2, "key"], [2, 1, "query"]]),
        ("zeroed_channels", {"1.query": (1, 2)}, {"1.query": [1, 2]}),
        ("out_indices", (1, 2), [1, 2]),
    ],
)
def test_tuples_and_arrays_are_taken_for_lists(config_of, name, given, kept):
    assert getattr(config_of(**{name: given}), name) == kept


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda model, pixels, five: model.extract_features(pixels, five, block=five - 4, num_noise_draws=five), "x"),
        (lambda model, pixels, five: model.add_noise(pixels, five, draw=five), "add_noise"),
        (lambda model, pixels, five: model.generate_latents(five, five, five, five), "generate_latents"),
        (lambda model, pixels, five: model.noise_schedule.even_timesteps(five), "even_timesteps"),
        (lambda model, pixels, five: model.extract_maps(pixels, [(five - 4, "key")])[1, "key"], "extract_maps"),
    ],
)
@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_functions_take_integers_of_any_library(model, pixels, call, word, kind):
    found, expected = call(model, pixels, kind(5)), call(model, pixels, 5)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), word


def test_objects_of_diffusers_stand_for_their_configurations():
    transformer, vae = build_transformer(num_channels=4), build_vae()
    config = ASelectConfig(transformer=transformer, vae=vae, scheduler=DDPMScheduler(beta_schedule="scaled_linear"))
    assert config.transformer["_class_name"] == "DiTTransformer2DModel"
    assert config.vae["block_out_channels"] == [8, 8]
    assert config.scheduler["beta_schedule"] == "scaled_linear"
    assert "_use_default_values" not in config.scheduler
    json.dumps(config.to_dict())


def test_a_scheduler_as_an_object_is_a_noise_schedule():
    assert NoiseSchedule.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0)).sampled is not None


@pytest.mark.parametrize(("field", "part"), [("scheduler", DDPMScheduler()), ("transformer", build_transformer())])
def test_a_configuration_without_a_class_is_told_of_the_object(field, part):
    with pytest.raises((ValueError, StrictDataclassError), match="Pass the object itself"):
        DiTModel(ASelectConfig(**{field: dict(part.config)}))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_object_that_replaces_a_part_of_a_pipeline_brings_its_weights(latent_folder, part):
    given = {"transformer": build_transformer(num_channels=4), "vae": build_vae()}[part]
    with torch.no_grad():
        for weight in given.parameters():
            weight.mul_(0.5)
    model = DiTModel.from_pretrained(latent_folder, timestep=50, **{part: given})
    read = (model.denoiser.transformer if part == "transformer" else model.vae).state_dict()
    theirs = given.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in read.items() if name in theirs)


def offloaded(part):
    return accelerate.cpu_offload(part, execution_device="cpu")


def cast_to_16_bits(part):
    part.enable_layerwise_casting(torch.bfloat16, torch.float32)


def trained_fusion(part):
    part.fuse_qkv_projections()
    with torch.no_grad():
        part.encoder.mid_block.attentions[0].to_qkv.weight.mul_(1.1)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", offloaded),
        ("vae", offloaded),
        ("transformer", cast_to_16_bits),
        ("transformer", lambda part: part.compile(backend="eager")),
        ("vae", lambda part: part.fuse_qkv_projections()),
    ],
)
def test_an_object_that_was_changed_in_place_brings_its_weights(latent_folder, part, change, pixels, caplog):
    """Siblings of what is changed in a model before it is saved."""
    pixel_values = pixels.repeat(1, 1, 2, 2)
    given = {"transformer": build_transformer(num_channels=4), "vae": build_vae()}[part]
    for weight in given.parameters():
        weight.data = weight.data.bfloat16().float()
    expected = DiTModel.from_pretrained(latent_folder, timestep=50, **{part: given})(pixel_values).last_hidden_state
    change(given)
    found = DiTModel.from_pretrained(latent_folder, timestep=50, **{part: given})(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert "are ignored" not in caplog.text


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "transformer",
            lambda part: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), part),
            r"`transformer=` has weights of adapters: .*lora_A.*fuse_lora",
        ),
        ("vae", trained_fusion, r"`vae=` has fused projections that were trained.*unfuse_qkv_projections"),
        ("transformer", lambda part: part.to("meta"), "is not in memory and has no accelerate hook"),
    ],
)
def test_an_object_that_is_no_checkpoint_says_what_to_undo(latent_folder, part, change, words):
    given = {"transformer": build_transformer(num_channels=4), "vae": build_vae()}[part]
    change(given)
    with pytest.raises(ValueError, match=words):
        DiTModel.from_pretrained(latent_folder, timestep=50, **{part: given})


def test_a_scheduler_given_as_an_object_takes_the_place_of_the_files(pixel_folder):
    model = DiTModel.from_pretrained(pixel_folder, timestep=50, scheduler=DDPMScheduler(beta_end=0.01))
    assert model.config.scheduler["beta_end"] == 0.01


def test_any_kind_of_path_is_a_source(pixel_folder, converted):
    """An entry of `os.scandir` was met; its sibling is one of a folder of ours."""
    for folder in (pixel_folder, converted):
        (entry,) = [each for each in os.scandir(folder.parent) if each.name == folder.name]
        assert DiTModel.from_pretrained(entry, timestep=50).config.timestep == 50


@pytest.mark.parametrize("field", ["my_run", "a_field_of_a_later_version", "finetuning_task"])
def test_unknown_keys_of_a_file_are_kept(classifier, tmp_path, field):
    """A key of one's own was met; siblings: one of a later version, one that scripts pass."""
    setattr(classifier.config, field, {"x": 1})
    classifier.save_pretrained(tmp_path)
    loaded = DiTForImageClassification.from_pretrained(tmp_path)
    assert getattr(loaded.config, field) == getattr(AutoConfig.from_pretrained(tmp_path), field) == {"x": 1}
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[field] == {"x": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [("read_outs", 3), ("hidden_size", 5), ("layer_types", ["x"]), ("max_length", 3), ("head_dim", "x"), ("_x", 1)],
)
def test_no_key_of_a_file_stops_a_load(tmp_path, key, value):
    ASelectConfig(timestep=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    config = ASelectConfig.from_pretrained(tmp_path)
    assert config.read_outs() == [(3, 10, "query")]
    assert config.hidden_size == 1152
    config.save_pretrained(tmp_path)
    assert ASelectConfig.from_pretrained(tmp_path).timestep == 3


def test_a_misspelt_key_of_a_file_is_warned_of(tmp_path, caplog):
    ASelectConfig(timestep=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "timestepp": 7}))
    with caplog.at_level("WARNING"):
        assert ASelectConfig.from_pretrained(tmp_path).timestep == 3
    assert "unknown key `timestepp`. Did you mean `timestep`?" in caplog.text


def test_unknown_keys_are_kept_inside_of_another_configuration():
    nested = {**ASelectConfig(timestep=3).to_dict(), "my_run": "x"}
    assert UperNetConfig(backbone_config=nested).backbone_config.my_run == "x"


@pytest.mark.parametrize("given", [{"timestp": 5}, {"num_label": 5}, {"imagesize": 5}])
def test_a_misspelt_keyword_of_a_call_is_refused(config_of, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"ASelectConfig has no field `{name}` .did you mean"):
        config_of(**given)


@pytest.mark.parametrize(
    ("name", "fits", "other", "words"),
    [
        ("num_channels", 3, 1, "it is 3 in `transformer` or `vae`"),
        ("num_hidden_layers", 3, 12, "it is 3"),
        ("patch_size", 2, 16, "it is 2"),
        ("hidden_dropout_prob", 0.0, 0.1, "it is 0"),
    ],
)
def test_fields_of_vit_are_taken_where_they_are_so_here(converted, name, fits, other, words):
    assert ASelectConfig.from_pretrained(converted, **{name: fits}).timestep == 50
    with pytest.raises(
        (ValueError, StrictDataclassError), match=f"`{name}` cannot be set, because {words}.*got {other}"
    ):
        ASelectConfig.from_pretrained(converted, **{name: other})


def test_fields_of_vit_without_a_meaning_say_why():
    with pytest.raises(ValueError, match="`hidden_act` cannot be set, because it follows from `_class_name`"):
        ASelectConfig(hidden_act="gelu")


def test_a_model_takes_no_pooling_layer_as_vit_does(converted, pixels):
    model = AutoModel.from_pretrained(converted, add_pooling_layer=False)
    assert torch.equal(model(pixels).last_hidden_state, DiTModel.from_pretrained(converted)(pixels).last_hidden_state)
    assert AutoModel.from_config(model.config, add_pooling_layer=False).config.timestep == 50
    with pytest.raises(ValueError, match=r"`add_pooling_layer=True`.*mean of the tokens"):
        AutoModel.from_pretrained(converted, add_pooling_layer=True)


def test_transformers_own_scripts_load_a_configuration_and_a_model(converted):
    """The calls of transformers' `run_image_classification.py` and its no-trainer form."""
    labels = {"label2id": {"a": "0", "b": "1", "c": "2"}, "id2label": {"0": "a", "1": "b", "2": "c"}}
    common = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}
    for given in (labels, {"i2label": labels["id2label"], "label2id": labels["label2id"]}):
        config = AutoConfig.from_pretrained(
            converted, num_labels=3, finetuning_task="image-classification", **given, **common
        )
        model = AutoModelForImageClassification.from_pretrained(
            converted, from_tf=False, config=config, ignore_mismatched_sizes=False, **common
        )
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_keyword_beside_a_configuration_says_where_it_belongs(converted):
    """ViT has only Python's own words for it."""
    config = ASelectConfig.from_pretrained(converted)
    with pytest.raises(ValueError, match="Set timestep in `config=`"):
        DiTModel.from_pretrained(converted, config=config, timestep=5)


@pytest.mark.parametrize("name", ["lables", "label", "pixel_value", "latent"])
def test_a_misspelt_argument_of_forward_is_refused(classifier, pixels, name):
    """`lables` was met: there was no loss, and nothing said so."""
    with pytest.raises(ValueError, match=f"`forward` has no `{name}` .did you mean `"):
        classifier(pixels, **{name: torch.zeros(7).long()})
    # What transformers and its trainers pass to any model.
    assert classifier(pixels, num_items_in_batch=7, interpolate_pos_encoding=True, return_loss=True).loss is None


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 stops at its own exceptions")
def test_further_arguments_of_forward_break_no_graph(classifier, pixels):
    compiled = torch.compile(classifier.eval(), fullgraph=True, backend="eager")
    labels = torch.zeros(7).long()
    found = compiled(pixels, labels=labels, num_items_in_batch=7)
    torch.testing.assert_close(found.loss, classifier(pixels, labels=labels).loss)


@pytest.mark.parametrize("given", [{"use_temp_dir": True}, {"safe_serialization": True}, {"tags": None}])
def test_keywords_of_transformers_are_taken_by_a_push(classifier, monkeypatch, given):
    """`use_temp_dir` was met; the others are its siblings."""
    pushed = {}
    monkeypatch.setattr("hf_aselect.hub.push._push", lambda *_, **options: pushed.update(options))
    classifier.push_to_hub("me/model", commit_message="x", private=True, **given)
    assert pushed["include_code"] is True
    with pytest.raises(ValueError, match="is not supported"):
        classifier.push_to_hub("me/model", safe_serialization=False)
    with pytest.raises(ValueError, match="A card has no facts"):
        classifier.push_to_hub("me/model", use_tempdir=True)
