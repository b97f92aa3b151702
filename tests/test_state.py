"""What is frozen, and which mode it is in, belongs to the model: whoever loads it, and whatever is put into it."""

import copy
import pickle
from functools import partial

import accelerate
import onnxruntime
import peft
import pytest
import safetensors.torch
import torch
from conftest import HEAD, enable_checkpointing
from diffusers.models.embeddings import LabelEmbedding
from packaging.version import Version
from pipelines import LOAD_OPTIONS, PIPELINES, images_of
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from hf_aselect import (
    DiTBackbone,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    select_timestep,
)
from hf_aselect.model import noise_schedule
from hf_aselect.selection.apply import apply_selection

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks by its old name
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # peft's, of a base that diffusers saved
]


@pytest.fixture(scope="module")
def saved(latent_folder, tmp_path_factory):
    """Folders of a classifier on a DiT with a VAE: one whose backbone is frozen, and one whose is not."""
    folders = {}
    for is_frozen in (True, False):
        torch.manual_seed(0)
        model = DiTForImageClassification.from_pretrained(
            latent_folder, timestep=50, block=2, num_labels=4, freeze_backbone=is_frozen, **HEAD
        )
        folders[is_frozen] = tmp_path_factory.mktemp(f"frozen_{is_frozen}")
        model.save_pretrained(folders[is_frozen])
    return folders


class CompositeConfig(PreTrainedConfig):
    """A composite of one's own."""

    model_type = "composite_of_ones_own"
    backbone_config: dict | None = None


class Composite(PreTrainedModel):
    """A backbone under a layer, as people write it."""

    config_class = CompositeConfig

    def __init__(self, config):
        super().__init__(config)
        self.eyes = DiTBackbone(DiTBackbone.config_class(**config.backbone_config))
        self.probe = nn.Linear(4, 2)
        self.post_init()


def by_class(folder, _):
    return DiTForImageClassification.from_pretrained(folder)


def by_auto(folder, _):
    return AutoModelForImageClassification.from_pretrained(folder)


def by_auto_model(folder, _):
    return AutoModel.from_pretrained(folder)


def by_backbone(folder, _):
    return AutoBackbone.from_config(backbone_config(folder))


def by_configuration(folder, _):
    return AutoModelForImageClassification.from_config(by_class(folder, _).config)


def by_assigned_parameters(folder, _):
    model = by_class(folder, _)
    weights = {name: nn.Parameter(value.clone()) for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def by_assigned_parameters_in_a_module(folder, _):
    # A sibling: torch hands each part of the module its part of the weights.
    model = nn.Sequential(by_class(folder, _))
    weights = {name: nn.Parameter(value.clone()) for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def by_safetensors(folder, _):
    model = DiTForImageClassification(by_class(folder, _).config)
    safetensors.torch.load_model(model, folder / "model.safetensors")
    return model


def by_pickle(folder, path):
    torch.save(by_class(folder, path), path / "whole.pt")
    return torch.load(path / "whole.pt", weights_only=False)


def by_accelerate(folder, _):
    config = by_class(folder, _).config
    with accelerate.init_empty_weights():
        model = DiTForImageClassification(config)
    return accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"})


def by_device_map(folder, _):
    return DiTForImageClassification.from_pretrained(folder, device_map="cpu")


def by_upernet(folder, path):
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone_config(folder), hidden_size=16, use_auxiliary_head=False)
    )
    model.save_pretrained(path)
    return UperNetForSemanticSegmentation.from_pretrained(path)


def by_mask2former(folder, path):
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 8}
    small |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 8}
    config = Mask2FormerConfig(backbone_config=backbone_config(folder), num_queries=4, **small)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return Mask2FormerForUniversalSegmentation.from_pretrained(path)


def by_a_head(kind, config, folder, path):
    kind(config(folder)).save_pretrained(path)
    return kind.from_pretrained(path)


