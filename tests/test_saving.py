"""What is saved of a backbone that diffusers, peft, torch or accelerate changed comes back, or saving says why not."""

import json
import warnings

import accelerate
import peft
import pytest
import torch
from conftest import HEAD
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.utils import recurse_remove_peft_layers
from pipelines import images_of, sd3
from torch import nn
from torch.nn.utils import prune

from hf_aselect import DiTForImageClassification

pytestmark = [
    pytest.mark.family,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks by its old name
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier on a tiny Stable Diffusion 3, saved."""
    folders = tmp_path_factory.mktemp("sd3")
    sd3(t5_too=False).save_pretrained(folders / "pipeline")
    torch.manual_seed(0)
    options = {"timestep": 300, "block": 2, "feature": "hidden", "num_labels": 2, "text_encoder_3": None}
    model = DiTForImageClassification.from_pretrained(folders / "pipeline", **options, **HEAD)
    model.save_pretrained(folders / "saved")
    return folders / "saved"


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_v"], "init_lora_weights": False, **options})


def transformer_of(model):
    return model.backbone.denoiser.transformer


def injected(model):
    return peft.inject_adapter_in_model(lora(), model)


def injected_into_the_transformer(model):
    peft.inject_adapter_in_model(lora(use_dora=True), transformer_of(model))


def added_by_diffusers(model):
    transformer_of(model).add_adapter(lora())


def fused_but_there(model):
    added_by_diffusers(model)
    transformer_of(model).fuse_lora()


def fused_and_unloaded(model):
    fused_but_there(model)
    transformer_of(model).unload_lora()


def merged(model):
    peft.get_peft_model(model, lora()).merge_and_unload()


def fused_projections(model):
    transformer_of(model).fuse_qkv_projections()


def unfused_projections(model):
    fused_projections(model)
    transformer_of(model).unfuse_qkv_projections()


def fused_projections_of_the_vae(model):
    model.backbone.vae.fuse_qkv_projections()


def trained_projections(model):
    fused_projections(model)
    with torch.no_grad():
        transformer_of(model).transformer_blocks[0].attn.to_qkv.weight.mul_(1.1)


def other_processors(model):
    class Halved(JointAttnProcessor2_0):
        """A processor of one's own."""

    transformer_of(model).set_attn_processor(Halved())


def cast_to_8_bits(model):
    transformer_of(model).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def cast_to_16_bits(model):
    transformer_of(model).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def cast_vae(model):
    model.backbone.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def compiled_block(model):
    blocks = transformer_of(model).transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


def parametrized(model):
    nn.utils.parametrizations.weight_norm(transformer_of(model).transformer_blocks[0].attn.to_q)


def pruned(model):
    # A sibling of parametrizations, as is the next.
    prune.l1_unstructured(transformer_of(model).transformer_blocks[0].attn.to_q, "weight", 0.5)


def weight_normed_as_before(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of this older way
        nn.utils.weight_norm(transformer_of(model).transformer_blocks[0].attn.to_q)


def quantized_by_torch(model):
    layer = transformer_of(model).transformer_blocks[0].ff.net[2]
    block = transformer_of(model).transformer_blocks[0]
    block.ff.net[2] = torch.ao.nn.quantized.dynamic.Linear(layer.in_features, layer.out_features)


def to_integers(model):
    for parameter in transformer_of(model).transformer_blocks.parameters():
        parameter.data = parameter.data.to(torch.int8)


def quantized_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torchao.quantize_(transformer_of(model), torchao.Int8WeightOnlyConfig())


def quantized_by_bitsandbytes(model):
    layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    net = transformer_of(model).transformer_blocks[0].ff.net
    net[2] = layers.Linear8bitLt(net[2].in_features, net[2].out_features, has_fp16_weights=False).to("cpu")


def without_vae(model):
    model.backbone.vae = None


def offloaded(model):
    accelerate.cpu_offload(model, execution_device="cpu")


COMES_BACK = [
    fused_and_unloaded,
    merged,
    fused_projections,
    unfused_projections,
    fused_projections_of_the_vae,
    cast_to_8_bits,
    cast_to_16_bits,
    cast_vae,
    compiled_block,
    offloaded,
]


@pytest.mark.parametrize("change", COMES_BACK)
def test_what_can_be_saved_comes_back(saved, tmp_path, change):
    model = DiTForImageClassification.from_pretrained(saved)
    change(model)
    expected = model(images_of(model)).logits
    model.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images_of(model)).logits, expected, rtol=1e-5, atol=1e-6)
    # And the model itself is as it was.
    torch.testing.assert_close(model(images_of(model)).logits, expected, rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


CANNOT = {
    injected: r"merge them \(`merge_and_unload",
    injected_into_the_transformer: r"or remove them \(`diffusers.utils.recurse_remove_peft_layers",
    added_by_diffusers: r"`fuse_lora\(\)` and `unload_lora\(\)` of the transformer",
    fused_but_there: r"`fuse_lora\(\)` and `unload_lora\(\)` of the transformer",
    trained_projections: r"Its fused projections were trained\. .*unfuse_qkv_projections",
    parametrized: r"remove_parametrizations",
    pruned: r"`torch\.nn\.utils\.prune\.remove`",
    weight_normed_as_before: r"`torch\.nn\.utils\.remove_weight_norm`",
    quantized_by_torch: r"could not be loaded again: .* Its layers are quantized\. Save the model before",
    quantized_by_torchao: "is quantized .* Save the model before",
    quantized_by_bitsandbytes: "Save the model before",
    to_integers: r"is quantized \(torch\.int8\).* Save the model before",
    without_vae: r"it lacks vae\.encoder.*Restore the modules that were replaced",
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning")  # torch's own, of its own layers
@pytest.mark.parametrize("change", CANNOT)
def test_saving_says_what_to_undo(saved, tmp_path, change):
    model = DiTForImageClassification.from_pretrained(saved)
    change(model)
    with pytest.raises(ValueError, match=CANNOT[change]):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_adapters_in_the_head_are_told_of(saved, tmp_path):
    """They were saved without a word, and loading called them another kind of head."""
    model = DiTForImageClassification.from_pretrained(saved)
    peft.inject_adapter_in_model(lora(target_modules=["output_projection"]), model)
    with pytest.raises(ValueError, match=r"The saved head could not be loaded again: .*base_layer.*merge_and_unload"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_what_is_to_be_undone_can_be(saved, tmp_path):
    model = DiTForImageClassification.from_pretrained(saved)
    expected = model(images_of(model)).logits
    injected(model)
    recurse_remove_peft_layers(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(DiTForImageClassification.from_pretrained(tmp_path)(images_of(model)).logits, expected)


def test_processors_that_are_not_saved_are_named(saved, tmp_path, caplog):
    model = DiTForImageClassification.from_pretrained(saved)
    other_processors(model)
    model.save_pretrained(tmp_path)
    assert (
        "Attention processors are not saved. The loaded model has diffusers' default processors instead of Halved"
        in caplog.text
    )
    assert DiTForImageClassification.from_pretrained(tmp_path)


def test_a_checkpoint_of_a_training_is_looked_at_too(saved, tmp_path):
    """A sibling: Trainer hands over the weights itself."""
    model = DiTForImageClassification.from_pretrained(saved)
    injected(model)
    with pytest.raises(ValueError, match="The model has adapters"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
