"""What a configuration names, built with new weights: the denoiser and the encoder half of the VAE."""

from functools import partial
from typing import Any

from torch import nn

from .configuration_aselect import ASelectConfig
from .denoiser import Denoiser
from .families import family_of
from .folded_transformer import FoldedTransformer
from .vae import keep_encoder


def build_denoiser(config: ASelectConfig, with_prompt: bool = True) -> Denoiser | FoldedTransformer:
    """Build the denoiser of a configuration, with new weights; a plain transformer where it is folded.

    Args:
        config: The configuration.
        with_prompt: Whether to build the buffers of the empty prompt's embeddings, too; without them nothing can be
            read, and their shapes need not be known.

    Raises:
        ValueError: If the transformer's class is not described, its kind is not supported, or the configuration lacks
            the shapes of the prompt that it is conditioned on.
    """
    if (layout := config.folding) is not None:
        return FoldedTransformer(config, layout)
    transformer = dict(config.transformer or {})
    family = family_of(transformer.get("_class_name"))
    build = partial(_build, transformer, family.transformer_class)
    return Denoiser(
        build(),
        family,
        rebuild=build,
        timestep_embedding=config.timestep_embedding,
        prompt_shapes=(config.prompt_shapes or {}) if with_prompt else None,
        guidance=config.guidance,
        vae_scale_factor=config.vae_scale_factor,
    )


def build_vae_encoder(config: ASelectConfig) -> nn.Module | None:
    """Build the encoder half of the VAE of a configuration, with new weights; None in pixel space.

    Raises:
        ValueError: If diffusers cannot build it.
    """
    if config.vae is None:
        return None
    return keep_encoder(_build(config.vae))


def _build(config: dict[str, Any], kind: Any = None) -> Any:
    """Build a model of diffusers of its configuration, or of another class than the one that it names."""
    # diffusers takes seconds to import, and folded models, configurations and heads do not need it. In a `try`, as
    # transformers asks for everything else that a model's code imports.
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"A {config['_class_name']} needs diffusers: pip install diffusers") from error

    # diffusers would take its own defaults for what this lists, whatever the configuration says.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    if kind is None and not hasattr(diffusers, config["_class_name"]):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {config['_class_name']}. Upgrade it: pip install -U diffusers"
        )
    try:
        return (kind or getattr(diffusers, config["_class_name"])).from_config(config)
    except Exception as error:  # the class does not check its values, and may raise anything
        raise ValueError(
            f"diffusers cannot build a {config['_class_name']} from its configuration ({type(error).__name__}: "
            f"{error}). Save or download the checkpoint again."
        ) from error
