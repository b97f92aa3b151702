"""How long a described family takes to read, against the same one written by hand.

    python examples/benchmarks/described_families.py --output described_families.json

Six families are written by hand in the package, as folding needs their parts. Here they are described as well, as a
user describes a family, and registered under names of their own. Both forms get the same random weights and read the
same latents, in turns and in one process. The time is that of the processor: other programs may use the machine, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from hf_aselect import (
    ASelectConfig,
    DiTModel,
    TransformerBlocks,
    TransformerFamily,
    register_family,
    transformer_layout,
)

PLAIN = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
FLUX = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "num_single_layers")
TEXT = {"prompt_embeds": "caption_channels"}
POOLED = {"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"}


def with_text(inputs: Any, **given: Any) -> dict[str, Any]:
    """What most transformers are called with."""
    return {"hidden_states": inputs.latents, "encoder_hidden_states": inputs.text, **given}


def call_flux(inputs: Any) -> dict[str, Any]:
    """FLUX.1's call; timesteps and guidance in thousandths."""
    packed = {"hidden_states": inputs.packed(), "encoder_hidden_states": inputs.text, "timestep": inputs.sigmas}
    if inputs.transformer.config.guidance_embeds:
        packed["guidance"] = torch.full_like(inputs.sigmas, inputs.guidance)
    places = {"img_ids": inputs.places(), "txt_ids": inputs.places()[:1].repeat(inputs.text.shape[1], 1)}
    return {**packed, **places, "pooled_projections": inputs.prompt["pooled_prompt_embeds"]}


def call_pixart(inputs: Any) -> dict[str, Any]:
    """PixArt's call; PixArt-alpha at 1024 pixels looks at the image's size, too."""
    sizes = {"resolution": None, "aspect_ratio": None}
    if inputs.transformer.use_additional_conditions:
        sizes = {"resolution": inputs.image_size, "aspect_ratio": inputs.image_size[:, :1] / inputs.image_size[:, 1:]}
    return with_text(inputs, timestep=inputs.timesteps, added_cond_kwargs=sizes)


def call_sana(inputs: Any) -> dict[str, Any]:
    """Sana's call."""
    return with_text(inputs, timestep=inputs.timesteps * inputs.transformer.config.timestep_scale)


