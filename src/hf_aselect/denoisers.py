"""The table of transformer families, and what a configuration asks for of diffusers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .configuration_aselect import ASelectConfig
from .denoiser import Denoiser
from .denoiser_dit import DiTDenoiser
from .denoiser_flux import FluxDenoiser
from .denoiser_lumina2 import Lumina2Denoiser
from .denoiser_pixart import PixArtDenoiser
from .denoiser_sana import SanaDenoiser
from .denoiser_sd3 import SD3Denoiser
from .folded_transformer import FoldedTransformer
from .noise_schedule import NoiseSchedule, is_flow_matching
from .transformer_layout import check_family

FAMILIES: dict[str, type[Denoiser]] = {
    "DiTTransformer2DModel": DiTDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "FluxTransformer2DModel": FluxDenoiser,
    "SanaTransformer2DModel": SanaDenoiser,
    "Lumina2Transformer2DModel": Lumina2Denoiser,
}


def build_denoiser(config: ASelectConfig, with_prompt: bool = True) -> Denoiser | FoldedTransformer:
    """Build the denoiser of a configuration, with new weights; a plain transformer where it is folded.

    Args:
        config: The configuration.
        with_prompt: Whether to build the buffers of the empty prompt's embeddings, too; without them nothing can be
            read, and their shapes need not be known.

    Raises:
        ValueError: If the transformer's class has no denoiser here, its kind is not supported, or the configuration
            lacks the shapes of the prompt that it is conditioned on.
    """
    if (layout := config.folding) is not None:
        return FoldedTransformer(config, layout)
    transformer = dict(config.transformer or {})
    check_family(transformer.get("_class_name"))
    return FAMILIES[transformer["_class_name"]](
        _build(transformer),
        timestep_embedding=config.timestep_embedding,
        prompt_shapes=(config.prompt_shapes or {}) if with_prompt else None,
        guidance=config.guidance,
        vae_scale_factor=config.vae_scale_factor,
    )


def build_vae_encoder(config: ASelectConfig) -> nn.Module | None:
    """Build the encoder half of the VAE of a configuration, with new weights; None in pixel space.

    Raises:
        ValueError: If the VAE is neither an `AutoencoderKL` nor an `AutoencoderDC`.
    """
    if config.vae is None:
        return None
    vae: Any = _build(config.vae)
    # Features need no pictures back: the decoder is more than half of the VAE's weights.
    vae.decoder = None
    if hasattr(vae, "post_quant_conv"):
        vae.post_quant_conv = None
    encoder: nn.Module = vae
    return encoder


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
        # A shift that depends on the size of the picture is left out: few coarse steps do not need it.
        shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
        return _build({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"Unsupported `prediction_type` {prediction_type!r} of the scheduler; supported for generating are "
            "epsilon, v_prediction and sample."
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


def _build(config: dict[str, Any]) -> Any:
    # diffusers takes seconds to import, and folded models, configurations and heads do not need it. In a `try`, as
    # transformers asks for everything else that a model's code imports.
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"A {config['_class_name']} needs diffusers: pip install diffusers") from error

    # diffusers would take its own defaults for what this lists, whatever the configuration says.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    try:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception as error:  # whatever the class makes of values that it does not check
        raise ValueError(
            f"diffusers cannot build a {config['_class_name']} of its configuration ({type(error).__name__}: "
            f"{error}). Save or download the checkpoint again."
        ) from error


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a module in eval mode for a while; afterwards each of its parts is in the mode that it was in."""
    modes = {part: part.training for part in model.modules()} if isinstance(model, nn.Module) else {}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
