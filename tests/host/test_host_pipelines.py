"""transformers' tests of pipelines, on ours: images in, what the task gives out, one by one and in batches."""

import atexit
import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from PIL import Image
from transformers import pipeline

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
)

sys.path.insert(0, str(Path(__file__).parent))
from host_tests import host_module

MODELS = {model.task: model for model in (DiTModel, DiTForImageClassification, DiTForSemanticSegmentation)}
CONFIG = ASelectConfig(
    transformer={
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    },
    timestep=50,
    num_labels=4,
    head_hidden_size=16,
    head_num_attention_heads=2,
)

# Transformers' tiny models lie on the Hub; it takes those of a folder if it is told so before it is imported.
FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER)
(FOLDER / "reports").mkdir()
(FOLDER / "reports" / "tiny_model_summary.json").write_text(
    json.dumps(
        {
            model.__name__: {"tokenizer_classes": [], "processor_classes": ["ASelectImageProcessor"]}
            for model in MODELS.values()
        }
    )
)
with patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": str(FOLDER)}):
    HOST = host_module("test_pipeline_mixin")
# Where it looks a processor up by its name.
HOST.transformers_module = SimpleNamespace(ASelectImageProcessor=ASelectImageProcessor)


class Examples:
    """What transformers' test asks of a task; transformers' own are among those that its source distribution lacks."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32"):
        pictures = [Image.new("RGB", (12, 10), color) for color in ("red", "white")]
        return pipeline(model.task, model=model, image_processor=image_processor, dtype=dtype), pictures

    def run_pipeline_test(self, pipe, pictures):
        self.check(pipe, pipe(pictures[0]))
        for given in pipe(pictures):
            self.check(pipe, given)


class FeatureExamples(Examples):
    def check(self, pipe, given):
        assert [len(given), len(given[0]), len(given[0][0])] == [1, 16, 16]


class ClassificationExamples(Examples):
    def check(self, pipe, given):
        assert {entry["label"] for entry in given} == set(pipe.model.config.id2label.values())
        assert abs(sum(entry["score"] for entry in given) - 1) < 1e-2  # float16


class SegmentationExamples(Examples):
    def check(self, pipe, given):
        assert given
        assert {entry["label"] for entry in given} <= set(pipe.model.config.id2label.values())
        assert {entry["mask"].size for entry in given} == {(12, 10)}


for task, examples in {
    "image-feature-extraction": FeatureExamples,
    "image-classification": ClassificationExamples,
    "image-segmentation": SegmentationExamples,
}.items():
    HOST.pipeline_test_mapping[task] = {"test": f"{__name__}.{examples.__name__}"}


class PipelineTest(HOST.PipelineTesterMixin, unittest.TestCase):
    """Transformers' tests of all tasks; those that are none of ours skip themselves."""

    pipeline_model_mapping = MODELS

    @classmethod
    def setUpClass(cls):
        for model in MODELS.values():
            folder = FOLDER / ASelectConfig.model_type / model.__name__
            model(CONFIG).save_pretrained(folder)
            ASelectImageProcessor.from_model_config(CONFIG).save_pretrained(folder)

    # Four of transformers' tests want timm, which other models of these tasks need and ours do not.

    def test_pipeline_image_feature_extraction(self):
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self):
        self.run_task_tests("image-feature-extraction", dtype="float16")

    def test_pipeline_image_segmentation(self):
        self.run_task_tests("image-segmentation")

    def test_pipeline_image_segmentation_fp16(self):
        self.run_task_tests("image-segmentation", dtype="float16")