def of_dpt(folder):
    sizes = {"neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16, "reassemble_factors": [1] * 4}
    return DPTConfig(backbone_config=backbone_config(folder), hidden_size=16, is_hybrid=False, **sizes)


def of_detr(folder, **options):
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return DetrConfig(backbone_config=backbone_config(folder), **small, **options)


def of_maskformer(folder):
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return MaskFormerConfig(backbone_config=backbone_config(folder), decoder_config=of_detr(folder), **sizes)


BERT = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def of_an_encoder_and_decoder(folder):
    decoder = BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(by_auto_model(folder, None).config, decoder)


def of_two_encoders(folder):
    config = by_auto_model(folder, None).config
    return VisionTextDualEncoderConfig.from_vision_text_configs(config, BertConfig(**BERT), projection_dim=8)


# Siblings of UperNet: other heads that take a backbone, and those that take a base model.
HEADS = {
    DPTForDepthEstimation: of_dpt,
    DetrForObjectDetection: of_detr,
    MaskFormerForInstanceSegmentation: of_maskformer,
    VisionEncoderDecoderModel: of_an_encoder_and_decoder,
    VisionTextDualEncoderModel: of_two_encoders,
}


def by_accelerators_state(folder, path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(by_class(folder, path))
    accelerator.save_state(str(path))
    accelerator.load_state(str(path))
    return model.train()


def by_a_composite(folder, path):
    Composite(CompositeConfig(backbone_config=backbone_config(folder).to_dict())).save_pretrained(path)
    return Composite.from_pretrained(path)


def by_peft(folder, path):
    peft.get_peft_model(by_class(folder, path), lora(modules_to_save=["classifier"])).save_pretrained(path)
    return peft.PeftModel.from_pretrained(by_class(folder, path), path, is_trainable=True)


def by_merging(folder, path):
    model = peft.get_peft_model(by_class(folder, path), lora()).merge_and_unload()
    return model


def by_transformers_adapters(folder, path):
    peft.get_peft_model(by_class(folder, path), lora()).save_pretrained(path)
    model = by_class(folder, path)
    model.load_adapter(str(path), is_trainable=True)
    return model


def backbone_config(folder):
    return DiTBackbone.from_pretrained(folder, out_indices=[0, 1, 2, 3]).config


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], **options)


LOADERS = [
    by_class,
    by_auto,
    by_auto_model,
    by_backbone,
    by_configuration,
    by_assigned_parameters,
    by_assigned_parameters_in_a_module,
    by_safetensors,
    by_pickle,
    by_accelerate,
    by_device_map,
    by_upernet,
    by_mask2former,
    by_a_composite,
    by_accelerators_state,
    *(pytest.param(partial(by_a_head, kind, config), id=kind.__name__) for kind, config in HEADS.items()),
    by_peft,
    by_merging,
    by_transformers_adapters,
]


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("load", LOADERS)
def test_frozen_means_frozen_whoever_loads(saved, tmp_path, load, is_frozen):
    model = load(saved[is_frozen], tmp_path)
    (base,) = (module for module in model.modules() if isinstance(module, DiTModel))
    own = {name: value for name, value in base.named_parameters() if "lora_" not in name}
    trained = {name for name, value in own.items() if value.requires_grad}
    assert not {name for name in trained if name.startswith("vae.")}
    # peft freezes what it puts adapters on, whatever the configuration says.
    assert bool(trained) == (not is_frozen and load not in (by_peft, by_merging, by_transformers_adapters))
    assert not base.vae.encoder.training
    # What lies on the backbone, or was put into it, is trained. peft freezes a head that it does not save.
    is_bare = load in (by_auto_model, by_backbone, by_merging)
    assert is_bare or any(value.requires_grad for value in model.parameters() if not _is_in(value, own))


def _is_in(value, parameters):
    return any(value is each for each in parameters.values())


def with_lora(model):
    return peft.get_peft_model(model, lora(lora_dropout=0.5))


def with_dora(model):
    return peft.get_peft_model(model, lora(lora_dropout=0.5, use_dora=True))


def with_injected(model):
    return peft.inject_adapter_in_model(lora(lora_dropout=0.5), model)


def with_transformers_adapter(model):
    config = lora(lora_dropout=0.5)
    weights = peft.get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(model), config))
    model.load_adapter(peft_config=config, adapter_state_dict=weights, is_trainable=True)
    return model


def with_a_copied_part(model):
    # A sibling: peft trains a copy of a part that has a dropout of its own.
    model.backbone.denoiser.transformer.transformer_blocks[0].ff.net[1].p = 0.5
    return peft.get_peft_model(model, lora(modules_to_save=["transformer_blocks.0.ff"]))


