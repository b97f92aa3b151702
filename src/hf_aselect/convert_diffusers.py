"""What diffusers saved, as ours: configuration and weights, in memory or as a folder."""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .configuration_aselect import DDPM_LINEAR, ASelectConfig
from .denoisers import build_denoiser, build_vae_encoder
from .diffusers_files import (
    CONFIG,
    SCHEDULER_CONFIG,
    HubOptions,
    check_parts,
    iterate_weights,
    locate,
    read_json,
    tensor_bytes,
    weight_files,
)
from .empty_prompt import TEXT_PARTS, checked_embeddings, encode_empty_prompt, text_parts
from .image_processing_aselect import ASelectImageProcessor
from .noise_schedule import NoiseSchedule, is_flow_matching
from .transformer_layout import check_family

logger = logging.getLogger(__name__)

# What a VAE needs to encode; the rest of it turns latents back into pictures.
VAE_ENCODER_KEYS = ("encoder.", "quant_conv.")
# DiT-XL/2 with a learned variance is what facebookresearch/DiT trained and nobody trains with diffusers.
_ORIGINAL_DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 1000,
}
# The empty prompt's embeddings among a denoiser's weights.
_PROMPT = ("prompt_embeds", "pooled_prompt_embeds")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Args:
        output: The folder.
        num_parameters: Values in the files: parameters, position tables and the empty prompt's embeddings.
        transformer_bytes: Size of the transformer's weights there, with the empty prompt's embeddings.
        vae_encoder_bytes: Size of the VAE encoder's weights there.
        vae_decoder_bytes: Size of the VAE decoder's weights in the source, which are dropped.
        text_encoder_bytes: Size of the text encoders' weights in the source, which are not needed any more.
        seconds: How long it took.
    """

    output: Path
    num_parameters: int
    transformer_bytes: int
    vae_encoder_bytes: int
    vae_decoder_bytes: int
    text_encoder_bytes: int
    seconds: float


def find_diffusers(
    source: str | os.PathLike[str],
    options: HubOptions,
    without: str | Iterable[str] = (),
    has_prompt: bool = False,
) -> Path | None:
    """Return the folder of a diffusers checkpoint, fetched from the Hub if need be; None for a checkpoint of ours.

    Args:
        source: Local folder, or id on the Hub.
        options: How to fetch.
        without: Parts of the text side to do without, which are not fetched.
        has_prompt: Whether the empty prompt's embeddings are given, so that nothing of the text side is fetched.

    Raises:
        ValueError: As `diffusers_files.locate`.
        OSError: As `diffusers_files.locate`.
    """
    left_out = set(_names(without))
    if any(part.endswith("_3") for part in left_out):
        left_out |= {"text_encoder_3", "tokenizer_3"}
    wanted = () if has_prompt else [part for part in TEXT_PARTS if part not in left_out]
    return locate(source, ASelectConfig.model_type, options, wanted, lambda config: check_family(_class_name(config)))


def _names(parts: str | Iterable[str] | None) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else tuple(parts or ())


def load_diffusers(
    folder: Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    without: str | Iterable[str] = (),
    prompt_embeds: Mapping[str, Tensor] | None = None,
    **fields: Any,  # noqa: ANN401
) -> tuple[ASelectConfig, Iterator[tuple[str, Tensor]]]:
    """Read a diffusers transformer, with its scheduler and VAE where they lie beside it.

    Args:
        folder: Folder with `transformer/` and `scheduler/` (and `vae/` for a DiT in latent space), or a bare
            transformer's folder. A bare `DiTTransformer2DModel` is taken for one in pixel space with DiT's own
            schedule; the other families need `scheduler=`.
        variant: Variant of the weights, as "fp16".
        dtype: What the empty prompt's embeddings are in, where the transformer needs them; see `encode_empty_prompt`.
        without: Parts of the text side to do without; see `encode_empty_prompt`.
        prompt_embeds: The empty prompt's embeddings by name, in place of computing them.
        fields: Fields of `ASelectConfig` that take the place of what was read.

    Returns:
        The configuration, and the weights by the names that `DiTModel` gives them, one after the other, in the dtype
        they were saved in. What the transformer has no place for is left out, with a warning.

    Raises:
        ValueError: If a part is missing or broken, the transformer's class is unsupported, or a field is unknown.
    """
    is_bare = not (folder / "transformer").is_dir()
    transformer = _read_transformer(folder if is_bare else folder / "transformer")
    name = transformer["_class_name"]
    needed = () if prompt_embeds is not None else text_parts(name, _names(without))
    check_parts(folder, ("transformer", "scheduler", "vae", *needed))
    parts: dict[str, Any] = {"transformer": transformer, "scheduler": dict(DDPM_LINEAR)}
    if not is_bare:
        if not (folder / "scheduler" / SCHEDULER_CONFIG).is_file():
            raise ValueError(
                f"{str(folder)!r} has transformer/ but no scheduler/{SCHEDULER_CONFIG}: the noise levels of the "
                "timesteps are unknown. Save the scheduler that the transformer was trained with beside it."
            )
        parts["scheduler"] = read_json(folder / "scheduler" / SCHEDULER_CONFIG)
    elif name != "DiTTransformer2DModel" and "scheduler" not in fields:
        raise ValueError(
            f"{str(folder)!r} is a {name} alone: the noise levels of its timesteps are unknown. Load the whole "
            "pipeline, or pass `scheduler=`, the configuration of the scheduler that it was trained with "
            "(`dict(scheduler.config)`, with `_class_name`)."
        )
    transformer_files = weight_files(folder if is_bare else folder / "transformer", variant)
    vae_files: list[Path] = []
    if not is_bare and (folder / "vae").is_dir():
        parts["vae"] = read_json(folder / "vae" / CONFIG)
        vae_files = weight_files(folder / "vae", variant, fall_back=True)
    parts["timestep_embedding"] = _default_embedding(parts, fields)
    config = ASelectConfig(**{**parts, **fields})
    NoiseSchedule.from_config(config.scheduler or {})  # refuses schedulers that are not supported
    if config.vae is None and config.num_channels not in (1, 3):
        logger.warning(
            "A %s on latents of %d channels, and no VAE beside it: it cannot be given pictures, only latents. Load "
            "the whole pipeline for pictures.",
            name,
            config.num_channels,
        )
    # What cannot be built is said so before text encoders are loaded, which takes minutes.
    expected = _expected_shapes(config)
    embeddings: dict[str, Tensor] = {}
    if config.layout.needs_prompt:
        if prompt_embeds is None:
            embeddings = encode_empty_prompt(
                folder, transformer, dtype=dtype, variant=variant, without=_names(without)
            )
        else:
            embeddings = checked_embeddings(prompt_embeds, name, dtype)
        config.prompt_shapes = {part: list(value.shape) for part, value in embeddings.items()}
        with torch.device("meta"):
            build_denoiser(config)  # refuses embeddings of other widths
    elif prompt_embeds is not None or _names(without):
        given = "`prompt_embeds` are" if prompt_embeds is not None else f"{', '.join(_names(without))} is"
        raise ValueError(f"{given} given, but a {name} is not conditioned on a text.")

    def weights() -> Iterator[tuple[str, Tensor]]:
        left_over = []
        for key, value in iterate_weights(transformer_files):
            if f"denoiser.transformer.{key}" in expected:
                yield f"denoiser.transformer.{key}", value
            else:
                left_over.append(key)
        for key, value in embeddings.items():
            yield f"denoiser.{key}", value
        for key, value in iterate_weights(vae_files if config.vae is not None else []):
            if key.startswith(VAE_ENCODER_KEYS):
                if f"vae.{_renamed(key)}" in expected:
                    yield f"vae.{_renamed(key)}", value
                else:
                    left_over.append(f"vae/{key}")
        if left_over:
            logger.warning(
                "%d tensors of %s have no place in a %s and are left out, as diffusers does: %s.",
                len(left_over),
                folder.name,
                name,
                ", ".join(left_over[:4]),
            )

    return config, weights()


# How diffusers before 0.17 named the attention of a VAE; it renames them on loading, too.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renamed(key: str) -> str:
    """Return today's name of a VAE's tensor."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}{_OLD_ATTENTION[found[2]]}.",
        key,
    )


