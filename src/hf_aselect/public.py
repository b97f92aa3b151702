"""The public names, and their registration with the Auto classes."""

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
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.maskformer.configuration_maskformer import MaskFormerConfig
from transformers.utils.import_utils import is_torchvision_available

from .checkpoints.convert import convert_diffusers, convert_research
from .checkpoints.descriptions import register_family
from .hub.card import facts_of_card
from .model.configuration_aselect import ASelectConfig
from .model.families import TransformerBlocks, TransformerFamily, transformer_layout
from .model.image_processing_aselect import ASelectImageProcessor, ASelectImageProcessorPil
from .model.modeling_aselect import DiTModel
from .model.modeling_classification import DiTForImageClassification
from .model.modeling_segmentation import DiTBackbone, DiTForSemanticSegmentation
from .model.noise_schedule import NoiseSchedule
from .plots import plot_confusion_matrix
from .selection.record import TimestepSelection
from .selection.select import select_timestep
from .training.callback import ASelectCallback

__all__ = [
    "ASelectCallback",
    "ASelectConfig",
    "ASelectImageProcessor",
    "ASelectImageProcessorPil",
    "DiTBackbone",
    "DiTForImageClassification",
    "DiTForSemanticSegmentation",
    "DiTModel",
    "NoiseSchedule",
    "TimestepSelection",
    "TransformerBlocks",
    "TransformerFamily",
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
# Both warn about backbones that they do not list. They run on any backbone that reports the widths of its maps.
for kind in (MaskFormerConfig, Mask2FormerConfig):
    kind.backbones_supported = [*kind.backbones_supported, ASelectConfig.model_type]
# Without torchvision both names stand for one class.
_BY_TORCHVISION = {"torchvision": ASelectImageProcessor} if is_torchvision_available() else {}
AutoImageProcessor.register(
    ASelectConfig, image_processor_classes={**_BY_TORCHVISION, "pil": ASelectImageProcessorPil}
)


class _NoVideoProcessor:
    """Stands where transformers' `pipeline` looks for a video processor, which it does for images as well.

    Where nothing is registered it takes the code beside an image processor for that of one, and asks whether it may
    run.
    """

    @classmethod
    def from_pretrained(cls, *_args: Any, **_kwargs: Any) -> None:
        """Say that there is none, as transformers finds of most models.

        Raises:
            ValueError: Always.
        """
        raise ValueError("hf_aselect models take images, and have no video processor.")


# The Auto class itself wants torchvision.
VIDEO_PROCESSOR_MAPPING.register(ASelectConfig, _NoVideoProcessor)  # type: ignore[arg-type]

# What is saved has the code, too, so that it can be loaded where this package is not installed.
ASelectConfig.register_for_auto_class()
DiTModel.register_for_auto_class("AutoModel")
DiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
DiTForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
DiTBackbone.register_for_auto_class("AutoBackbone")