def with_a_dropout(model):
    # A sibling without weights, put in by hand.
    ff = model.backbone.denoiser.transformer.transformer_blocks[0].ff
    ff.net.append(nn.Dropout(0.5))
    model.enable_input_require_grads()
    return model


ADAPTERS = [with_lora, with_dora, with_injected, with_transformers_adapter, with_a_copied_part, with_a_dropout]


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("adapt", ADAPTERS)
def test_what_others_put_in_behaves_as_in_a_backbone_that_is_trained(saved, adapt, is_checkpointed):
    found = []
    for is_frozen in (True, False):
        torch.manual_seed(0)
        model = by_class(saved[is_frozen], None)
        if is_checkpointed:
            enable_checkpointing(model)
        base, adapted = model.backbone, adapt(model)
        for part in base.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0  # which drops the null label to the null label, by random numbers
        own = {part for part in base._own_modules["denoiser"] if part.__class__.__module__.startswith("diffusers")}
        calls = [0, 0, 0]
        for number, block in enumerate(base.denoiser.blocks):
            block.ff.register_forward_pre_hook(partial(_count, calls, number))
        modes = []
        for mode in (True, False, True):
            adapted.train(mode)
            modes.append([part.training for part in base.denoiser.modules() if part not in own])
            assert not is_frozen or not any(part.training for part in own)
        torch.manual_seed(1)
        adapted(
            pixel_values=torch.linspace(-1, 1, 1536).view(2, 3, 16, 16), labels=torch.tensor([0, 1])
        ).loss.backward()
        gradients = [value.grad for name, value in base.named_parameters() if "lora_" in name]
        found.append((modes, calls, gradients))
    (modes, calls, gradients), (expected_modes, expected_calls, expected) = found
    assert [any(each) for each in modes] == [any(each) for each in expected_modes] == [True, False, True]
    assert calls == expected_calls == [1 + is_checkpointed] * 2 + [0]  # block 2 is tapped at its queries
    assert len(gradients) == len(expected)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=0)


def _count(calls, number, *_):
    calls[number] += 1


@pytest.mark.parametrize("timestep", [50, [50, 300]])
def test_a_folded_backbone_is_frozen_and_checkpointed(pixel_folder, timestep):
    """A sibling: its blocks have weights that hang on no layer, and are what transformers checkpoints."""
    model = a_classifier(pixel_folder, timestep=timestep, block=2, feature="hidden").fold()
    assert not any(value.requires_grad for value in model.backbone.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=model.lora_targets(), lora_dropout=0.5))
    enable_checkpointing(model)
    adapted.train()
    blocks = model.backbone.denoiser.blocks
    assert all(block.training for block in blocks) and not any(
        part.training for block in blocks for part in block.modules() if isinstance(part, nn.LayerNorm)
    )
    assert all(part.training for part in model.backbone.denoiser.modules() if isinstance(part, nn.Dropout))


def test_a_copy_has_the_modes_of_its_model(saved):
    """A sibling: what is its own is known in a copy, too."""
    model = copy.deepcopy(by_class(saved[True], None)).train()
    blocks = model.backbone.denoiser.transformer.transformer_blocks
    blocks[0].ff.net.append(nn.Dropout(0.5))
    model.eval().train()
    assert blocks[0].ff.net[-1].training and not blocks[0].ff.net[0].training and not blocks[1].training


@pytest.fixture(scope="module", params=PIPELINES)
def family(request, tmp_path_factory):
    """A model of each family, and the options that it is small with."""
    folder = tmp_path_factory.mktemp(request.param)
    PIPELINES[request.param]().save_pretrained(folder)
    return folder, LOAD_OPTIONS.get(request.param, {})


def of_family(family, **options):
    folder, small = family
    torch.manual_seed(0)
    return DiTForImageClassification.from_pretrained(folder, timestep=300, num_labels=2, **HEAD, **small, **options)


@pytest.mark.parametrize("is_folded", [False, True])
def test_each_parameter_that_is_trainable_is_used(family, is_folded):
    """PixArt and Sana were met; the other families, and all of them folded, are siblings."""
    model = of_family(family, block=1, feature="hidden", freeze_backbone=False).train()
    model = model.fold().train() if is_folded else model
    model(images_of(model), labels=torch.tensor([0, 1])).loss.backward()
    unused = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not unused


