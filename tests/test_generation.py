import pytest
import torch
from conftest import NUM_BLOCKS, NUM_CLASSES, build_transformer, denoiser_of
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from hf_aselect import ASelectConfig, DiTForImageClassification, DiTModel
from hf_aselect.model.configuration_aselect import DDPM_LINEAR
from hf_aselect.selection.generation import build_sampler, generate_latents

SIZE = (8, 8)


def build_sampler_of(**scheduler):
    return build_sampler(ASelectConfig(scheduler={**DDPM_LINEAR, **scheduler}))


def build_small(**sizes):
    """A DiT whose weights are small enough that twenty steps stay near 1."""
    torch.manual_seed(0)
    given = {"in_channels": 3, "num_embeds_ada_norm": NUM_CLASSES, **sizes}
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=NUM_BLOCKS, sample_size=8, patch_size=2, **given
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return transformer.eval()


@pytest.fixture
def denoiser():
    return denoiser_of(build_small()).eval()


@pytest.fixture
def latent_model(latent_folder):
    return DiTModel.from_pretrained(latent_folder, timestep=50)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_the_prediction_is_that_of_diffusers(num_channels):
    transformer = build_transformer(num_channels)
    noised = torch.randn(4, num_channels, 8, 8)
    timesteps, labels = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 4, NUM_CLASSES])
    with torch.no_grad():
        expected = transformer(noised, timestep=timesteps, class_labels=labels).sample
        found = denoiser_of(transformer).predict(noised, timesteps, labels)
    assert_near(found, expected)


def test_a_learned_variance_is_left_out():
    transformer = build_small(in_channels=4, out_channels=8)
    noised, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = transformer(noised, timestep=timesteps, class_labels=labels).sample
        found = denoiser_of(transformer).predict(noised, timesteps, labels)
    assert expected.shape == (2, 8, 8, 8)
    assert_near(found, expected[:, :4])
    sampled = generate_latents(denoiser_of(transformer), build_sampler_of(), SIZE, 3, num_steps=4)
    assert sampled.shape == (3, 4, 8, 8)


def test_a_grid_that_is_not_square_keeps_rows_and_columns_apart():
    # A transformer that does not look at other tokens predicts for each patch what it does in a square.
    transformer = build_small()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
        transformer.pos_embed.pos_embed.zero_()
        wide, timesteps, labels = torch.randn(1, 3, 8, 8), torch.tensor([10]), torch.tensor([1])
        expected = transformer(wide, timestep=timesteps, class_labels=labels).sample[:, :, :4]
        transformer.pos_embed.pos_embed = None
        found = denoiser_of(transformer).predict(wide[:, :, :4], timesteps, labels)
    assert_near(found, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_it_equals_a_plain_loop_around_diffusers(denoiser, prediction_type):
    guidance_scale, num_steps = 3.0, 10
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=prediction_type)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(3):
        label = torch.randint(NUM_CLASSES, (1,), generator=generator)
        latents = torch.randn((1, 3, 8, 8), generator=generator)
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                conditional, null = (
                    denoiser.transformer(latents, timestep=timestep[None], class_labels=each).sample
                    for each in (label, torch.tensor([NUM_CLASSES]))
                )
            guided = (1 - guidance_scale) * null + guidance_scale * conditional
            latents = scheduler.step(guided, timestep, latents).prev_sample
        expected.append(latents)
    found = generate_latents(
        denoiser,
        build_sampler_of(prediction_type=prediction_type),
        SIZE,
        3,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=7,
    )
    assert_near(found, torch.cat(expected))


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def test_flow_matching_is_sampled_by_euler_steps(denoiser):
    # Two batches: the scheduler counts its steps and must begin again.
    sampler = build_sampler(ASelectConfig(scheduler=FLOW))
    found = generate_latents(denoiser, sampler, SIZE, 3, num_steps=4, guidance_scale=1, batch_size=2, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = []
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for _ in range(3):
        label = torch.randint(NUM_CLASSES, (1,), generator=generator)
        latents = torch.randn((1, 3, *SIZE), generator=generator)
        theirs.set_timesteps(4)
        for timestep, sigma, following in zip(theirs.timesteps, theirs.sigmas, theirs.sigmas[1:], strict=False):
            assert float(timestep) == pytest.approx(1000 * float(sigma), rel=1e-5)
            with torch.no_grad():
                velocity = denoiser.transformer(latents, timestep=timestep[None], class_labels=label).sample
            latents = latents + (following - sigma) * velocity
        expected.append(latents)
    assert_near(found, torch.cat(expected))


def test_a_shift_by_its_other_name_is_kept():
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert build_sampler(ASelectConfig(scheduler=scheduler)).config.shift == 3


@pytest.mark.parametrize(
    "scheduler", [{}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.01}]
)
def test_the_sampler_has_the_noise_levels_of_diffusers(scheduler):
    sampler, theirs = build_sampler_of(**scheduler), DDPMScheduler(**scheduler)
    torch.testing.assert_close(sampler.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)


def test_the_sampler_knows_the_sigmoid_schedule_and_zero_terminal_snr():
    sigmoid = build_sampler_of(beta_schedule="sigmoid")
    theirs = DDPMScheduler(beta_schedule="sigmoid")
    torch.testing.assert_close(sigmoid.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-7)
    assert float(build_sampler_of(rescale_betas_zero_snr=True).alphas_cumprod[-1]) == 0


