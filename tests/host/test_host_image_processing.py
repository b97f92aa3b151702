"""transformers' tests of image processors, on ours: by PIL, and by torchvision where that is installed."""

import sys
import unittest
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils.import_utils import is_torchvision_available

from hf_aselect import ASelectImageProcessor, ASelectImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent))
from host_tests import host_module

HOST = host_module("test_image_processing_common")
# Of COCO, which is not fetched.
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
HOST.load_test_image = lambda _url: IMAGE


class ProcessorTester(HOST.ImageProcessingTester):
    """What transformers' tests ask of each processor."""

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 16, "width": 24})
        kwargs.setdefault("num_labels", 5)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        # Transformers looks its own processors up, by the folder of the test.
        both = {"torchvision": ASelectImageProcessor, "pil": ASelectImageProcessorPil}
        return both if is_torchvision_available() else {"pil": ASelectImageProcessorPil}


class ASelectImageProcessorTest(
    HOST.ImageProcessingTestMixin, HOST.PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    """Transformers' tests of an image processor."""

    image_processor_tester_class = ProcessorTester
    test_cast_dtype = True

    @unittest.skip("it gives images of four channels and asks for four back; ours gives the model's number, 1 or 3")
    def test_call_numpy_4_channels(self):
        """Four channels: see the reason."""

    @unittest.skip("it looks the processor up among transformers' own model types")
    def test_new_models_require_torchvision_backend(self):
        """New models of transformers."""
