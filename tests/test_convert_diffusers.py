"""Loading: the three sources, what comes back, and every folder that is rejected."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HEAD, build_transformer, build_vae, example
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from huggingface_hub.errors import StrictDataclassError
from pipelines import dit, sd3, sit
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
)

from hf_aselect import ASelectConfig, DiTForImageClassification, DiTModel, NoiseSchedule, convert_diffusers
from hf_aselect.checkpoints.diffusers import _default_embedding, expected_shapes
from hf_aselect.model.families import FAMILIES, layout_of

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pixel_folder, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pixel_folder, tmp_path / "copy")


@pytest.fixture
def saved(classifier, tmp_path):
    """A saved classifier that a test may break."""
    classifier.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_folder_of_transformer_and_scheduler_has_their_weights(pixel_folder):
    model = DiTModel.from_pretrained(pixel_folder, timestep=5)
    expected = DiTTransformer2DModel.from_pretrained(pixel_folder / "transformer").state_dict()
    for name, value in model.denoiser.transformer.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_bare_transformer_takes_dits_own_schedule(bare_folder):
    model = DiTModel.from_pretrained(bare_folder, timestep=5)
    theirs = DDPMScheduler(beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(model.noise_schedule.alphas_cumprod.float(), theirs, rtol=1e-4, atol=1e-6)


def test_the_scheduler_beside_the_transformer_is_taken(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=5)
    theirs = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(model.noise_schedule.alphas_cumprod.float(), theirs, rtol=1e-4, atol=1e-6)


def test_a_vae_encodes_to_its_scaled_posterior_mean(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=5)
    vae = AutoencoderKL.from_pretrained(latent_folder / "vae").eval()
    pixel_values = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixel_values).latent_dist.mean * 0.5
        torch.testing.assert_close(model.encode(pixel_values), expected)


def test_the_decoder_of_a_vae_is_dropped(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=5)
    assert not [name for name, _ in model.named_parameters() if "decoder" in name or "post_quant" in name]
    assert sum(p.numel() for p in model.vae.parameters()) < sum(p.numel() for p in build_vae().parameters()) / 2


def test_a_latent_model_reads_and_reloads(latent_folder, tmp_path):
    model = DiTForImageClassification.from_pretrained(latent_folder, timestep=5, num_labels=3, **HEAD)
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    model.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)


def test_half_precision_weights_become_float32(folder):
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    transformer.save_pretrained(folder / "transformer")
    assert DiTModel.from_pretrained(folder, timestep=5).dtype == torch.float32


def test_another_dtype_can_be_asked_for(folder, pixels):
    model = DiTModel.from_pretrained(folder, timestep=5, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert bool(model(pixels).last_hidden_state.isfinite().all())


def test_weights_in_shards_are_read(folder, pixel_folder, pixels):
    shutil.rmtree(folder / "transformer")
    build_transformer().save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    found, expected = (DiTModel.from_pretrained(source, timestep=5)(pixels) for source in (folder, pixel_folder))
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_a_folder_that_is_none_of_the_sources_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"is not a supported checkpoint: expected an hf_aselect checkpoint.*notes\.txt"
    ):
        DiTModel.from_pretrained(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="is not a supported checkpoint"):
        DiTModel.from_pretrained(tmp_path)


def test_a_missing_scheduler_is_refused(folder):
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match=r"has transformer/ but no scheduler/scheduler_config.json"):
        DiTModel.from_pretrained(folder)


def test_missing_weights_are_refused(folder):
    (folder / "transformer" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no weights '{WEIGHTS}'"):
        DiTModel.from_pretrained(folder)


def test_a_configuration_that_is_no_json_is_refused(folder):
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        DiTModel.from_pretrained(folder)


def test_a_truncated_diffusers_file_is_refused(folder):
    cut(folder / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        DiTModel.from_pretrained(folder)


def test_a_truncated_checkpoint_of_ours_is_refused(saved):
    cut(saved / "model.safetensors")
    with pytest.raises(ValueError, match="are truncated or not safetensors"):
        DiTForImageClassification.from_pretrained(saved)


def test_a_truncated_shard_of_ours_is_refused(classifier, tmp_path):
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    cut(sorted(tmp_path.glob("*.safetensors"))[1])
    with pytest.raises(ValueError, match="are truncated or not safetensors"):
        DiTForImageClassification.from_pretrained(tmp_path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("place", ["transformer/diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_pickled_weights_of_diffusers_are_refused_and_never_unpickled(pixel_folder, bare_folder, tmp_path, place):
    source = pixel_folder if "/" in place else bare_folder
    folder = shutil.copytree(source, tmp_path / "copy")
    (folder / place).with_name(WEIGHTS).unlink()
    (folder / place).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"only pickled weights .diffusion_pytorch_model.bin., which are not loaded"):
        DiTModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_ours_are_refused_and_never_unpickled(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"only pickled weights .pytorch_model.bin., which are not loaded"):
        DiTForImageClassification.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_the_trainers_own_pickle_beside_safetensors_does_no_harm(saved):
    before = DiTForImageClassification.from_pretrained(saved).state_dict()
    (saved / "training_args.bin").write_bytes(b"")
    after = DiTForImageClassification.from_pretrained(saved).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_tensor_of_the_backbone_is_refused(folder):
    rewrite(folder / "transformer" / WEIGHTS, lambda weights: weights.pop("pos_embed.proj.bias"))
    with pytest.raises(ValueError, match=r"1 tensors of the backbone are missing.*pos_embed\.proj\.bias"):
        DiTModel.from_pretrained(folder)


def test_a_missing_tensor_of_our_checkpoint_is_refused(saved):
    name = "backbone.denoiser.transformer.transformer_blocks.0.attn1.to_q.weight"
    rewrite(saved / "model.safetensors", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=r"1 tensors of the backbone are missing.*to_q"):
        DiTForImageClassification.from_pretrained(saved)


def test_a_tensor_of_another_shape_is_refused(folder):
    rewrite(folder / "transformer" / WEIGHTS, lambda weights: weights.update({"proj_out_1.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"of another shape.*proj_out_1"):
        DiTModel.from_pretrained(folder)


def test_a_tensor_too_many_of_diffusers_is_left_out_with_a_warning(folder, pixel_folder, pixels, tmp_path, caplog):
    """As diffusers does: old PixArt weights hold `caption_projection.y_embedding`, which nothing reads."""
    rewrite(folder / "transformer" / WEIGHTS, lambda weights: weights.update({"extra.weight": torch.zeros(3)}))
    expected = DiTModel.from_pretrained(pixel_folder, timestep=5)(pixels).pooler_output
    with caplog.at_level("WARNING", logger="hf_aselect"):
        assert torch.equal(DiTModel.from_pretrained(folder, timestep=5)(pixels).pooler_output, expected)
    assert "1 tensors of copy do not belong to a DiTTransformer2DModel and are ignored" in caplog.text
    assert "extra.weight" in caplog.text
    made = convert_diffusers(folder, tmp_path / "out")
    assert torch.equal(DiTModel.from_pretrained(made.output, timestep=5)(pixels).pooler_output, expected)


def test_a_tensor_too_many_of_our_backbone_is_refused(saved):
    name = "backbone.denoiser.extra"
    rewrite(saved / "model.safetensors", lambda weights: weights.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"do not fit.*denoiser\.extra"):
        DiTForImageClassification.from_pretrained(saved)


def test_a_vae_with_the_attention_names_of_old_is_read(tmp_path):
    """As diffusers before 0.17 saved it, `facebook/DiT-XL-2-256` among them; diffusers renames on loading, too."""
    dit().save_pretrained(tmp_path / "new")
    folder = shutil.copytree(tmp_path / "new", tmp_path / "old")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for name in list(weights):
            for now, before in old.items():
                if f".attentions.0.{now}." in name:
                    weights[name.replace(f".{now}.", f".{before}.")] = weights.pop(name)

    rewrite(folder / "vae" / WEIGHTS, rename)
    names = load_file(folder / "vae" / WEIGHTS)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in names
    assert not [name for name in names if ".to_" in name]
    pixel_values = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = DiTModel.from_pretrained(tmp_path / "new", timestep=5).encode(pixel_values)
    assert torch.equal(DiTModel.from_pretrained(folder, timestep=5).encode(pixel_values), expected)
    made = convert_diffusers(folder, tmp_path / "out")
    assert torch.equal(DiTModel.from_pretrained(made.output, timestep=5).encode(pixel_values), expected)
    # diffusers' own reading of the same files.
    theirs = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        mean = theirs.encode(pixel_values).latent_dist.mean * theirs.config.scaling_factor
    torch.testing.assert_close(expected, mean)


@pytest.mark.parametrize("part", ["vae", "scheduler", "text_encoder_3", "tokenizer_2"])
def test_a_part_that_the_pipeline_lists_and_lacks_is_refused(sd3_folder, tmp_path, part):
    """Without it another model would come out: one on pixels, or one with zeros in place of T5's embeddings."""
    folder = shutil.copytree(sd3_folder, tmp_path / "in", ignore=shutil.ignore_patterns(part))
    with pytest.raises(ValueError, match=rf"lacks {part}/, which model_index\.json lists"):
        DiTModel.from_pretrained(folder, timestep=5)
    with pytest.raises(ValueError, match=rf"lacks {part}/, which model_index\.json lists"):
        convert_diffusers(folder, tmp_path / "out")


