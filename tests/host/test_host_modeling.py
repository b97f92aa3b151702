"""transformers' tests of models, on ours: each of the four, as it wraps diffusers' transformer and folded."""

import sys
import unittest
from pathlib import Path

import torch

from hf_aselect import ASelectConfig, DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation, DiTModel

sys.path.insert(0, str(Path(__file__).parent))
from host_tests import host_module

HOST = host_module("test_modeling_common")
CONFIGURATION = host_module("test_configuration_common")
TRAINING = host_module("test_training_mixin")
FSDP = host_module("test_fsdp_mixin")

# The host knows a model's task by the name of its class.
for mapping, model in {
    "MODEL_MAPPING_NAMES": DiTModel,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": DiTBackbone,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": DiTForImageClassification,
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": DiTForSemanticSegmentation,
}.items():
    setattr(HOST, mapping, {**getattr(HOST, mapping), ASelectConfig.model_type: model.__name__})

TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
FIELDS = {
    "transformer": TRANSFORMER,
    "timestep": 50,
    "block": 1,
    "feature": "hidden",
    "zeroed_channels": [],
    "freeze_backbone": False,
    "head_hidden_size": 16,
    "head_num_attention_heads": 2,
}


class ModelTester:
    """What the host's tests ask of each model."""

    batch_size = 3
    image_size = 8
    num_hidden_layers = 2
    is_training = True

    def get_config(self):
        return ASelectConfig(**FIELDS)

    def prepare_config_and_inputs_for_common(self):
        pixel_values = HOST.floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class CommonTests(HOST.ModelTesterMixin, TRAINING.TrainingTesterMixin, FSDP.FSDPTesterMixin):
    """All of the host's tests of a model."""

    model_tester = None
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = ModelTester()
        self.config_tester = CONFIGURATION.ConfigTester(
            self, config_class=ASelectConfig, has_text_modality=False, **FIELDS
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class DiTModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTModel,)


class DiTBackboneTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTBackbone,)


class DiTForImageClassificationTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTForImageClassification,)


class DiTForSemanticSegmentationTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTForSemanticSegmentation,)
