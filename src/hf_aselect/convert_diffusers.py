"""Reading what diffusers saved: a checkpoint's parts to our configuration and weights."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .configuration_aselect import DDPM_LINEAR, ASelectConfig
from .denoisers import check_family

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
# What a VAE needs to encode; the rest of an `AutoencoderKL` turns latents back into pictures.
VAE_ENCODER_KEYS = ("encoder.", "quant_conv.")


def is_diffusers_folder(source: str | os.PathLike[str]) -> bool:
    """Return whether a local folder holds a transformer of diffusers, rather than a checkpoint of ours.

    Raises:
        ValueError: If the folder exists but is neither; if it has only pickled weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        return False  # an id of the Hub, or a path that the host will complain of
    _refuse_pickles(folder)
    if (folder / "transformer").is_dir():
        return True
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        return True
    if config.get("model_type") == ASelectConfig.model_type:
        return False
    raise ValueError(
        f"{str(source)!r} holds nothing that can be loaded: expected a checkpoint of hf_aselect ({CONFIG} with "
        f"model_type {ASelectConfig.model_type!r}), a folder with transformer/ and scheduler/, or a diffusers "
        f"transformer ({CONFIG} with `_class_name`); found {sorted(path.name for path in folder.iterdir())[:10]}."
    )


def load_diffusers(source: str | os.PathLike[str], **fields: Any) -> tuple[ASelectConfig, dict[str, Tensor]]:  # noqa: ANN401
    """Read a diffusers transformer, with its scheduler and VAE where they lie beside it.

    Args:
        source: Folder with `transformer/` and `scheduler/` (and `vae/` for a DiT in latent space), or a bare
            transformer's folder, which is taken for a DiT in pixel space with DiT's own schedule.
        fields: Fields of `ASelectConfig` that take the place of what was read.

    Returns:
        The configuration, and the weights by the names that `DiTModel` gives them, in the dtype they were saved in.

    Raises:
        ValueError: If a part is missing or broken, the transformer's class is unsupported, or a field is unknown.
    """
    folder = Path(source)
    fields.setdefault("name_or_path", str(source))
    if not (folder / "transformer").is_dir():
        config = ASelectConfig(**{"transformer": _read_config(folder), "scheduler": dict(DDPM_LINEAR), **fields})
        return config, _prefixed("denoiser.transformer.", _read_weights(folder))
    if not (folder / "scheduler" / SCHEDULER_CONFIG).is_file():
        raise ValueError(
            f"{str(source)!r} has transformer/ but no scheduler/{SCHEDULER_CONFIG}: the noise levels of the timesteps "
            "are unknown. Save the scheduler that the transformer was trained with beside it."
        )
    parts = {
        "transformer": _read_config(folder / "transformer"),
        "scheduler": _read_json(folder / "scheduler" / SCHEDULER_CONFIG),
    }
    weights = _prefixed("denoiser.transformer.", _read_weights(folder / "transformer"))
    if (folder / "vae").is_dir():
        parts["vae"] = _read_json(folder / "vae" / CONFIG)
        encoder = {k: v for k, v in _read_weights(folder / "vae").items() if k.startswith(VAE_ENCODER_KEYS)}
        weights.update(_prefixed("vae.", encoder))
    return ASelectConfig(**{**parts, **fields}), weights


def _prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / CONFIG)
    # The name that DiT went by in diffusers before version 0.29, and in Meta's checkpoints to this day; diffusers
    # itself maps it in the same way.
    if config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        config["_class_name"] = "DiTTransformer2DModel"
    check_family(config.get("_class_name"))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(path)!r} is missing; save the model again with diffusers' `save_pretrained`."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Save or download it again.") from error
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a diffusers model, whole or in shards."""
    _refuse_pickles(folder)
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{str(folder)!r} has no weights {name!r}. Save or download them again.")
        weights.update(_load_safetensors(path))
    return weights


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or no safetensors file ({error}). Save or download it again."
        ) from error


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles: unpickling runs whatever code they hold."""
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if any("model" in name for name in pickles) and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(folder)!r} has only pickled weights ({', '.join(sorted(pickles))}), which are never unpickled, as "
            "they can run any code. Save them again with `safe_serialization=True` (safetensors)."
        )
