"""The inputs of a transformer's first block, for the families that can be folded.

A denoiser is read by hooks on diffusers' own call. Folding needs the values that this call computes before the first
block, so those steps are repeated here. `tests/test_folding.py` checks that both are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.denoiser import grid_of


@dataclass
class Pass:
    """The inputs of the first block.

    Args:
        hidden_states: Tokens, (B, N, D): the image's, or, where there is one stream, text and image.
        rows: Rows of the token grid.
        columns: Its columns.
        condition: Conditioning that modulates the blocks.
        context: Tokens of the text, (B, L, D), where there are any.
        rotary: Rotary position embeddings, where there are any.
    """

    hidden_states: Tensor
    rows: int
    columns: int
    condition: Any
    context: Tensor | None = None
    rotary: Any = None


# Of a denoiser, noised latents, (B, C, h, w), and timesteps in [0, 1000), (B,), with the null label or empty prompt.
Begin = Callable[[Any, Tensor, Tensor], Pass]


def begin_dit(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a DiT or SiT: tokens, timesteps and labels.

    Source: diffusers, `models/transformers/dit_transformer_2d.py`.
    """
    rows, columns = grid_of(noised_latents, denoiser.patch_size)
    labels = torch.full(timesteps.shape, denoiser.num_classes, device=timesteps.device)
    if denoiser.timestep_embedding in ("sit", "repa"):
        timesteps = timesteps / 1000
        timesteps = 1 - timesteps if denoiser.timestep_embedding == "sit" else timesteps
    return Pass(denoiser.transformer.pos_embed(noised_latents), rows, columns, (timesteps, labels))


def begin_pixart(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a PixArt; all blocks share one modulation.

    Source: diffusers, `models/transformers/pixart_transformer_2d.py`.
    """
    transformer, size = denoiser.transformer, noised_latents.shape[0]
    rows, columns = grid_of(noised_latents, denoiser.patch_size)
    hidden_states = transformer.pos_embed(noised_latents)
    height, width = (side * denoiser.vae_scale_factor for side in noised_latents.shape[-2:])
    added = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:
        resolution = hidden_states.new_tensor([float(height), float(width)])
        aspect_ratio = hidden_states.new_tensor([height / width])
        added = {"resolution": resolution.expand(size, -1), "aspect_ratio": aspect_ratio.expand(size, -1)}
    condition, _ = transformer.adaln_single(timesteps, added, batch_size=size, hidden_dtype=hidden_states.dtype)
    context = denoiser.prompt_embeds.expand(size, -1, -1)
    if transformer.caption_projection is not None:
        context = transformer.caption_projection(context)
    return Pass(hidden_states, rows, columns, condition, context=context)


def begin_sd3(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a Stable Diffusion 3.

    Source: diffusers, `models/transformers/transformer_sd3.py`.
    """
    transformer, size = denoiser.transformer, noised_latents.shape[0]
    rows, columns = grid_of(noised_latents, denoiser.patch_size)
    return Pass(
        transformer.pos_embed(noised_latents).contiguous(),
        rows,
        columns,
        transformer.time_text_embed(timesteps, denoiser.pooled_prompt_embeds.expand(size, -1)),
        context=transformer.context_embedder(denoiser.prompt_embeds.expand(size, -1, -1)),
    )


def begin_flux(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a FLUX.1, with latents packed 2 × 2 as in diffusers' pipeline.

    Source: diffusers, `models/transformers/transformer_flux.py` and `pipelines/flux/pipeline_flux.py`.
    """
    transformer, size, device = denoiser.transformer, noised_latents.shape[0], noised_latents.device
    rows, columns = grid_of(noised_latents, 2)
    packed = noised_latents.unflatten(-1, (columns, 2)).unflatten(2, (rows, 2))  # (B, C, rows, 2, columns, 2)
    packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 4C)
    # Not by diffusers' way over t/1000 in the model's dtype, which loses the timestep's last digits in half precision.
    condition = [timesteps.float()]
    if transformer.config.guidance_embeds:
        condition.append(torch.full_like(condition[0], 1000 * denoiser.guidance))
    prompt = denoiser.prompt_embeds.expand(size, -1, -1)
    places = torch.zeros(prompt.shape[1] + rows * columns, 3, device=device)
    grid = places[prompt.shape[1] :].unflatten(0, (rows, columns))
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return Pass(
        transformer.x_embedder(packed),
        rows,
        columns,
        transformer.time_text_embed(*condition, denoiser.pooled_prompt_embeds.expand(size, -1)),
        context=transformer.context_embedder(prompt),
        rotary=transformer.pos_embed(places),
    )


def begin_sana(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a Sana.

    Source: diffusers, `models/transformers/sana_transformer.py`.
    """
    transformer, size = denoiser.transformer, noised_latents.shape[0]
    rows, columns = grid_of(noised_latents, denoiser.patch_size)
    hidden_states = transformer.patch_embed(noised_latents)
    condition, _ = transformer.time_embed(
        timesteps * transformer.config.timestep_scale, batch_size=size, hidden_dtype=hidden_states.dtype
    )
    context = transformer.caption_projection(denoiser.prompt_embeds.expand(size, -1, -1))
    return Pass(hidden_states, rows, columns, condition, context=transformer.caption_norm(context))


def begin_lumina2(denoiser: Any, noised_latents: Tensor, timesteps: Tensor) -> Pass:
    """Return the inputs of the first block of a Lumina-Image 2.0: one sequence of refined text and image tokens.

    Source: diffusers, `models/transformers/transformer_lumina2.py`.
    """
    transformer, size = denoiser.transformer, noised_latents.shape[0]
    rows, columns = grid_of(noised_latents, denoiser.patch_size)
    prompt = denoiser.prompt_embeds.expand(size, -1, -1)
    condition, context = transformer.time_caption_embed(noised_latents, 1 - timesteps / 1000, prompt)
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    patches, text_rotary, image_rotary, rotary, _, _ = transformer.rope_embedder(noised_latents, mask)
    hidden_states = transformer.x_embedder(patches)
    for layer in transformer.context_refiner:
        context = layer(context, mask, text_rotary)
    for layer in transformer.noise_refiner:
        hidden_states = layer(hidden_states, None, image_rotary, condition)
    return Pass(torch.cat([context, hidden_states], dim=1), rows, columns, condition, rotary=rotary)