def _expected_shapes(config: ASelectConfig) -> dict[str, torch.Size]:
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


def convert_diffusers(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    without: str | Iterable[str] = (),
    prompt_embeds: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = "1GB",
    **fields: Any,  # noqa: ANN401
) -> Conversion:
    """Write a diffusers checkpoint as one of ours: transformer, VAE encoder, scheduler, the empty prompt's embeddings.

    Weights are read and written tensor by tensor, so that about `max_shard_size` of them are in memory at a time. Text
    encoders, where the transformer is conditioned on a text, are loaded once before and dropped. The folder appears
    whole or not at all; a process that is killed leaves a hidden `.OUTPUT.incomplete-...` beside it. The VAE encoder
    stays in float32.

    Args:
        source: A pipeline that diffusers saved (folder, or id on the Hub, of which only the files that are needed are
            downloaded), or a bare transformer; see `DiTModel.from_pretrained`.
        output: Folder to write; it must not exist, or be empty, and neither be the current folder nor a mount point,
            which cannot appear at once.
        dtype: Of the weights that are written, and of the text encoders meanwhile; "float32", "float16" and "bfloat16"
            will do, too. Default: the weights as they are, text encoders in float32.
        variant: Variant of the weights to read, as "fp16".
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder in `source` that holds the checkpoint.
        token: Token for the Hub, or whether to take the one that is logged in.
        cache_dir: Folder of downloads.
        local_files_only: Whether to take what was downloaded before and ask the Hub nothing.
        without: Parts of the text side to do without: `"text_encoder_3"` of Stable Diffusion 3, its T5.
        prompt_embeds: The empty prompt's embeddings by name, (1, L, C) and (1, C), in place of computing them.
        max_shard_size: Size of a file of weights at the most, unless one tensor is larger: bytes, or "5GB", "200MB".
        fields: Fields of `ASelectConfig`.

    Returns:
        What was made and what was dropped.

    Raises:
        ValueError: If the source is none, or already one of ours; a part is missing, broken, or of an unsupported
            kind; a field is unknown; a number is out of range.
        FileExistsError: If `output` exists and is not empty.
        OSError: If a repository is not found or may not be read, or the Hub cannot be reached.
    """
    started = time.monotonic()
    target = _checked_output(output)
    shard_bytes = _bytes_of(max_shard_size)
    wanted = checked_dtype(dtype)
    options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, variant=variant)
    folder = _source_folder(source, find_diffusers(source, options, without, prompt_embeds is not None))
    if target.is_relative_to(folder.resolve()):
        raise ValueError(f"`output` {str(target)!r} lies inside the source; name a folder beside it.")
    if not Path(source).exists():
        fields.setdefault("base_model", str(source))
    config, weights = load_diffusers(
        folder,
        variant=variant,
        dtype=wanted or torch.float32,
        without=without,
        prompt_embeds=prompt_embeds,
        **fields,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another conversion may be under way, and a folder of a fixed name may be somebody's.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.incomplete-", dir=target.parent))
    try:
        shapes: dict[str, torch.Size] = {}
        sizes, dtypes = _write_weights(weights, unfinished, wanted, shard_bytes, shapes)
        _check_fit(config, shapes, source)
        config.architectures = ["DiTModel"]
        config.dtype = wanted or max(dtypes, key=lambda kind: dtypes[kind])
        config.save_pretrained(unfinished)
        if config.num_channels in (1, 3):  # latents without a VAE are no pictures
            ASelectImageProcessor.from_model_config(config).save_pretrained(unfinished)
        decoder_bytes = _dropped_bytes(folder / "vae", variant, kept=VAE_ENCODER_KEYS)
        text_bytes = sum(_dropped_bytes(folder / part, variant) for part in TEXT_PARTS)
        unfinished.chmod(0o777 & ~_umask())  # as a folder that was made in the usual way
        os.replace(unfinished, target)  # an empty folder of that name goes
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"{str(output)!r} was written by somebody else meanwhile, and is left alone.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Conversion(
        output=Path(output),
        num_parameters=sum(count for count, _ in sizes.values()),
        transformer_bytes=sizes["denoiser"][1],
        vae_encoder_bytes=sizes["vae"][1],
        vae_decoder_bytes=decoder_bytes,
        text_encoder_bytes=text_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _bytes_of(size: int | str) -> int:
    """Return the bytes of a size, as 200 or "5GB"."""
    if isinstance(size, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B", size.strip(), re.IGNORECASE)):
        size = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " "))
    if not isinstance(size, int | float) or not 1 <= size < float("inf"):
        raise ValueError(f"`max_shard_size` must be at least 1 byte, a number or as '5GB' or '200MB', got {size!r}.")
    return int(size)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _checked_output(output: str | os.PathLike[str]) -> Path:
    """Return the folder to write, with links followed; refuse one that holds something or cannot be replaced."""
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{str(output)!r} exists and is not empty; name another folder, or remove it.")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise FileExistsError(f"{str(output)!r} cannot be made: {str(above)!r} is a file.")
    if target == Path.cwd() or os.path.ismount(target):
        raise FileExistsError(
            f"{str(output)!r} is the current folder or a mount point, which cannot be replaced at once by a finished "
            "one; name a folder in it."
        )
    return target


