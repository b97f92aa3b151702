"""The empty prompt's embeddings, which text-conditioned transformers are read with: computed once, then kept."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.checks import read_json
from ..model.families import FAMILIES
from .weight_files import MODEL_INDEX, is_listed, weight_files

# What the text encoders and tokenizers of all pipelines are called.
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
# Encoders of a prompt get diffusers' pipeline and the configuration of its transformer.
Encode = Callable[[Any, dict[str, Any]], dict[str, Tensor]]


def _sd3(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    prompt, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def _flux(pipeline: Any, transformer: dict[str, Any]) -> dict[str, Tensor]:
    # The padding is attended to, so its length matters: FLUX.1-schnell, which has no guidance, was trained with 256
    # tokens, FLUX.1-dev with 512 (black-forest-labs/flux, `flux/util.py`, `load_t5`).
    length = 512 if transformer.get("guidance_embeds") else 256
    prompt, pooled, _ = pipeline.encode_prompt("", "", max_sequence_length=length)
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}


def _masked(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # The negative prompt: no instruction or system prompt stands before it, as in the guidance of the pipelines.
    _, _, prompt, mask = pipeline.encode_prompt("", do_classifier_free_guidance=True, negative_prompt="")
    return {"prompt_embeds": _kept(prompt, mask)}


def _kept(prompt: Tensor, mask: Tensor | None) -> Tensor:
    """Return the embeddings that a transformer attends to: it does to no others, so they need not be stored."""
    return prompt if mask is None else prompt[:, mask[0].bool()]


def _whole(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # These transformers attend to the padding, too.
    return {"prompt_embeds": pipeline.encode_prompt("")[0]}


def _zimage(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # A list, of what is not padding.
    return {"prompt_embeds": pipeline.encode_prompt("", do_classifier_free_guidance=False)[0][0][None]}


def _qwen_image(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    return {"prompt_embeds": _kept(*pipeline.encode_prompt(""))}


def _chroma(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # The mask keeps one token of padding, as Chroma was trained with. diffusers 0.42 adds it to the attention scores,
    # by mistake (huggingface/diffusers, issue 13619), and what it is to hide is attended to. Here it is hidden.
    prompt, _, mask, *_ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    return {"prompt_embeds": _kept(prompt, mask)}


def _positive(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    prompt, mask, *_ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    return {"prompt_embeds": _kept(prompt, mask)}


def _prx(pipeline: Any, transformer: dict[str, Any]) -> dict[str, Tensor]:
    # Cleaning needs ftfy, and there is nothing to clean.
    pipeline.text_preprocessor.clean_text = str
    return _positive(pipeline, transformer)


def _hunyuan_dit(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # Whole: what a mask hides is replaced by weights of the transformer, and T5's embeddings are pooled with padding.
    found: dict[str, Tensor] = {}
    for index, suffix in enumerate(("", "_2")):
        prompt, _, mask, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, text_encoder_index=index)
        found |= {f"prompt_embeds{suffix}": prompt, f"prompt_mask{suffix}": mask}
    return found


def _wan(pipeline: Any, _: dict[str, Any]) -> dict[str, Tensor]:
    # As the pipeline calls it; the zeros that the embeddings are padded with are attended to.
    prompt, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=512)
    return {"prompt_embeds": prompt}


# By the transformer's class: diffusers' pipeline that encodes a prompt for it, and how. The names are those of the
# family's `prompt_fields`.
_ENCODERS: dict[str, tuple[str, Encode]] = {
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", _sd3),
    "PixArtTransformer2DModel": ("PixArtSigmaPipeline", _masked),
    "FluxTransformer2DModel": ("FluxPipeline", _flux),
    "SanaTransformer2DModel": ("SanaPipeline", _masked),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", _masked),
    "Flux2Transformer2DModel": ("Flux2KleinPipeline", _whole),
    "ZImageTransformer2DModel": ("ZImagePipeline", _zimage),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", _qwen_image),
    "ChromaTransformer2DModel": ("ChromaPipeline", _chroma),
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline", _whole),
    "CogView4Transformer2DModel": ("CogView4Pipeline", _whole),
    "HunyuanDiT2DModel": ("HunyuanDiTPipeline", _hunyuan_dit),
    "LuminaNextDiT2DModel": ("LuminaPipeline", _positive),
    "PRXTransformer2DModel": ("PRXPipeline", _prx),
    "LongCatImageTransformer2DModel": ("LongCatImagePipeline", _whole),
    "WanTransformer3DModel": ("WanPipeline", _wan),
}


def _encoder_of(transformer: str) -> tuple[str, Encode] | None:
    """Return diffusers' pipeline that encodes a prompt for a class of transformers, and how; None if none is known."""
    if transformer in _ENCODERS:
        return _ENCODERS[transformer]
    family = FAMILIES.get(transformer)
    return None if family is None or family.encode_prompt is None else (family.pipeline, family.encode_prompt)


