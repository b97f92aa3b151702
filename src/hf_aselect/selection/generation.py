"""The table of transformer families, and what a configuration asks for of diffusers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model.checks import NUM_TIMESTEPS
from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import as_if_called, placement
from ..model.denoisers import _build
from ..model.layouts import plain
from ..model.noise_schedule import NoiseSchedule, is_flow_matching
from .reader import eval_mode


def build_sampler(config: ASelectConfig) -> Any:
    """Build the diffusers scheduler that samples from the model of a configuration, without randomness.

    For flow matching Euler's method, with the shift of the configuration's scheduler. Else DDIM with the noise levels
    of `NoiseSchedule` and the `prediction_type` (epsilon, v_prediction or sample) of the configuration's scheduler; it
    begins at the last timestep, where there is most noise, and ends without noise.

    Raises:
        ValueError: If the scheduler is none that `NoiseSchedule` knows, or its prediction type none of those.
    """
    scheduler = dict(config.scheduler or {})
    schedule = NoiseSchedule.from_config(scheduler)
    if is_flow_matching(scheduler):
        # A shift that depends on the size of the image is left out: few coarse steps do not need it.
        shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
        return _build({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            "`prediction_type` of the scheduler must be epsilon, v_prediction or sample to generate images, got "
            f"{prediction_type!r}. Pass `images`."
        )
    shares = schedule.alphas_cumprod
    shares_before = torch.cat([shares.new_ones(1), shares[:-1]])
    return _build(
        {
            "_class_name": "DDIMScheduler",
            # As one list: DDIMScheduler does not know every `beta_schedule` that noise is added with.
            "trained_betas": (1 - shares / shares_before).tolist(),
            "prediction_type": prediction_type,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
    )


def generate_for(
    model: Any, num_images: int, num_steps: int, batch_size: int, seed: int, guidance_scale: float
) -> Tensor:
    """Return clean latents that a model makes itself; see its `generate_latents`."""
    config = model.config
    if config.folded:
        raise ValueError("A folded model cannot generate images. Use the model it was folded from.")
    if model.noise_schedule.num_trained < NUM_TIMESTEPS:
        raise ValueError(
            "This transformer was trained only on low noise, so it cannot generate images from pure noise. Pass "
            "your own images (`calibration_images=`)."
        )
    height, width = (side // config.vae_scale_factor for side in config.image_height_width)
    base, sampler = model._base(), build_sampler(config)
    latents = generate_latents(
        base.denoiser,
        sampler,
        (height, width),
        num_images,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
    )
    return latents.clamp(-1, 1) if base.vae is None else latents


def count_forwards(num_images: int, num_steps: int = 20) -> int:
    """Return how many passes of an image through the transformer a model's `generate_latents` makes, unguided."""
    return num_images * num_steps


