"""Published results as commands: each row runs on stand-ins, and says what it loads where there is no network."""

import json

import numpy as np
import pytest
from conftest import build_transformer
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import DDPMScheduler
from forking import SCRIPT, offline
from PIL import Image as Images
from test_examples import EXAMPLES, example

pytestmark = pytest.mark.process

PUBLISHED = example("benchmarks/published.py")


def run(*words):
    code, said = offline().run(SCRIPT, EXAMPLES / "benchmarks/published.py", *words)
    return code, said


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A DiT of as many blocks as the rows name, on images of 8 × 8, and two files of dark and bright ones."""
    folder = tmp_path_factory.mktemp("stand-ins")
    build_transformer(num_layers=18).save_pretrained(folder / "model" / "transformer")
    DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    for split, count in (("train", 40), ("test", 12)):
        labels = [index % 2 for index in range(count)]
        images = [
            Images.fromarray(generator.integers(128 * label, 128 * label + 128, (8, 8, 3), dtype=np.uint8))
            for label in labels
        ]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("name", PUBLISHED.ROWS)
def test_a_row_is_measured_four_times(name, stand_ins, tmp_path):
    row = PUBLISHED.ROWS[name]
    words = ["--row", name, "--output_dir", tmp_path / "out", "--num_train_epochs", 1]
    words += ["--model", stand_ins / "model", "--train_file", stand_ins / "train.parquet"]
    words += ["--test_file", stand_ins / "test.parquet"]
    if "linear_probe.py" not in row.script:
        small = {"image_size": 8, "head_hidden_size": 16, "head_num_layers": 1, "head_num_attention_heads": 2}
        words += [each for key, value in small.items() for each in (f"--{key}", value)]
        words += ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
    code, said = run(*words)
    assert code == 0, said[-3000:]
    found = json.loads((tmp_path / "out" / "published.json").read_text(encoding="utf-8"))
    assert found["published"] == row.accuracy and len(found["measured"]) == 4
    for setting, measured in found["measured"].items():
        assert 0 <= measured["accuracy"] <= 1
        is_published = "published timestep" in setting
        assert (measured["timestep"] == row.timestep) or not is_published
    config = json.loads((tmp_path / "out/read-out-published-timestep/config.json").read_text(encoding="utf-8"))
    assert config["block"] == list(row.read_out["block"]) and config["feature"] == list(row.read_out["feature"])
    assert f"| single tap, published timestep | {row.feature} of {row.block} | {row.timestep} |" in said
    assert f"{row.accuracy:.2%} |" in said


def test_without_network_a_row_says_what_it_would_load(tmp_path):
    code, said = run("--row", "ddae-cifar10", "--output_dir", tmp_path / "out")
    assert code == 1
    for told in ("facebook/DiT-XL-2-256, revision refs/pr/1", "uoft-cs/cifar10", "hidden of block 13 at timestep 121"):
        assert told in said
    assert "That could not be loaded, and nothing is measured" in said and "Traceback" not in said
    code, said = run("--list")
    assert code == 0 and all(row.model in said and row.dataset in said for row in PUBLISHED.ROWS.values())