def test_the_sampler_ends_without_noise():
    sampler = build_sampler_of(set_alpha_to_one=False, clip_sample=True)
    sampler.set_timesteps(20)
    assert sampler.timesteps.tolist() == list(range(999, 0, -50))
    assert float(sampler.final_alpha_cumprod) == 1
    assert not sampler.config.clip_sample


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match=r"must be epsilon, v_prediction or sample .* got 'score'"):
        build_sampler_of(prediction_type="score")


def test_v_prediction_works_with_zero_terminal_snr_and_epsilon_is_refused(denoiser):
    zero_snr = {"rescale_betas_zero_snr": True}
    sampled = generate_latents(
        denoiser, build_sampler_of(prediction_type="v_prediction", **zero_snr), SIZE, 2, num_steps=5
    )
    assert sampled.isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate_latents(denoiser, build_sampler_of(**zero_snr), SIZE, 2, num_steps=5)


def test_the_seed_says_what_comes_out(denoiser):
    sampler = build_sampler_of()
    first, again, other = (generate_latents(denoiser, sampler, SIZE, 4, num_steps=5, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_the_batch_and_the_number_of_pictures_change_nothing(denoiser):
    sampler = build_sampler_of()
    whole = generate_latents(denoiser, sampler, SIZE, 7, num_steps=5)
    assert_near(generate_latents(denoiser, sampler, SIZE, 7, num_steps=5, batch_size=3), whole)
    assert_near(generate_latents(denoiser, sampler, SIZE, 2, num_steps=5), whole[:2])


@pytest.mark.parametrize(
    ("num_classes", "guidance_scale", "passes"), [(NUM_CLASSES, 2.0, 2), (NUM_CLASSES, 1.0, 1), (1, 2.0, 1)]
)
def test_the_passes_are_as_documented(num_classes, guidance_scale, passes):
    denoiser = denoiser_of(build_small(num_embeds_ada_norm=num_classes))
    seen = []
    embedder = denoiser.transformer.transformer_blocks[0].norm1.emb.class_embedder
    embedder.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    generate_latents(denoiser, build_sampler_of(), SIZE, 5, num_steps=4, guidance_scale=guidance_scale, batch_size=2)
    # The embedder runs in the first block and again before the output.
    labels = torch.cat(seen)
    assert len(labels) == 2 * passes * 5 * 4
    if num_classes == 1:
        assert (labels == 1).all()
    elif passes == 1:
        assert (labels < num_classes).all()
    else:
        assert int((labels == num_classes).sum()) == len(labels) // 2


def test_modes_gradients_and_global_randomness_stay_as_they_were(classifier):
    classifier.train()
    classifier.backbone.denoiser.train()
    modes = {name: module.training for name, module in classifier.named_modules()}
    state = torch.get_rng_state()
    trained = classifier.generate_latents(4, num_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in classifier.named_modules()} == modes
    assert not trained.requires_grad
    # Labels are dropped at random in train mode, but not here.
    assert torch.equal(trained, classifier.eval().generate_latents(4, num_steps=5))


def test_modes_are_restored_after_an_error(denoiser):
    denoiser.train()
    with pytest.raises(RuntimeError):
        generate_latents(denoiser, build_sampler_of(), (7, 7), 1, num_steps=1)
    assert all(module.training for module in denoiser.modules())


def test_pictures_in_pixel_space_are_clamped(pixel_folder):
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=50, num_labels=2, head="linear")
    sampled = model.generate_latents(5, num_steps=5)
    assert sampled.shape == (5, 3, 8, 8)
    assert sampled.dtype == torch.float32
    assert sampled.device.type == "cpu"
    assert float(sampled.abs().max()) == 1
    assert torch.equal(model.encode(sampled), sampled)


def test_latents_have_the_shape_of_encoded_pictures(latent_model):
    sampled = latent_model.generate_latents(5, num_steps=5)
    assert sampled.shape == latent_model.encode(torch.zeros(5, 3, 16, 16)).shape == (5, 4, 8, 8)
    assert float(sampled.abs().max()) > 1


def test_the_size_of_pictures_is_the_configurations(latent_folder):
    model = DiTModel.from_pretrained(latent_folder, timestep=50, image_size=[8, 24])
    assert model.generate_latents(2, num_steps=2).shape == (2, 4, 4, 12)


def test_it_works_in_half_precision(pixel_folder):
    model = DiTModel.from_pretrained(pixel_folder, timestep=50, dtype=torch.bfloat16)
    sampled = model.generate_latents(2, num_steps=5)
    assert sampled.dtype == torch.float32
    assert sampled.isfinite().all()


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"num_steps": 0}, {"batch_size": 0}, {"num_steps": -5}])
def test_numbers_below_one_are_refused(model, wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        model.generate_latents(**{"num_images": 1, **wrong})


@pytest.mark.parametrize("num_steps", [3, 61, 1001])
def test_steps_that_do_not_divide_the_timesteps_are_refused(model, num_steps):
    with pytest.raises(ValueError, match=f"must divide 1000 .* got {num_steps}"):
        model.generate_latents(1, num_steps=num_steps)


@pytest.mark.parametrize("scale", [0.5, float("nan")])
def test_a_guidance_below_one_is_refused(denoiser, scale):
    with pytest.raises(ValueError, match="`guidance_scale` must be at least 1"):
        generate_latents(denoiser, build_sampler_of(), SIZE, 1, guidance_scale=scale)
