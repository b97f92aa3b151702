"""Diffusion transformers as vision models: A-SelecT finds the timestep at which a DiT sees best."""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ASelectCallback",
    "ASelectConfig",
    "ASelectImageProcessor",
    "ASelectImageProcessorPil",
    "Accuracy",
    "DiTBackbone",
    "DiTForImageClassification",
    "DiTForSemanticSegmentation",
    "DiTModel",
    "MeanIoU",
    "NoiseSchedule",
    "TimestepSelection",
    "TransformerBlocks",
    "TransformerFamily",
    "cache_features",
    "convert_diffusers",
    "convert_research",
    "facts_of_card",
    "plot_confusion_matrix",
    "register_family",
    "select_timestep",
    "transformer_layout",
]


def _is_command_line() -> bool:
    """Return whether this process is `hf-aselect`, which imports what a command needs when it knows which it is."""
    first = "".join(sys.argv[:1])
    # While Python looks for a module to run, this stands in place of its path.
    is_run = first == "-m" and "-m hf_aselect" in " ".join(sys.orig_argv)
    return is_run or Path(first).stem == "hf-aselect"


if not _is_command_line():
    from .public import (
        ASelectCallback,
        ASelectConfig,
        ASelectImageProcessor,
        ASelectImageProcessorPil,
        DiTBackbone,
        DiTForImageClassification,
        DiTForSemanticSegmentation,
        DiTModel,
        NoiseSchedule,
        TimestepSelection,
        TransformerBlocks,
        TransformerFamily,
        convert_diffusers,
        convert_research,
        facts_of_card,
        plot_confusion_matrix,
        register_family,
        select_timestep,
        transformer_layout,
    )


def __getattr__(name: str) -> Any:
    """Import on its first use what needs `datasets` or `evaluate`, which take a second and which not all install.

    Of the command line that is every name.

    Raises:
        AttributeError: If there is no such name.
        ImportError: If a library is not installed.
    """
    try:
        if name == "cache_features":
            from .training.feature_cache import cache_features

            return cache_features
        if name in ("Accuracy", "MeanIoU"):
            from .training.metrics import Accuracy, MeanIoU

            return Accuracy if name == "Accuracy" else MeanIoU
    except ModuleNotFoundError as error:
        raise ImportError(f"`{name}` needs {error.name}: pip install 'hf_aselect[train]'") from error
    if name in __all__:
        return getattr(importlib.import_module(".public", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
