"""Diffusion transformers as vision models: A-SelecT finds the timestep at which a DiT sees best."""

from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from .checkpoints.convert import convert_diffusers, convert_research
from .hub.card import facts_of_card
from .model.configuration_aselect import ASelectConfig
from .model.families import TransformerBlocks, TransformerFamily, register_family, transformer_layout
from .model.image_processing_aselect import ASelectImageProcessor
from .model.modeling_aselect import DiTModel
from .model.modeling_classification import DiTForImageClassification
from .model.modeling_segmentation import DiTBackbone, DiTForSemanticSegmentation
from .model.noise_schedule import NoiseSchedule
from .plots import plot_confusion_matrix
from .selection.record import TimestepSelection
from .selection.select import select_timestep
from .training.callback import ASelectCallback

__version__ = "0.1.0"

__all__ = [
    "ASelectCallback",
    "ASelectConfig",
    "ASelectImageProcessor",
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

AutoConfig.register(ASelectConfig.model_type, ASelectConfig)
AutoModel.register(ASelectConfig, DiTModel)
AutoModelForImageClassification.register(ASelectConfig, DiTForImageClassification)
AutoModelForSemanticSegmentation.register(ASelectConfig, DiTForSemanticSegmentation)
# The segmentation pipeline looks into this table of names alone, and calls every registered class unsupported.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[ASelectConfig.model_type] = DiTForSemanticSegmentation.__name__
AutoBackbone.register(ASelectConfig, DiTBackbone)
AutoImageProcessor.register(ASelectConfig, image_processor_classes={"pil": ASelectImageProcessor})


class _NoVideoProcessor:
    """Stands where the host's `pipeline` looks for a video processor, which it does for pictures as well.

    Where nothing is registered it takes the code beside an image processor for that of one, and asks whether it may
    run.
    """

    @classmethod
    def from_pretrained(cls, *_args: Any, **_kwargs: Any) -> None:
        """Say that there is none, as the host finds of most models.

        Raises:
            ValueError: Always.
        """
        raise ValueError("The models of hf_aselect look at pictures; they have no video processor.")


# The Auto class itself wants torchvision.
VIDEO_PROCESSOR_MAPPING.register(ASelectConfig, _NoVideoProcessor)  # type: ignore[arg-type]

# What is saved has the code, too, so that it can be loaded where this package is not installed.
ASelectConfig.register_for_auto_class()
DiTModel.register_for_auto_class("AutoModel")
DiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
DiTForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
DiTBackbone.register_for_auto_class("AutoBackbone")


def __getattr__(name: str) -> Any:
    """Import on its first use what needs `datasets` or `evaluate`, which take a second and which not all install.

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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