def _source_folder(source: str | os.PathLike[str], folder: Path | None) -> Path:
    """Return the folder of the checkpoint to convert; refuse one of ours."""
    if folder is None:
        raise ValueError(f"{str(source)!r} is a checkpoint of hf_aselect already and needs no conversion.")
    return folder


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


def _read_transformer(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    config["_class_name"] = _class_name(config)
    check_family(config["_class_name"])
    return config


def _default_embedding(parts: dict[str, Any], fields: dict[str, Any]) -> str:
    """Return how timesteps are embedded, as far as the files tell."""
    transformer = parts["transformer"]
    if transformer["_class_name"] != "DiTTransformer2DModel" or "timestep_embedding" in fields:
        return "diffusers"
    is_xl_2 = all(transformer.get(name) == value for name, value in _ORIGINAL_DIT.items())
    if is_flow_matching(fields.get("scheduler") or parts["scheduler"]):
        logger.warning(
            "A DiT with a flow-matching scheduler: taken for one that was trained with diffusers, conditioned on "
            "1000 * sigma. If its weights are SiT's own, pass `timestep_embedding='sit'`."
        )
    elif is_xl_2:
        logger.info("A DiT-XL/2 with a learned variance: taken for the weights of facebookresearch/DiT.")
        return "original"
    return "diffusers"


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of a name; None stays None.

    Raises:
        ValueError: If it is none of float32, float16 and bfloat16.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def _check_fit(config: ASelectConfig, shapes: dict[str, torch.Size], source: str | os.PathLike[str]) -> None:
    """Refuse weights that do not fit their configuration, as loading would."""
    expected = _expected_shapes(config)
    written = {name: shape for name, shape in shapes.items() if name.removeprefix("denoiser.") not in _PROMPT}
    broken = {name for name in expected.keys() | written.keys() if expected.get(name) != written.get(name)}
    if broken:
        raise ValueError(
            f"The weights in {str(source)!r} do not fit their configuration: {len(broken)} tensors are missing or of "
            f"another shape, among them {sorted(broken)[:3]}."
        )


def _write_weights(
    weights: Iterator[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int,
    shapes: dict[str, torch.Size],
) -> tuple[dict[str, tuple[int, int]], dict[torch.dtype, int]]:
    """Write weights in shards, each as it fills, and note their shapes.

    Returns:
        Parameters and bytes of each part, and the values of each dtype in the transformer.
    """
    sizes = {"denoiser": (0, 0), "vae": (0, 0)}
    dtypes: dict[torch.dtype, int] = {}
    shard: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    filled = count = 0

    def flush() -> None:
        nonlocal shard, filled, count
        if shard:
            count += 1
            save_file(shard, folder / _unnumbered(count), metadata={"format": "pt"})
            shard, filled = {}, 0

    for name, value in weights:
        part = name.split(".")[0]
        # Encoders overflow in float16, and bfloat16 has too few digits for what little noise leaves of the latents.
        kind = torch.float32 if part == "vae" else dtype
        value = value.to(kind or value.dtype).clone() if value.is_floating_point() else value.clone()
        if shard and filled + value.nbytes > max_shard_size:
            flush()
        shard[name] = value.contiguous()
        places[name] = count + 1
        shapes[name] = value.shape
        filled += value.nbytes
        sizes[part] = sizes[part][0] + value.numel(), sizes[part][1] + value.nbytes
        if part == "denoiser":
            dtypes[value.dtype] = dtypes.get(value.dtype, 0) + value.numel()
    flush()
    if count == 1:
        os.replace(folder / _unnumbered(1), folder / "model.safetensors")
        return sizes, dtypes
    files = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, name in files.items():
        os.replace(folder / _unnumbered(number), folder / name)
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes.values())},
        "weight_map": {name: files[number] for name, number in sorted(places.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sizes, dtypes


def _unnumbered(number: int) -> str:
    return f"shard-{number}.safetensors"


def _dropped_bytes(folder: Path, variant: str | None, kept: tuple[str, ...] = ()) -> int:
    """Return the size of the weights in a folder, but for those whose names begin as `kept`; 0 if there are none."""
    if not folder.is_dir() or folder.name.startswith("tokenizer"):
        return 0
    try:
        sizes = tensor_bytes(weight_files(folder, variant, fall_back=True))
    except ValueError:
        return 0  # not needed, so not refused
    return sum(size for name, size in sizes.items() if not (kept and name.startswith(kept)))
