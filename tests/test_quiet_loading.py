"""Loading a checkpoint that has no problems prints nothing but transformers' own lines."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

EMBEDDED = Path(__file__).parents[1] / "src" / "hf_aselect" / "assets" / "fashion_mnist"
# Progress bars, and the device that a pipeline uses.
OF_TRANSFORMERS = re.compile(r"Loading weights:.*|.*Device set to use.*|Fetching .*")
LOAD = """
import sys
import numpy
from PIL import Image
import hf_aselect
from transformers import AutoModelForImageClassification, pipeline
embedded, saved = sys.argv[1:]
hf_aselect.DiTModel.from_pretrained(embedded, timestep=19, block=4, feature="hidden")
model = AutoModelForImageClassification.from_pretrained(saved)
assert model.config.feature == "hidden", model.config.feature
image = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (28, 28), dtype=numpy.uint8))
found = pipeline("image-classification", model=saved)(image)
assert len(found) == 5, found
"""


def test_a_load_without_problems_prints_nothing_of_ours(tmp_path):
    import torch

    from hf_aselect import ASelectImageProcessor, DiTForImageClassification

    model = DiTForImageClassification.from_pretrained(
        EMBEDDED, timestep=19, block=4, feature="hidden", head="linear", num_labels=10
    )
    pixels = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.fit_head({"pixel_values": pixels, "labels": torch.arange(40) % 10})
    model.save_pretrained(tmp_path / "saved")
    ASelectImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "saved")
    # What a user has set, or this run, is not the default.
    kept = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name and "WARNINGS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(EMBEDDED), str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=kept,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = [line.strip() for line in re.split(r"[\r\n]+", done.stdout) if line.strip()]
    assert [line for line in lines if not OF_TRANSFORMERS.fullmatch(line)] == []


def test_the_report_of_a_new_head_names_its_source(caplog, tmp_path, monkeypatch):
    from hf_aselect import DiTForImageClassification, DiTModel

    # Other tests may have changed both.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        DiTForImageClassification.from_pretrained(EMBEDDED, timestep=19, block=4, num_labels=10)
        DiTModel.from_pretrained(EMBEDDED, timestep=19, block=4).save_pretrained(tmp_path)
        DiTForImageClassification.from_pretrained(tmp_path, num_labels=10)
    reports = [re.sub(r"\x1b\[\d*m", "", each.message) for each in caplog.records if "LOAD REPORT" in each.message]
    # Loggers that propagate report each of them twice.
    sources = list(dict.fromkeys(re.search("from: (.*)", each)[1] for each in reports))
    assert sources == [str(EMBEDDED), str(tmp_path)]