@torch.no_grad()
def generate_latents(
    denoiser: Any,
    sampler: Any,
    size: tuple[int, int],
    num_images: int,
    *,
    num_steps: int = 20,
    guidance_scale: float = 2.0,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """Sample clean latents of random classes, with classifier-free guidance.

    Classes and starting noise are made on the CPU, image by image: an image depends on `seed` and its place
    alone, beyond rounding, and not on `batch_size`, `num_images` or the device. No global random state is touched, and
    each module of the denoiser is in eval mode meanwhile and afterwards in the mode it was in.

    It costs `num_images * num_steps` passes through the whole transformer; twice as many with guidance, which is
    everywhere but with one class (the null label alone is used) or a `guidance_scale` of 1.

    Args:
        denoiser: The transformer, a `Denoiser`.
        sampler: A deterministic diffusers scheduler, as from `build_sampler`.
        size: Height and width of the latents, multiples of the patch size.
        num_images: How many, at least 1.
        num_steps: Timesteps on the way from noise, a divisor of 1000.
        guidance_scale: Prediction = null + scale · (class − null), at least 1; 1 is not a guidance.
        batch_size: Images at once; with guidance the transformer sees twice as many.
        seed: Seed of classes and noise.

    Returns:
        Clean latents, (n, C, h, w), float32, on the CPU, not clamped.

    Raises:
        ValueError: If a number is out of range, or the model yields NaN or infinite values.

    Source: DDIM, arXiv 2010.02502; classifier-free guidance, arXiv 2207.12598. diffusers' `DiTPipeline` guides the
    first three channels alone; here all are.
    """
    num_images, num_steps, batch_size, seed = map(plain, (num_images, num_steps, batch_size, seed))
    _check(num_images, num_steps, guidance_scale, batch_size)
    classes, noise = _draw(denoiser, size, num_images, seed)
    is_guided = denoiser.num_classes > 1 and guidance_scale > 1
    done = []
    with eval_mode(denoiser):
        device, dtype = placement(denoiser.patch_embedding)
        for start in range(0, num_images, batch_size):
            labels = classes[start : start + batch_size].to(device)
            # In float32 whatever the model's dtype: the first steps divide by a signal factor below 0.01.
            latents = noise[start : start + batch_size].to(device)
            # A new one for each batch: Euler's scheduler counts its steps.
            sampler.set_timesteps(num_steps)
            for timestep in sampler.timesteps:
                prediction = _predict(denoiser, latents.to(dtype), timestep, labels, is_guided).float()
                if is_guided:
                    conditional, null = prediction.chunk(2)
                    prediction = null + guidance_scale * (conditional - null)
                latents = sampler.step(prediction, timestep, latents).prev_sample
            done.append(latents.cpu())
    generated = torch.cat(done)
    if not bool(generated.isfinite().all()):
        raise ValueError(
            "The model generated NaN or infinite values: its weights or its scheduler's `prediction_type` "
            "may be wrong. Pass your own images instead."
        )
    return generated


def _check(num_images: int, num_steps: int, guidance_scale: float, batch_size: int) -> None:
    if not all(isinstance(count, int) for count in (num_images, num_steps, batch_size)):
        raise ValueError(
            "`num_images`, `num_steps` and `batch_size` must be integers, got "
            f"{num_images!r}, {num_steps!r} and {batch_size!r}."
        )
    if num_images < 1 or num_steps < 1 or batch_size < 1:
        raise ValueError(
            "`num_images`, `num_steps` and `batch_size` must be at least 1, got "
            f"{num_images}, {num_steps} and {batch_size}."
        )
    if NUM_TIMESTEPS % num_steps:
        # diffusers' DDIM strides by the rounded-down quotient: else it misses its next timestep, or takes one of -1.
        raise ValueError(f"`num_steps` must divide {NUM_TIMESTEPS} (for example 10, 20 or 50), got {num_steps}.")
    if not guidance_scale >= 1:
        raise ValueError(f"`guidance_scale` must be at least 1 (no guidance), got {guidance_scale}.")


def _draw(
    denoiser: Any,
    size: tuple[int, int],
    num_images: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return class indices, (n,), and standard normal noise, (n, C, h, w), float32, both on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = denoiser.num_classes
    classes, noise = [], []
    for _ in range(num_images):
        drawn = torch.randint(max(num_classes, 1), (), generator=generator)
        # The null label, `num_classes`, where there are no classes to select from; a text-conditioned transformer has
        # its empty prompt.
        classes.append(drawn if num_classes > 1 else torch.tensor(num_classes))
        noise.append(torch.randn((denoiser.num_channels, *size), generator=generator))
    return torch.stack(classes), torch.stack(noise)


def _predict(
    denoiser: Any,
    latents: Tensor,
    timestep: Tensor,
    labels: Tensor,
    is_guided: bool,
) -> Tensor:
    """Return the denoiser's output, (B, C, h, w), or with guidance, (2B, C, h, w): with the classes, then without."""
    if is_guided:
        latents = torch.cat([latents, latents])
        labels = torch.cat([labels, torch.full_like(labels, denoiser.num_classes)])
    timesteps = timestep.to(latents.device).expand(len(latents))
    prediction: Tensor = as_if_called(denoiser, partial(denoiser.predict, latents, timesteps, labels))
    return prediction