def test_a_part_that_is_done_without_may_be_missing(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "in", ignore=shutil.ignore_patterns("*_3"))
    whole = DiTModel.from_pretrained(sd3_folder, timestep=5, text_encoder_3=None)
    model = DiTModel.from_pretrained(folder, timestep=5, text_encoder_3=None)
    assert torch.equal(model.denoiser.prompt_embeds, whole.denoiser.prompt_embeds)


def test_a_bare_transformer_of_another_family_needs_its_scheduler(sd3_folder):
    """DiT's own noise would be taken for it: sigma 0.44 in place of 0.14 at t = 141."""
    transformer, pipe = sd3_folder / "transformer", DiTModel.from_pretrained(sd3_folder, timestep=141)
    given = {
        "prompt_embeds": pipe.denoiser.prompt_embeds,
        "pooled_prompt_embeds": pipe.denoiser.pooled_prompt_embeds,
    }
    with pytest.raises(ValueError, match=r"has only a SD3Transformer2DModel, so the noise level.*`scheduler=`"):
        DiTModel.from_pretrained(transformer, timestep=141, prompt_embeds=given)
    model = DiTModel.from_pretrained(
        transformer, timestep=141, prompt_embeds=given, scheduler=dict(pipe.config.scheduler)
    )
    assert float(model.noise_schedule.sigma(141)) == pytest.approx(0.141)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noised = model.add_noise(latents, 141)
        read = [each._base().denoiser(noised, torch.tensor([141]), 1, "query") for each in (model, pipe)]
    assert torch.equal(*read)


