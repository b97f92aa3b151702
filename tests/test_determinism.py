"""The same images give the same tokens, scores and timestep: in any batch, on any number of threads or processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import END_OF_PROCESSES
from forking import offline

pytestmark = pytest.mark.process

CODE = """
import json, os, sys
from importlib.resources import files
import torch
from datasets import load_dataset
from hf_aselect import ASelectImageProcessor, DiTModel, select_timestep

torch.set_num_threads(int(sys.argv[2]))
rank = int(os.environ.get("RANK", 0))
folder = files("hf_aselect") / "assets" / "fashion_mnist"
pictures = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")[:64]["image"]
model = DiTModel.from_pretrained(folder, timestep=35, block=5, feature="hidden")
processor = ASelectImageProcessor.from_model_config(model.config)
pixels = processor(pictures, return_tensors="pt").pixel_values
with torch.no_grad():
    tokens = {
        size: torch.cat([model(batch).last_hidden_state for batch in pixels.split(size)]) for size in (1, 7, 32)
    }
options = {"timesteps": model.noise_schedule.even_timesteps()[::5], "max_images": 64}
selections = [select_timestep(model, pictures, batch_size=size, **options) for size in (7, 32)]
found = {"tokens": tokens, "selections": [each.to_dict() for each in selections]}
torch.save(found, f"{sys.argv[1]}-{rank}.pt")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each run found, by its name: twice on one thread, once on two, and by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    code = CODE + END_OF_PROCESSES
    # One process has a memory and an order of sets of its own; the others are forks of one that has imported it all.
    alone = subprocess.run(
        [sys.executable, "-c", code, str(folder / "first"), "1"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    # Processes find each other, and share the images, where accelerate's state was made first.
    shared = "from accelerate import PartialState; PartialState()\n" + code
    for name, script, threads, world in (
        ("second", code, 1, 1),
        ("threads", code, 2, 1),
        ("processes", shared, 1, 2),
    ):
        status, said = offline().run(script, folder / name, threads, world=world)
        assert status == 0, said
    names = [path.stem for path in folder.iterdir()]
    assert sorted(names) == ["first-0", "processes-0", "processes-1", "second-0", "threads-0"]
    return {name: torch.load(folder / f"{name}.pt") for name in names}


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_two_runs_are_bit_equal(runs):
    for size in (1, 7, 32):
        assert torch.equal(runs["first-0"]["tokens"][size], runs["second-0"]["tokens"][size])
    first, second = (
        [{**each, "seconds": None} for each in runs[name]["selections"]] for name in ("first-0", "second-0")
    )
    assert first == second


@pytest.mark.parametrize("name", ["first-0", "threads-0", "processes-0", "processes-1"])
def test_tokens_are_equal_in_any_batch_thread_and_process(runs, name):
    expected = runs["first-0"]["tokens"][32]
    assert max(relative(tokens, expected) for tokens in runs[name]["tokens"].values()) <= 1e-6


def test_the_choice_is_the_same_in_all_of_them(runs):
    expected = runs["first-0"]["selections"][0]
    for run in runs.values():
        for found in run["selections"]:
            for name in ("timestep", "timesteps", "num_images", "confidence", "stopped_by", "block", "feature"):
                assert found[name] == expected[name]
            for name in ("scores", "smoothed", "intervals"):
                assert json.dumps(found[name])  # plain numbers
                assert torch.allclose(
                    torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-4, atol=1e-5, equal_nan=True
                )
