"""transformers' example scripts for images, unmodified, on hf_aselect checkpoints: pushed ones and converted ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import host_scripts
import numpy as np
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as Images

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build_transformer

from hf_aselect import DiTForImageClassification, DiTForSemanticSegmentation, convert_diffusers
from hf_aselect.model.modeling_aselect import save_image_processor

FOLDER = host_scripts.folder()
needs_scripts = pytest.mark.skipif(
    not all((FOLDER / Path(path).name).exists() for path in host_scripts.SCRIPTS),
    reason="copy them: python tests/host/host_scripts.py CHECKOUT_OF_TRANSFORMERS",
)
TASKS = {"image_classification": DiTForImageClassification, "semantic_segmentation": DiTForSemanticSegmentation}
TRAINER = ["--do_train", "--do_eval", "--report_to", "none", "--remove_unused_columns", "False", "--use_cpu", "True"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of images in two classes, and of images with masks."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def image(shape=(8, 8, 3), high=255):
        return Images.fromarray(generator.integers(0, high, shape, dtype=np.uint8))

    for name in ("cat", "dog"):
        (root / "image_classification" / name).mkdir(parents=True)
        for number in range(12):
            image().save(root / "image_classification" / name / f"{number}.png")
    rows = {"image": [image() for _ in range(12)], "label": [image((8, 8), 2) for _ in range(12)]}
    (root / "semantic_segmentation").mkdir()
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Image()})).to_parquet(
        root / "semantic_segmentation" / "train.parquet"
    )
    names = json.dumps({"0": "background", "1": "digit"})
    (root / "semantic_segmentation" / "id2label.json").write_text(names, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved model of each task with its code and processor, as a push has them, and a converted folder."""
    from diffusers import DDPMScheduler

    root = tmp_path_factory.mktemp("checkpoints")
    build_transformer().save_pretrained(root / "source" / "transformer")
    DDPMScheduler().save_pretrained(root / "source" / "scheduler")
    small = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}
    for task, kind in TASKS.items():
        model = kind.from_pretrained(root / "source", timestep=20, num_labels=2, **small)
        model.save_pretrained(root / task, include_code=True)
        save_image_processor(model, root / task)
    convert_diffusers(root / "source", root / "converted", **small)
    return root


def test_scripts_are_copied_out_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = f'# Licensed under the {host_scripts.LICENSE}\ncheck_min_version("5.0.0.dev0")\n'
    for path in host_scripts.SCRIPTS:
        with pytest.raises(ValueError, match="is no script of transformers"):
            host_scripts.copy(tmp_path)
        script = tmp_path / "examples" / "pytorch" / path
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    versions = host_scripts.copy(tmp_path)
    assert versions == {Path(path).name: "5.0.0.dev0" for path in host_scripts.SCRIPTS}
    assert all((host_scripts.folder() / name).read_text(encoding="utf-8") == text for name in versions)


@needs_scripts
@pytest.mark.parametrize("start", ["package", "remote code", "converted"])
@pytest.mark.parametrize("script", [Path(path).name for path in host_scripts.SCRIPTS])
def test_a_script_runs_unmodified(script, start, data, checkpoints, tmp_path):
    task = next(task for task in TASKS if task in script)
    words = ["--model_name_or_path", checkpoints / ("converted" if start == "converted" else task)]
    words += ["--dataset_name", data / task, "--output_dir", tmp_path / "out", "--num_train_epochs", 1]
    words += ["--per_device_train_batch_size", 4, *([] if "no_trainer" in script else TRAINER)]
    words += ["--trust_remote_code"] if start == "remote code" else []
    words += ["--label_column_name", "label"] if task == "image_classification" else []
    command = [sys.executable, host_scripts.__file__, FOLDER / script, *words]
    given = {**os.environ, "HAS_PACKAGE": str(int(start != "remote code")), "HF_MODULES_CACHE": str(tmp_path / "code")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    said = done.stdout + done.stderr
    assert ("`hf-aselect select" in said) == (start == "converted"), "how to select first"
