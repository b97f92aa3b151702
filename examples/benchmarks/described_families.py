"""How long reading a family by its description takes, against a plain loop over its blocks.

    python examples/benchmarks/described_families.py --output described_families.json

A description is read by hooks on diffusers' own call, which ends at the last tap. The loops below are what one would
write by hand for a single family: what comes before the blocks, and the blocks as far as the tap. Both have the same
random weights and read the same latents, in turns and in one process, and their tokens are equal to the bit. The time
is that of the processor: other programs may use the machine, too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from hf_aselect import ASelectConfig, DiTModel

TIMESTEP = 141
# Small enough for a laptop, and large enough that a pass takes a tenth of a second.
HEADS = {"num_attention_heads": 8, "attention_head_dim": 32}
SIZES = {
    "DiTTransformer2DModel": {**HEADS, "num_layers": 16},
    "SD3Transformer2DModel": {**HEADS, "num_layers": 16, "caption_projection_dim": 256},
    "PixArtTransformer2DModel": {**HEADS, "num_layers": 16, "caption_channels": 256, "cross_attention_dim": 256,
                                 "use_additional_conditions": False},
    "FluxTransformer2DModel": {**HEADS, "num_layers": 7, "num_single_layers": 14, "axes_dims_rope": (8, 12, 12)},
}  # fmt: skip
# Of the empty prompt's embeddings, by name: the field of the configuration that says how wide they are.
POOLED = {"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"}
PROMPTS = {
    "DiTTransformer2DModel": {},
    "SD3Transformer2DModel": POOLED,
    "PixArtTransformer2DModel": {"prompt_embeds": "caption_channels"},
    "FluxTransformer2DModel": POOLED,
}


def loop_dit(transformer: Any, latents: torch.Tensor, timesteps: torch.Tensor, prompt: Any, last: int) -> Any:
    """DiT's blocks, with the null label."""
    hidden_states = transformer.pos_embed(latents)
    labels = torch.full(timesteps.shape, transformer.config.num_embeds_ada_norm)
    for block in transformer.transformer_blocks[: last + 1]:
        hidden_states = block(hidden_states, timestep=timesteps, class_labels=labels)
    return hidden_states


def loop_sd3(transformer: Any, latents: torch.Tensor, timesteps: torch.Tensor, prompt: Any, last: int) -> Any:
    """The blocks of Stable Diffusion 3, of two streams."""
    hidden_states = transformer.pos_embed(latents).contiguous()
    condition = transformer.time_text_embed(timesteps, prompt["pooled_prompt_embeds"])
    context = transformer.context_embedder(prompt["prompt_embeds"])
    for block in transformer.transformer_blocks[: last + 1]:
        context, hidden_states = block(hidden_states, context, condition)
    return hidden_states


def loop_pixart(transformer: Any, latents: torch.Tensor, timesteps: torch.Tensor, prompt: Any, last: int) -> Any:
    """PixArt's blocks, which share one modulation."""
    hidden_states = transformer.pos_embed(latents)
    sizes = {"resolution": None, "aspect_ratio": None}
    condition, _ = transformer.adaln_single(timesteps, sizes, len(latents), hidden_dtype=hidden_states.dtype)
    context = transformer.caption_projection(prompt["prompt_embeds"])
    for block in transformer.transformer_blocks[: last + 1]:
        hidden_states = block(hidden_states, encoder_hidden_states=context, timestep=condition)
    return hidden_states


def loop_flux(transformer: Any, latents: torch.Tensor, timesteps: torch.Tensor, prompt: Any, last: int) -> Any:
    """FLUX's blocks of two streams, then those of one; 2 × 2 latents are a token."""
    size, rows, columns = len(latents), latents.shape[-2] // 2, latents.shape[-1] // 2
    packed = diffusers.FluxPipeline._pack_latents(latents, size, latents.shape[1], 2 * rows, 2 * columns)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(size, rows, columns, "cpu", torch.float32)
    hidden_states = transformer.x_embedder(packed)
    condition = transformer.time_text_embed(timesteps, prompt["pooled_prompt_embeds"])
    context = transformer.context_embedder(prompt["prompt_embeds"])
    rotary = transformer.pos_embed(torch.cat([torch.zeros(context.shape[1], 3), places]))
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks[: last + 1]:
        context, hidden_states = block(hidden_states, context, condition, rotary)
    return hidden_states


LOOPS = {
    "DiTTransformer2DModel": loop_dit,
    "SD3Transformer2DModel": loop_sd3,
    "PixArtTransformer2DModel": loop_pixart,
    "FluxTransformer2DModel": loop_flux,
}


def build(name: str) -> tuple[DiTModel, Any]:
    """Return a model with random weights, and diffusers' transformer with the same."""
    transformer = getattr(diffusers, name)(**SIZES[name])
    config = dict(transformer.config)
    shapes = {
        part: [1, config[field]] if part.startswith("pooled") else [1, 16, config[field]]
        for part, field in PROMPTS[name].items()
    }
    fields = {"transformer": {**config, "_class_name": name}, "prompt_shapes": shapes or None}
    model = DiTModel(ASelectConfig(**fields, timestep=TIMESTEP, feature="hidden")).eval()
    for part, shape in shapes.items():
        getattr(model.denoiser, part).copy_(torch.randn(shape))
    transformer.load_state_dict(model.denoiser.transformer.state_dict())
    return model, transformer.eval()


@torch.no_grad()
def measure(name: str, num_reads: int, side: int) -> dict[str, float]:
    """Return the median seconds of one core for one read in each way, and their ratio."""
    model, transformer = build(name)
    latents = torch.randn(1, model.config.layout.num_channels, side, side)
    tap = (model.config.block_index(), "hidden")
    prompt = {part: getattr(model.denoiser, part) for part in PROMPTS[name]}
    ways = {
        "loop": lambda: LOOPS[name](transformer, latents, torch.full((1,), TIMESTEP), prompt, tap[0]),
        "described": lambda: model.denoiser.read_taps(latents, TIMESTEP, [tap])[tap],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(num_reads + 1):
        tokens = []
        for way, read in ways.items():
            start = time.process_time()
            tokens.append(read())
            if number:
                seconds[way].append(time.process_time() - start)
        if not torch.equal(*tokens):
            raise AssertionError(f"The two ways to read a {name} differ.")
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {**median, "ratio": median["described"] / median["loop"]}


def main() -> None:
    """Measure all families, print the ratios and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-reads", type=int, default=20)
    parser.add_argument("--side", type=int, default=32, help="latents a side")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {name: measure(name, options.num_reads, options.side) for name in LOOPS}
    for name, figures in found.items():
        print(f"{name}: {figures['loop']:.4f} s by a loop, {figures['ratio']:.3f} of it described")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
