"""What diffusers saved, read: its configuration as ours, and its weights by our names, one after the other."""

import logging
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.checks import read_json, refuse_other_than_weights
from ..model.configuration_aselect import DDPM_LINEAR, PARTS, ASelectConfig
from ..model.denoisers import build_denoiser, build_vae_encoder
from ..model.families import family_of
from ..model.layouts import record_of
from ..model.noise_schedule import NoiseSchedule, is_flow_matching
from ..model.vae import ENCODER_WEIGHTS
from .empty_prompt import checked_embeddings, encode_empty_prompt, text_parts
from .hub_files import HubOptions, locate
from .research import ResearchWeights, is_port, refuse_kin, research_in
from .saving import weights_of
from .weight_files import (
    CONFIG,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    check_parts,
    iterate_weights,
    transformer_part,
    weight_files,
)

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# How diffusers before 0.17 named the attention of a VAE; it renames them on loading, too.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def find_diffusers(
    source: str | os.PathLike[str],
    options: HubOptions,
    without: str | Iterable[str] = (),
    has_prompt: bool = False,
    check: Callable[[str | None], None] = lambda _: None,
) -> Path | None:
    """Return the folder of a diffusers checkpoint, fetched from the Hub if need be; None for an hf_aselect checkpoint.

    Args:
        source: Local folder, or id on the Hub.
        options: How to fetch.
        without: Parts of the text side to do without, which are not fetched.
        has_prompt: Whether the empty prompt's embeddings are given, so that nothing of the text side is fetched.
        check: Rejects classes of transformers that are of no use, before weights are fetched or read; None stands for
            weights of the research code.

    Raises:
        ValueError: As `hub_files.locate`.
        OSError: As `hub_files.locate`.
    """

    def needed_text(transformer: dict[str, Any], pipeline: str | None) -> tuple[str, ...]:
        name = _class_name(transformer)
        if is_port(name):
            return ()
        refuse_kin(name)
        family_of(name)
        check(name)
        refuse_conditioned(transformer, pipeline)
        return () if has_prompt else text_parts(str(name), names_of(without))

    folder = locate(source, ASelectConfig.model_type, options, needed_text)
    if folder is not None:
        inner = folder / transformer_part(read_json(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else {})
        path = (inner if inner.is_dir() else folder) / CONFIG
        name = _class_name(read_json(path)) if path.is_file() else None
        check(None if is_port(name) else name)
    return folder


def names_of(parts: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the names that a word or several stand for."""
    return (parts,) if isinstance(parts, str) else tuple(parts or ())


def load_diffusers(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    without: str | Iterable[str] = (),
    prompt_embeds: Mapping[str, Tensor] | None = None,
    layout: str | None = None,
    num_attention_heads: int | None = None,
    check_layout: bool = True,
    vae_folder: Path | None = None,
    **fields: Any,
) -> tuple[ASelectConfig, Iterator[tuple[str, Tensor]]]:
    """Read a diffusers transformer, with its scheduler and VAE where they lie beside it.

    Args:
        folder: Folder with `transformer/` and `scheduler/` (and `vae/` for a DiT in latent space), or a bare
            transformer's folder. A bare `DiTTransformer2DModel` is taken for one in pixel space with DiT's own
            schedule; the other families need `scheduler=`. The weights may have the names of the research code.
        variant: Variant of the weights, as "fp16".
        dtype: What the empty prompt's embeddings are in, where the transformer needs them; see `encode_empty_prompt`.
        without: Parts of the text side to do without; see `encode_empty_prompt`.
        prompt_embeds: The empty prompt's embeddings by name, in place of computing them.
        layout: Of weights by the names of the research code, whose they are: see `research.LAYOUTS`.
        num_attention_heads: Of those, heads of a block, where the size is none of the published ones.
        check_layout: Of those, whether to reject a layout that the tensors contradict, or warn of it.
        vae_folder: Folder of a VAE that takes the place of the one beside the transformer.
        fields: Fields of `ASelectConfig` that take the place of what was read. A transformer or VAE of diffusers that
            is given as an object brings its weights along.

    Returns:
        The configuration, and the weights by the names that `DiTModel` gives them, one after the other, in the dtype
        they were saved in. What the transformer has no place for is left out, with a warning.

    Raises:
        ValueError: If a part is missing or broken, the transformer's class is unsupported, or a field is unknown.
    """
    modules = {part: fields[part] for part in PARTS if isinstance(fields.get(part), nn.Module)}
    fields |= {part: record_of(fields[part]) for part in PARTS if part in fields}
    index = read_json(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else {}
    part = transformer_part(index)
    is_bare = not (folder / part).is_dir()
    transformer_folder = folder if is_bare else folder / part
    has_vae = (folder / "vae").is_dir()
    if (weights := research_in(transformer_folder, variant)) is not None:
        check_parts(folder, ("scheduler", "vae"))
        _check_no_prompt("DiTTransformer2DModel", prompt_embeds, names_of(without))
        vae_folder = vae_folder or (folder / "vae" if has_vae else None)
        return load_research(
            weights,
            vae_folder,
            scheduler_beside(folder),
            layout,
            num_attention_heads,
            variant,
            fields,
            check_layout=check_layout,
            vae=modules.get("vae"),
        )
    vae_folder = vae_folder or (folder / "vae" if has_vae and not is_bare else None)
    if layout is not None or num_attention_heads is not None:
        raise ValueError(
            "`layout=` and `num_attention_heads=` are for weights of the DiT, SiT and REPA research code, but "
            f"{str(transformer_folder)!r} has a diffusers checkpoint. Omit them."
        )
    transformer = _read_transformer(transformer_folder)
    name = transformer["_class_name"]
    refuse_conditioned(transformer, index.get("_class_name"))
    text = () if prompt_embeds is not None else text_parts(name, names_of(without))
    check_parts(folder, (part, "scheduler", "vae", *text))
    scheduler = _default_scheduler(folder, transformer, fields) if is_bare else _read_scheduler(folder)
    if part != "transformer":
        scheduler = {**scheduler, "boundary_ratio": index["boundary_ratio"]}
        logger.info(
            "%s has two transformers. Features are read from %s, which was trained for low noise.", folder.name, part
        )
    parts: dict[str, Any] = {"transformer": transformer, "scheduler": scheduler}
    weights_of_transformer: Iterable[tuple[str, Tensor]]
    weights_of_transformer = iterate_weights(weight_files(transformer_folder, variant))
    vae_files = _take_vae(parts, vae_folder, variant)
    config = _config_of(parts, fields)
    # What cannot be built is said so before text encoders are loaded, which takes minutes.
    expected = expected_shapes(config)
    if not config.layout.needs_prompt:
        _check_no_prompt(name, prompt_embeds, names_of(without))
        embeddings = {}
    elif prompt_embeds is None:
        embeddings = encode_empty_prompt(folder, transformer, dtype=dtype, variant=variant, without=names_of(without))
        _note_prompt(config, embeddings)
    else:
        embeddings = checked_embeddings(prompt_embeds, name, dtype)
        _note_prompt(config, embeddings)
    weights_of_vae: Iterable[tuple[str, Tensor]]
    weights_of_vae = iterate_weights(vae_files if config.vae is not None else [])
    if "transformer" in modules:
        weights_of_transformer = weights_of("transformer", modules["transformer"])
    if "vae" in modules:
        weights_of_vae = weights_of("vae", modules["vae"])
    return config, _weights(weights_of_transformer, weights_of_vae, embeddings, expected, folder.name, name)


def load_research(
    weights: ResearchWeights,
    vae_folder: Path | None,
    scheduler: dict[str, Any] | None,
    layout: str | None,
    num_attention_heads: int | None,
    variant: str | None,
    fields: dict[str, Any],
    *,
    check_layout: bool = True,
    vae: nn.Module | None = None,
) -> tuple[ASelectConfig, Iterator[tuple[str, Tensor]]]:
    """Read weights by the names of the research code as a `DiTTransformer2DModel`.

    Args:
        weights: Those of the transformer.
        vae_folder: Folder of a VAE that diffusers saved; None where the model takes latents, or pixels.
        scheduler: Configuration of the scheduler beside the weights; None for that of the layout.
        layout: Whose they are: "dit", "sit" or "repa"; or the field `timestep_embedding` that stands for it.
        num_attention_heads: Heads of a block, where the size is none of the published ones.
        variant: Variant of the VAE's weights.
        fields: Fields of `ASelectConfig` that take the place of what was read.
        check_layout: Whether to reject a layout that the tensors contradict, or warn of it.
        vae: A VAE of diffusers whose configuration is among the fields.

    Returns:
        As `load_diffusers`.

    Raises:
        ValueError: If the layout is not said or the tensors contradict it, sizes are not a DiT's or contradict each
            other, a part is broken, or a field is unknown.
    """
    known = weights.layout(layout, fields.get("timestep_embedding"), is_checked=check_layout)
    parts = {
        "transformer": weights.transformer(num_attention_heads),
        "scheduler": weights.scheduler(known, scheduler),
    }
    vae_files = _take_vae(parts, vae_folder, variant)
    config = _config_of(parts, {**fields, "timestep_embedding": known.timestep_embedding})
    expected = expected_shapes(config)
    weights.check_shapes(expected)
    of_vae: Iterable[tuple[str, Tensor]] = iterate_weights(vae_files if config.vae is not None else [])
    if vae is not None:
        of_vae = weights_of("vae", vae)
    return config, _weights(
        weights.of_diffusers(), of_vae, {}, expected, weights.where, parts["transformer"]["_class_name"]
    )


def _take_vae(parts: dict[str, Any], folder: Path | None, variant: str | None) -> list[Path]:
    """Put the configuration of a VAE, if there is one, beside the other parts, and return the files of its weights.

    Raises:
        ValueError: If it is broken.
    """
    if folder is None:
        return []
    parts["vae"] = read_json(folder / CONFIG)
    return weight_files(folder, variant, fall_back=True)


def scheduler_beside(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of the scheduler in a folder; None where there is none."""
    return _read_scheduler(folder) if (folder / "scheduler" / SCHEDULER_CONFIG).is_file() else None


def _read_transformer(folder: Path) -> dict[str, Any]:
    """Return the configuration of a transformer, with today's name of its class.

    Raises:
        ValueError: If it is missing or broken, or the class is not supported.
    """
    config = read_json(folder / CONFIG)
    config["_class_name"] = _class_name(config)
    refuse_kin(config["_class_name"])
    family_of(config["_class_name"])
    return config


# By the pipeline: what a transformer needs beside the noised image, though its class is that of one without.
_WITH_AN_IMAGE = "it was trained to edit an image, which it takes as further tokens and in its prompt"
_CONDITIONED = {
    "QwenImageEditPipeline": _WITH_AN_IMAGE,
    "QwenImageEditInpaintPipeline": _WITH_AN_IMAGE,
    "QwenImageEditPlusPipeline": _WITH_AN_IMAGE,
    "QwenImageLayeredPipeline": "it was trained to split an image into several layers",
    "LongCatImageEditPipeline": _WITH_AN_IMAGE,
    "ZImageOmniPipeline": "it is conditioned on images and their embeddings as well",
    "PRXPixelPipeline": "its noise is stronger than that of any noise level of its scheduler",
}
# The same, as far as the configuration of the transformer tells it.
_CONDITIONING_FIELDS = {
    "zero_cond_t": ("QwenImageTransformer2DModel", _WITH_AN_IMAGE),
    "use_additional_t_cond": ("QwenImageTransformer2DModel", _CONDITIONED["QwenImageLayeredPipeline"]),
    "use_layer3d_rope": ("QwenImageTransformer2DModel", _CONDITIONED["QwenImageLayeredPipeline"]),
    "siglip_feat_dim": ("ZImageTransformer2DModel", _CONDITIONED["ZImageOmniPipeline"]),
    "image_dim": ("WanTransformer3DModel", "it generates videos from an image, whose latents and embeddings it needs"),
}


def refuse_conditioned(transformer: Mapping[str, Any], pipeline: str | None) -> None:
    """Reject a transformer that takes more than a noised image and a text, though others of its class do not.

    Those whose latents have more channels for it, as FLUX.1-Fill's, contradict their VAE.

    Args:
        transformer: Its configuration.
        pipeline: Class of its pipeline; None where it lies alone.

    Raises:
        ValueError: If it does.
    """
    name = transformer.get("_class_name")
    known = [key for key, (kind, _) in _CONDITIONING_FIELDS.items() if kind == name and transformer.get(key)]
    if isinstance(pipeline, str) and pipeline in _CONDITIONED:
        what, why = f"a {pipeline}", _CONDITIONED[str(pipeline)]
    elif known:
        what, why = f"a {name} with `{known[0]}`", _CONDITIONING_FIELDS[known[0]][1]
    else:
        return
    raise ValueError(
        f"The transformer of {what} is not supported: {why}. Load a text-to-image checkpoint, such as the one it was "
        "made from."
    )


def _class_name(config: dict[str, Any]) -> str | None:
    """Return the class of a transformer, by the name that it has in diffusers today.

    DiT and PixArt were `Transformer2DModel` in diffusers before version 0.29, and are in published checkpoints to this
    day; diffusers itself maps them in the same way.
    """
    name: str | None = config.get("_class_name")
    if name != "Transformer2DModel":
        return name
    renamed = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
    return renamed.get(str(config.get("norm_type")), name)


def _read_scheduler(folder: Path) -> dict[str, Any]:
    """Return the configuration of a pipeline's scheduler.

    Raises:
        ValueError: If it is missing or broken.
    """
    path = folder / "scheduler" / SCHEDULER_CONFIG
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} has transformer/ but no scheduler/{SCHEDULER_CONFIG}, so the noise level of each "
            "timestep is unknown. Add the scheduler that the transformer was trained with."
        )
    return read_json(path)


