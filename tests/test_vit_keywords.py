"""What ViT takes, we take, or say why not: every keyword of its configuration, models, processor, loading and saving.

The names are read off transformers' signatures: one that a later version adds fails here until it has a value.
"""

import inspect
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import HEAD
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BeitForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorKwargs, BeitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
)

FOLLOWS = "cannot be set, because it follows from `_class_name`"
POOLER = "the pooled output is the mean of the tokens"
# A value that somebody would give, and the reason where it is rejected.
OF_CONFIG = {
    **{name: (value, FOLLOWS) for name, value in {"hidden_act": "gelu", "intermediate_size": 64}.items()},
    **{name: (value, FOLLOWS) for name, value in {"layer_norm_eps": 1e-12, "qkv_bias": True}.items()},
    "encoder_stride": (2, FOLLOWS),
    "pooler_act": ("tanh", POOLER),
    "pooler_output_size": (16, POOLER),
    "hidden_dropout_prob": (0.1, "cannot be set, because it is 0"),
    "attention_probs_dropout_prob": (0.1, "cannot be set, because it is 0"),
    "hidden_size": (768, "cannot be set, because it is 16"),
    "num_hidden_layers": (12, "cannot be set, because it is 3"),
    "num_attention_heads": (12, "cannot be set, because it is 2"),
    "patch_size": (16, "cannot be set, because it is 2"),
    "num_channels": (1, "cannot be set, because it is 3"),
    "image_size": (16, None),
    "initializer_range": (0.01, None),
    "architectures": (["ViTModel"], None),
    "transformers_version": ("5.0.0", None),
    "output_hidden_states": (True, None),
    "return_dict": (False, None),
    "dtype": ("float32", None),
    "chunk_size_feed_forward": (2, None),
    "is_encoder_decoder": (False, None),
    "id2label": ({0: "a", 1: "b"}, None),
    "label2id": ({"a": 0, "b": 1}, None),
    "problem_type": ("regression", None),
}
MASKS = "is not supported, because all tokens are read"
OF_FORWARD = {
    "pixel_values": (torch.zeros(2, 3, 8, 8), None),
    "labels": (torch.tensor([0, 1]), None),
    "interpolate_pos_encoding": (True, None),
    "bool_masked_pos": (torch.ones(2, 16), MASKS),
    "attention_mask": (torch.ones(2, 16), MASKS),
    # Of `kwargs`: what transformers' models and `Trainer` hand over, and older ViTs had.
    "output_attentions": (True, "most attention kernels return no weights"),
    "output_hidden_states": (True, None),
    "return_dict": (True, None),
    "num_items_in_batch": (torch.tensor(2), None),
    "head_mask": (None, None),
    "use_cache": (False, None),
}
OF_LOADING = {
    **dict.fromkeys(("config", "cache_dir", "token", "fusion_config"), (None, None)),
    **dict.fromkeys(("ignore_mismatched_sizes", "force_download", "disable_mmap"), (False, None)),
    **dict.fromkeys(("local_files_only", "use_safetensors", "weights_only"), (True, None)),
    "revision": ("main", None),
    # Of `kwargs`.
    "device_map": ("cpu", None),
    "dtype": ("auto", None),
    "torch_dtype": ("float32", None),
    "low_cpu_mem_usage": (True, None),
    "trust_remote_code": (False, None),
    "attn_implementation": ("eager", None),
    "adapter_kwargs": ({}, None),
    "key_mapping": (None, None),
    "subfolder": ("", None),
    "variant": (None, None),
    "num_labels": (4, None),
    "add_pooling_layer": (False, "it is for a `DiTModel`, and adds nothing there"),
    "use_mask_token": (False, "no token is masked"),
    "use_auth_token": ("hf_x", "did you mean `token`?"),
    "problem_typ": ("regression", "did you mean `problem_type`?"),
    "ignore_mismatched_size": (True, "did you mean `ignore_mismatched_sizes`?"),
    "calibration_image": (None, "did you mean `calibration_images`?"),
}
OF_SAVING = {
    **dict.fromkeys(("is_main_process", "save_peft_format", "save_original_format"), (True, None)),
    **dict.fromkeys(("push_to_hub", "distributed_checkpoint"), (False, None)),
    **dict.fromkeys(("state_dict", "token"), (None, None)),
    "max_shard_size": ("1KB", None),
    "variant": ("fp16", None),
    "safe_serialization": (True, None),
}
OF_PROCESSOR = {
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop"), (True, None)),
    **dict.fromkeys(("default_to_square", "disable_grouping"), (True, None)),
    **dict.fromkeys(("pad_size", "input_data_format", "image_seq_length"), (None, None)),
    "do_pad": (False, None),
    "size": ({"height": 8, "width": 8}, None),
    "crop_size": ({"height": 8, "width": 8}, None),
    "resample": (2, None),
    "rescale_factor": (1 / 255, None),
    "image_mean": ([0.5] * 3, None),
    "image_std": ([0.5] * 3, None),
    "data_format": ("channels_first", None),
    "device": ("cpu", None),
    "return_tensors": ("pt", None),
    "use_fast": (True, "It is for `AutoImageProcessor.from_pretrained`"),
    "num_lables": (2, "ASelectImageProcessor has no field"),
}