def flux_layout(config: Mapping[str, Any]) -> Any:
    """FLUX.1's sizes: 2 × 2 latents are packed into a token."""
    depth = {"num_layers": config["num_layers"] + config["num_single_layers"]}
    packed = {"num_channels": config["in_channels"] // 4, "patch_size": 2, "sample_size": 128}
    return transformer_layout(config, **depth, **packed, num_attention_outputs=config["num_layers"])


def lumina_layout(config: Mapping[str, Any]) -> Any:
    """Lumina-Image 2.0's sizes: several heads share keys and values."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    shared = width // heads * (config["num_kv_heads"] or heads)
    return transformer_layout(config, hidden_size=width, key_value_size=shared)


CROSS = (TransformerBlocks(attention="attn1"),)
SINGLE = TransformerBlocks("single_transformer_blocks", hidden=1)
# By diffusers' class: sizes, layout, call, blocks, and the other fields of the description.
DESCRIPTIONS = {
    "DiTTransformer2DModel": (
        PLAIN,
        lambda config: transformer_layout(config, needs_prompt=False),
        lambda inputs: {
            "hidden_states": inputs.latents,
            "timestep": inputs.timesteps.long(),
            "class_labels": inputs.labels,
        },
        CROSS,
        {"num_classes": "num_embeds_ada_norm", "patch_embedding": "pos_embed"},
    ),
    "SD3Transformer2DModel": (
        PLAIN,
        transformer_layout,
        lambda inputs: with_text(
            inputs, timestep=inputs.timesteps, pooled_projections=inputs.prompt["pooled_prompt_embeds"]
        ),
        (TransformerBlocks(hidden=1),),
        {"prompt_fields": POOLED, "patch_embedding": "pos_embed"},
    ),
    "PixArtTransformer2DModel": (
        PLAIN,
        transformer_layout,
        call_pixart,
        CROSS,
        {"prompt_fields": TEXT, "patch_embedding": "pos_embed"},
    ),
    "FluxTransformer2DModel": (
        FLUX,
        flux_layout,
        call_flux,
        (TransformerBlocks(hidden=1), SINGLE),
        {"prompt_fields": POOLED, "timestep_modules": {"time_text_embed.time_proj": 1}},
    ),
    "SanaTransformer2DModel": (
        PLAIN,
        transformer_layout,
        call_sana,
        CROSS,
        {"prompt_fields": TEXT, "patch_embedding": "patch_embed"},
    ),
    "Lumina2Transformer2DModel": (
        ("hidden_size", "num_attention_heads", "in_channels", "num_layers", "sample_size", "patch_size"),
        lumina_layout,
        lambda inputs: with_text(
            inputs,
            timestep=1 - inputs.timesteps / 1000,
            encoder_attention_mask=torch.ones(inputs.text.shape[:2], dtype=torch.long),
        ),
        (TransformerBlocks("layers"),),
        {"prompt_fields": {"prompt_embeds": "cap_feat_dim"}},
    ),
}
# Small enough for a laptop, and large enough that a pass takes a tenth of a second.
HEADS = {"num_attention_heads": 8, "attention_head_dim": 32}
SIZES = {
    "DiTTransformer2DModel": {**HEADS, "num_layers": 16},
    "SD3Transformer2DModel": {**HEADS, "num_layers": 16, "caption_projection_dim": 256},
    "PixArtTransformer2DModel": {**HEADS, "num_layers": 16, "caption_channels": 256, "cross_attention_dim": 256,
                                 "use_additional_conditions": False},
    "FluxTransformer2DModel": {**HEADS, "num_layers": 7, "num_single_layers": 14, "axes_dims_rope": (8, 12, 12)},
    "SanaTransformer2DModel": {**HEADS, "num_layers": 16, "cross_attention_dim": 256, "num_cross_attention_heads": 8,
                               "cross_attention_head_dim": 32},
    "Lumina2Transformer2DModel": {"hidden_size": 256, "num_attention_heads": 8, "num_kv_heads": 4, "num_layers": 16,
                                  "axes_dim_rope": (8, 12, 12), "cap_feat_dim": 256},
}  # fmt: skip


def describe(name: str) -> TransformerFamily:
    """Return the description of a family that the package has by hand, under a name of its own."""
    sizes, layout, call, blocks, others = DESCRIPTIONS[name]
    kind = type(f"Described{name}", (getattr(diffusers, name),), {})
    return TransformerFamily(kind.__name__, sizes, layout, call, blocks, **others, transformer_class=kind)


def models(name: str) -> list[DiTModel]:
    """Return both forms of a family, with the same weights."""
    family = describe(name)
    register_family(family)
    config = dict(getattr(diffusers, name)(**SIZES[name]).config)
    shapes = {
        part: [1, config[field]] if part.startswith("pooled") else [1, 16, config[field]]
        for part, field in family.prompt_fields.items()
    }
    made = [
        DiTModel(
            ASelectConfig(transformer={**config, "_class_name": each}, prompt_shapes=shapes or None, timestep=141)
        )
        for each in (name, family.name)
    ]
    made[1].load_state_dict(made[0].state_dict())
    return [model.eval() for model in made]


@torch.no_grad()
def measure(name: str, num_reads: int, side: int) -> dict[str, float]:
    """Return the median seconds of one core for one read by each form, and their ratio."""
    by_hand, described = models(name)
    latents = torch.randn(1, by_hand.config.layout.num_channels, side, side)
    seconds = {"by hand": [], "described": []}
    for number in range(num_reads + 1):
        for which, model in (("by hand", by_hand), ("described", described)):
            start = time.process_time()
            model.extract_features(latents=latents)  # at the default tap
            if number:
                seconds[which].append(time.process_time() - start)
    median = {which: statistics.median(values) for which, values in seconds.items()}
    return {**median, "ratio": median["described"] / median["by hand"]}


def main() -> None:
    """Measure all families, print the ratios and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-reads", type=int, default=20)
    parser.add_argument("--side", type=int, default=32, help="latents a side")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {name: measure(name, options.num_reads, options.side) for name in DESCRIPTIONS}
    for name, figures in found.items():
        print(f"{name}: {figures['by hand']:.4f} s by hand, {figures['ratio']:.3f} of it described")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