def _default_scheduler(folder: Path, transformer: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the scheduler of a transformer that lies alone: DiT's own.

    Raises:
        ValueError: If the transformer is of another family, and the fields name no scheduler either.
    """
    name = transformer["_class_name"]
    if name != "DiTTransformer2DModel" and "scheduler" not in fields:
        raise ValueError(
            f"{str(folder)!r} has only a {name}, so the noise level of each timestep is unknown. Load the whole "
            "pipeline, or pass the scheduler it was trained with, or its configuration, as `scheduler=`."
        )
    return dict(DDPM_LINEAR)


def _config_of(parts: dict[str, Any], fields: dict[str, Any]) -> ASelectConfig:
    """Return the configuration of what was read, unless a field takes its place.

    Raises:
        ValueError: If a field is unknown or out of range, or the scheduler is not supported.
    """
    # Where a part was loaded from before is nobody's business.
    for part in parts.values():
        part.pop("_name_or_path", None)
    config = ASelectConfig(**{**parts, "timestep_embedding": _default_embedding(parts, fields), **fields})
    # Rejects schedulers that are not supported.
    NoiseSchedule.from_config(config.scheduler or {})
    if config.timestep_embedding in ("sit", "repa") and not is_flow_matching(config.scheduler or {}):
        raise ValueError(
            f"`timestep_embedding={config.timestep_embedding!r}` is for a transformer trained with flow matching, "
            f"but the scheduler is a {(config.scheduler or {})['_class_name']}. Pass a `scheduler=` with "
            "`_class_name` 'FlowMatchEulerDiscreteScheduler', or `timestep_embedding='original'` for DiT's weights."
        )
    if config.takes_latents:
        logger.warning(
            "The %s takes latents of %d channels, but the checkpoint has no VAE, so the model accepts only latents. "
            "To use images, pass `vae=` (`--vae`): a folder or an id on the Hub of a VAE or of a pipeline with one.",
            parts["transformer"]["_class_name"],
            config.num_channels,
        )
    return config


def _default_embedding(parts: dict[str, Any], fields: dict[str, Any]) -> str:
    """Return how timesteps are embedded, as far as the files tell."""
    transformer = parts["transformer"]
    if transformer["_class_name"] != "DiTTransformer2DModel" or "timestep_embedding" in fields:
        return "diffusers"
    # The code of facebookresearch/DiT learns one, and nothing in diffusers trains it.
    learns_variance = transformer.get("out_channels") == 2 * transformer.get("in_channels", 0)
    if is_flow_matching(fields.get("scheduler") or parts["scheduler"]):
        logger.warning(
            "The checkpoint is a DiT with a flow-matching scheduler, and is assumed to be trained with diffusers "
            "(conditioned on 1000 * sigma). Otherwise pass `timestep_embedding`: 'sit' for weights of SiT, 'repa' "
            "for REPA or SRA, 'original' for other code with DiT's frequencies and 1000 * sigma."
        )
    elif learns_variance:
        logger.info(
            "The checkpoint is a DiT with a learned variance, and is assumed to come from facebookresearch/DiT. If "
            "it was trained with diffusers, pass `timestep_embedding='diffusers'`."
        )
        return "original"
    return "diffusers"


def expected_shapes(config: ASelectConfig) -> dict[str, torch.Size]:
    """Return the shape of every weight of a configuration, but for the empty prompt's embeddings, by name.

    Raises:
        ValueError: If the transformer or VAE cannot be built.
    """
    with torch.device("meta"):
        parts = {"denoiser": build_denoiser(config, with_prompt=False), "vae": build_vae_encoder(config)}
    return {
        f"{part}.{name}": value.shape
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def _check_no_prompt(name: str, prompt_embeds: Mapping[str, Tensor] | None, without: tuple[str, ...]) -> None:
    """Check that neither embeddings nor omitted text encoders are given for a transformer without text conditioning.

    Raises:
        ValueError: If one of them is given.
    """
    if prompt_embeds is not None or without:
        given = "`prompt_embeds`" if prompt_embeds is not None else ", ".join(without)
        raise ValueError(f"{given} cannot be used with a {name}, which has no text conditioning. Omit it.")


def _note_prompt(config: ASelectConfig, embeddings: dict[str, Tensor]) -> None:
    """Put the shapes of the empty prompt's embeddings into the configuration.

    Raises:
        ValueError: If one is missing, or of another width than the transformer's.
    """
    config.prompt_shapes = {part: list(value.shape) for part, value in embeddings.items()}
    with torch.device("meta"):
        build_denoiser(config)


def _weights(
    transformer: Iterable[tuple[str, Tensor]],
    vae: Iterable[tuple[str, Tensor]],
    embeddings: dict[str, Tensor],
    expected: Container[str],
    source: str,
    kind: str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by the names that `DiTModel` gives them, one after the other.

    Args:
        transformer: Those of the transformer, by diffusers' names.
        vae: Those of the VAE.
        embeddings: The empty prompt's.
        expected: Names that the model has a place for; tensors of other names are left out, with a warning.
        source: What they are read from, for that warning.
        kind: The transformer's class, for it.
    """
    left_over = []
    for key, value in transformer:
        name = f"denoiser.transformer.{key}"
        if name in expected:
            refuse_other_than_weights(key, value.dtype)
            yield name, value
        else:
            left_over.append(key)
    for key, value in embeddings.items():
        yield f"denoiser.{key}", value
    for key, value in vae:
        if not key.startswith(ENCODER_WEIGHTS):
            continue
        name = f"vae.{_renamed(key)}"
        if name in expected:
            refuse_other_than_weights(key, value.dtype)
            yield name, value
        else:
            left_over.append(f"vae/{key}")
    if left_over:
        logger.warning(
            "%d tensors of %s do not belong to a %s and are ignored, as in diffusers: %s.",
            len(left_over),
            source,
            kind,
            ", ".join(left_over[:4]),
        )


def _renamed(key: str) -> str:
    """Return today's name of a VAE's tensor."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}{_OLD_ATTENTION[found[2]]}.",
        key,
    )