def change_config(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_unsupported_transformer_is_refused(folder):
    change_config(folder / "transformer" / "config.json", _class_name="UNet2DModel")
    with pytest.raises(ValueError, match="Unsupported transformer 'UNet2DModel'; supported are DiTTransformer2DModel"):
        DiTModel.from_pretrained(folder)


def test_an_unsupported_scheduler_is_refused(folder):
    change_config(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    with pytest.raises(ValueError, match="Unsupported scheduler 'EulerDiscreteScheduler'"):
        DiTModel.from_pretrained(folder)


def test_an_unsupported_vae_is_refused(latent_folder, tmp_path):
    folder = shutil.copytree(latent_folder, tmp_path / "copy")
    change_config(folder / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match="Unsupported VAE 'VQModel'; supported are AutoencoderKL, AutoencoderDC"):
        DiTModel.from_pretrained(folder)


def test_a_misspelt_keyword_is_refused_for_a_diffusers_folder(pixel_folder):
    with pytest.raises(ValueError, match=r"has no field `timestp` .did you mean `timestep`"):
        DiTModel.from_pretrained(pixel_folder, timestp=5)


def test_a_misspelt_keyword_is_refused_for_a_checkpoint_of_ours(saved):
    with pytest.raises(ValueError, match=r"has no field `timestp` .did you mean `timestep`"):
        DiTForImageClassification.from_pretrained(saved, timestp=5)


def test_dits_older_name_in_diffusers_is_known(folder, pixel_folder, pixels):
    change_config(folder / "transformer" / "config.json", _class_name="Transformer2DModel", norm_type="ada_norm_zero")
    models = [DiTModel.from_pretrained(source, timestep=5) for source in (folder, pixel_folder)]
    assert models[0](pixels).pooler_output.equal(models[1](pixels).pooler_output)


def test_a_subfolder_may_hold_the_model(pixel_folder, saved):
    bare = DiTModel.from_pretrained(pixel_folder, subfolder="transformer", timestep=5)
    assert bare.config.transformer["_class_name"] == "DiTTransformer2DModel"
    assert DiTForImageClassification.from_pretrained(saved.parent, subfolder=saved.name).config.num_labels == 4


def test_of_a_configuration_beside_what_diffusers_saved_the_fields_are_taken(pixel_folder, pixels):
    fields = {"timestep": 7, "block": 2, "feature": "value", "head": "linear", "id2label": {0: "cat", 1: "dog"}}
    fields |= {"num_noise_draws": 2, "timestep_embedding": "original", "zeroed_channels": [1]}
    expected = DiTForImageClassification.from_pretrained(pixel_folder, **fields)
    config = ASelectConfig.from_dict(json.loads(json.dumps(expected.config.to_dict())))
    model = DiTForImageClassification.from_pretrained(pixel_folder, config=config)
    assert model.config.to_dict() == expected.config.to_dict()
    model.classifier.load_state_dict(expected.classifier.state_dict())
    assert model(pixels).logits.equal(expected(pixels).logits)
    # A keyword beats it.
    assert DiTModel.from_pretrained(pixel_folder, config=config, timestep=9).config.timestep == 9


def test_a_configuration_of_another_model_than_diffusers_saved_is_refused(pixel_folder, model):
    wider = {**model.config.transformer, "num_layers": 7}
    for config, complaint in (
        (ASelectConfig(transformer=wider, timestep=5), "`config` does not match the transformer of"),
        (model.fold().config, "must be an ASelectConfig that is not folded"),
        (PreTrainedConfig(), "must be an ASelectConfig that is not folded, got PreTrainedConfig"),
    ):
        with pytest.raises(ValueError, match=complaint):
            DiTModel.from_pretrained(pixel_folder, config=config)
    with pytest.raises(ValueError, match="cannot be used together with a `config` that names the classes"):
        DiTForImageClassification.from_pretrained(pixel_folder, config=model.config, num_labels=3)


def test_the_older_name_of_dtype_is_honoured(pixel_folder):
    assert DiTModel.from_pretrained(pixel_folder, timestep=5, torch_dtype=torch.float16).dtype == torch.float16


def test_pickled_weights_cannot_be_asked_for(pixel_folder):
    assert DiTModel.from_pretrained(pixel_folder, timestep=5, use_safetensors=True)
    with pytest.raises(ValueError, match="`use_safetensors=False` is not supported"):
        DiTModel.from_pretrained(pixel_folder, timestep=5, use_safetensors=False)


def test_a_part_of_the_head_is_refused(saved):
    rewrite(saved / "model.safetensors", lambda weights: weights.pop("classifier.class_token"))
    with pytest.raises(ValueError, match=r"only a part of the head: 1 of its \d+ tensors are missing.*class_token"):
        DiTForImageClassification.from_pretrained(saved)


def test_another_head_is_a_new_one_where_that_is_asked_for(saved, pixels):
    with pytest.raises(
        ValueError,
        match=r"have another kind of head: .*`ignore_mismatched_sizes=True`.*load the model with the `head`",
    ):
        DiTForImageClassification.from_pretrained(saved, head="linear")
    model = DiTForImageClassification.from_pretrained(saved, head="linear", ignore_mismatched_sizes=True)
    assert model(pixels).logits.shape == (7, 4)
    assert bool((model.classifier.norm.weight == 1).all()) and not model.classifier.norm.bias.any()


# Conversion to a folder.


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    sd3().save_pretrained(folder)
    return folder


def test_a_converted_pipeline_equals_the_one_converted_on_the_fly(sd3_folder, tmp_path):
    made = convert_diffusers(sd3_folder, tmp_path / "out", block=1, feature="key")
    direct = DiTModel.from_pretrained(sd3_folder, timestep=141, block=1, feature="key")
    model = DiTModel.from_pretrained(made.output, timestep=141)
    for name, value in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    written = model.config.to_diff_dict()
    written.pop("architectures")
    expected = direct.config.to_diff_dict()
    assert {name: written[name] for name in expected if name != "architectures"} == {
        name: value for name, value in expected.items() if name != "architectures"
    }
    classifier = AutoModelForImageClassification.from_pretrained(made.output, timestep=141, num_labels=3, **HEAD)
    assert classifier(torch.rand(1, 3, 64, 64)).logits.shape == (1, 3)
    assert AutoImageProcessor.from_pretrained(made.output).size == {"height": 64, "width": 64}


def test_a_conversion_says_what_it_made_and_dropped(sd3_folder, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    made = convert_diffusers(sd3_folder, tmp_path / "out")

    def size(module):
        return sum(value.nbytes for value in module.state_dict().values())

    prompt = 4 * (272 * 32 + 16)
    assert made.transformer_bytes == size(pipe.transformer) + prompt
    assert made.vae_encoder_bytes == size(pipe.vae.encoder)
    assert made.vae_decoder_bytes == size(pipe.vae.decoder)
    encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    # Parameters that two names share are saved once.
    assert made.text_encoder_bytes == sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    assert not list(tmp_path.glob(".out*"))


def test_a_conversion_is_written_in_shards_that_reload(sd3_folder, tmp_path):
    whole = DiTModel.from_pretrained(convert_diffusers(sd3_folder, tmp_path / "whole").output, timestep=5)
    made = convert_diffusers(sd3_folder, tmp_path / "parts", max_shard_size=100_000)
    files = sorted(path.name for path in made.output.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((made.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert all((made.output / name).stat().st_size < 120_000 for name in files)
    parts = DiTModel.from_pretrained(made.output, timestep=5)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_a_conversion_to_half_precision_keeps_the_vae_in_float32(sd3_folder, tmp_path, dtype):
    made = convert_diffusers(sd3_folder, tmp_path / "out", dtype=dtype)
    model = DiTModel.from_pretrained(made.output, timestep=5)
    assert model.dtype == model.config.dtype == (torch.float16 if dtype == "float16" else dtype)
    assert {parameter.dtype for parameter in model.vae.parameters()} == {torch.float32}
    kinds = {value.dtype for name, value in load_file(made.output / "model.safetensors").items() if "vae" in name}
    assert kinds == {torch.float32}


@pytest.mark.family
def test_a_variant_is_read_where_there_is_one(tmp_path):
    pipe = dit()
    pipe.save_pretrained(tmp_path / "both")
    pipe.to(torch.float16).save_pretrained(tmp_path / "both", variant="fp16")
    half = DiTModel.from_pretrained(convert_diffusers(tmp_path / "both", tmp_path / "half", variant="fp16").output)
    assert half.dtype == torch.float16
    whole = DiTModel.from_pretrained(tmp_path / "both", timestep=5)
    assert whole.dtype == torch.float32
    again = DiTModel.from_pretrained(tmp_path / "both", timestep=5, variant="fp16")
    name = "denoiser.transformer.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(again.state_dict()[name], whole.state_dict()[name].half().float())
    assert not torch.equal(again.state_dict()[name], whole.state_dict()[name])
    with pytest.raises(ValueError, match=r"has no weights 'diffusion_pytorch_model.bf16.safetensors'.*fp16"):
        convert_diffusers(tmp_path / "both", tmp_path / "none", variant="bf16")


def test_a_part_without_the_variant_is_read_without(tmp_path):
    pipe = dit()
    pipe.vae.save_pretrained(tmp_path / "in" / "vae")
    pipe.scheduler.save_pretrained(tmp_path / "in" / "scheduler")
    pipe.transformer.to(torch.float16).save_pretrained(tmp_path / "in" / "transformer", variant="fp16")
    assert DiTModel.from_pretrained(tmp_path / "in", timestep=5, variant="fp16").vae is not None
    with pytest.raises(ValueError, match=r"pass the `variant=` that exists"):
        DiTModel.from_pretrained(tmp_path / "in", timestep=5)


def test_a_subfolder_is_read(latent_folder, tmp_path):
    shutil.copytree(latent_folder, tmp_path / "all" / "one")
    model = DiTModel.from_pretrained(tmp_path / "all", subfolder="one", timestep=5)
    made = convert_diffusers(tmp_path / "all", tmp_path / "out", subfolder="one")
    assert DiTModel.from_pretrained(made.output, timestep=5).config.vae["latent_channels"] == 4
    assert model.config.vae["latent_channels"] == 4


def test_a_failed_conversion_leaves_nothing(latent_folder, tmp_path):
    folder = shutil.copytree(latent_folder, tmp_path / "in")
    cut(folder / "vae" / WEIGHTS)
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        convert_diffusers(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_are_not_converted(latent_folder, tmp_path, change):
    folder = shutil.copytree(latent_folder, tmp_path / "in")
    weights = load_file(folder / "transformer" / WEIGHTS)
    name = "transformer_blocks.0.attn1.to_q.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, folder / "transformer" / WEIGHTS)
    with pytest.raises(ValueError, match=r"do not match their configuration: 1 tensors are missing or have another"):
        convert_diffusers(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_missing_subfolder_is_said_so(latent_folder):
    with pytest.raises(ValueError, match=r"has no folder 'two'. Check `subfolder`"):
        DiTModel.from_pretrained(latent_folder, subfolder="two", timestep=5)


@pytest.mark.process
def test_a_conversion_that_is_killed_never_looks_finished(latent_folder, tmp_path):
    script = f"""
import os
from hf_aselect import convert_diffusers, convert_diffusers as _
import hf_aselect.checkpoints.convert
import sys
module = sys.modules["hf_aselect.checkpoints.convert"]
count = 0
save = module.save_file
def save_once(*args, **kwargs):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), 9)
    return save(*args, **kwargs)
module.save_file = save_once
convert_diffusers({str(latent_folder)!r}, {str(tmp_path / "out")!r}, max_shard_size=5000)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.incomplete-") and not (left / "config.json").exists()
    convert_diffusers(latent_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_conversions_to_one_folder_do_not_mix(latent_folder, tmp_path, monkeypatch):
    """The second one begins and ends while the first one writes."""
    module = sys.modules["hf_aselect.checkpoints.convert"]
    write = module._write_weights

    def write_after_another(*args):
        monkeypatch.setattr(module, "_write_weights", write)
        convert_diffusers(latent_folder, tmp_path / "out", block=1)
        return write(*args)

    monkeypatch.setattr(module, "_write_weights", write_after_another)
    with pytest.raises(FileExistsError, match="was written by another process in the meantime and is left as it is"):
        convert_diffusers(latent_folder, tmp_path / "out", block=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert DiTModel.from_pretrained(tmp_path / "out", timestep=5).config.block == 1


def test_a_folder_of_somebody_elses_is_left_alone(latent_folder, tmp_path):
    source = shutil.copytree(latent_folder, tmp_path / ".out.incomplete")
    before = sorted(path.name for path in source.rglob("*"))
    made = convert_diffusers(source, tmp_path / "out")
    assert sorted(path.name for path in source.rglob("*")) == before
    (tmp_path / "plain").mkdir()
    assert made.output.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_latents_without_a_vae_are_said_to_be_no_pictures(latent_folder, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="hf_aselect"):
        made = convert_diffusers(latent_folder, tmp_path / "out", subfolder="transformer")
    assert "latents of 4 channels, but the checkpoint has no VAE" in caplog.text
    assert not (made.output / "preprocessor_config.json").exists()
    caplog.clear()
    with caplog.at_level("WARNING", logger="hf_aselect"):
        DiTModel.from_pretrained(latent_folder, timestep=5)
    assert "no VAE" not in caplog.text


def test_the_vae_runs_in_float32_under_autocast(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=5)
    pixel_values = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.encode(pixel_values)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encode(pixel_values), expected)


def test_nothing_that_is_there_is_overwritten(latent_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and is not empty. Pass another folder"):
        convert_diffusers(latent_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert convert_diffusers(latent_folder, tmp_path / "empty").output == tmp_path / "empty"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be one of float32, float16, bfloat16, got 'int8'"),
        (
            {"max_shard_size": 0},
            "`max_shard_size` must be at least 1 byte, as a number or a string such as '5GB' or '200MB', got 0",
        ),
        ({"max_shard_size": None}, "`max_shard_size` must be at least 1 byte.*got None"),
        ({"max_shard_size": float("nan")}, "`max_shard_size` must be at least 1 byte.*got nan"),
        ({"max_shard_size": "many"}, "`max_shard_size` must be at least 1 byte.*got 'many'"),
        ({"scheduler": {"_class_name": "EDMEulerScheduler"}}, "Unsupported scheduler 'EDMEulerScheduler'"),
        ({"blok": 3}, "no field `blok`"),
        ({"prompt_embeds": {"prompt_embeds": torch.zeros(1, 1, 4)}}, "has no text conditioning"),
    ],
)
def test_bad_options_are_refused(latent_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_diffusers(latent_folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_ours_needs_no_conversion(saved, tmp_path):
    with pytest.raises(ValueError, match="is already an hf_aselect checkpoint and needs no conversion"):
        convert_diffusers(saved, tmp_path / "out")


def test_a_path_that_is_not_there_is_said_so(tmp_path):
    for call in (DiTModel.from_pretrained, lambda source: convert_diffusers(source, tmp_path / "out")):
        for source in (tmp_path / "nothing", "./nothing", "a/b/c"):
            with pytest.raises(OSError, match=r"is neither a local folder nor an id on the Hub .such as 'owner/name'"):
                call(source)


def test_an_output_inside_the_source_is_refused(latent_folder):
    with pytest.raises(ValueError, match=r"must not lie inside the source, got .* Pass a folder beside it"):
        convert_diffusers(latent_folder, latent_folder / "transformer" / "out")
    assert not (latent_folder / "transformer" / "out").exists()


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (
            ("text_encoder_9",),
            "text_encoder_9 of a .* cannot be None. Parts that can be left out: text_encoder_3, tokenizer_3",
        ),
        (("text_encoder", "tokenizer_3"), "text_encoder of a .* must be loaded"),
    ],
)
def test_parts_that_are_needed_cannot_be_left_out(sd3_folder, tmp_path, without, message):
    with pytest.raises(ValueError, match=message):
        convert_diffusers(sd3_folder, tmp_path / "out", without=without)


def test_parts_to_do_without_are_checked_where_there_is_no_text_or_it_is_given(latent_folder, sd3_folder):
    with pytest.raises(ValueError, match=r"text_encoder_3 of a .* can be left out: none"):
        DiTModel.from_pretrained(latent_folder, timestep=5, text_encoder_3=None)
    with pytest.raises(ValueError, match=r"text_encoder of a .* can be left out: text_encoder_3, tokenizer_3"):
        DiTModel.from_pretrained(sd3_folder, timestep=5, text_encoder=None)


def test_an_empty_prompt_that_overflows_is_refused(sd3_folder, tmp_path):
    whole = DiTModel.from_pretrained(sd3_folder, timestep=5)
    given = {name: getattr(whole.denoiser, name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    for value, dtype in ((float("nan"), "float32"), (1e5, "float16")):
        broken = {**given, "prompt_embeds": torch.full_like(given["prompt_embeds"], value)}
        with pytest.raises(ValueError, match=rf"SD3Transformer2DModel .prompt_embeds. have NaN or infinite.*{dtype}"):
            convert_diffusers(sd3_folder, tmp_path / "out", prompt_embeds=broken, dtype=dtype)
        with pytest.raises(ValueError, match="have NaN or infinite values"):
            DiTModel.from_pretrained(sd3_folder, timestep=5, prompt_embeds=broken, dtype=dtype)
    assert not list(tmp_path.iterdir())
    # Of the pipeline's own encoders, too.
    folder = shutil.copytree(sd3_folder, tmp_path / "in")
    rewrite(folder / "text_encoder" / "model.safetensors", lambda w: w["text_projection.weight"].fill_(float("inf")))
    with pytest.raises(ValueError, match=r"have NaN or infinite values in float32. Pass `dtype='bfloat16'`"):
        DiTModel.from_pretrained(folder, timestep=5)


@pytest.mark.parametrize(("dtype", "computed"), [("float16", "bfloat16"), ("bfloat16", "bfloat16"), (None, "float32")])
def test_text_encoders_compute_where_they_do_not_overflow(sd3_folder, tmp_path, monkeypatch, dtype, computed):
    kinds = []
    load = CLIPTextModelWithProjection.from_pretrained.__func__

    def noted(cls, *args, **kwargs):
        kinds.append(str(kwargs["dtype"]).removeprefix("torch."))
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", classmethod(noted))
    made = convert_diffusers(sd3_folder, tmp_path / "out", dtype=dtype)
    assert kinds == [computed] * 2
    stored = load_file(made.output / "model.safetensors")["denoiser.prompt_embeds"]
    assert str(stored.dtype) == f"torch.{dtype or 'float32'}"
    kinds.clear()
    assert str(DiTModel.from_pretrained(sd3_folder, timestep=5, dtype=dtype).dtype) == f"torch.{dtype or 'float32'}"
    assert kinds == [computed] * 2


@pytest.mark.family
def test_a_variant_is_read_of_text_encoders_where_they_have_it(tmp_path):
    pipe = sd3(t5_too=False)
    pipe.save_pretrained(tmp_path / "in")
    pipe.to(torch.float16).save_pretrained(tmp_path / "in", variant="fp16")
    plain = DiTModel.from_pretrained(tmp_path / "in", timestep=5, text_encoder_3=None)
    half = DiTModel.from_pretrained(tmp_path / "in", timestep=5, text_encoder_3=None, variant="fp16")
    assert not torch.equal(plain.denoiser.prompt_embeds, half.denoiser.prompt_embeds)
    torch.testing.assert_close(plain.denoiser.prompt_embeds, half.denoiser.prompt_embeds, rtol=0.05, atol=0.01)
    (tmp_path / "in" / "text_encoder" / "model.fp16.safetensors").unlink()
    mixed = DiTModel.from_pretrained(tmp_path / "in", timestep=5, text_encoder_3=None, variant="fp16")
    assert torch.equal(mixed.denoiser.pooled_prompt_embeds[:, :8], plain.denoiser.pooled_prompt_embeds[:, :8])
    assert torch.equal(mixed.denoiser.pooled_prompt_embeds[:, 8:], half.denoiser.pooled_prompt_embeds[:, 8:])
    made = convert_diffusers(tmp_path / "in", tmp_path / "out", variant="fp16")
    assert DiTModel.from_pretrained(made.output, timestep=5).dtype == torch.float16


def test_a_pickled_text_encoder_is_refused_and_never_unpickled(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "in")
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"only pickled weights .pytorch_model.bin., which are not loaded"):
        DiTModel.from_pretrained(folder, timestep=5)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_built_is_said_before_text_encoders_are_loaded(sd3_folder, monkeypatch):
    name = "hf_aselect.checkpoints.diffusers.encode_empty_prompt"
    monkeypatch.setattr(name, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="`timestep_embedding` of SD3Transformer2DModel must be one of diffusers"):
        DiTModel.from_pretrained(sd3_folder, timestep=5, timestep_embedding="original")


def test_a_transformer_that_takes_more_than_latents_is_refused(sd3_folder, tmp_path):
    """As FLUX.1-Fill, which takes an image and a mask beside them."""
    folder = shutil.copytree(sd3_folder, tmp_path / "in")
    change_config(folder / "vae" / "config.json", latent_channels=4)
    with pytest.raises(StrictDataclassError, match="takes latents of 16 channels, but the VAE returns 4"):
        DiTModel.from_pretrained(folder, timestep=5)


@pytest.mark.parametrize("text_encoder", ["pickled", "fp8", "gone"])
def test_what_is_dropped_never_breaks_a_conversion(sd3_folder, tmp_path, text_encoder):
    """Where the embeddings are given, nobody looks at the text encoders but to tell what was saved."""
    whole = DiTModel.from_pretrained(sd3_folder, timestep=5)
    folder = shutil.copytree(sd3_folder, tmp_path / "in")
    weights = folder / "text_encoder" / "model.safetensors"
    if text_encoder == "fp8":
        save_file({"weight": torch.zeros(1000).to(torch.float8_e4m3fn)}, weights)
    elif text_encoder == "pickled":
        weights.rename(weights.with_name("pytorch_model.bin"))
    else:
        shutil.rmtree(folder / "text_encoder")
    given = {name: getattr(whole.denoiser, name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    made = convert_diffusers(folder, tmp_path / "out", prompt_embeds=given)
    others = sum(p.nbytes for part in ("2", "3") for p in text_weights(sd3_folder / f"text_encoder_{part}"))
    assert made.text_encoder_bytes == others + (1000 if text_encoder == "fp8" else 0)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("transformer", {"num_layers": "3"}, r"integers in .1, .* as sizes, got \{'num_layers': '3'\}"),
        ("transformer", {"activation_fn": "bogus"}, "diffusers cannot build a DiTTransformer2DModel"),
        ("vae", {"act_fn": "bogus"}, "diffusers cannot build a AutoencoderKL"),
        ("vae", {"scaling_factor": None}, "`scaling_factor` of `vae` must be a finite number other than 0, got None"),
        ("vae", {"block_out_channels": -1}, "`vae` must have a list as `block_out_channels`, got -1"),
        ("scheduler", {"trained_betas": "x"}, "`trained_betas` of the scheduler must be a list, got 'x'"),
        ("scheduler", {"beta_end": None}, "`beta_end` of the scheduler must be a finite number, got None"),
        ("scheduler", {"num_train_timesteps": 100}, "`num_train_timesteps` of the scheduler must be 1000, got 100"),
    ],
)
def test_a_broken_configuration_is_refused_before_anything_is_written(latent_folder, tmp_path, part, values, message):
    folder = shutil.copytree(latent_folder, tmp_path / "in")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change_config(folder / part / name, **values)
    with pytest.raises(ValueError, match=message):
        DiTModel.from_pretrained(folder, timestep=5)
    with pytest.raises(ValueError, match=message):
        convert_diffusers(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("change", ["renamed", "one gone"])
def test_a_text_encoder_that_lacks_weights_is_refused(sd3_folder, tmp_path, change):
    """Transformers gives it new ones, and the embeddings would be random."""
    folder = shutil.copytree(sd3_folder, tmp_path / "in")

    def break_it(weights):
        for name in list(weights):
            if change == "renamed":
                weights[f"{name}x"] = weights.pop(name)
            elif "final_layer_norm" in name:
                del weights[name]

    rewrite(folder / "text_encoder_3" / "model.safetensors", break_it)
    with pytest.raises(ValueError, match=r"of its weights are missing, among them"):
        DiTModel.from_pretrained(folder, timestep=5)


@pytest.mark.parametrize("values", [{"tokenizer": [None, None]}, {"text_encoder": None}, {"text_encoder": "CLIP"}])
def test_an_index_that_says_too_little_of_the_text_side_is_refused(sd3_folder, tmp_path, values):
    folder = shutil.copytree(sd3_folder, tmp_path / "in")
    change_config(folder / "model_index.json", **values)
    if "tokenizer" in values:
        shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"has text_encoder/ but no tokenizer/, or model_index.json does not list"):
        DiTModel.from_pretrained(folder, timestep=5)


def test_a_pickle_beside_the_parts_of_a_pipeline_does_no_harm(folder, pixels):
    (folder / "model_args.pth").write_bytes(b"no weights of ours")
    assert DiTModel.from_pretrained(folder, timestep=5)(pixels).pooler_output.shape == (7, 16)


def test_a_left_over_tensor_of_the_vae_is_left_out_with_a_warning(latent_folder, tmp_path, caplog):
    folder = shutil.copytree(latent_folder, tmp_path / "in")
    rewrite(folder / "vae" / WEIGHTS, lambda weights: weights.update({"encoder.extra": torch.zeros(3)}))
    with caplog.at_level("WARNING", logger="hf_aselect"):
        assert DiTModel.from_pretrained(folder, timestep=5)
    assert "vae/encoder.extra" in caplog.text


def test_shards_have_the_size_that_the_hosts_words_say(sd3_folder, tmp_path):
    made = convert_diffusers(sd3_folder, tmp_path / "out", max_shard_size="100KB")
    sizes = [path.stat().st_size for path in made.output.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 120_000


def test_an_output_below_a_file_is_refused_at_once(latent_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"out' cannot be created, because '.*file' is a file"):
        convert_diffusers(latent_folder, tmp_path / "file" / "deep" / "out")


def text_weights(folder):
    return [value for path in folder.glob("*.safetensors") for value in load_file(path).values()]


def test_the_output_may_be_a_link_to_an_empty_folder(latent_folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    made = convert_diffusers(latent_folder, tmp_path / "link")
    assert made.output == tmp_path / "link" and (tmp_path / "link").is_symlink()
    assert DiTModel.from_pretrained(tmp_path / "disk", timestep=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_the_current_folder_is_no_output(latent_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r"is the current folder or a mount point.*Pass a folder inside it"):
        convert_diffusers(latent_folder, ".")
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(FileExistsError, match="is the current folder or a mount point"):
        convert_diffusers(latent_folder, "disk")


def test_t5_is_left_out_with_its_tokenizer(sd3_folder, tmp_path):
    prompts = [
        load_file(convert_diffusers(sd3_folder, tmp_path / str(number), without=without).output / "model.safetensors")[
            "denoiser.prompt_embeds"
        ]
        for number, without in enumerate(["text_encoder_3", ("text_encoder_3", "tokenizer_3"), ()])
    ]
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])


def test_the_prompts_embeddings_can_be_given_in_place_of_text_encoders(sd3_folder, tmp_path):
    whole = DiTModel.from_pretrained(sd3_folder, timestep=5)
    folder = shutil.copytree(sd3_folder, tmp_path / "in", ignore=shutil.ignore_patterns("text_*", "tokenizer*"))
    with pytest.raises(ValueError, match=r"lacks text_encoder/, text_encoder_2/.*`prompt_embeds="):
        DiTModel.from_pretrained(folder, timestep=5)
    given = {
        "prompt_embeds": whole.denoiser.prompt_embeds,
        "pooled_prompt_embeds": whole.denoiser.pooled_prompt_embeds,
    }
    model = DiTModel.from_pretrained(folder, timestep=5, prompt_embeds=given)
    pixel_values = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values)[0], whole(pixel_values)[0])
    for name, shape, wanted in (
        ("prompt_embeds", (1, 4, 7), r"\(1, L, 32\), got \(1, 4, 7\)"),
        ("prompt_embeds", (2, 4, 32), r"\(1, L, 32\), got \(2, 4, 32\)"),
        ("pooled_prompt_embeds", (1, 4, 16), r"\(1, 16\), got \(1, 4, 16\)"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` of a SD3Transformer2DModel must have shape {wanted}"):
            DiTModel.from_pretrained(folder, timestep=5, prompt_embeds={**given, name: torch.zeros(shape)})
    for given, got in ((torch.zeros(1, 4, 32), "Tensor"), ({"prompt_embeds": [0.0]}, "dict"), ([], "list")):
        with pytest.raises(ValueError, match=f"must be a dictionary of tensors: .*, got {got}"):
            DiTModel.from_pretrained(folder, timestep=5, prompt_embeds=given)
    with pytest.raises(ValueError, match=r"is conditioned on prompt_embeds, pooled.*has none"):
        DiTModel.from_pretrained(folder, timestep=5, prompt_embeds={})
    with pytest.raises(ValueError, match="must be None"):
        DiTModel.from_pretrained(folder, timestep=5, text_encoder=whole)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="can only be used with a diffusers pipeline"):
        DiTModel.from_pretrained(tmp_path / "ours", text_encoder_3=None)


# What the files tell of the timestep embedding.

XL_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "patch_size": 2, "in_channels": 4}
XL_2 |= {"out_channels": 8, "num_embeds_ada_norm": 1000, "sample_size": 32, "_class_name": "DiTTransformer2DModel"}


@pytest.mark.parametrize(
    ("transformer", "scheduler", "expected"),
    [
        (XL_2, "DDIMScheduler", "original"),
        ({**XL_2, "sample_size": 64}, "DDIMScheduler", "original"),
        ({**XL_2, "num_layers": 12}, "DDIMScheduler", "original"),
        ({"_class_name": XL_2["_class_name"], "in_channels": 3, "out_channels": 6}, "DDPMScheduler", "original"),
        ({**XL_2, "out_channels": None}, "DDPMScheduler", "diffusers"),
        ({**XL_2, "out_channels": 4}, "DDPMScheduler", "diffusers"),
        (XL_2, "FlowMatchEulerDiscreteScheduler", "diffusers"),
        (XL_2, {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "diffusers"),
        ({"_class_name": "SD3Transformer2DModel"}, "FlowMatchEulerDiscreteScheduler", "diffusers"),
    ],
)
def test_the_timestep_embedding_is_read_off_the_source(transformer, scheduler, expected):
    """A smaller transformer on latents was met; siblings: another side, pixels in place of latents."""
    scheduler = scheduler if isinstance(scheduler, dict) else {"_class_name": scheduler}
    parts = {"transformer": transformer, "scheduler": scheduler}
    assert _default_embedding(parts, {}) == expected


def test_a_flow_matching_dit_is_said_to_be_taken_for_one_of_diffusers(tmp_path, caplog):
    sit().save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="hf_aselect"):
        assert DiTModel.from_pretrained(tmp_path, timestep=5).config.timestep_embedding == "diffusers"
    for choice in ("'sit'", "'repa'", "'original'"):
        assert choice in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="hf_aselect"):
        DiTModel.from_pretrained(tmp_path, timestep=5, timestep_embedding="sit")
    assert "SiT" not in caplog.text


@pytest.mark.parametrize("embedding", ["sit", "repa"])
def test_a_time_of_flow_matching_does_not_go_with_a_scheduler_of_diffusion(latent_folder, embedding):
    with pytest.raises(ValueError, match=f"`timestep_embedding='{embedding}'` .* the scheduler is a DDPMScheduler"):
        DiTModel.from_pretrained(latent_folder, timestep=5, timestep_embedding=embedding)


def test_a_scheduler_in_memory_is_read(latent_folder):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = DiTModel.from_pretrained(latent_folder, timestep=5, scheduler=scheduler)
    assert model.config.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert model.config.scheduler["shift"] == 3.0


# Real architectures, without weights.


READING_COST = example("benchmarks/reading_cost.py")
# In millions, by diffusers.
PARAMETERS = {"facebook/DiT-XL-2-256": 749.8, "stabilityai/stable-diffusion-3-medium-diffusers": 2028.3}


@pytest.mark.family
@pytest.mark.parametrize("name", READING_COST.SOURCES)
def test_a_full_size_checkpoint_would_fit_by_names_and_shapes(name):
    class_name = READING_COST.SOURCES[name][0]
    transformer = READING_COST.whole_transformer(name)
    theirs = {f"denoiser.transformer.{key}": value.shape for key, value in transformer.state_dict().items()}
    if name in PARAMETERS:
        assert sum(p.numel() for p in transformer.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.05)
    config = {**transformer.config, "_class_name": class_name}
    layout = layout_of(config)
    widths = {name: transformer.config[field] for name, field in FAMILIES[class_name].prompt_fields.items()}
    vae = {"_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [128, 256, 512, 512]}
    fields = {"transformer": config, "vae": {**vae, "latent_channels": layout.num_channels}}
    if layout.needs_prompt:
        fields["prompt_shapes"] = {
            key: [1, width] if key.startswith("pooled") else [1, 3, width] for key, width in widths.items()
        }
    with torch.device("meta"):
        model = DiTModel(ASelectConfig(timestep=5, **fields))
    ours = {key: value.shape for key, value in model.state_dict().items() if key.startswith("denoiser.transformer.")}
    assert ours == theirs
    first = next(module for key, module in transformer.named_modules() if key.endswith("to_q"))
    assert model.config.hidden_size == first.in_features
    assert len(model.denoiser.blocks) == layout.num_layers == model.config.num_hidden_layers


# Names that published files hold, written down from diffusers' own scripts that made them from the original weights
# (`scripts/convert_dit_to_diffusers.py`, `convert_pixart_alpha_to_diffusers.py`, `convert_sd3_to_diffusers.py`), not
# from the classes that read them here. `*` stands for weight and bias.
DIT_OUTSIDE = ["pos_embed.proj.*", "proj_out_1.*", "proj_out_2.*"]
DIT_BLOCK = [
    *("norm1.emb.timestep_embedder.linear_1.*", "norm1.emb.timestep_embedder.linear_2.*", "norm1.linear.*"),
    "norm1.emb.class_embedder.embedding_table.weight",
    *("attn1.to_q.*", "attn1.to_k.*", "attn1.to_v.*", "attn1.to_out.0.*", "ff.net.0.proj.*", "ff.net.2.*"),
]
PIXART_OUTSIDE = [
    *("pos_embed.proj.*", "caption_projection.linear_1.*", "caption_projection.linear_2.*", "adaln_single.linear.*"),
    *(f"adaln_single.emb.timestep_embedder.linear_{n}.*" for n in (1, 2)),
    *("proj_out.*", "scale_shift_table"),
]
PIXART_BLOCK = [
    *(f"attn{n}.{part}.*" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj.*", "ff.net.2.*", "scale_shift_table"),
]
SD3_OUTSIDE = [
    *("pos_embed.pos_embed", "pos_embed.proj.*", "context_embedder.*", "norm_out.linear.*", "proj_out.*"),
    *(f"time_text_embed.{part}_embedder.linear_{n}.*" for part in ("timestep", "text") for n in (1, 2)),
]
SD3_ATTENTION = [f"attn.{part}.*" for part in ("to_q", "to_k", "to_v", "to_out.0")]
SD3_ATTENTION += [f"attn.add_{part}_proj.*" for part in ("q", "k", "v")]
SD3_BLOCK = [*SD3_ATTENTION, "norm1.linear.*", "norm1_context.linear.*", "ff.net.0.proj.*", "ff.net.2.*"]
# The last block has no more use for its text.
SD3_NOT_LAST = ["attn.to_add_out.*", "ff_context.net.0.proj.*", "ff_context.net.2.*"]


def written_out(outside, block, depth, not_last=()):
    names = list(outside)
    for number in range(depth):
        here = [*block, *(not_last if number < depth - 1 else ())]
        names += [f"transformer_blocks.{number}.{name}" for name in here]
    return {
        f"denoiser.transformer.{name.replace('*', kind)}"
        for name in names
        for kind in (("weight", "bias") if name.endswith("*") else ("",))
    }


@pytest.mark.family
@pytest.mark.parametrize(
    ("source", "published"),
    [
        ("facebook/DiT-XL-2-256", written_out(DIT_OUTSIDE, DIT_BLOCK, 28)),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", written_out(PIXART_OUTSIDE, PIXART_BLOCK, 28)),
        (
            "stabilityai/stable-diffusion-3-medium-diffusers",
            written_out(SD3_OUTSIDE, SD3_BLOCK, 24, SD3_NOT_LAST),
        ),
    ],
)
def test_the_names_of_published_files_are_those_we_read(source, published):
    transformer = READING_COST.whole_transformer(source)
    config = ASelectConfig(transformer={**transformer.config, "_class_name": READING_COST.SOURCES[source][0]})
    expected = expected_shapes(config)
    assert {name for name in expected if name.startswith("denoiser.transformer.")} == published


def test_sd3_medium_is_read_where_the_paper_reads_it():
    transformer = READING_COST.whole_transformer("stabilityai/stable-diffusion-3-medium-diffusers")
    config = ASelectConfig(transformer={**transformer.config, "_class_name": "SD3Transformer2DModel"})
    assert (config.block, config.feature, config.feature_size) == (9, "query", 1536)
    schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    # The paper's "t = 50": index 950 of the schedule shifted by 3.
    assert schedule.timestep_of_paper(50) == schedule.timestep_at_index(950) == 141
    assert float(schedule.sigma(141)) == pytest.approx(0.141)
    assert float(schedule.log_snr(141)) == pytest.approx(3.61, abs=0.01)
