"""transformers' tests of models, on ours: each of the four, as it wraps diffusers' transformer."""

import copy
import sys
import unittest
from pathlib import Path

from hf_aselect import ASelectConfig, DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation, DiTModel

sys.path.insert(0, str(Path(__file__).parent))
from host_tests import host_module

HOST = host_module("test_modeling_common")
CONFIGURATION = host_module("test_configuration_common")
TRAINING = host_module("test_training_mixin")
FSDP = host_module("test_fsdp_mixin")

# Transformers knows a model's task by the name of its class.
for mapping, model in {
    "MODEL_MAPPING_NAMES": DiTModel,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": DiTBackbone,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": DiTForImageClassification,
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": DiTForSemanticSegmentation,
}.items():
    setattr(HOST, mapping, {**getattr(HOST, mapping), ASelectConfig.model_type: model.__name__})
# It sets the epsilons of norms in the configuration, which are no fields of ours, and in `decoder`, which is a string.
HOST.set_config_for_less_flaky_test = lambda config: None

FIELDS = {
    "transformer": {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    },
    "timestep": 50,
    "block": 1,
    "feature": "hidden",
    "zeroed_channels": [],
    "freeze_backbone": False,
    "head_hidden_size": 16,
    "head_num_attention_heads": 2,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.5,
}


class ModelTester:
    """What transformers' tests ask of each model."""

    batch_size = 3
    num_hidden_layers = 2
    hidden_size = 16
    seq_length = 16
    is_training = True

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        height, width = config.image_height_width
        return config, {"pixel_values": HOST.floats_tensor([self.batch_size, config.num_channels, height, width])}


class CommonTests(HOST.ModelTesterMixin, TRAINING.TrainingTesterMixin, FSDP.FSDPTesterMixin):
    """All of transformers' tests of a model; here of a DiT on pixels."""

    # Each test class has one model of ours: what one test skips of it is not hidden by what runs of another.
    model_tester = None
    has_attentions = False
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def fields(self):
        return FIELDS

    def setUp(self):
        self.model_tester = ModelTester(ASelectConfig(**self.fields()))

    def test_config(self):
        config = CONFIGURATION.ConfigTester(self, config_class=ASelectConfig, has_text_modality=False, **self.fields())
        config.run_common_tests()

    @unittest.skip("there are no tokens of a text to embed")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("transformers' test makes batches of text alone")
    def test_training_overfit(self):
        pass


class BackboneTests(CommonTests):
    """What is different in a backbone, which gives maps."""

    def test_hidden_states_output(self):
        # One token stands before those of the image, as transformers' DPT wants them.
        self.model_tester.config.reshape_hidden_states = False
        self.model_tester.seq_length = 17
        super().test_hidden_states_output()

    @unittest.skip("a backbone's first output is a tuple of maps, which transformers' test takes for one tensor")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class LatentTests(CommonTests):
    """A DiT on latents: a VAE, which stays in float32, stands before it."""

    def fields(self):
        return {**FIELDS, "transformer": {**FIELDS["transformer"], "in_channels": 4}, "vae": VAE}


class FoldedTests(CommonTests):
    """A folded model: a plain vision transformer, on transformers' attention kernels."""

    def fields(self):
        folded = self.all_model_classes[0](ASelectConfig(**FIELDS)).fold().config
        return {**FIELDS, "folded": True, "folded_layout": folded.folded_layout}

    def setUp(self):
        super().setUp()
        # It has hidden states at its own taps alone, of which one is such.
        self.model_tester.expected_num_hidden_layers = 1
        # It gives no attention weights back, but that transformers' kernels agree can be told.
        self.has_attentions = "sdpa" in self._testMethodName or "attention_dynamically" in self._testMethodName


class DiTModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTModel,)


class DiTBackboneTest(BackboneTests, unittest.TestCase):
    all_model_classes = (DiTBackbone,)


class DiTForImageClassificationTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTForImageClassification,)


class DiTForSemanticSegmentationTest(CommonTests, unittest.TestCase):
    all_model_classes = (DiTForSemanticSegmentation,)


class LatentDiTModelTest(LatentTests, unittest.TestCase):
    all_model_classes = (DiTModel,)


class LatentDiTBackboneTest(BackboneTests, LatentTests, unittest.TestCase):
    all_model_classes = (DiTBackbone,)


class LatentDiTForImageClassificationTest(LatentTests, unittest.TestCase):
    all_model_classes = (DiTForImageClassification,)


class LatentDiTForSemanticSegmentationTest(LatentTests, unittest.TestCase):
    all_model_classes = (DiTForSemanticSegmentation,)


class FoldedDiTModelTest(FoldedTests, unittest.TestCase):
    all_model_classes = (DiTModel,)


class FoldedDiTBackboneTest(BackboneTests, FoldedTests, unittest.TestCase):
    all_model_classes = (DiTBackbone,)


class FoldedDiTForImageClassificationTest(FoldedTests, unittest.TestCase):
    all_model_classes = (DiTForImageClassification,)


class FoldedDiTForSemanticSegmentationTest(FoldedTests, unittest.TestCase):
    all_model_classes = (DiTForSemanticSegmentation,)