def test_each_adapter_up_to_the_tap_is_used_and_none_is_after_it(family):
    model = of_family(family, block=1, feature="attention")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=model.lora_targets(), init_lora_weights=False)
    ).train()
    adapted(pixel_values=images_of(model), labels=torch.tensor([0, 1])).loss.backward()
    adapters = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert adapters and not [name for name, value in adapters.items() if value.grad is None]


def test_layers_are_named_by_their_ends_and_found_under_other_models(saved, tmp_path):
    """A sibling: other layers, and a backbone that is part of a composite."""
    model = by_a_composite(saved[True], tmp_path)
    names = model.eyes.lora_targets(["to_out.0"])
    assert [name.split(".", 3)[-1] for name in names] == [
        f"{block}.attn1.to_out.0" for block in range(2)
    ]  # queries of block 2 are read
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2
    with pytest.raises(ValueError, match=r"suffixes of the names of layers up to the tap, got \['q_proj'\]"):
        model.eyes.lora_targets(["q_proj"])


def a_classifier(folder, **options):
    torch.manual_seed(0)
    given = {"timestep": 50, "head": "linear", "num_labels": 4, **options}
    return DiTForImageClassification.from_pretrained(folder, **given)


def a_segmenter(folder):
    """A sibling: of another size, with several draws of noise."""
    torch.manual_seed(0)
    options = {"timestep": 50, "num_labels": 3, "decoder": "linear", "image_size": 12, "num_noise_draws": 2}
    return DiTForSemanticSegmentation.from_pretrained(folder, **options)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 compiles no model of transformers")
@pytest.mark.parametrize("make", [a_classifier, a_segmenter])
def test_a_model_compiles_before_it_was_called(pixel_folder, make):
    noise_schedule._KEPT_NOISE.clear()
    torch._dynamo.reset()  # other tests compiled the same code
    model = make(pixel_folder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images_of(model)).logits
    torch.testing.assert_close(compiled, make(pixel_folder)(images_of(model)).logits)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:(Attempted to insert a get_attr|Node lifted_tensor):UserWarning")  # torch 2.6's
def test_a_model_is_exported_before_it_was_called(pixel_folder, tmp_path):
    noise_schedule._KEPT_NOISE.clear()
    pixel_values = torch.zeros(1, 3, 8, 8)
    torch.onnx.export(a_classifier(pixel_folder), (pixel_values,), tmp_path / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits, *_) = session.run(None, {session.get_inputs()[0].name: pixel_values.numpy()})
    torch.testing.assert_close(torch.tensor(logits), a_classifier(pixel_folder)(pixel_values).logits)


def test_a_call_does_not_make_a_model_another_one(saved):
    """A sibling: what `datasets.map` takes a model for is what pickle makes of it."""
    model = by_class(saved[True], None)
    before = pickle.dumps(model)
    model(torch.zeros(1, 3, 24, 16))
    assert pickle.dumps(model) == before


def test_layers_up_to_the_tap_are_found_under_either_kind_of_checkpointing(saved):
    """A sibling: the older kind takes no part in `torch.autograd.grad`, by which they are found."""
    model = by_class(saved[False], None)
    expected = model.lora_targets()
    enable_checkpointing(model, {"use_reentrant": True})
    assert model.train().lora_targets() == expected
    selection = select_timestep(model, images_of(model, num=8), timesteps=[50, 500], block=1, feature="hidden")
    model.apply_selection(selection)
    assert all(step.gradient_checkpointing for step in model.backbone.denoiser.steps)


@pytest.mark.parametrize("is_adapted", [False, True])
def test_another_tap_trains_what_was_trained(saved, is_adapted):
    """A sibling: under adapters peft froze the backbone, and a selection at another tap leaves it so."""
    model = by_class(saved[False], None)
    trained = peft.get_peft_model(model, lora()) if is_adapted else model
    selection = select_timestep(model, images_of(model, num=8), timesteps=[50, 500], block=1, feature="hidden")
    apply_selection(trained, selection)
    blocks = {block: set() for block in range(3)}
    for name, value in model.backbone.named_parameters():
        if "transformer_blocks." in name and "lora_" not in name:
            blocks[int(name.split("transformer_blocks.")[1][0])].add(value.requires_grad)
    assert blocks == {0: {not is_adapted}, 1: {not is_adapted}, 2: {False}}
