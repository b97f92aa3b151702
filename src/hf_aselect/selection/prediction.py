"""What a diffusion transformer predicts, run to its end: by this it generates. Models that read features never do."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from ..model.denoiser import Pass, SteppedDenoiser


def predict(denoiser: Any, noised_latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Return what a transformer predicts, running all of it: what its scheduler's `prediction_type` says.

    For flow matching that is the velocity from the image to the noise, whichever way the family itself points. A
    learned variance, where there is one, is left out. Call it in eval mode: in train mode diffusers' DiT replaces one
    label in ten by the null label, at random.

    Args:
        denoiser: The transformer.
        noised_latents: Noised latents, (B, C, h, w).
        timesteps: Timesteps in [0, 1000], (B,).
        labels: Class indices in [0, `num_classes`), or `num_classes` for the null label, (B,); of no use to a
            text-conditioned transformer, which always has the empty prompt.

    Returns:
        The prediction, (B, C, h, w).
    """
    finish = _FINISH.get(type(denoiser.transformer).__name__)
    if finish is None:
        prediction: Tensor = denoiser.predict(noised_latents, timesteps, labels)
        return prediction
    state = denoiser.begin(noised_latents, timesteps, labels)
    for block in denoiser.blocks:
        denoiser.advance(state, block)
    return finish(denoiser, state)


def _finish_dit(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    """Return the prediction of a DiT or SiT.

    Source: diffusers, `models/transformers/dit_transformer_2d.py`, `forward`.
    """
    transformer, hidden_states = denoiser.transformer, state.hidden_states
    embedding = transformer.transformer_blocks[0].norm1.emb
    condition = embedding(*state.condition, hidden_dtype=hidden_states.dtype)
    shift, scale = transformer.proj_out_1(silu(condition)).chunk(2, dim=1)
    hidden_states = transformer.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
    prediction = _unpatchify(denoiser, transformer.proj_out_2(hidden_states), state)
    return -prediction if denoiser.timestep_embedding == "sit" else prediction


def _finish_pixart(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    transformer = denoiser.transformer
    shift, scale = (transformer.scale_shift_table[None] + state.output_condition[:, None]).chunk(2, dim=1)
    hidden_states = transformer.norm_out(state.hidden_states) * (1 + scale) + shift
    return _unpatchify(denoiser, transformer.proj_out(hidden_states), state)


def _finish_sd3(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    transformer = denoiser.transformer
    patches = transformer.proj_out(transformer.norm_out(state.hidden_states, state.condition))
    return _unpatchify(denoiser, patches, state)


def _finish_flux(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    transformer = denoiser.transformer
    patches = transformer.proj_out(transformer.norm_out(state.hidden_states, state.condition))  # (B, N, 4C)
    grid = patches.unflatten(-1, (-1, 2, 2)).unflatten(1, (state.rows, state.columns))
    image: Tensor = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return image


def _finish_sana(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    transformer = denoiser.transformer
    hidden_states = transformer.norm_out(state.hidden_states, state.output_condition, transformer.scale_shift_table)
    return _unpatchify(denoiser, transformer.proj_out(hidden_states), state)


def _finish_lumina2(denoiser: SteppedDenoiser, state: Pass) -> Tensor:
    patches = denoiser.transformer.norm_out(denoiser.tokens_of(state), state.condition)
    return -_unpatchify(denoiser, patches, state)


def _unpatchify(denoiser: SteppedDenoiser, patches: Tensor, state: Pass) -> Tensor:
    """Return the image, (B, C, h, w), of the tokens' patches, (B, N, p · p · C) with channels last.

    Channels beyond those of the latents (a learned variance) are left out.
    """
    side = denoiser.patch_size
    grid = patches.unflatten(-1, (side, side, -1))[..., : denoiser.num_channels]
    grid = grid.unflatten(1, (state.rows, state.columns))  # (B, rows, columns, p, p, C)
    image: Tensor = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return image


# By the name of diffusers' class: where a checkpoint's own code runs, our classes are there twice.
_FINISH: dict[str, Callable[[SteppedDenoiser, Pass], Tensor]] = {
    "DiTTransformer2DModel": _finish_dit,
    "PixArtTransformer2DModel": _finish_pixart,
    "SD3Transformer2DModel": _finish_sd3,
    "FluxTransformer2DModel": _finish_flux,
    "SanaTransformer2DModel": _finish_sana,
    "Lumina2Transformer2DModel": _finish_lumina2,
}
