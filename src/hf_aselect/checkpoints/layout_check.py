"""Whether weights predict as the layout has it that they were said to be of."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_aselect import ASelectConfig
from ..model.noise_schedule import NoiseSchedule, is_flow_matching
from ..selection.images import CalibrationPictures
from ..selection.reader import eval_mode
from .research import LAYOUTS, NORM_EPS, ResearchLayout

logger = logging.getLogger(__name__)

# Little noise and much: there a time that runs the other way is farthest from the right one.
TIMESTEPS = (50, 950)
NUM_IMAGES = 4
# The loss of the layout that was said has to be so many times that of another one. Of small models, trained for a
# moment, it was 1.4 times and more under a wrong layout, and worse than predicting nothing.
FACTOR = 1.25
# Weights whose best loss is no less than this share of predicting nothing tell nothing: they are random, or the images
# are not of their kind.
_NOTHING = 0.99


def said_layout(config: ASelectConfig) -> str | None:
    """Return the layout that research weights were said to be of; None where there is nothing to check."""
    transformer, names = config.transformer or {}, {each.timestep_embedding: name for name, each in LAYOUTS.items()}
    # The epsilon is that of the research code, and of no default of diffusers.
    is_research = transformer["_class_name"] == "DiTTransformer2DModel" and transformer.get("norm_eps") == NORM_EPS
    return names.get(config.timestep_embedding) if is_research else None


def is_comparable(config: ASelectConfig, images: Any) -> bool:
    """Return whether images can tell if the layout of research weights is right; where they cannot, log why."""
    said = said_layout(config)
    if said is None:
        return False
    why = ""
    if images is None:
        why = "no images were given (`calibration_images=`, `--images`)"
    elif isinstance(images, Iterator):
        why = "the images can be read only once"
    elif config.takes_latents and not CalibrationPictures(images, config, NUM_IMAGES, 0).images.is_ready:
        why = "the model has no VAE (`vae=`, `--vae`), without which it cannot be given images"
    if why:
        logger.warning("The layout %r was not checked against what the weights predict: %s.", said, why)
    return not why


def compare_layouts(model: Any, images: Any, seed: int = 0, *, is_error: bool = False) -> dict[str, float]:
    """Warn where another layout predicts what images were noised with far better than the one that was said.

    Args:
        model: A model of any class; only of research weights there is something to check.
        images: Images, as in `select_timestep`, of which a sample of four is looked at; None where there are none. Of
            an iterator, which may be used up, none is looked at.
        seed: Seed of the sample and of the noise.
        is_error: Whether to raise instead.

    Returns:
        The loss of each layout as a share of that of predicting nothing, the worse one of timesteps 50 and 950; empty
        where nothing was checked, which is logged.

    Raises:
        ValueError: If `is_error` and the loss of another layout is less by `FACTOR`.
    """
    config = model.config
    if not is_comparable(config, images):
        return {}
    said = str(said_layout(config))
    sample = CalibrationPictures(images, config, NUM_IMAGES, seed)
    denoiser = model._base().denoiser
    with torch.no_grad(), eval_mode(denoiser):
        latents = torch.cat([model.encode(read()) for _, read in sample.batches(0, NUM_IMAGES, NUM_IMAGES, 0, 1)])
        mine = {said: replace(LAYOUTS[said], scheduler=config.scheduler)}
        losses = {name: _loss(denoiser, latents, layout, seed) for name, layout in (LAYOUTS | mine).items()}
    best = min(losses, key=lambda name: losses[name])
    shares = ", ".join(f"{loss:.2f} as {name!r}" for name, loss in losses.items())
    measured = (
        f"The loss as a share of that of predicting nothing, at the worse of timesteps {TIMESTEPS[0]} and "
        f"{TIMESTEPS[1]}, is {shares}"
    )
    if losses[best] > _NOTHING:
        logger.warning(
            "The layout %r could not be checked: under none do the weights predict what %d images were noised with "
            "better than nothing would. They are not trained, or on other images. %s.",
            said,
            len(latents),
            measured,
        )
    elif losses[best] * FACTOR < losses[said]:
        message = (
            f"The layout was said to be {said!r}, but the weights predict what {len(latents)} images were noised with "
            f"far better as {best!r}. {measured}; a factor of {FACTOR} counts as far."
        )
        if is_error:
            raise ValueError(
                f"{message} Nothing is written: pass `layout={best!r}` (`--layout {best}`), or, if you know better, "
                "`check_layout=False` (`--no-layout-check`)."
            )
        logger.warning("%s Load them again with `layout=%r`, unless you know better.", message, best)
    return losses


def _loss(denoiser: Any, latents: Tensor, layout: ResearchLayout, seed: int) -> float:
    """Return the loss of a layout as a share of that of predicting nothing, at the worst of the timesteps."""
    schedule = NoiseSchedule.from_config(layout.scheduler)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    target = noise - latents if is_flow_matching(layout.scheduler) else noise
    labels = torch.full(latents.shape[:1], denoiser.num_classes, device=latents.device)
    own, shares = denoiser.timestep_embedding, []
    # The frequencies of all three are those of the original DiT.
    denoiser.timestep_embedding = layout.timestep_embedding
    try:
        for timestep in TIMESTEPS:
            noised = schedule.add_noise(latents, noise, timestep)
            predicted = denoiser.predict(noised, torch.full_like(labels, timestep), labels)
            shares.append(float((predicted - target).square().mean() / target.square().mean()))
    finally:
        denoiser.timestep_embedding = own
    return max(shares)
