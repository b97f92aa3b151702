"""The kinds of VAE: diffusers' names for their sizes, and how images become the transformer's latents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from .checks import is_finite_number, short
from .layouts import MAX_SIZE, hint_of

# What a VAE needs to encode and to normalise latents; the rest of its weights turns latents back into images.
ENCODER_WEIGHTS = ("encoder.", "quant_conv.", "bn.running_")
# Nobody has a VAE of more resolutions.
_MAX_LEVELS = 16


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    shift, scale = float(vae.config.get("shift_factor") or 0), float(vae.config.scaling_factor)
    return (latents - shift) * scale


def _by_channel(vae: Any, latents: Tensor) -> Tensor:
    # Plain numbers: nothing is copied to an accelerator, and a compiled graph has constants here.
    each = zip(latents.split(1, dim=1), vae.config.latents_mean, vae.latents_scale, strict=True)
    return torch.cat([(channel - mean) * scale for channel, mean, scale in each], dim=1)


def _by_batch_norm(vae: Any, latents: Tensor) -> Tensor:
    mean, variance = (values[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
    packed: Tensor = (pixel_unshuffle(latents, 2) - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    return packed


@dataclass(frozen=True)
class VAEKind:
    """What must be known of a class of diffusers' VAEs, beside its code. Fields are those of its configuration.

    Args:
        levels: Field with one entry for each resolution.
        normalize: Makes of the VAE and its latents, (B, C, h, w), those that transformers are trained on.
        latent_channels: Field with the channels of the latents that it encodes to.
        packing: Latents a side that become channels of one when they are normalised.
        image_channels: Field with the channels of an image.
        default_channels: Channels of an image where the configuration says nothing; 0 where it has to.
        is_video: Whether it encodes videos, of which an image is one frame.
    """

    levels: str
    normalize: Callable[[Any, Tensor], Tensor]
    latent_channels: str = "latent_channels"
    packing: int = 1
    image_channels: str = "in_channels"
    default_channels: int = 0
    is_video: bool = False


_VIDEO: dict[str, Any] = {"latent_channels": "z_dim", "default_channels": 3, "is_video": True}
VAE_KINDS = {
    "AutoencoderKL": VAEKind("block_out_channels", _scaled),
    "AutoencoderDC": VAEKind("encoder_block_out_channels", _scaled),
    # FLUX.2. Source: diffusers, `pipelines/flux2/pipeline_flux2.py`, `_encode_vae_image`.
    "AutoencoderKLFlux2": VAEKind("block_out_channels", _by_batch_norm, packing=2, default_channels=3),
    # Qwen-Image and Wan. Source: diffusers, `pipelines/wan/pipeline_wan_video2video.py`, `prepare_latents`.
    "AutoencoderKLQwenImage": VAEKind("dim_mult", _by_channel, image_channels="input_channels", **_VIDEO),
    "AutoencoderKLWan": VAEKind("dim_mult", _by_channel, **_VIDEO),
}


def check_vae(vae: dict[str, Any] | None) -> None:
    """Reject a VAE that is none of those we can encode with.

    Raises:
        ValueError: If `vae` is not a configuration of one of them.
    """
    if vae is None:
        return
    name = vae.get("_class_name")
    if not isinstance(name, str) or name not in VAE_KINDS:
        raise ValueError(
            f"Unsupported VAE {name!r}; supported are {', '.join(VAE_KINDS)}. Pass `vae=None` to use latents, "
            f"normalised as in the VAE's pipeline, instead of images.{hint_of(name)}"
        )
    kind = VAE_KINDS[name]
    needed = [kind.levels, *([] if kind.default_channels else [kind.image_channels])]
    needed += [kind.latent_channels, "latents_mean", "latents_std"] if kind.normalize is _by_channel else []
    if missing := [field for field in needed if vae.get(field) is None]:
        raise ValueError(
            f"`vae` lacks {', '.join(missing)}. Pass the VAE itself, or the whole configuration saved by diffusers."
        )
    levels = vae[kind.levels]
    if not isinstance(levels, list | tuple):
        raise ValueError(f"`vae` must have a list as `{kind.levels}`, got {levels!r}.")
    for field in (kind.image_channels, kind.latent_channels, "patch_size" if kind.is_video else ""):
        size = vae.get(field)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIZE):
            raise ValueError(f"`{field}` of `vae` must be a positive integer, got {short(size)}.")
    if not 1 <= len(levels) <= _MAX_LEVELS:
        raise ValueError(
            f"`{kind.levels}` of `vae` must have 1 to {_MAX_LEVELS} entries, one per resolution, got {len(levels)}."
        )
    if image_channels_of(vae) < 1 or (kind.packing > 1 and vae.get("patch_size") not in (None, [2, 2], (2, 2))):
        raise ValueError(
            "`patch_size` of `vae` does not fit its channels (an AutoencoderKLFlux2 has 2 × 2), got "
            f"{short(vae.get('patch_size'))}. Save or download the checkpoint again."
        )
    _check_normalization(vae, kind)


def _check_normalization(vae: dict[str, Any], kind: VAEKind) -> None:
    """Reject numbers by which latents would be nothing, or infinite."""
    if kind.normalize is _by_channel:
        for field in ("latents_mean", "latents_std"):
            values, count = vae[field], vae[kind.latent_channels]
            is_list = isinstance(values, list | tuple) and len(values) == count and all(map(is_finite_number, values))
            # In float32 less is nothing.
            if not is_list or (field == "latents_std" and min(map(abs, values)) < 1e-30):
                raise ValueError(
                    f"`{field}` of `vae` must be a list of {count} finite numbers, one per latent channel, standard "
                    f"deviations not 0, got {short(values)}."
                )
        return
    if not is_finite_number(vae.get("batch_norm_eps", 1e-4)) or vae.get("batch_norm_eps", 1e-4) < 0:
        raise ValueError(f"`batch_norm_eps` of `vae` must be a number >= 0, got {short(vae['batch_norm_eps'])}.")
    if not is_finite_number(vae.get("scaling_factor", 1.0)) or not vae.get("scaling_factor", 1.0):
        raise ValueError(
            f"`scaling_factor` of `vae` must be a finite number other than 0, got {short(vae['scaling_factor'])}."
        )
    if not is_finite_number(vae.get("shift_factor") or 0):
        raise ValueError(f"`shift_factor` of `vae` must be a finite number, got {short(vae['shift_factor'])}.")
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ValueError(
            f"A {vae['_class_name']} with `latents_mean` and `latents_std` is not supported, because no supported "
            "transformer was trained on latents scaled channel by channel."
        )


def vae_scale_factor_of(vae: dict[str, Any] | None) -> int:
    """Return the pixels a side that one latent stands for, as a VAE's configuration has it: 1 without a VAE."""
    if vae is None:
        return 1
    kind = VAE_KINDS[vae["_class_name"]]
    return int(2 ** (len(vae[kind.levels]) - 1)) * kind.packing * _patch_size(vae, kind)


