"""A training that is killed goes on where its last whole checkpoint ends, and ends with the very same weights."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from conftest import example
from datasets import ClassLabel, Dataset, Features, Image
from forking import SCRIPT, offline
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerState

from hf_aselect import ASelectImageProcessor, DiTModel

EXAMPLES = Path(__file__).parent.parent / "examples" / "image_classification"
NUM_STEPS = 24

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Forty-eight colour images of 10 × 12 in two classes."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    values = np.random.default_rng(0).integers(0, 256, (48, 10, 12, 3), dtype=np.uint8)
    columns = {"image": [PILImage.fromarray(value) for value in values], "label": (np.arange(48) % 2).tolist()}
    features = Features(image=Image(), label=ClassLabel(names=["dark", "bright"]))
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def trainer_words(pixel_folder, parquet, output):
    return [
        *(str(EXAMPLES / "train_image_classification.py"), "--model_name_or_path", str(pixel_folder)),
        *("--train_file", str(parquet), "--output_dir", str(output), "--timestep", "5", "--head_hidden_size", "16"),
        *("--head_num_attention_heads", "2", "--crop_share", "0.9", "--max_steps", str(NUM_STEPS)),
        *("--resample_noise_in_training", "True", "--save_steps", "4", "--per_device_train_batch_size", "4"),
        *("--use_cpu", "True", "--report_to", "none", "--learning_rate", "1e-2"),
    ]


def loop_words(pixel_folder, parquet, output):
    return [
        *(str(EXAMPLES / "train_image_classification_no_trainer.py"), "--model_name_or_path", str(pixel_folder)),
        *("--train_file", str(parquet), "--output_dir", str(output), "--timestep", "5", "--head_hidden_size", "16"),
        *("--head_num_attention_heads", "2", "--max_train_steps", str(NUM_STEPS), "--checkpointing_steps", "4"),
        *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2"),
    ]


@pytest.fixture(scope="module")
def noisy_folder(pixel_folder, tmp_path_factory):
    """A checkpoint of ours whose training draws numbers: fresh noise for each image."""
    folder = tmp_path_factory.mktemp("noisy")
    DiTModel.from_pretrained(pixel_folder, timestep=5, resample_noise_in_training=True).save_pretrained(folder)
    return folder


def finish(words):
    code, said = offline().run(SCRIPT, *words)
    assert code == 0, said[-3000:]
    return said


def kill_when(words, is_time):
    """Start a training, and kill it when something is there."""
    running = offline().start(SCRIPT, *words)
    deadline = time.monotonic() + 120
    while not is_time() and not running.has_ended and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.random() * 0.1)
    running.kill()
    return running.wait()[0]


@pytest.mark.parametrize(
    ("words_of", "pattern"),
    [
        pytest.param(trainer_words, "checkpoint-8", id="trainer"),
        pytest.param(loop_words, "step_8", id="loop", marks=pytest.mark.slow),
        pytest.param(loop_words, "step_16", id="loop in its second epoch"),
    ],
)
def test_killed_and_resumed_it_ends_with_the_same_weights(words_of, pattern, noisy_folder, parquet, tmp_path):
    whole, killed = (words_of(noisy_folder, parquet, tmp_path / name) for name in ("a", "b"))
    finish(whole)
    returncode = kill_when(killed, (tmp_path / "b" / pattern).exists)
    assert returncode == -signal.SIGKILL
    assert not (tmp_path / "b" / "model.safetensors").exists()
    finish([*killed, "--resume_from_checkpoint", "latest"])
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.mark.parametrize("words_of", [trainer_words, loop_words], ids=["trainer", "loop"])
def test_what_goes_on_at_the_end_of_an_epoch_ends_with_the_same_weights(words_of, noisy_folder, parquet, tmp_path):
    """The checkpoint of an epoch's last step is older than the epoch's evaluation, which is not made up for."""
    words, steps = (
        words_of(noisy_folder, parquet, tmp_path),
        {trainer_words: "--max_steps", loop_words: "--max_train_steps"},
    )
    every = {trainer_words: ["--save_steps=11", "--eval_strategy=epoch"], loop_words: ["--checkpointing_steps=11"]}
    words += [*every[words_of], f"{steps[words_of]}=13"]
    finish(words)
    weights = (tmp_path / "model.safetensors").read_bytes()
    # Another training there would leave checkpoints of two.
    code, said = offline().run(SCRIPT, *words)
    assert code and "of an earlier training" in said
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "checkpoint-13", ignore_errors=True)
    log = finish([*words, "--resume_from_checkpoint", "latest"])
    assert re.search("Resuming from .*11", log)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_a_half_written_checkpoint_is_passed_over(tmp_path, caplog):
    last_checkpoint = example("image_classification/train_image_classification.py").last_checkpoint
    for step, text in ((4, json.dumps({"global_step": 4})), (8, '{"global_step": 8'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-8, which is incomplete" in caplog.text and "checkpoint-12, which" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="There is no complete checkpoint"):
        last_checkpoint(str(tmp_path))


def test_a_checkpoint_that_lacks_another_process_share_is_passed_over(tmp_path, monkeypatch, caplog):
    last_checkpoint = example("image_classification/train_image_classification.py").last_checkpoint
    for step, files in ((4, "01"), (8, "0")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, "stateful_callbacks": {"EpochCallback": {"attributes": {"num_processes": 2}}}}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for rank in files:
            (folder / f"rng_state_{rank}.pth").touch()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert "written by 2 processes" in caplog.text
    caplog.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert "written by" not in caplog.text


def test_a_checkpoint_of_one_process_or_of_weights_alone_is_whole_for_several(tmp_path, monkeypatch):
    last_checkpoint = example("image_classification/train_image_classification.py").last_checkpoint
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step, file in ((4, "rng_state.pth"), (8, "model.safetensors")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / file).touch()
        assert last_checkpoint(str(tmp_path)) == str(folder)


def test_workers_that_persist_hear_of_the_epoch(parquet):
    """Each epoch has crops of its own, whoever makes them."""
    module = example("image_classification/train_image_classification.py")
    args = SimpleNamespace(image_column="image", label_column="label", crop_share=0.5)
    pictures = module.Pictures(Dataset.from_parquet(str(parquet)), ASelectImageProcessor(size=8), args, seed=0)
    loader = DataLoader(pictures, batch_size=48, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in range(3):
        pictures.epoch = epoch
        (batch,) = loader
        expected = torch.stack([pictures[index]["pixel_values"] for index in range(48)])
        assert torch.equal(batch["pixel_values"], expected)
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_the_sampler_of_several_processes_is_told_the_epoch_in_the_middle_of_it():
    """Under what accelerate makes of a loader that is shared, and of one that goes on in an epoch."""
    module = example("image_classification/train_image_classification.py")
    sampler = SeedableRandomSampler(range(16), data_seed=0)
    shared = BatchSamplerShard(torch.utils.data.BatchSampler(sampler, 2, False), num_processes=2, process_index=0)
    skipping = SkipBatchSampler(shared, skip_batches=1)
    for batches in (shared, skipping):
        loader = DataLoader(list(range(16)), batch_sampler=batches)
        module.EpochCallback().on_epoch_begin(None, TrainerState(epoch=3.25), None, train_dataloader=loader)
        assert sampler.epoch == 3
        sampler.set_epoch(0)


def test_a_folder_that_was_being_replaced_when_a_run_died_is_put_back(tmp_path, monkeypatch):
    module = example("pretraining/pretrain_dit.py")
    target, rename = tmp_path / "checkpoint", os.replace

    def killed(source, destination):
        if Path(destination) == target:
            raise KeyboardInterrupt
        rename(source, destination)

    (module.incomplete(target) / "log.json").write_text("old")
    module.complete(target)
    (module.incomplete(target) / "log.json").write_text("new")
    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        module.complete(target)
    monkeypatch.undo()
    assert not target.exists()
    module.restore(target)
    assert (target / "log.json").read_text() == "old"
    (module.incomplete(target) / "log.json").write_text("newer")
    module.complete(target)
    module.restore(target)
    assert (target / "log.json").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
