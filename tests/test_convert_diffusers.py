"""Loading: the three sources, what comes back, and every folder that is refused."""

import json
import pickle
import shutil

import pytest
import torch
from conftest import HEAD, build_transformer, build_vae
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from hf_aselect import DiTForImageClassification, DiTModel

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
    with pytest.raises(ValueError, match=r"holds nothing that can be loaded: expected a checkpoint.*notes\.txt"):
        DiTModel.from_pretrained(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="holds nothing that can be loaded"):
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
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        DiTModel.from_pretrained(folder)


def test_a_truncated_checkpoint_of_ours_is_refused(saved):
    cut(saved / "model.safetensors")
    with pytest.raises(ValueError, match="are truncated or no safetensors"):
        DiTForImageClassification.from_pretrained(saved)


def test_a_truncated_shard_of_ours_is_refused(classifier, tmp_path):
    classifier.save_pretrained(tmp_path, max_shard_size="20KB")
    cut(sorted(tmp_path.glob("*.safetensors"))[1])
    with pytest.raises(ValueError, match="are truncated or no safetensors"):
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
    with pytest.raises(
        ValueError, match=r"only pickled weights .diffusion_pytorch_model.bin., which are never unpickled"
    ):
        DiTModel.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_ours_are_refused_and_never_unpickled(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"only pickled weights .pytorch_model.bin., which are never unpickled"):
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


def test_a_tensor_too_many_is_refused(folder):
    rewrite(folder / "transformer" / WEIGHTS, lambda weights: weights.update({"extra.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"left over.*extra\.weight"):
        DiTModel.from_pretrained(folder)


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


def test_a_configuration_beside_what_diffusers_saved_is_refused(pixel_folder, model):
    with pytest.raises(ValueError, match="`config=` cannot be given with what diffusers saved"):
        DiTModel.from_pretrained(pixel_folder, config=model.config)


def test_the_older_name_of_dtype_is_honoured(pixel_folder):
    assert DiTModel.from_pretrained(pixel_folder, timestep=5, torch_dtype=torch.float16).dtype == torch.float16


def test_pickled_weights_cannot_be_asked_for(pixel_folder):
    assert DiTModel.from_pretrained(pixel_folder, timestep=5, use_safetensors=True)
    with pytest.raises(ValueError, match="`use_safetensors=False` asks for pickled weights"):
        DiTModel.from_pretrained(pixel_folder, timestep=5, use_safetensors=False)


def test_a_part_of_the_head_is_refused(saved):
    rewrite(saved / "model.safetensors", lambda weights: weights.pop("head.class_token"))
    with pytest.raises(ValueError, match=r"a part of the head only: 1 of its \d+ tensors are missing.*class_token"):
        DiTForImageClassification.from_pretrained(saved)