def image_channels_of(vae: dict[str, Any]) -> int:
    """Return the channels of the images that a VAE of a configuration encodes."""
    kind = VAE_KINDS[vae["_class_name"]]
    given = vae.get(kind.image_channels)
    # Where pixels are packed into channels, the latter are counted.
    return int(given) // _patch_size(vae, kind) ** 2 if given else kind.default_channels


def latent_channels_of(vae: dict[str, Any]) -> int | None:
    """Return the channels of the latents that `encode_images` makes; None where the configuration does not say."""
    kind = VAE_KINDS[vae["_class_name"]]
    channels = vae.get(kind.latent_channels)
    return None if channels is None else int(channels) * kind.packing**2


def _patch_size(vae: Mapping[str, Any], kind: VAEKind) -> int:
    """Return the pixels a side that are packed into channels before the encoder: 2 in the VAE of Wan 2.2's 5B."""
    return int(vae.get("patch_size") or 1) if kind.is_video else 1


def keep_encoder(vae: Any) -> nn.Module:
    """Return a VAE without what turns latents back into images, which is more than half of its weights."""
    vae.decoder = None
    if hasattr(vae, "post_quant_conv"):
        vae.post_quant_conv = None
    if hasattr(vae, "bn"):
        # The statistics only: a batch norm also counts batches, in an integer.
        statistics = nn.Module()
        for name in ("running_mean", "running_var"):
            statistics.register_buffer(name, getattr(vae.bn, name))
        vae.bn = statistics
    if VAE_KINDS[type(vae).__name__].normalize is _by_channel:
        # Reciprocals in float32, as diffusers' pipelines multiply by them.
        vae.latents_scale = (1 / np.array(vae.config.latents_std, np.float32)).tolist()
    encoder: nn.Module = vae
    return encoder


def encode_images(vae: Any, pixel_values: Tensor) -> Tensor:
    """Return the latents of images as the transformers of a VAE are trained on: its posterior mean, normalised.

    Args:
        vae: A VAE of diffusers, of one of the kinds.
        pixel_values: Images in [-1, 1], (B, C, H, W), on its device and in its dtype.

    Returns:
        Latents, (B, C, h, w), equal to what diffusers' pipelines make of an image.
    """
    kind = VAE_KINDS[type(vae).__name__]
    if kind.is_video:
        if (side := _patch_size(vae.config, kind)) > 1:
            # Columns come before rows within a patch.
            pixel_values = pixel_unshuffle(pixel_values.mT, side).mT.contiguous()
        # Not by `encode`, which keeps the frames before in the VAE itself, where a second thread would find them: the
        # first frame has none.
        latents = vae.quant_conv(vae.encoder(pixel_values[:, :, None])).chunk(2, dim=1)[0][:, :, 0]
    else:
        encoded = vae.encode(pixel_values)
        # An AutoencoderDC has no distribution.
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return kind.normalize(vae, latents)
