"""What diffusers saved, converted to an hf_aselect checkpoint: written in shards, whole or not at all."""

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
from ..model.vae import ENCODER_WEIGHTS
from .atomic import checked_output, whole_folder
from .diffusers import DTYPES, expected_shapes, find_diffusers, load_diffusers
from .empty_prompt import TEXT_PARTS
from .hub_files import HubOptions
from .licenses import license_on_card
from .weight_files import tensor_bytes, weight_files


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
    **fields: Any,
) -> Conversion:
    """Write a diffusers checkpoint as one of ours: transformer, VAE encoder, scheduler, the empty prompt's embeddings.

    Weights are read and written tensor by tensor, so that about `max_shard_size` of them are in memory at a time. Text
    encoders, where the transformer is conditioned on a text, are loaded once before and dropped. The folder appears
    whole or not at all; what a killed process leaves, a hidden `.OUTPUT.incomplete-...` beside it, the next one
    removes. The VAE encoder stays in float32.

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
    target = checked_output(output)
    shard_bytes = _bytes_of(max_shard_size)
    wanted = checked_dtype(dtype)
    options = HubOptions(revision, subfolder, token, cache_dir, local_files_only, variant=variant)
    folder = find_diffusers(source, options, without, prompt_embeds is not None)
    if folder is None:
        raise ValueError(f"{str(source)!r} is a checkpoint of hf_aselect already and needs no conversion.")
    if target.is_relative_to(folder.resolve()):
        raise ValueError(f"`output` {str(target)!r} lies inside the source; name a folder beside it.")
    if not Path(source).exists():
        fields.setdefault("base_model", str(source))
    fields.setdefault("base_license", license_on_card(folder))
    config, weights = load_diffusers(
        folder,
        variant=variant,
        dtype=wanted or torch.float32,
        without=without,
        prompt_embeds=prompt_embeds,
        **fields,
    )
    with whole_folder(target) as unfinished:
        written = _write_weights(weights, unfinished, wanted, shard_bytes)
        _check_fit(config, written, source)
        config.architectures = ["DiTModel"]
        config.dtype = wanted or _main_dtype(written)
        config.save_pretrained(unfinished)
        # Latents without a VAE are no images.
        if config.num_channels in (1, 3):
            ASelectImageProcessor.from_model_config(config).save_pretrained(unfinished)
        decoder_bytes = _dropped_bytes(folder / "vae", variant, kept=ENCODER_WEIGHTS)
        text_bytes = sum(_dropped_bytes(folder / part, variant) for part in TEXT_PARTS)
    return Conversion(
        output=Path(output),
        num_parameters=sum(value.numel() for value in written.values()),
        transformer_bytes=sum(value.nbytes for name, value in written.items() if not _is_of_vae(name)),
        vae_encoder_bytes=sum(value.nbytes for name, value in written.items() if _is_of_vae(name)),
        vae_decoder_bytes=decoder_bytes,
        text_encoder_bytes=text_bytes,
        seconds=round(time.monotonic() - started, 3),
    )


def _bytes_of(size: int | str) -> int:
    """Return the bytes of a size, as 200 or "5GB".

    Raises:
        ValueError: If it is no size, or less than a byte.
    """
    if isinstance(size, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B", size.strip(), re.IGNORECASE)):
        size = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " "))
    if not isinstance(size, int | float) or not 1 <= size < float("inf"):
        raise ValueError(f"`max_shard_size` must be at least 1 byte, a number or as '5GB' or '200MB', got {size!r}.")
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
        """Write what was taken and not written yet, and name the files as transformers does."""
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
            f"The weights in {str(source)!r} do not fit their configuration: {len(broken)} tensors are missing or of "
            f"another shape, among them {sorted(broken)[:3]}."
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
        return 0  # not needed, so not refused
    return sum(size for name, size in sizes.items() if not (kept and name.startswith(kept)))
