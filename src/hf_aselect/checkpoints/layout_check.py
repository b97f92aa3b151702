"""Whether weights predict as the layout has it that they were said to be of."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model.noise_schedule import NoiseSchedule, is_flow_matching
from ..selection.images import CalibrationPictures
from ..selection.prediction import predict
from ..selection.reader import eval_mode
from .research import LAYOUTS, NORM_EPS, ResearchLayout

logger = logging.getLogger(__name__)

# Little noise and much: there a time that runs the other way is farthest from the right one.
TIMESTEPS = (50, 950)
NUM_IMAGES = 4
# Another layout has to predict this much better at the worse of the two. Of small models, trained for a moment, the
# loss under a wrong layout was 1.4 times and more that under the right one, and worse than predicting nothing.
_MARGIN = 0.8


def check_layout(model: Any, images: Any, seed: int = 0) -> dict[str, float]:
    """Warn where another layout predicts what images were noised with better than the one that was said.

    Args:
        model: A model of any class; only of research weights there is something to check.
        images: Images, as in `select_timestep`, of which a sample of four is looked at; of an iterator, which may be
            used up, none.
        seed: Seed of the sample and of the noise.

    Returns:
        The loss of each layout as a share of that of predicting nothing, the worse one of timesteps 50 and 950; empty
        where nothing was checked.
    """
    transformer, names = model.config.transformer, {each.timestep_embedding: name for name, each in LAYOUTS.items()}
    # The epsilon is that of the research code, and of no default of diffusers.
    is_research = transformer["_class_name"] == "DiTTransformer2DModel" and transformer.get("norm_eps") == NORM_EPS
    said = names.get(model.config.timestep_embedding)
    if not is_research or said is None or isinstance(images, Iterator):
        return {}
    sample = CalibrationPictures(images, model.config, NUM_IMAGES, seed)
    denoiser = model._base().denoiser
    with torch.no_grad(), eval_mode(denoiser):
        latents = torch.cat([model.encode(read()) for _, read in sample.batches(0, NUM_IMAGES, NUM_IMAGES, 0, 1)])
        mine = {said: replace(LAYOUTS[said], scheduler=model.config.scheduler)}
        losses = {name: _loss(denoiser, latents, layout, seed) for name, layout in (LAYOUTS | mine).items()}
    best = min(losses, key=lambda name: losses[name])
    if best != said and losses[best] < _MARGIN * losses[said]:
        logger.warning(
            "The layout was said to be %r, but the weights predict what %d images were noised with far better as %r. "
            "The loss as a share of that of predicting nothing, at the worse of timesteps %d and %d, is %s. Convert "
            "them again with that layout, unless you know better.",
            said,
            len(latents),
            best,
            *TIMESTEPS,
            ", ".join(f"{loss:.2f} as {name!r}" for name, loss in losses.items()),
        )
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
            predicted = predict(denoiser, noised, torch.full_like(labels, timestep), labels)
            shares.append(float((predicted - target).square().mean() / target.square().mean()))
    finally:
        denoiser.timestep_embedding = own
    return max(shares)
