"""Folding: a denoiser at constant timesteps, as the weights of a plain transformer."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..model.configuration_aselect import ASelectConfig
from ..model.denoiser import Denoiser, placement
from ..model.layouts import FoldedLayout, ReadOut, tap_key
from ..selection.distribution import unwrapped
from ..selection.placement import moved
from ..selection.reader import eval_mode
from .families import Fold, fold_dit, fold_flux, fold_lumina2, fold_pixart, fold_sana, fold_sd3
from .layers import State
from .passes import Begin, begin_dit, begin_flux, begin_lumina2, begin_pixart, begin_sana, begin_sd3

# Keyed by the name of diffusers' class. Classes of this package exist twice if a checkpoint's own code is loaded.
FOLDED: dict[str, tuple[Begin, Fold]] = {
    "DiTTransformer2DModel": (begin_dit, fold_dit),
    "PixArtTransformer2DModel": (begin_pixart, fold_pixart),
    "SD3Transformer2DModel": (begin_sd3, fold_sd3),
    "FluxTransformer2DModel": (begin_flux, fold_flux),
    "SanaTransformer2DModel": (begin_sana, fold_sana),
    "Lumina2Transformer2DModel": (begin_lumina2, fold_lumina2),
}


def check_foldable(name: str | None) -> None:
    """Reject a class of transformers that cannot be folded. None is accepted.

    Raises:
        ValueError: If it cannot be folded.
    """
    if name is not None and name not in FOLDED:
        raise ValueError(f"{name} cannot be folded. Supported are {', '.join(FOLDED)}.")


def fold_model(model: Any) -> Any:
    """Return a folded copy of a model. See its `fold`.

    Raises:
        ValueError: If its timestep is not selected, it is already folded, or some weights are not in memory, and as in
            `fold_denoiser`.
    """
    model = unwrapped(model)
    check_foldable((model.config.transformer or {}).get("_class_name"))
    config = copy.deepcopy(model.config)
    config.resolved_timestep()
    if config.folded:
        raise ValueError("This model is already folded. Fold the model it was folded from.")
    if len(config.read_outs()) == 1:  # also written as a list of one
        config = moved(config, [config.resolved_timestep()], config.taps()[0])
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Some weights of this model are not in memory. Load it without offloading to fold it.")
    base = model._base()
    read = list(dict.fromkeys(base.read_outs()))
    if not set(config.read_outs()) <= set(read):
        read = _move_block(config, read)
    layout, weights = fold_denoiser(base.denoiser, config, read)
    if isinstance(config.zeroed_channels, dict):
        kept = config.zeroed_channels.items()
        config.zeroed_channels = {key: channels for key, channels in kept if key in layout.taps}
    config.folded_layout, config.folded = layout.to_dict(), True
    if not model.config.is_selection_in_use():
        config.selection = None
    config.validate()
    return _with_weights(model, config, weights)


def _move_block(config: ASelectConfig, read: list[ReadOut]) -> list[ReadOut]:
    """Set the configuration's block to one that is kept, and return all read-outs.

    A backbone or decoder reads other blocks than the configuration's, which would be kept without use.
    """
    own, block = config.read_outs(), max(block for _, block, _ in read)
    if block < 0:  # the stem alone, which the configuration cannot name
        block = 0
        read = [*read, *((timestep, block, feature) for timestep, _, feature in own)]
    if isinstance(config.zeroed_channels, list) and config.zeroed_channels:
        # The channels still belong to the former block.
        config.zeroed_channels = {tap_key(*config.taps()[0]): config.zeroed_channels}
    config.block = block
    if config.read_out is not None:
        config.read_out = [list(each) for each in dict.fromkeys((t, block, feature) for t, _, feature in own)]
    return list(dict.fromkeys(read))


def _with_weights(model: Any, config: ASelectConfig, weights: State) -> Any:
    """Return a model of a folded configuration: its denoiser with the folded weights, the rest as in the model."""
    with torch.device("meta"):
        folded = type(model)(config)
    prefix = "denoiser." if model is model._base() else f"{model.base_model_prefix}.denoiser."
    others = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(prefix)}
    folded.load_state_dict({**others, **{f"{prefix}{name}": value for name, value in weights.items()}}, assign=True)
    folded._base().freeze()
    return folded.train(model.training)


@torch.no_grad()
def fold_denoiser(denoiser: Denoiser, config: ASelectConfig, read: Sequence[ReadOut]) -> tuple[FoldedLayout, State]:
    """Return the layout and weights of a denoiser that is folded at some timesteps and taps.

    At a constant timestep and label (or prompt) the six modulation vectors of a block are constants. With LN the norm
    without affine, W·((1 + scale)·LN(x) + shift) + b = (W·diag(1 + scale))·LN(x) + (W·shift + b), and
    gate·(W·x + b) = (diag(gate)·W)·x + gate·b. Lumina-Image has scales without shifts, and its gates come after norms,
    whose weights they scale. Query, key and value become one layer. The products are computed in float64 and rounded
    once, to the weights' dtype.

    With several timesteps each would need its own products. Instead all timesteps share W, and LN gets 1 + scale and
    shift as its weight and bias, with one row per timestep. The gates have one row per timestep, too.

    Args:
        denoiser: A denoiser of DiT (or SiT), PixArt, Stable Diffusion 3, FLUX, Sana or Lumina-Image 2.
        config: Its configuration.
        read: Read-outs: integer timestep, block (counted from the first) and feature.

    Returns:
        The layout, and the state dict of the `FoldedTransformer` with this layout.

    Raises:
        ValueError: If the family or one of its layers cannot be folded.
    """
    name = type(denoiser.transformer).__name__
    check_foldable(name)
    begin, fold = FOLDED[name]
    device, dtype = placement(denoiser.patch_embedding)
    height, width = (side // config.vae_scale_factor for side in config.image_height_width)
    timesteps = list(dict.fromkeys(int(timestep) for timestep, _, _ in read))
    taps = tuple(dict.fromkeys(tap_key(block, feature) for _, block, feature in read))
    where = {"timestep": timesteps[0], "others": tuple(timesteps[1:]), "taps": taps}
    with eval_mode(denoiser):
        latents = torch.zeros(1, denoiser.num_channels, height, width, device=device, dtype=dtype)
        steps = [torch.full((1,), timestep, device=device) for timestep in timesteps]
        starts = [begin(denoiser, latents, each) for each in steps]
        layout, weights = fold(denoiser, config, starts, where)
        # Weights are rounded one by one, because all of them in float64 would take twice the model's memory.
        return layout, {name: value.to(device, dtype, copy=True).contiguous() for name, value in weights}
