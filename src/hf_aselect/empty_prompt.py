"""The empty prompt's embeddings, which text-conditioned transformers are read with: computed once, then kept."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What the text encoders and tokenizers of all pipelines are called.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def _sd3(pipeline: Any) -> dict[str, Tensor]:  # noqa: ANN401 - diffusers' pipeline
    prompt, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def _flux(pipeline: Any) -> dict[str, Tensor]:  # noqa: ANN401 - diffusers' pipeline
    prompt, pooled, _ = pipeline.encode_prompt("", "")
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def _masked(pipeline: Any) -> dict[str, Tensor]:  # noqa: ANN401 - diffusers' pipeline
    # The negative prompt: no instruction or system prompt stands before it, as in the guidance of the pipelines.
    _, _, prompt, mask = pipeline.encode_prompt("", do_classifier_free_guidance=True, negative_prompt="")
    # The transformers attend to what the mask keeps and to nothing else, so the padding need not be stored.
    return {"prompt_embeds": prompt[:, mask[0].bool()]}


# By the transformer's class: diffusers' pipeline that encodes a prompt for it, and how.
_ENCODERS: dict[str, tuple[str, Callable[[Any], dict[str, Tensor]]]] = {
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", _sd3),
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", _masked),
    "FluxTransformer2DModel": ("FluxPipeline", _flux),
    "SanaTransformer2DModel": ("SanaPipeline", _masked),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", _masked),
}


# What diffusers puts zeros in the place of.
_OPTIONAL = {"SD3Transformer2DModel": ("text_encoder_3", "tokenizer_3")}


@torch.no_grad()
def encode_empty_prompt(
    folder: str | os.PathLike[str],
    transformer: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Return the embeddings of the empty prompt, as the pipeline in a folder makes them.

    Its text encoders are loaded, one beside the other, and dropped; neither transformer nor VAE is.

    Args:
        folder: A pipeline that diffusers saved.
        transformer: diffusers' configuration of its transformer, with `_class_name`.
        dtype: What the text encoders compute in.
        without: Parts of the text side to do without: `text_encoder_3` and `tokenizer_3` of Stable Diffusion 3, either
            or both; diffusers then puts zeros in place of T5's embeddings.

    Returns:
        Embeddings by name, on the CPU: `prompt_embeds` (1, L, C), and `pooled_prompt_embeds` (1, C) where the
        transformer has them. Where the pipeline masks the padding, L counts what is not padding.

    Raises:
        ValueError: If a part is missing or broken, needs a package that is not installed, or cannot be done without.
    """
    if needed := sorted(set(without) - set(_OPTIONAL.get(transformer["_class_name"], ()))):
        optional = ", ".join(_OPTIONAL.get(transformer["_class_name"], ())) or "none"
        raise ValueError(
            f"A {transformer['_class_name']} cannot do without {', '.join(needed)}; what can be left out: {optional}."
        )
    if without:
        without = _OPTIONAL[transformer["_class_name"]]
    # diffusers takes seconds to import, and only a conversion needs its pipelines.
    import diffusers

    name, encode = _ENCODERS[transformer["_class_name"]]
    present = {part for part in TEXT_PARTS if (Path(folder) / part).is_dir()} - set(without)
    if not any(part.startswith("text_encoder") for part in present):
        raise ValueError(
            f"{str(folder)!r} has no text encoder, and a {transformer['_class_name']} is conditioned on a text. Load "
            "the whole pipeline, or pass `prompt_embeds=`, the empty prompt's embeddings by name."
        )
    with torch.device("meta"):
        # Some pipelines ask it for sizes.
        stand_in = getattr(diffusers, transformer["_class_name"]).from_config(transformer)
    pipeline_class = getattr(diffusers, name)
    known = inspect.signature(pipeline_class.__init__).parameters
    given = {part: None for part in TEXT_PARTS if part in known and part not in present}
    try:
        pipeline = pipeline_class.from_pretrained(
            folder, transformer=stand_in, vae=None, scheduler=None, dtype=dtype, local_files_only=True, **given
        )
        embeddings = encode(pipeline)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The text encoders in {str(folder)!r} could not be loaded to encode the empty prompt ({error}). Download "
            "or save the pipeline again; tokenizers of T5 and Gemma may need `pip install sentencepiece protobuf`."
        ) from error
    return {key: value.detach().cpu().contiguous() for key, value in embeddings.items()}
