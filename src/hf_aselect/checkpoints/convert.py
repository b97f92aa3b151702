"""What diffusers or research code saved, converted to an hf_aselect checkpoint: in shards, whole or not at all."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model.configuration_aselect import ASelectConfig
from ..model.image_processing_aselect import ASelectImageProcessor
from ..model.layouts import plain
from ..model.modeling_aselect import DiTModel
from ..model.vae import ENCODER_WEIGHTS
from .atomic import checked_output, whole_folder
from .diffusers import (
    DTYPES,
    expected_shapes,
    find_diffusers,
    load_diffusers,
    load_research,
    scheduler_beside,
)
from .empty_prompt import TEXT_PARTS
from .hub_files import HubOptions, named_vae
from .layout_check import compare_layouts, is_comparable
from .licenses import license_on_card
from .research import ResearchWeights, research_file, research_in
from .weight_files import PICKLES, check_parts, tensor_bytes, weight_files


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
    calibration_images: Any = None,
    include_code: bool = True,
    **fields: Any,
) -> Conversion:
    """Write a diffusers checkpoint as an hf_aselect checkpoint: transformer, VAE encoder, scheduler, empty prompt.

    Weights are read and written tensor by tensor, so that about `max_shard_size` of them are in memory at a time. Text
    encoders, where the transformer is conditioned on a text, are loaded once before and dropped. The folder appears
    complete or not at all. A killed process leaves a hidden `.OUTPUT.incomplete-...` beside it, which the next
    conversion removes. The VAE encoder stays in float32.

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
        local_files_only: Whether to use only downloaded files and not contact the Hub.
        without: Parts of the text side to do without: `"text_encoder_3"` of Stable Diffusion 3, its T5.
        prompt_embeds: The empty prompt's embeddings by name, (1, L, C) and (1, C), in place of computing them.
        max_shard_size: Maximum size of a file of weights, unless one tensor is larger: bytes, or "5GB", "200MB".
        calibration_images: Images to select the timestep from, as in `select_timestep`, if `timestep` is "auto", the
            default. Without them it stays open. The model is loaded for it.
        include_code: Whether to add the code of the models to the weights, for users without this package.
        fields: Fields of `ASelectConfig`.

    Returns:
        The facts of the conversion: its output and the parts that were left out.

    Raises:
        ValueError: If the source is none, or already an hf_aselect checkpoint; a part is missing, broken, or of an
            unsupported kind; a field is unknown; a number is out of range.
        FileExistsError: If `output` exists and is not empty.
        OSError: If a repository is not found or may not be read, or the Hub cannot be reached.

    Example:
        >>> from hf_aselect import convert_diffusers
        >>> conversion = convert_diffusers("src/hf_aselect/assets/fashion_mnist", "converted", timestep=19)
        >>> conversion.output.name, conversion.num_parameters
        ('converted', 2818448)
    """
    started = time.monotonic()
    target = checked_output(output)
    shard_bytes = _bytes_of(plain(max_shard_size))
    wanted = checked_dtype(dtype)
    options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, variant=variant)
    folder = find_diffusers(source, options, without, prompt_embeds is not None)
    if folder is None:
        raise ValueError(f"{str(source)!r} is already an hf_aselect checkpoint and needs no conversion.")
    if target.is_relative_to(folder.resolve()):
        raise ValueError(f"`output` must not lie inside the source, got {str(target)!r}. Pass a folder beside it.")
    if not Path(source).exists():
        fields.setdefault("base_model", str(source))
    fields.setdefault("base_license", license_on_card(folder))
    is_checked = fields.pop("check_layout", True)  # of ports that keep the research names
    vae_folder = named_vae(fields, options)
    config, weights = load_diffusers(
        folder,
        vae_folder=vae_folder,
        check_layout=is_checked,
        variant=variant,
        dtype=wanted or torch.float32,
        without=without,
        prompt_embeds=prompt_embeds,
        **fields,
    )
    if calibration_images is not None and config.timestep != "auto":
        raise ValueError(
            f"`calibration_images` cannot be used with a fixed timestep ({config.timestep}). Pass `timestep='auto'` "
            "to select it from them, or omit them."
        )
    written = _write(
        target, config, weights, source, wanted, shard_bytes, include_code, calibration_images, is_checked
    )
    return _conversion(
        output,
        written,
        started,
        decoder_bytes=_dropped_bytes(vae_folder or folder / "vae", variant, kept=ENCODER_WEIGHTS),
        text_bytes=sum(_dropped_bytes(folder / part, variant) for part in TEXT_PARTS),
    )


def convert_research(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_shard_size: int | str = "1GB",
    calibration_images: Any = None,
    check_layout: bool = True,
    include_code: bool = True,
    **fields: Any,
) -> Conversion:
    """Write the weights of the research code of DiT, SiT, REPA or SRA as an hf_aselect checkpoint.

    They become a `DiTTransformer2DModel`, whose size, patch, classes and learned variance are read off the tensors.
    Weights that were averaged over training (`ema`) are taken where there are any. As `convert_diffusers` it works
    tensor by tensor, and the folder appears whole or not at all.

    Args:
        source: A file of weights (.safetensors, or .pt with `allow_pickle=True`); or a folder or an id on the Hub of
            diffusers' form whose safetensors have the names of the research code.
        output: Folder to write, as in `convert_diffusers`.
        layout: Whose weights they are, which they do not tell: "dit" (facebookresearch/DiT: diffusion), "sit" (SiT:
            flow matching with the image at time 1) or "repa" (REPA, SRA: flow matching with the image at time 0).
            See `check_layout`.
        vae: The VAE of the latents, as diffusers saved it: a folder or an id on the Hub, of the VAE alone or of a
            pipeline. Without one, and none beside the weights, the model takes latents.
        allow_pickle: Whether a pickle may be read. Torch's reader of weights alone does it, which runs no code of it.
        num_attention_heads: Heads of a block, which the tensors do not tell. Default: those of the published sizes.
        dtype: As in `convert_diffusers`.
        variant: Variant of the weights to read, as "fp16"; of a file that of its VAE.
        revision: Branch, tag or commit of `source` on the Hub.
        subfolder: Folder in `source`, unless that is a file, that holds the checkpoint.
        token: Token for the Hub, or whether to take the one that is logged in.
        cache_dir: Folder of downloads.
        local_files_only: Whether to use only downloaded files and not contact the Hub.
        max_shard_size: As in `convert_diffusers`.
        calibration_images: As in `convert_diffusers`; where the timestep is fixed, to check the layout by.
        check_layout: Whether to reject a layout that the weights contradict: by `projectors` or a learned variance,
            and, where there are `calibration_images`, by a loss on a few of them that is at least 1.25 times that of
            another layout. A warning is logged if the losses do not show which layout is right.
        include_code: As in `convert_diffusers`.
        fields: Fields of `ASelectConfig`.

    Returns:
        The facts of the conversion: its output and the parts that were left out.

    Raises:
        ValueError: If the layout is not said, the source is a pickle and none is allowed, it holds other things than
            weights, those of another architecture, or too few; a `config.json` beside them contradicts them, or they
            contradict the layout; a VAE is none or makes other latents; an option has no meaning for a file; a field
            is unknown.
        FileExistsError: If `output` exists and is not empty.
        OSError: If a file or repository is not found or may not be read, or the Hub cannot be reached.

    Example:
        >>> from hf_aselect import convert_research
        >>> conversion = convert_research("SiT-XL-2-256.safetensors", "sit", layout="sit")  # doctest: +SKIP
    """
    started = time.monotonic()
    target = checked_output(output)
    shard_bytes = _bytes_of(max_shard_size)
    wanted = checked_dtype(dtype)
    options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, variant=variant)
    if os.path.isfile(source):
        _refuse_options_of_a_file(source, revision, subfolder, None if vae is not None else variant)
    vae_folder = named_vae({"vae": vae}, options)
    scheduler = None
    if os.path.isfile(source):
        research = research_file(Path(source), allow_pickle)
    elif Path(source).suffix in (".safetensors", *PICKLES):
        raise FileNotFoundError(f"The file {str(source)!r} does not exist.")
    else:
        folder = find_diffusers(source, options)
        if folder is not None and target.is_relative_to(folder.resolve()):
            raise ValueError(f"`output` must not lie inside the source, got {str(target)!r}. Pass a folder beside it.")
        research, beside, scheduler = _research_folder(folder, source, variant)
        vae_folder = vae_folder or beside
        if not Path(source).exists():
            fields.setdefault("base_model", str(source))
        fields.setdefault("base_license", license_on_card(folder or ""))
    config, weights = load_research(
        research, vae_folder, scheduler, layout, num_attention_heads, variant, fields, check_layout=check_layout
    )
    images = calibration_images
    written = _write(target, config, weights, source, wanted, shard_bytes, include_code, images, check_layout)
    decoder_bytes = 0 if vae_folder is None else _dropped_bytes(vae_folder, variant, kept=ENCODER_WEIGHTS)
    return _conversion(output, written, started, decoder_bytes=decoder_bytes, text_bytes=0)


def _refuse_options_of_a_file(
    source: str | os.PathLike[str], revision: str | None, subfolder: str | None, variant: str | None
) -> None:
    """Reject options that say which file to take, where the source is one.

    Raises:
        ValueError: If one is given.
    """
    options = {"revision": revision, "subfolder": subfolder, "variant": variant}
    if given := [f"`{name}={value!r}`" for name, value in options.items() if value is not None]:
        of_vae = ", and no `vae` is given" if variant is not None else ""
        raise ValueError(
            f"{', '.join(given)} can only be used with a folder or a repository, but {str(source)!r} is a single "
            f"file{of_vae}. Omit it, or pass the folder or the id on the Hub."
        )


def _research_folder(
    folder: Path | None, source: str | os.PathLike[str], variant: str | None
) -> tuple[ResearchWeights, Path | None, dict[str, Any] | None]:
    """Return the research weights in a folder, the folder of the VAE and the scheduler beside them.

    Raises:
        ValueError: If there are none.
    """
    found = None
    if folder is not None:
        inner = folder / "transformer"
        found = research_in(inner if inner.is_dir() else folder, variant)
    if folder is None or found is None:
        raise ValueError(
            f"{str(source)!r} has no weights in the layout of the DiT, SiT or REPA research code. Convert a "
            "diffusers checkpoint with `convert_diffusers`, or with `hf-aselect convert` without `--layout`."
        )
    check_parts(folder, ("scheduler", "vae"))
    return found, folder / "vae" if (folder / "vae").is_dir() else None, scheduler_beside(folder)


def _conversion(
    output: str | os.PathLike[str], written: dict[str, Tensor], started: float, decoder_bytes: int, text_bytes: int
) -> Conversion:
    """Return the facts of a finished conversion."""
    return Conversion(
        output=Path(output),
        num_parameters=sum(value.numel() for value in written.values()),
        transformer_bytes=sum(value.nbytes for name, value in written.items() if not _is_of_vae(name)),
        vae_encoder_bytes=sum(value.nbytes for name, value in written.items() if _is_of_vae(name)),
        vae_decoder_bytes=decoder_bytes,
        text_encoder_bytes=text_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _write(
    target: Path,
    config: ASelectConfig,
    weights: Iterator[tuple[str, Tensor]],
    source: str | os.PathLike[str],
    dtype: torch.dtype | None,
    shard_bytes: int,
    include_code: bool,
    images: Any,
    check_layout: bool,
) -> dict[str, Tensor]:
    """Write a checkpoint into a folder that appears whole.

    Returns:
        What was written, by name, as tensors without data.

    Raises:
        ValueError: If the weights do not fit, contradict the layout, or the images do not fit.
    """
    is_checked = check_layout and is_comparable(config, images)
    with whole_folder(target) as unfinished:
        written = _write_weights(weights, unfinished, dtype, shard_bytes)
        _check_fit(config, written, source)
        config.architectures = ["DiTModel"]
        config.dtype = dtype or _main_dtype(written)
        config.save_pretrained(unfinished, include_code=include_code)
        if not config.takes_latents:
            ASelectImageProcessor.from_model_config(config).save_pretrained(unfinished, include_code=include_code)
        if is_checked:
            # Before a timestep is selected, which takes longer.
            model = DiTModel.from_pretrained(unfinished, dtype=torch.float32, timestep=0, read_out=None)
            compare_layouts(model, images, is_error=True)
            del model
        if images is not None and config.timestep == "auto":
            _select(config, unfinished, images)
            config.save_pretrained(unfinished, include_code=include_code)
    return written


def _select(config: ASelectConfig, folder: Path, images: Any) -> None:
    """Select the timestep of a checkpoint, which is open.

    Args:
        config: Its configuration, which takes the selection over.
        folder: Where it lies.
        images: As in `select_timestep`.
    """
    model = DiTModel.from_pretrained(folder, dtype=torch.float32, calibration_images=images)
    for name in ("timestep", "num_timesteps", "block", "feature", "zeroed_channels", "selection"):
        setattr(config, name, getattr(model.config, name))


def _bytes_of(size: int | str) -> int:
    """Return the bytes of a size, as 200 or "5GB".

    Raises:
        ValueError: If it is not a size of at least one byte.
    """
    if isinstance(size, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B", size.strip(), re.IGNORECASE)):
        size = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " "))
    if not isinstance(size, int | float) or not 1 <= size < float("inf"):
        raise ValueError(
            "`max_shard_size` must be at least 1 byte, as a number or a string such as '5GB' or '200MB', got "
            f"{size!r}."
        )
    return int(size)


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


class _ShardWriter:
    """Writes weights into the files of a folder, each file as it fills, and their index where there are several.

    Args:
        folder: The folder.
        max_bytes: Size of a file at most, unless one tensor is larger.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        # The number of each tensor's file, from 1.
        self._numbers: dict[str, int] = {}
        self._num_files = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take a tensor, which is written with its file."""
        if self._shard and self._shard_bytes + value.nbytes > self.max_bytes:
            self._write_shard()
        self._shard[name] = value.contiguous()
        self._numbers[name] = self._num_files + 1
        self._shard_bytes += value.nbytes
        self._total_bytes += value.nbytes

    def finish(self) -> None:
        """Write the remaining tensors, and name the files as transformers does."""
        if self._shard:
            self._write_shard()
        if self._num_files == 1:
            os.replace(self._unnumbered(1), self.folder / "model.safetensors")
            return
        count = self._num_files
        files = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        for number, name in files.items():
            os.replace(self._unnumbered(number), self.folder / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: files[number] for name, number in sorted(self._numbers.items())},
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write_shard(self) -> None:
        self._num_files += 1
        save_file(self._shard, self._unnumbered(self._num_files), metadata={"format": "pt"})
        self._shard, self._shard_bytes = {}, 0

    def _unnumbered(self, number: int) -> Path:
        """Return where a file lies until it is known how many there are."""
        return self.folder / f"shard-{number}.safetensors"


def _write_weights(
    weights: Iterator[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None, max_shard_size: int
) -> dict[str, Tensor]:
    """Write weights in shards, each as it fills.

    Returns:
        What was written, by name, as tensors without data.
    """
    writer = _ShardWriter(folder, max_shard_size)
    written = {}
    for name, value in weights:
        # Encoders overflow in float16, and bfloat16 has too few digits for what little noise leaves of the latents.
        kind = torch.float32 if _is_of_vae(name) else dtype
        value = value.to(kind or value.dtype).clone() if value.is_floating_point() else value.clone()
        written[name] = torch.empty_like(value, device="meta")
        writer.add(name, value)
    writer.finish()
    return written


def _is_of_vae(name: str) -> bool:
    """Return whether a weight of a name is the VAE encoder's, and not the denoiser's."""
    return name.startswith("vae.")


def _check_fit(config: ASelectConfig, written: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Check that the weights fit their configuration, as loading would.

    Raises:
        ValueError: If they do not.
    """
    expected = expected_shapes(config)
    prompt = {f"denoiser.{name}" for name in config.prompt_shapes or ()}
    shapes = {name: value.shape for name, value in written.items() if name not in prompt}
    broken = {name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)}
    if broken:
        raise ValueError(
            f"The weights in {str(source)!r} do not match their configuration: {len(broken)} tensors are missing or "
            f"have another shape, such as {sorted(broken)[:3]}. Download or save the checkpoint again."
        )


def _main_dtype(written: dict[str, Tensor]) -> torch.dtype:
    """Return the dtype of most values of the denoiser."""
    counts: Counter[torch.dtype] = Counter()
    for name, value in written.items():
        if not _is_of_vae(name):
            counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0]


def _dropped_bytes(folder: Path, variant: str | None, kept: tuple[str, ...] = ()) -> int:
    """Return the size of the weights in a folder, but for those whose names begin as `kept`; 0 if there are none."""
    if not folder.is_dir() or folder.name.startswith("tokenizer"):
        return 0
    try:
        sizes = tensor_bytes(weight_files(folder, variant, fall_back=True))
    except ValueError:
        return 0  # not needed, so not rejected
    return sum(size for name, size in sizes.items() if not (kept and name.startswith(kept)))
