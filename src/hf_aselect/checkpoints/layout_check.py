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
# A layout is contradicted if its loss is this many times that of another layout. For small models, trained briefly,
# the loss of a wrong layout was at least 1.4 times as high, and worse than predicting nothing.
FACTOR = 1.25
# Weights whose best loss is at least this share of predicting nothing show nothing: they are random, or the images
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
        why = "no images are given (`calibration_images=`, `--images`)"
    elif isinstance(images, Iterator):
        why = "the images can be read only once"
    elif config.takes_latents and not CalibrationPictures(images, config, NUM_IMAGES, 0).images.is_ready:
        why = "the model has no VAE (`vae=`, `--vae`) to encode images"
    if why:
        logger.warning("`layout=%r` was not checked against the predictions of the weights, because %s.", said, why)
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
    shares = ", ".join(f"{loss:.2f} for {name!r}" for name, loss in losses.items())
    measured = (
        f"The loss relative to predicting zero, at the worse of timesteps {TIMESTEPS[0]} and {TIMESTEPS[1]}, is "
        f"{shares}"
    )
    if losses[best] > _NOTHING:
        logger.warning(
            "`layout=%r` could not be checked: in no layout do the weights predict the noise of %d images better "
            "than zero does. They may be untrained, or trained on other images. %s.",
            said,
            len(latents),
            measured,
        )
    elif losses[best] * FACTOR < losses[said]:
        message = (
            f"`layout` is {said!r}, but the weights predict the noise of {len(latents)} images far better as "
            f"{best!r}. {measured} (a factor of {FACTOR} counts as far better)."
        )
        if is_error:
            raise ValueError(
                f"{message} Nothing was written. Pass `layout={best!r}` (`--layout {best}`), or skip this check with "
                "`check_layout=False` (`--no-layout-check`)."
            )
        logger.warning("%s If the layout is not known for certain, load them again with `layout=%r`.", message, best)
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