# What diffusers puts zeros in place of.
_OPTIONAL = {"SD3Transformer2DModel": ("text_encoder_3", "tokenizer_3")}
_UNREADABLE = (
    "The text encoders in {folder!r} could not be loaded to encode the empty prompt ({error}). Download or save "
    "the pipeline again, or install the tokenizers of T5 and Gemma: `pip install sentencepiece protobuf`."
)


def text_parts(transformer: str, without: Iterable[str] = ()) -> tuple[str, ...]:
    """Return which parts of the text side are needed of a pipeline that has them.

    Args:
        transformer: Class of the transformer.
        without: Parts to do without: `text_encoder_3` and `tokenizer_3` of Stable Diffusion 3, either or both.

    Raises:
        ValueError: If one of them cannot be done without.
    """
    without = tuple(without)
    optional = _OPTIONAL.get(transformer, ())
    if needed := sorted(set(without) - set(optional)):
        raise ValueError(
            f"{', '.join(needed)} of a {transformer} must be loaded and cannot be None. Parts that can be left out: "
            f"{', '.join(optional) or 'none'}."
        )
    if _encoder_of(transformer) is None:
        return ()
    return tuple(part for part in TEXT_PARTS if not (without and part in optional))


@torch.no_grad()
def encode_empty_prompt(
    folder: str | os.PathLike[str],
    transformer: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    without: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return the embeddings of the empty prompt, as the pipeline in a folder makes them.

    Its text encoders are loaded, one beside the other, and dropped; neither transformer nor VAE is.

    Args:
        folder: A pipeline that diffusers saved.
        transformer: diffusers' configuration of its transformer, with `_class_name`.
        dtype: What the embeddings are in. The text encoders compute in it, too, but for float16, where Gemma and T5
            overflow: they compute in bfloat16 then.
        variant: Variant of their weights; those that have none of it are read without.
        without: Parts of the text side to do without: `text_encoder_3` and `tokenizer_3` of Stable Diffusion 3, either
            or both; diffusers then puts zeros in place of T5's embeddings.

    Returns:
        Embeddings by name, on the CPU: `prompt_embeds` (1, L, C), and `pooled_prompt_embeds` (1, C) where the
        transformer has them. Where the pipeline masks the padding, L counts what is not padding. HunyuanDiT has
        `prompt_embeds_2` (1, L, C) of a second encoder, and masks of both, `prompt_mask` and `prompt_mask_2` (1, L).

    Raises:
        ValueError: If a part is missing, broken or pickled, needs a package that is not installed, or cannot be done
            without; or if embeddings are NaN or infinite.
    """
    kind = transformer["_class_name"]
    if (encoder := _encoder_of(kind)) is None:
        raise ValueError(
            f"The description of {kind} has no `pipeline` and `encode_prompt`. Pass the empty prompt's embeddings as "
            "a dictionary, `prompt_embeds=`."
        )
    name, encode = encoder
    wanted = text_parts(kind, without)
    # diffusers takes seconds to import, and only a conversion needs it.
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"A {kind} needs diffusers: pip install diffusers") from error

    folder = Path(folder)
    if kind == "Flux2Transformer2DModel" and transformer.get("guidance_embeds"):
        raise ValueError(
            f"{str(folder)!r} is a FLUX.2 with `guidance_embeds`, such as FLUX.2 [dev], which encodes prompts "
            "differently from FLUX.2 [klein]. Pass the output of its pipeline's `encode_prompt` for an empty prompt "
            "as a dictionary, `prompt_embeds=`."
        )
    present = [part for part in wanted if (folder / part).is_dir()]
    if not any(part.startswith("text_encoder") for part in present):
        raise ValueError(
            f"{str(folder)!r} has no text encoder, but a {kind} is conditioned on text. Load the whole pipeline, or "
            "pass the empty prompt's embeddings as a dictionary, `prompt_embeds=`."
        )
    with torch.device("meta"):
        # Some pipelines ask it for sizes.
        own: Any = FAMILIES[kind].transformer_class if kind in FAMILIES else None
        stand_in = (own or getattr(diffusers, kind)).from_config(transformer)
    try:
        pipeline_class = getattr(diffusers, name)
    except (AttributeError, RuntimeError) as error:  # another version lacks it, or it does not import
        raise ValueError(
            f"diffusers {diffusers.__version__} has no {name}, which encodes prompts for {kind} ({error}). Upgrade "
            "it (pip install -U diffusers), or pass the empty prompt's embeddings as a dictionary, "
            "`prompt_embeds=`."
        ) from error
    known = inspect.signature(pipeline_class.__init__).parameters
    index = read_json(folder / MODEL_INDEX)
    _refuse_other_code(folder, index, known)
    # What the prompt is not encoded with is not loaded: safety checkers, processors of images.
    absent = {
        part: None
        for part, parameter in known.items()
        if part not in ("self", "transformer", *present)
        and (part in TEXT_PARTS or is_listed(index, part) or parameter.default is inspect.Parameter.empty)
    }
    computed_in = torch.bfloat16 if dtype == torch.float16 else dtype
    encoders = {
        part: _load_encoder(folder, part, index, present, variant, computed_in)
        for part in present
        if part.startswith("text_encoder")
    }
    try:
        pipeline = pipeline_class.from_pretrained(
            folder, transformer=stand_in, local_files_only=True, **absent, **encoders
        )
        embeddings = encode(pipeline, transformer)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(_UNREADABLE.format(folder=str(folder), error=error)) from error
    return checked_embeddings(embeddings, kind, dtype)


def _refuse_other_code(folder: str | os.PathLike[str], index: dict[str, Any], known: Iterable[str]) -> None:
    """Reject an index that has diffusers import more than itself and transformers.

    diffusers imports whatever module an index names for a part, and looks for code in the pipeline's folder.

    Raises:
        ValueError: If it names anything else.
    """
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{MODEL_INDEX} in {str(folder)!r} must name a pipeline of diffusers as `_class_name`, got "
            f"{index.get('_class_name')!r}. Custom pipeline code is never run."
        )
    for part in known:
        if _is_named(index.get(part)) and index[part][0] not in ("diffusers", "transformers"):
            raise ValueError(
                f"{MODEL_INDEX} in {str(folder)!r} loads {part} from {index[part][0]!r}, but only classes of "
                "diffusers and transformers are supported. Pass the empty prompt's embeddings as a dictionary, "
                "`prompt_embeds=`."
            )


def _is_named(component: Any) -> bool:
    """Return whether a part's entry in the index of a pipeline names library and class."""
    return isinstance(component, list) and len(component) == 2 and all(isinstance(name, str) for name in component)


def _load_encoder(
    folder: Path, part: str, index: dict[str, Any], present: list[str], variant: str | None, dtype: torch.dtype
) -> Any:
    """Return a text encoder of a pipeline, in the variant where there are weights of it.

    Raises:
        ValueError: If it has no tokenizer beside it, is not in the index, pickled, broken or incomplete.
    """
    # Its models take seconds to import, and only a conversion needs them.
    import transformers

    tokenizer = part.replace("text_encoder", "tokenizer")
    if tokenizer not in present or not _is_named(index.get(part)):
        raise ValueError(
            f"{str(folder)!r} has {part}/ but no {tokenizer}/, or {MODEL_INDEX} does not list {part}. Download or "
            "save the pipeline again, or pass `prompt_embeds=`."
        )
    # Rejects pickles, which diffusers would load.
    files = weight_files(folder / part, variant, fall_back=True)
    has_variant = variant is not None and any(variant in path.name for path in files)
    kind = getattr(transformers, index[part][1], None)
    return _load_whole(kind, folder / part, variant if has_variant else None, dtype)


def _load_whole(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Return a model of transformers from a folder that has all of its weights.

    Raises:
        ValueError: If it cannot be loaded, or a weight is missing.
    """
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ImportError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(_UNREADABLE.format(folder=str(folder), error=error)) from error
    if missing := sorted(info["missing_keys"]):
        # transformers gives them new weights, and the embeddings would be random.
        lacking = f"{len(missing)} of its weights are missing, among them {missing[:3]}"
        raise ValueError(_UNREADABLE.format(folder=str(folder), error=lacking))
    return model


def checked_embeddings(embeddings: Any, transformer: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the empty prompt's embeddings in a dtype, on the CPU.

    Args:
        embeddings: Tensors by name.
        transformer: Class of the transformer that they are for.
        dtype: What to return them in.

    Raises:
        ValueError: If that is not a mapping of names to tensors, or values are NaN or infinite, or so in `dtype`.
    """
    if not isinstance(embeddings, Mapping) or not all(isinstance(value, Tensor) for value in embeddings.values()):
        raise ValueError(
            f"`prompt_embeds` of a {transformer} must be a dictionary of tensors: `prompt_embeds` (1, L, C) and, for "
            f"some transformers, `pooled_prompt_embeds` (1, C), got {type(embeddings).__name__}."
        )
    checked = {name: value.detach().to("cpu", dtype).contiguous() for name, value in embeddings.items()}
    if broken := [name for name, value in checked.items() if not bool(value.isfinite().all())]:
        raise ValueError(
            f"The empty prompt's embeddings for {transformer} ({', '.join(broken)}) have NaN or infinite values in "
            f"{str(dtype).removeprefix('torch.')}. Pass `dtype='bfloat16'` or 'float32', which have a wider range, "
            "or check the weights of the text encoders."
        )
    return checked
