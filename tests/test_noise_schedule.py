import math
import shutil

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from hf_aselect import DiTModel, NoiseSchedule
from hf_aselect.model.noise_schedule import DDPM_LIKE, fixed_noise

EVERY = torch.arange(1000)


def schedule(**config):
    return NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **config})


@pytest.mark.parametrize("name", DDPM_LIKE)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_levels_are_those_of_diffusers(name, betas):
    theirs = getattr(diffusers, name)(beta_schedule=betas)
    ours = NoiseSchedule.from_config({**theirs.config, "_class_name": name})
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"trained_betas": torch.linspace(0.001, 0.01, 1000).tolist()},
    ],
    ids=["sigmoid", "zero terminal SNR", "stable diffusion", "trained betas"],
)
def test_other_settings_give_the_levels_of_diffusers(config):
    theirs = diffusers.DDPMScheduler(**config)
    ours = NoiseSchedule.from_config(dict(theirs.config) | {"_class_name": "DDPMScheduler"})
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_noise_is_added_as_by_diffusers():
    latents, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    timesteps = torch.tensor([0, 10, 500, 999])
    expected = diffusers.DDPMScheduler().add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule().add_noise(latents, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_latents_stay_half_precision():
    latents = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    assert schedule().add_noise(latents, torch.randn(3, 8, 8), torch.tensor([3])).dtype == torch.bfloat16


def test_signal_and_noise_make_unit_power():
    levels = schedule()
    total = levels.alpha(EVERY) ** 2 + levels.sigma(EVERY) ** 2
    torch.testing.assert_close(total, torch.ones(1000, dtype=torch.float64))


def test_log_snr_falls_with_the_timestep():
    assert bool((schedule().log_snr(EVERY).diff() < 0).all())


def test_log_snr_is_that_of_alpha_and_sigma():
    levels, timesteps = schedule(), torch.tensor([50])
    expected = 2 * math.log(levels.alpha(timesteps) / levels.sigma(timesteps))
    assert float(levels.log_snr(timesteps)) == pytest.approx(expected)


def test_log_snr_of_pure_noise_is_finite():
    assert bool(schedule(rescale_betas_zero_snr=True).log_snr(EVERY).isfinite().all())


def test_timesteps_are_found_again_by_their_log_snr():
    levels = schedule()
    for timestep in (0, 1, 121, 500, 999):
        assert levels.timestep_at(float(levels.log_snr(torch.tensor(timestep)))) == timestep


def test_fixed_noise_is_the_same_each_time_and_differs_by_seed_and_draw():
    first = fixed_noise((3, 8, 8), seed=0)
    assert torch.equal(first, fixed_noise((3, 8, 8), seed=0))
    for other in (fixed_noise((3, 8, 8), seed=1), fixed_noise((3, 8, 8), seed=0, draw=1)):
        assert (first - other).abs().max() > 0.1


def test_fixed_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    fixed_noise((3, 8, 8), seed=0, draw=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_schedulers_are_refused():
    with pytest.raises(ValueError, match="Unsupported scheduler 'EulerDiscreteScheduler'; supported are DDIM"):
        NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"})


def test_of_a_scheduler_in_memory_the_class_is_asked_for():
    with pytest.raises(ValueError, match=r"Unsupported scheduler None.*Pass the object itself"):
        NoiseSchedule.from_config(dict(diffusers.DDPMScheduler().config))


def test_other_numbers_of_timesteps_are_refused():
    remedy = "Pass the scheduler with 1000 timesteps that the transformer was trained with as `scheduler=`"
    with pytest.raises(ValueError, match=f"`num_train_timesteps` of the scheduler must be 1000, got 4000. {remedy}"):
        schedule(num_train_timesteps=4000)
    with pytest.raises(ValueError, match=f"`trained_betas` of the scheduler must be a list of 1000 .*{remedy}"):
        schedule(trained_betas=[0.1] * 50)


def test_a_time_that_runs_the_other_way_is_refused():
    given = {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}
    with pytest.raises(ValueError, match=r"`invert_sigmas=True` .* not supported. .* pass `scheduler=` without it"):
        NoiseSchedule.from_config(given)
    NoiseSchedule.from_config({**given, "invert_sigmas": False})


def test_so_it_is_as_an_object_and_beside_a_transformer(pixel_folder, tmp_path):
    """Siblings: nothing that reads a scheduler passes it over."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    shutil.copytree(pixel_folder / "transformer", tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    for call in (
        lambda: NoiseSchedule.from_config(scheduler),
        lambda: DiTModel.from_pretrained(tmp_path, timestep=50),
        lambda: DiTModel.from_pretrained(pixel_folder, timestep=50, scheduler=scheduler),
    ):
        with pytest.raises(ValueError, match="`invert_sigmas=True` of the scheduler"):
            call()


def test_unknown_betas_are_refused():
    with pytest.raises(ValueError, match="Unsupported `beta_schedule` 'cubic'"):
        schedule(beta_schedule="cubic")


def test_levels_that_rise_are_refused():
    with pytest.raises(ValueError, match="`alphas` must fall with the timestep"):
        NoiseSchedule.from_alphas_cumprod(torch.linspace(0.1, 0.9, 1000))
    with pytest.raises(ValueError, match="`sigmas` must rise with the timestep"):
        NoiseSchedule(torch.linspace(1, 0, 1000), torch.linspace(1, 0, 1000))


def test_a_wrong_number_of_levels_is_refused():
    with pytest.raises(ValueError, match=r"must have 1000 timesteps, got shape \(10,\)"):
        NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9, 0.1, 10))


def test_a_log_snr_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="`log_snr` must be a number"):
        schedule().timestep_at(float("nan"))


@pytest.mark.parametrize("method", ["alpha", "sigma", "log_snr"])
@pytest.mark.parametrize("timesteps", [-1, 1000, 2.5, True, torch.tensor([5, 1000])])
def test_timesteps_that_are_none_are_refused(method, timesteps):
    with pytest.raises(ValueError, match=r"must be integers in \[0, 1000\), got"):
        getattr(schedule(), method)(timesteps)


def test_a_single_timestep_may_be_an_integer():
    assert schedule().log_snr(5) == schedule().log_snr(torch.tensor([5]))[0]


FLOWS = [
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    {"_class_name": "FlowMatchHeunDiscreteScheduler"},
    {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
    {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
]


@pytest.mark.parametrize("config", FLOWS)
def test_flow_matching_goes_straight_from_picture_to_noise(config):
    flow = NoiseSchedule.from_config(config)
    timesteps = torch.tensor([0, 250, 500, 999])
    torch.testing.assert_close(flow.sigma(timesteps), timesteps.double() / 1000)
    torch.testing.assert_close(flow.alpha(timesteps), 1 - timesteps.double() / 1000)
    assert float(flow.log_snr(500)) == pytest.approx(0, abs=1e-12)
    assert bool(flow.log_snr(torch.arange(1000)).isfinite().all())
    assert bool((flow.log_snr(torch.arange(1000)).diff() < 0).all())


def test_flow_matching_noises_as_diffusers_does():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    # Of a shifted scheduler the timesteps that it passes to the transformer are 1000 sigma, too.
    timestep = theirs.timesteps[(theirs.timesteps - 600).abs().argmin()]
    expected = theirs.scale_noise(latents, timestep[None], noise)
    nearest = torch.full((2,), round(float(timestep)))
    found = NoiseSchedule.flow_matching().add_noise(latents, noise, nearest)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


# As the newer families are published: shifts by the image's size, an end above 0, sigmas of a beta distribution, and
# Wan's solver of many steps.
FLOW_SCHEDULERS = {
    "FLUX.2": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "Z-Image": FlowMatchEulerDiscreteScheduler(shift=6.0),
    "Qwen-Image": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
    "Chroma": FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
    "Wan": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_timestep_is_a_level_of_noise_however_a_scheduler_spaces_them(name):
    theirs = FLOW_SCHEDULERS[name]
    ours = NoiseSchedule.from_config({**theirs.config, "_class_name": type(theirs).__name__})
    theirs.set_timesteps(10, **({"mu": 1.15} if theirs.config.get("use_dynamic_shifting") else {}))
    timesteps, sigmas = theirs.timesteps[1:].float(), theirs.sigmas[1:-1]
    # Wan's are rounded down to whole timesteps.
    torch.testing.assert_close(timesteps, 1000 * sigmas, rtol=0, atol=1.0 if name == "Wan" else 1e-3)
    torch.testing.assert_close(ours.sigma(timesteps.round().long()).float(), sigmas, rtol=0, atol=1.1e-3)
    assert (ours.sampled is not None) == (name == "Z-Image")


def test_hunyuan_dits_levels_are_those_of_diffusers():
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, prediction_type="v_prediction"
    )
    ours = NoiseSchedule.from_config({**theirs.config, "_class_name": "DDPMScheduler"})
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_an_even_grid_of_flow_matching_spans_the_same_levels_on_both_sides():
    flow = NoiseSchedule.flow_matching()
    grid = flow.even_timesteps(20)
    # 8-bit images have steps of 1/128: finer noise, at a smaller timestep, hides nothing of them.
    assert grid[0] == 6
    assert grid[-1] == 994
    levels = flow.log_snr(torch.tensor(grid))
    assert float(levels[0]) == pytest.approx(-float(levels[-1]), abs=0.1)
    middle = levels[3:-3].diff()
    assert float(middle.max() - middle.min()) < 0.3


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_an_index_is_that_of_diffusers_sampler_with_its_shift(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
    torch.testing.assert_close(schedule.sampled.float(), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    for index in (1, 500, 950, 999):
        timestep = schedule.timestep_at_index(index)
        assert timestep == min(round(float(scheduler.timesteps[index])), 999)
        assert abs(schedule.timestep_at_index(schedule.index_at(timestep)) - timestep) <= shift


def test_an_index_of_ddpm_counts_down_from_the_last_timestep():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})
    assert schedule.sampled.long().tolist() == scheduler.timesteps.tolist()
    assert schedule.timestep_at_index(0) == 999 and schedule.index_at(49) == 950


def test_index_timestep_sigma_and_log_snr_are_one_scale():
    schedule = NoiseSchedule.flow_matching(shift=3.0)
    timestep = schedule.timestep_of_paper(50)
    assert timestep == 141
    assert schedule.timestep_at_sigma(float(schedule.sigma(timestep))) == timestep
    assert schedule.timestep_at(float(schedule.log_snr(timestep))) == timestep


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    ],
)
def test_an_index_is_refused_where_it_stands_for_no_timestep_of_its_own(config):
    schedule = NoiseSchedule.from_config(config)
    for call in (lambda: schedule.timestep_at_index(5), lambda: schedule.index_at(5)):
        with pytest.raises(ValueError, match=r"an index does not identify a noise level. Use"):
            call()


@pytest.mark.parametrize("index", [-1, 1000, 2.5, True])
def test_a_bad_index_is_refused(index):
    with pytest.raises(ValueError, match=r"`index` must be an integer in \[0, 1000\)"):
        NoiseSchedule.flow_matching().timestep_at_index(index)


def test_bad_sigmas_and_shifts_are_refused():
    with pytest.raises(ValueError, match=r"`sigma` must be in \[0, 1\], got 1.5"):
        NoiseSchedule.flow_matching().timestep_at_sigma(1.5)
    with pytest.raises(ValueError, match=r"`shift` of a flow-matching scheduler must be in \[1e-6, 1e6\], got 0"):
        NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0})


@pytest.mark.parametrize("least", [0.0, 1e-34])
def test_betas_that_add_no_noise_are_refused(least):
    config = {"_class_name": "DDPMScheduler", "beta_start": 0.0}
    with pytest.raises(ValueError, match=r"must be in \[0, 1\] and not all 0"):
        NoiseSchedule.from_config({**config, "beta_end": least})
    assert NoiseSchedule.from_config({**config, "beta_end": 1e-10}).sigmas[-1] > 0
