"""transformers' tests of backbones, on ours."""

import sys
import unittest
from pathlib import Path

import torch

from hf_aselect import ASelectConfig, DiTBackbone

sys.path.insert(0, str(Path(__file__).parent))
from host_tests import host_module

HOST = host_module("test_backbone_common")
TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "num_layers": 4,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


class ModelTester:
    """What transformers' tests ask of each model."""

    def prepare_config_and_inputs_for_common(self):
        config = ASelectConfig(transformer=TRANSFORMER, timestep=50, out_features=["stage1", "stage3"])
        return config, {"pixel_values": torch.rand(2, 3, 8, 8)}


class DiTBackboneTest(HOST.BackboneTesterMixin, unittest.TestCase):
    """All of transformers' tests of a backbone."""

    all_model_classes = (DiTBackbone,)
    config_class = ASelectConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = ModelTester()