def names_of(*calls):
    """The names of what some functions take, but for what stands for others."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {each.name: each.kind for call in calls for each in inspect.signature(call).parameters.values()}
    others = {"self", "save_directory", "pretrained_model_name_or_path"}
    return {name for name, kind in found.items() if kind not in kinds} - others


@pytest.mark.parametrize(
    ("table", "calls"),
    [
        (OF_CONFIG, [ViTConfig]),
        (OF_FORWARD, [ViTModel.forward, ViTForImageClassification.forward, BeitForSemanticSegmentation.forward]),
        (OF_LOADING, [PreTrainedModel.from_pretrained, PreTrainedConfig.from_pretrained]),
        (OF_LOADING, [ViTImageProcessorPil.from_pretrained]),
        (OF_SAVING, [PreTrainedModel.save_pretrained, PreTrainedConfig.save_pretrained]),
    ],
    ids=["configuration", "forward", "loading", "loading-processors", "saving"],
)
def test_every_keyword_has_a_value(table, calls):
    assert names_of(*calls) - table.keys() == set()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (PreTrainedModel.push_to_hub, DiTForImageClassification.push_to_hub),
        (PreTrainedConfig.push_to_hub, ASelectConfig.push_to_hub),
        (ViTImageProcessorPil.push_to_hub, ASelectImageProcessor.push_to_hub),
        (
            BeitImageProcessorPil.post_process_semantic_segmentation,
            ASelectImageProcessor.post_process_semantic_segmentation,
        ),
        (ViTForImageClassification.forward, DiTForImageClassification.forward),
    ],
    ids=["model", "configuration", "processor", "post-processing", "forward"],
)
def test_arguments_have_the_names_and_the_order_of_transformers(theirs, ours):
    takes_more = any(
        each.kind == inspect.Parameter.VAR_KEYWORD for each in inspect.signature(ours).parameters.values()
    )
    assert takes_more or names_of(theirs) <= names_of(ours)
    places = [list(inspect.signature(each).parameters) for each in (theirs, ours)]
    both = [[name for name in each if name in places[0] and name in places[1]] for each in places]
    assert both[0] == both[1]


def test_every_field_of_a_processor_has_a_value():
    fields = {
        name for kind in ViTImageProcessorPil.valid_kwargs.__mro__ for name in getattr(kind, "__annotations__", {})
    }
    assert fields - OF_PROCESSOR.keys() == set()
    assert BeitImageProcessorKwargs.__annotations__.keys() <= ASelectImageProcessor.valid_kwargs.__annotations__.keys()


def check(reason, call):
    """What is taken, or rejected with a reason."""
    if reason is None:
        return call()
    with pytest.raises(ValueError) as rejected:
        call()
    assert reason in str(rejected.value)
    return None


@pytest.fixture(scope="module")
def saved(loaded_classifier, tmp_path_factory):
    """The classifier in our own layout, with its image processor."""
    folder = tmp_path_factory.mktemp("saved")
    loaded_classifier[0].save_pretrained(folder)
    ASelectImageProcessor.from_model_config(loaded_classifier[0].config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OF_CONFIG)
def test_a_field_of_vit_is_taken_or_the_reason_is_said(name, loaded_classifier, saved):
    value, reason = OF_CONFIG[name]
    fields = loaded_classifier[0].config.to_dict()
    del fields["model_type"], fields["transformers_version"]  # by which what is unknown is kept
    if name in ("id2label", "label2id"):
        fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
    check(reason, lambda: ASelectConfig(**{**fields, name: value}))
    check(reason, lambda: ASelectConfig.from_pretrained(saved, **{name: value}))


@pytest.mark.parametrize("name", OF_FORWARD)
def test_an_input_of_vit_is_taken_or_the_reason_is_said(name, classifier, model, pixel_folder):
    value, reason = OF_FORWARD[name]
    segmenter = DiTForSemanticSegmentation.from_pretrained(pixel_folder, timestep=5, num_labels=2)
    for each in (classifier, model, segmenter):
        own, said = value, reason
        if name == "labels":
            own = torch.zeros(2, 8, 8, dtype=torch.long) if each is segmenter else value
            said = "only models with a head take it" if each is model else None
        given = {"pixel_values": torch.zeros(2, 3, 8, 8), name: own}
        check(said, lambda each=each, given=given: each(**given))


@pytest.mark.parametrize("name", OF_LOADING)
def test_what_loads_vit_loads_us_or_the_reason_is_said(name, saved, pixel_folder):
    value, reason = OF_LOADING[name]
    check(reason, lambda: DiTForImageClassification.from_pretrained(saved, **{name: value}))
    check(
        reason,
        lambda: DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, **HEAD, **{name: value}),
    )


def test_what_makes_vit_makes_a_base_model_or_the_reason_is_said(model, saved, caplog):
    reason = "`pooler_output` is the mean of the tokens"
    for value in (False, True):
        for make in (partial(DiTModel, model.config), partial(DiTModel.from_pretrained, saved)):
            check(reason if value else None, partial(make, add_pooling_layer=value))
            caplog.clear()
            # As ViT's, the model is the same unless something is masked, which `forward` refuses.
            make(use_mask_token=value)
            assert ("images cannot be masked" in caplog.text) is value
    assert names_of(ViTModel.__init__) <= names_of(DiTModel.__init__)


@pytest.mark.parametrize("name", OF_SAVING)
def test_what_saves_vit_saves_us(name, classifier, tmp_path):
    value, reason = OF_SAVING[name]
    for each in (classifier, classifier.config):
        check(reason, lambda each=each: each.save_pretrained(tmp_path, **{name: value}))


@pytest.mark.parametrize("name", OF_PROCESSOR)
def test_a_field_of_vits_processor_is_taken_or_the_reason_is_said(name, saved):
    value, reason = OF_PROCESSOR[name]
    image = Image.new("RGB", (12, 10))
    check(reason, lambda: ASelectImageProcessor(**{name: value})(image))
    check(reason, lambda: ASelectImageProcessor.from_pretrained(saved)(image, **{name: value}))


def test_loading_a_processor_takes_what_belongs_to_the_model(saved):
    """As pipelines hand their keywords to all that they load."""
    for kind in (AutoImageProcessor, ASelectImageProcessor):
        assert kind.from_pretrained(saved, num_labels=3).num_channels == 3
    mask = np.ones((10, 12), np.uint8)
    theirs = BeitImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    for given in ([mask], {"segmentation_maps": mask}):
        arguments, named = (given, {}) if isinstance(given, list) else ([], given)
        made = [
            each(Image.new("RGB", (12, 10)), *arguments, **named) for each in (theirs, ASelectImageProcessor(size=8))
        ]
        assert made[0].keys() == made[1].keys()


def test_a_configuration_comes_back_from_its_dictionary(classifier, tmp_path):
    """With what a file, or its user, had in it beside the fields; a keyword alone is still rejected."""
    classifier.config.my_run = "x"
    classifier.config.of_a_newer_version = {"a": [1]}
    again = ASelectConfig(**classifier.config.to_dict())
    assert again.my_run == "x" and again.to_dict() == classifier.config.to_dict()
    with pytest.raises(ValueError, match="has no field `my_run`"):
        ASelectConfig(my_run="x")
    # Siblings: of a file, by the model's type, and under another model.
    classifier.save_pretrained(tmp_path, include_code=True)
    content = json.loads((tmp_path / "config.json").read_text())
    assert ASelectConfig(**content).my_run == AutoConfig.for_model(**content).my_run == "x"
    around = UperNetConfig(backbone_config=ASelectConfig(**content), use_auxiliary_head=False)
    assert UperNetConfig(**around.to_dict()).backbone_config.of_a_newer_version == {"a": [1]}


@pytest.mark.parametrize("name", ["timestep", "feature", "block"])
def test_none_is_what_was_saved_or_the_default(name, classifier, tmp_path, pixel_folder):
    """As scripts pass what they were not given."""
    assert getattr(ASelectConfig(**{name: None}), name) == getattr(ASelectConfig(), name)
    classifier.config.update({"timestep": 7, "feature": "query", "block": 2})
    classifier.save_pretrained(tmp_path)
    found = DiTForImageClassification.from_pretrained(tmp_path, **{name: None}).config
    assert found.read_outs() == [(7, 2, "query")]


def test_an_image_size_has_a_height_and_a_width():
    for given in ({"height": 256, "width": 512}, (256, 512), np.array([256, 512])):
        assert ASelectConfig(image_size=given).image_height_width == (256, 512)
    with pytest.raises(Exception, match="image_size"):
        ASelectConfig(image_size={"shortest_edge": 256})


@pytest.mark.parametrize("how", ["keyword", "attribute", "loaded"])
def test_asking_for_attention_weights_in_a_configuration_is_answered(how, classifier, saved, pixels, caplog, tmp_path):
    logging.enable_propagation()
    logging.get_logger().warning_once.__func__.cache_clear()
    if how == "attribute":
        classifier.config.output_attentions = True
    elif how == "keyword":
        classifier = DiTForImageClassification(
            ASelectConfig(**{**classifier.config.to_dict(), "output_attentions": True})
        )
    else:
        classifier = DiTForImageClassification.from_pretrained(saved, output_attentions=True)
    logging.disable_propagation()
    assert classifier.config.output_attentions
    assert [each.getMessage() for each in caplog.records if "attention weights are never" in each.getMessage()]
    assert classifier(pixels).attentions is None
    classifier.save_pretrained(tmp_path)
    DiTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["keyword", "attribute", "loaded"])
def test_what_a_configuration_says_of_outputs_holds(how, classifier, saved, pixels):
    asked = {"output_hidden_states": True, "return_dict": False}
    if how == "attribute":
        classifier.config.update(asked)
    elif how == "keyword":
        classifier = DiTForImageClassification(ASelectConfig(**{**classifier.config.to_dict(), **asked}))
    else:
        classifier = DiTForImageClassification.from_pretrained(saved, **asked)
    logits, hidden_states = classifier(pixels)
    assert logits.shape == (7, 4) and len(hidden_states) == 4
    assert classifier(pixels, return_dict=True).logits.shape == (7, 4)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *(("acuracy", "accuracy"), ("datasett", "dataset"), ("commit_mesage", "commit_message")),
        *(("privat", "private"), ("max_shard_sise", "max_shard_size"), ("use_auth_token", "token")),
        *(("repo_path_or_name", "repo_id"), ("licence", "license"), ("revison", "revision")),
    ],
)
def test_a_misspelt_keyword_of_a_push_names_the_nearest(given, meant, classifier):
    with pytest.raises(ValueError, match=f"'{given}' .did you mean '{meant}'") as rejected:
        classifier.push_to_hub("me/x", **{given: "x"})
    assert len(str(rejected.value)) < 150
