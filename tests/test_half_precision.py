"""What half precision changes: tokens by rounding alone, the selected timestep by no more than a step of the grid."""

from importlib.resources import files

import pytest
import torch
from datasets import load_dataset

from hf_aselect import ASelectImageProcessor, DiTModel, NoiseSchedule, select_timestep

EMBEDDED = files("hf_aselect") / "assets" / "fashion_mnist"
# What rounding to 8 and to 11 binary digits adds up to in four blocks, measured with a margin of a third.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.fixture(scope="module")
def sample():
    return load_dataset("parquet", data_files=str(EMBEDDED / "train.parquet"), split="train")[:64]["image"]


@pytest.fixture(scope="module")
def exact():
    return DiTModel.from_pretrained(EMBEDDED, timestep=35)


@pytest.fixture(scope="module")
def chosen(exact, sample):
    return select_timestep(exact, sample, timesteps=exact.noise_schedule.even_timesteps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.process)])
def test_tokens_change_by_rounding_alone(exact, sample, dtype):
    half = DiTModel.from_pretrained(EMBEDDED, timestep=35, dtype=dtype)
    pixels = ASelectImageProcessor.from_model_config(exact.config)(sample, return_tensors="pt").pixel_values
    with torch.no_grad():
        for timestep in (0, 35, 200, 700):
            expected = exact.extract_features(pixels, timestep=timestep)
            tokens = half.extract_features(pixels, timestep=timestep)
            assert tokens.dtype == dtype
            assert float((tokens.float() - expected).norm() / expected.norm()) <= BOUNDS[dtype], timestep


@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_chosen_timestep_moves_by_a_step_at_the_most(exact, chosen, sample, dtype):
    half = DiTModel.from_pretrained(EMBEDDED, timestep=35, dtype=dtype)
    grid = exact.noise_schedule.even_timesteps()
    found = select_timestep(half, sample, timesteps=grid)
    assert abs(grid.index(found.timestep) - grid.index(chosen.timestep)) <= 1
    # And where it moves, both are as good, in float32.
    assert max(chosen.smoothed) - chosen.smoothed[grid.index(found.timestep)] <= 0.01


def test_noise_is_added_before_anything_is_rounded():
    """At t = 0 the noise is a hundredth of the image: rounding that first would take the place of some of it."""
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0, dtype=torch.bfloat16)
    pixels = torch.linspace(-1, 1, 28 * 28).reshape(1, 1, 28, 28)
    latents = model.encode(pixels)
    assert latents.dtype == torch.float32 and torch.equal(latents, pixels)
    noised = model.add_noise(latents, 0)
    assert noised.dtype == torch.float32
    exact = DiTModel.from_pretrained(EMBEDDED, timestep=0)
    assert torch.equal(noised, exact.add_noise(pixels, 0))


def test_one_timestep_for_all_is_the_same_as_one_for_each():
    schedule = NoiseSchedule.flow_matching(3.0)
    latents, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in (0, 141, 999):
        expected = schedule.add_noise(latents, noise, torch.full((3,), timestep))
        assert torch.equal(schedule.add_noise(latents, noise, timestep), expected)


def test_a_bfloat16_model_trains_a_head_under_autocast(exact, sample):
    from hf_aselect import DiTForImageClassification

    model = DiTForImageClassification.from_pretrained(EMBEDDED, timestep=35, num_labels=10, head="linear").train()
    pixels = ASelectImageProcessor.from_model_config(model.config)(sample[:8], return_tensors="pt").pixel_values
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels, labels=torch.arange(8)).loss
    loss.backward()
    assert loss.isfinite() and model.classifier.output_projection.weight.grad.isfinite().all()


def test_a_model_of_a_configuration_has_its_vae_in_float32(latent_folder):
    config = DiTModel.from_pretrained(latent_folder, timestep=50).config
    built = DiTModel._from_config(config, dtype=torch.bfloat16)
    assert built.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in built.vae.parameters()} == {torch.float32}


def test_casting_a_model_leaves_the_vae_in_float32(latent_folder, tmp_path):
    """Encoders overflow in float16, and what is saved must not be rounded for good."""
    model = DiTModel.from_pretrained(latent_folder, timestep=50)
    expected = {name: value.clone() for name, value in model.vae.state_dict().items()}
    for cast in (model.to(torch.float16), model.half(), model.fold().to(torch.bfloat16)):
        assert cast.dtype in (torch.float16, torch.bfloat16)
        cast.save_pretrained(tmp_path)
        for one in (cast, DiTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)):
            assert all(torch.equal(value, expected[name]) for name, value in one.vae.state_dict().items())
    assert model.to(torch.float64).vae.dtype == torch.float64
    assert next(model.to("meta").vae.parameters()).is_meta
