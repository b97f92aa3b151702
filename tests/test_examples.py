"""The example scripts, each run as a user runs it: as a process, on few images.

The process is a fork of one that has imported the libraries, unless it is to be `alone`.
"""

import ast
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import example
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from forking import SCRIPT, offline
from packaging.version import Version
from PIL import Image as PILImage
from PIL import ImageOps
from pipelines import pixart_sigma
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_aselect import (
    ASelectConfig,
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    NoiseSchedule,
)
from hf_aselect.selection.distribution import Share
from hf_aselect.training.labelled_images import LabelledImages

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

pytestmark = pytest.mark.process


def run(script, *arguments, alone=False):
    if alone:
        command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        code, said = done.returncode, done.stdout + done.stderr
    else:
        code, said = offline().run(SCRIPT, EXAMPLES / script, *arguments)
    assert code == 0, said[-3000:]
    return said


@pytest.mark.parametrize(
    "script",
    [path for path in EXAMPLES.rglob("*.py") if path.name.startswith(("train_", "pretrain_"))],
    ids=lambda path: path.name,
)
def test_a_script_for_several_processes_ends_with_its_group_closed(script):
    (main,) = (each for each in ast.parse(script.read_text()).body if getattr(each, "name", "") == "main")
    assert ast.unparse(main.body[-1]).endswith("accelerator.end_training()")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Forty grey images of 8 × 8 in two classes: dark and bright."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    values = generator.integers(0, 100, (40, 8, 8)) + 150 * (np.arange(40) % 2)[:, None, None]
    columns = {
        "picture": [PILImage.fromarray(value.astype(np.uint8)) for value in values],
        "class": (np.arange(40) % 2).tolist(),
    }
    features = Features({"picture": Image(), "class": ClassLabel(names=["dark", "bright"])})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


PRETRAIN = (
    *("--image_column=picture", "--label_column=class", "--image_size=8", "--num_channels=1", "--num_layers=2"),
    *("--num_attention_heads=1", "--attention_head_dim=16", "--batch_size=8", "--warmup_steps=2"),
    "--mixed_precision=no",
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def prepare(script, *words):
    """The run that a script's command line asks for, in this process."""
    module = example(script)
    (args,) = module.HfArgumentParser(module.PretrainingArguments).parse_args_into_dataclasses(list(map(str, words)))
    name = {"pretrain_unet": "UNetPretraining", "pretrain_vae": "VAEPretraining"}.get(Path(script).stem, "Pretraining")
    return getattr(module, name)(args)


def kill_after_the_first_checkpoint(script, output, *arguments):
    """Start a run that writes a checkpoint after each step, and kill it after the first."""
    running = offline().start(SCRIPT, EXAMPLES / script, *arguments, "--checkpoint_minutes", "0")
    while not (output / "checkpoint").exists():
        assert not running.has_ended
        time.sleep(0.01)
    running.kill()
    _, said = running.wait()
    assert json.loads(said[said.index("{") :].splitlines()[0])["step"] == 1


@pytest.fixture(scope="module")
def pretrained(parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    words = ("--train_file", parquet, "--output_dir", folder, "--num_pictures", 48, *PRETRAIN)
    run("pretraining/pretrain_dit.py", *words, alone=True)
    return folder


def test_pretraining_ends_with_a_dit_that_loads(pretrained):
    model = DiTModel.from_pretrained(pretrained, timestep=5)
    assert model.config.num_hidden_layers == 2
    assert model.config.num_channels == 1
    log = json.loads((pretrained / "training_log.json").read_text())["log"]
    assert log[-1]["pictures"] == 48


@pytest.mark.parametrize(
    ("capabilities", "precision"), [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({}, "no")]
)
def test_pretraining_is_in_half_precision_where_the_processor_computes_in_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities, raising=False)
    assert example("pretraining/pretrain_dit.py").default_precision() == precision


def test_pretraining_keeps_the_stages_asked_for(parquet, pretrained, tmp_path):
    arguments = ("--train_file", parquet, "--output_dir", tmp_path, "--num_pictures", 48, *PRETRAIN)
    run("pretraining/pretrain_dit.py", *arguments, "--stages", 16, 20)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    stages = [(tmp_path / name / weights).read_bytes() for name in ("stage-16", "stage-20")]
    assert stages[0] != stages[1]
    # Looking at a stage does not change what comes after.
    assert (tmp_path / weights).read_bytes() == (pretrained / weights).read_bytes()
    assert DiTModel.from_pretrained(tmp_path / "stage-16", timestep=5).config.num_channels == 1


def test_pretraining_needs_no_labels(parquet, tmp_path):
    arguments = ("--train_file", parquet, "--output_dir", tmp_path, "--num_pictures", 16, *PRETRAIN)
    options = ("--label_column", "none", "--min_crop", 0.5, "--beta_schedule", "squaredcos_cap_v2")
    options += ("--prediction_type", "v_prediction")
    run("pretraining/pretrain_dit.py", *arguments, *options)
    model = DiTModel.from_pretrained(tmp_path, timestep=5)
    assert model.config.transformer["num_embeds_ada_norm"] == 1
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    # Half of the timesteps have more image than noise, and not a quarter, as by default.
    assert model.noise_schedule.log_snr(torch.tensor([490, 510])).sign().tolist() == [1, -1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pretraining_learns_the_noise_or_the_velocity(prediction_type):
    step = example("pretraining/pretrain_dit.py").training_step
    pixels, scheduler = torch.full((64, 1, 2, 2), 0.5), DDPMScheduler(prediction_type=prediction_type)

    def velocity(noised, timestep, class_labels):
        share = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (noised - share.sqrt() * pixels) / (1 - share).sqrt()
        return SimpleNamespace(sample=share.sqrt() * noise - (1 - share).sqrt() * pixels)

    batch = {"pixels": pixels, "labels": torch.zeros(64, dtype=torch.long)}
    torch.manual_seed(0)
    loss = step(velocity, scheduler, batch, SimpleNamespace(label_dropout=0.5), 1)
    assert (loss < 1e-4) == (prediction_type == "v_prediction")


def test_without_labels_the_samples_are_of_no_class(tmp_path):
    script = example("pretraining/pretrain_dit.py")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 1, "sample_size": 8}
    model = DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=1).eval()
    for name, value in (("plain", 0.0), ("nan", float("nan"))):
        # The class that no image was trained with, and that must not be used.
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.data[0] = value
        script.sample_grid(model, DDPMScheduler(), tmp_path / f"{name}.png", null_label=1, seed=0)
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "nan.png").read_bytes()


def test_pretraining_draws_a_row_of_pictures_for_each_class(pretrained):
    with PILImage.open(pretrained / "samples.png") as samples:
        assert samples.size == (2 * 2 * 8, 2 * 8 * 8)  # 2 classes, 8 rows, drawn twice as large


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@pytest.mark.parametrize("optim", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_pretraining_goes_on_where_it_was_killed(optim, parquet, pretrained, tmp_path):
    """A run that is killed after its first checkpoint and started again ends with the weights of one that was not."""
    arguments = ("--train_file", parquet, "--output_dir", tmp_path, "--num_pictures", 48, *PRETRAIN, "--optim", optim)
    kill_after_the_first_checkpoint("pretraining/pretrain_dit.py", tmp_path, *arguments)
    run("pretraining/pretrain_dit.py", *arguments)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    if optim == "adamw":
        assert (tmp_path / weights).read_bytes() == (pretrained / weights).read_bytes()
        other = ("--prediction_type", "v_prediction", "--seed", "7")
        code, said = offline().run(SCRIPT, EXAMPLES / "pretraining/pretrain_dit.py", *arguments, *other)
        assert code and "prediction_type 'epsilon', now 'v_prediction'; seed 0, now 7" in said
        assert DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.prediction_type == "epsilon"
        return
    whole = tmp_path / "whole"
    run("pretraining/pretrain_dit.py", *arguments, "--output_dir", whole)
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()
    assert (tmp_path / weights).read_bytes() != (pretrained / weights).read_bytes()


def test_pictures_are_known_wherever_they_lie_and_by_more_than_their_number(parquet, tmp_path):
    digest = example("pretraining/pretrain_dit.py").digest
    rows = Dataset.from_parquet(str(parquet))
    rows.to_parquet(tmp_path / "moved.parquet")
    known = digest(rows, "picture")
    assert digest(Dataset.from_parquet(str(tmp_path / "moved.parquet")), "picture") == known
    assert digest(rows.select(range(len(rows) - 1)), "picture") != known
    assert digest(rows.select(range(len(rows) - 1, -1, -1)), "picture") != known


@pytest.mark.parametrize("script", ["pretraining/pretrain_dit.py", "pretraining/pretrain_vae.py"])
def test_muon_asks_for_a_torch_that_has_it(script, parquet, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match=r"--optim muon requires torch >= 2\.9, got .* Give --optim adamw"):
        prepare(script, "--train_file", parquet, "--output_dir", tmp_path / "out", *PRETRAIN, "--optim", "muon")
    assert not (tmp_path / "out").exists()


@needs_muon
@pytest.mark.parametrize(
    ("script", "num_matrices"),
    [
        ("pretraining/pretrain_dit.py", 2 * 6),
        ("pretraining/pretrain_unet.py", 93),
        ("pretraining/pretrain_vae.py", 32),
    ],
)
def test_muon_moves_the_matrices_in_the_blocks_and_convolutions_as_such(script, num_matrices, parquet, tmp_path):
    words = ["--train_file", parquet, "--output_dir", tmp_path, *PRETRAIN, "--warmup_steps", 0, "--optim", "muon"]
    training = prepare(script, *words)
    weights = dict(training.model.named_parameters())
    assert len(training.matrices) == num_matrices
    for name, matrix in training.matrices.items():
        assert matrix.data_ptr() == weights[name].data_ptr() and matrix.shape[0] == len(weights[name])
    generator = torch.Generator().manual_seed(0)
    batch = {"pixels": torch.rand(8, 1, 8, 8, generator=generator), "labels": torch.zeros(8, dtype=torch.long)}
    for _ in range(3):  # what a DiT's blocks add is 0 at first, and then its output
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        training.optimize(batch)
    moved = {name for name in weights if not torch.equal(before[name], weights[name])}
    assert moved >= set(training.matrices) and len(moved) > len(training.matrices)
    if script == "pretraining/pretrain_dit.py":
        # Decay alone moves by a thousandth; each of Muon's steps is as long as one of AdamW's.
        length = {name: (weights[name] - before[name]).square().mean().sqrt() for name in training.matrices}
        assert all(1e-4 < value < 1e-3 for value in length.values()), length


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_learns_the_velocity_from_image_to_noise_along_a_straight_line(shift):
    step = example("pretraining/pretrain_dit.py").training_step
    images, seen = torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(1)), []

    def velocity(noised, timestep, class_labels):
        seen.append(timestep)
        return SimpleNamespace(sample=(noised - images) / (timestep.view(-1, 1, 1, 1) / 1000))

    batch = {"pixels": images, "labels": torch.zeros(4096, dtype=torch.long)}
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert step(velocity, scheduler, batch, SimpleNamespace(label_dropout=0.5), 1) < 1e-6
    (timesteps,) = seen
    assert timesteps.min() > 0 and timesteps.max() < 1000
    # Logit-normal, and the shift multiplies the odds: three standard errors of 4096 draws.
    odds = torch.logit(timesteps.double() / 1000) - np.log(shift)
    assert abs(odds.mean()) < 3 / 64 and abs(odds.std() - 1) < 3 / 90


FLOW_MATCHING = (*PRETRAIN, "--prediction_type", "flow_matching", "--shift", 3, "--num_pictures", 48)


@pytest.fixture(scope="module")
def flow_matched(parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    run("pretraining/pretrain_dit.py", "--train_file", parquet, "--output_dir", folder, *FLOW_MATCHING)
    return folder


def test_flow_matching_ends_with_a_dit_that_loads_and_generates(flow_matched):
    model = DiTModel.from_pretrained(flow_matched, timestep=300)
    assert (model.config.scheduler["_class_name"], model.config.scheduler["shift"]) == (
        "FlowMatchEulerDiscreteScheduler",
        3,
    )
    torch.testing.assert_close(model.noise_schedule.sigmas, torch.arange(1000).double() / 1000)
    torch.testing.assert_close(model.noise_schedule.alphas, 1 - model.noise_schedule.sigmas)
    generated = model.generate_latents(2, num_steps=10)
    assert generated.shape == (2, 1, 8, 8) and generated.isfinite().all()


def test_flow_matching_goes_on_where_it_was_killed(parquet, flow_matched, tmp_path):
    arguments = ("--train_file", parquet, "--output_dir", tmp_path, *FLOW_MATCHING)
    kill_after_the_first_checkpoint("pretraining/pretrain_dit.py", tmp_path, *arguments)
    run("pretraining/pretrain_dit.py", *arguments)
    assert (tmp_path / "transformer" / WEIGHTS).read_bytes() == (flow_matched / "transformer" / WEIGHTS).read_bytes()


VAE = (*PRETRAIN, "--label_column", "none", "--min_crop", 0.5, "--num_pictures", 48)


@pytest.fixture(scope="module")
def autoencoder_folder(parquet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    run("pretraining/pretrain_vae.py", "--train_file", parquet, "--output_dir", folder, *VAE, "--stages", 16)
    return folder


def normalized_images(parquet):
    """All images as they are given to a model, (40, 1, 8, 8)."""
    values = np.stack([np.asarray(image, dtype=np.float32) for image in Dataset.from_parquet(str(parquet))["picture"]])
    return torch.from_numpy(values)[:, None] / 127.5 - 1


def test_the_scaling_factor_of_a_trained_vae_gives_latents_a_deviation_of_one(parquet, autoencoder_folder):
    vae = AutoencoderKL.from_pretrained(autoencoder_folder, subfolder="vae").eval()
    with torch.no_grad():
        latents = vae.encode(normalized_images(parquet)).latent_dist.mean * vae.config.scaling_factor
    assert latents.shape == (40, 4, 2, 2)
    assert abs(latents.std() - 1) < 0.05


def test_a_trained_vae_draws_images_above_their_reconstructions(parquet, autoencoder_folder):
    with PILImage.open(autoencoder_folder / "samples.png") as samples:
        assert samples.size == (3 * 10 * 8, 3 * 2 * 8)
        first = np.asarray(samples.resize((10 * 8, 2 * 8), PILImage.Resampling.NEAREST))[:8, :8]
    assert np.array_equal(first, np.asarray(Dataset.from_parquet(str(parquet))[0]["picture"]))


def test_the_training_of_a_vae_goes_on_where_it_was_killed(parquet, autoencoder_folder, tmp_path):
    """The run that was not killed kept a stage: to measure and draw it took none of the numbers of random crops."""
    arguments = ("--train_file", parquet, "--output_dir", tmp_path, *VAE)
    kill_after_the_first_checkpoint("pretraining/pretrain_vae.py", tmp_path, *arguments)
    run("pretraining/pretrain_vae.py", *arguments)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "vae" / name).read_bytes() == (autoencoder_folder / "vae" / name).read_bytes()


def test_the_loss_of_a_vae_is_of_a_pass_of_the_prepared_model(parquet, tmp_path):
    """Of several processes, that pass alone shares the gradients."""
    training = prepare("pretraining/pretrain_vae.py", "--train_file", parquet, "--output_dir", tmp_path, *VAE)
    passes = []
    training.model.register_forward_hook(lambda *_: passes.append(1))
    training.loss({"pixels": normalized_images(parquet)[:4]}).backward()
    assert passes == [1]
    assert all(weight.grad is not None for weight in training.model.parameters())


@pytest.fixture(scope="module")
def latents_of(parquet, autoencoder_folder, tmp_path_factory):
    """The arguments of a run on latents that are shifted and scaled; it has ended."""
    folder = tmp_path_factory.mktemp("latents")
    vae = AutoencoderKL.from_pretrained(autoencoder_folder, subfolder="vae")
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    vae.save_pretrained(folder / "shifted")
    words = ("--train_file", parquet, "--output_dir", folder / "dit", *FLOW_MATCHING, "--label_column", "none")
    words += ("--vae_name_or_path", folder / "shifted", "--patch_size", 1, "--num_pictures", 16)
    run("pretraining/pretrain_dit.py", *words)
    return words


def given(words, option):
    return words[len(words) - 1 - words[::-1].index(option) + 1]


def test_a_dit_on_latents_reads_those_that_it_learned(parquet, latents_of):
    folder = given(latents_of, "--output_dir")
    assert (folder / "vae" / WEIGHTS).is_file()
    model = DiTModel.from_pretrained(folder, timestep=300)
    assert (model.config.image_size, model.config.num_channels) == (8, 1)
    images, training = normalized_images(parquet), prepare("pretraining/pretrain_dit.py", *latents_of)
    latents = training.encode(images)
    torch.testing.assert_close(model.encode(images), latents)
    plain = training.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(latents, (plain - 0.25) * 2)
    generated = model.generate_latents(2, num_steps=10)
    assert generated.shape == (2, 4, 2, 2) and generated.isfinite().all()


def test_samples_of_latents_are_decoded_as_images_were_encoded(latents_of, tmp_path):
    training = prepare("pretraining/pretrain_dit.py", *latents_of, "--output_dir", tmp_path)
    training.write_samples(training.model, tmp_path / "samples.png")  # a new model's velocity is 0: noise stays noise
    noise = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    decoded = training.vae.decode(noise / 2 + 0.25).sample.clamp(-1, 1)
    with PILImage.open(tmp_path / "samples.png") as samples:
        drawn = np.asarray(samples.resize((8, 8 * 8), PILImage.Resampling.NEAREST))
    # Rounding may fall on either side.
    assert np.abs(drawn - (decoded.numpy().reshape(64, 8) + 1) * 127.5).max() < 0.51


def test_a_run_on_latents_goes_on_with_a_vae_that_was_moved_but_not_with_another(latents_of, tmp_path):
    training = prepare("pretraining/pretrain_dit.py", *latents_of)
    assert training.step == training.num_steps
    moved = tmp_path / "moved"
    shutil.copytree(given(latents_of, "--vae_name_or_path"), moved)
    words = (*latents_of, "--vae_name_or_path", moved)
    assert prepare("pretraining/pretrain_dit.py", *words).step == training.num_steps
    vae = AutoencoderKL.from_pretrained(moved)
    vae.encoder.conv_in.bias.data[0] += 1
    vae.save_pretrained(moved)
    with pytest.raises(ValueError, match="contains a run with digest of the VAE"):
        prepare("pretraining/pretrain_dit.py", *words)


REFUSED = [
    ("dit", ("--shift", 3), r"--shift is for flow matching, got 3.0 with --prediction_type epsilon. Omit it"),
    ("dit", ("--prediction_type", "flow_matching", "--shift", 0), r"--shift must be above 0, .* got 0.0"),
    ("dit", ("--prediction_type", "flow_matching", "--shift", "nan"), r"--shift must be above 0, .* got nan"),
    (
        "dit",
        ("--prediction_type", "flow_matching", "--beta_schedule", "squaredcos_cap_v2"),
        r"has no betas, got --beta_schedule squaredcos_cap_v2. Omit it",
    ),
    ("dit", ("--image_size", 10), r"--image_size must be a multiple of 4 for .* got 10, for example 12"),
    ("dit", ("--vae_name_or_path", "VAE"), r"--image_size must be a multiple of 16 for .* got 8, for example 16"),
    ("dit", ("--vae_name_or_path", "VAE", "--num_channels", 3), r"--num_channels must be .* 1, got 3"),
    (
        "dit",
        ("--vae_name_or_path", "NOTHING"),
        r"must be a repository or folder of an `AutoencoderKL`.* got '.*nothing'",
    ),
    ("dit", ("--vae_name_or_path", "DIT"), r"got '.*transformer' with an `DiTTransformer2DModel`"),
    ("unet", ("--prediction_type", "flow_matching"), r"got --prediction_type flow_matching. Give epsilon or v_pred"),
    ("unet", ("--vae_name_or_path", "VAE"), r"pretrain_unet.py learns pixels, got --vae_name_or_path"),
    ("unet", ("--image_size", 6), r"--image_size must be a multiple of 4 .* got 6, for example 8"),
    ("vae", ("--vae_name_or_path", "VAE"), r"trains a VAE of its own, got --vae_name_or_path"),
    ("vae", ("--image_size", 6, "--patch_size", 2), r"--image_size must be a multiple of 4 .* got 6, for example 8"),
]


@pytest.mark.parametrize(("script", "words", "said"), REFUSED)
def test_pretraining_refuses_what_does_not_go_together(
    script, words, said, parquet, pretrained, autoencoder_folder, tmp_path
):
    folders = {"VAE": autoencoder_folder, "NOTHING": tmp_path / "nothing", "DIT": pretrained / "transformer"}
    (tmp_path / "nothing").mkdir()
    words = [folders.get(word, word) for word in words]
    arguments = ("--train_file", parquet, "--output_dir", tmp_path / "out", *PRETRAIN, *words)
    with pytest.raises(ValueError, match=said):
        prepare(f"pretraining/pretrain_{script}.py", *arguments)
    assert not (tmp_path / "out").exists()


def test_training_a_classifier_ends_with_everything_in_its_folder(parquet, pretrained, tmp_path):
    run(
        "image_classification/train_image_classification.py",
        *("--model_name_or_path", pretrained, "--train_file", parquet, "--validation_file", parquet),
        *("--image_column", "picture", "--label_column", "class", "--timestep", "auto", "--block", "-1"),
        *("--feature", "hidden", "--head", "linear", "--output_dir", tmp_path, "--max_steps", 30),
        *("--learning_rate", "0.05", "--report_to", "none", "--use_cpu", "--num_calibration_images", 8),
    )
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "eval_results.json"):
        assert (tmp_path / name).exists(), name
    model = DiTForImageClassification.from_pretrained(tmp_path)
    assert (model.config.feature, model.config.block, model.config.head) == ("hidden", -1, "linear")
    assert model.config.id2label == {0: "dark", 1: "bright"}
    assert model.config.selection["num_images"] == 8
    # Dark and bright images are told apart: training did something.
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_accuracy"] == 1.0


@pytest.mark.parametrize(
    "script",
    [
        "image_classification/train_image_classification.py",
        "image_classification/train_image_classification_no_trainer.py",
    ],
)
def test_a_validation_split_may_have_its_classes_in_another_order(script, tmp_path):
    for split, names in (("train", ["dark", "bright"]), ("validation", ["bright", "dark"])):
        rows = {
            "image": [PILImage.new("L", (8, 8), 200 * index) for index in range(2)],
            "label": [names.index(name) for name in ("dark", "bright")],
        }
        features = Features(image=Image(), label=ClassLabel(names=names))
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    files = {f"{split}_file": str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    args = SimpleNamespace(
        dataset_name=None, train_dir=None, streaming=False, image_column="image", label_column="label", **files
    )
    args.class_names, args.seed = None, 0
    module = example(script)
    loaded = (
        module.load_splits(args, 0)
        if script == "image_classification/train_image_classification.py"
        else module.load_splits(args)
    )
    train, held_out = loaded.values() if isinstance(loaded, dict) else loaded
    assert train["label"][:] == held_out["label"][:] == [0, 1]


def test_classes_named_by_strings_are_those_of_the_training_split(pretrained, tmp_path):
    """Validation lacks the first class; its images must still be scored against the right ones."""
    levels = {"black": 0, "grey": 120, "white": 250}
    names = {"train": ["black", "grey", "white"] * 6, "test": ["grey", "white"] * 4}
    for split, labels in names.items():
        pictures = [PILImage.new("L", (8, 8), levels[label] + i % 3) for i, label in enumerate(labels)]
        Dataset.from_dict({"image": pictures, "label": labels}).cast_column("image", Image()).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    run(
        "image_classification/train_image_classification.py",
        *("--model_name_or_path", pretrained, "--train_file", tmp_path / "train.parquet", "--validation_file"),
        *(tmp_path / "test.parquet", "--head", "linear", "--feature", "hidden", "--block", "-1", "--max_steps", 40),
        *("--learning_rate", "0.05", "--report_to", "none", "--use_cpu", "--output_dir", tmp_path / "out"),
    )
    model = DiTForImageClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["black", "grey", "white"]
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"] == 1.0
    # No --timestep was given, so it was selected.
    assert model.config.selection["num_images"] == 18


@pytest.mark.parametrize("num_channels", [1, 3])
def test_pretraining_reads_images_of_any_depth(num_channels):
    script = example("pretraining/pretrain_dit.py")
    values = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    images = [PILImage.fromarray(values), PILImage.fromarray(values.astype(np.uint16) * 257)]
    images += [
        PILImage.fromarray(values.astype(np.int32) * 257),
        PILImage.fromarray((values / 255).astype(np.float32)),
    ]
    args = SimpleNamespace(
        image_size=8, num_channels=num_channels, min_crop=1, image_column="image", label_column=None
    )
    expected, *others = script.to_tensors({"image": images}, args)["pixels"]
    assert expected.shape == (num_channels, 8, 8)
    assert torch.equal(expected[0], script.to_tensors({"image": images[:1]}, args)["pixels"][0][0])
    whole = np.asarray(ImageOps.fit(images[0].convert("RGB"), (8, 8)), np.float32)[..., 0] / 127.5 - 1
    assert np.array_equal(expected[0].numpy(), whole)
    assert all(torch.equal(each, expected) for each in others)


def test_training_on_a_folder_of_pictures(pretrained, tmp_path):
    for index, name in enumerate(["dark", "bright"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            PILImage.new("L", (9, 9), 200 * index + number).save(tmp_path / "data" / name / f"{number}.png")
    run(
        "image_classification/train_image_classification.py",
        *("--model_name_or_path", pretrained, "--train_dir", tmp_path / "data", "--timestep", 5, "--head", "linear"),
        *("--output_dir", tmp_path / "out", "--max_steps", 1, "--report_to", "none", "--use_cpu"),
    )
    assert DiTForImageClassification.from_pretrained(tmp_path / "out").config.timestep == 5


def test_training_a_segmenter_ends_with_everything_in_its_folder(pretrained, tmp_path):
    """Images of a dark and a bright half, on either side."""
    rng = np.random.default_rng(0)
    pictures, masks = [], []
    for _ in range(16):
        mask = np.zeros((12, 16), dtype=np.uint8)
        mask[:, 8:] = 1
        mask = mask[:, ::-1] if rng.random() < 0.5 else mask
        pictures.append(PILImage.fromarray((200 * mask + rng.integers(0, 40, mask.shape)).astype(np.uint8)))
        mask[0, 0] = 255
        masks.append(PILImage.fromarray(mask))
    data = Dataset.from_dict({"image": pictures, "annotation": masks})
    data.cast_column("image", Image()).cast_column("annotation", Image()).to_parquet(tmp_path / "data.parquet")
    run(
        "semantic_segmentation/train_semantic_segmentation.py",
        *("--model_name_or_path", pretrained, "--train_file", tmp_path / "data.parquet"),
        *("--validation_file", tmp_path / "data.parquet", "--class_names", "dark, bright", "--timestep", 5),
        *("--feature", "hidden", "--block", "-1", "--output_dir", tmp_path / "out", "--max_steps", 40),
        *("--learning_rate", "0.05", "--report_to", "none", "--use_cpu", "--num_overlays", 2),
    )
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md"):
        assert (tmp_path / "out" / name).exists(), name
    figures = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert figures["eval_mean_iou"] > 0.8
    assert figures["eval_iou_bright"] > 0.8 and figures["eval_absent_classes"] == ""
    assert "pipeline_tag: image-segmentation" in (tmp_path / "out" / "README.md").read_text()
    with PILImage.open(tmp_path / "out" / "overlays.png") as overlays:
        assert overlays.width > 500
    model = DiTForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "bright"}


def test_the_benchmark_ends_with_a_table_of_what_each_criterion_loses(parquet, pretrained, tmp_path):
    run(
        "benchmarks/selection_regret.py",
        *("--name", "tiny", "--model_name_or_path", pretrained, "--train_file", parquet, "--test_file", parquet),
        *("--image_column", "picture", "--label_column", "class", "--num_timesteps", 3, "--seeds", 0),
        *("--output_dir", tmp_path),
    )
    result = json.loads((tmp_path / "tiny.json").read_text())
    accuracies = [row["accuracies"] for row in result["accuracy"]]
    assert {(row["block"], row["feature"]) for row in result["accuracy"]} == {
        (block, feature) for block in (0, 1) for feature in ("hidden", "query", "key", "value")
    }
    # Dark and bright are told apart where there is little noise.
    assert all(each[0] == 1.0 for each in accuracies)
    named = {row["criterion"] for row in result["rows"]}
    former = "consensus of all timesteps"
    assert {"hfr", "signal_hfr", "consensus", former, "consensus, own images", "signal_hfr, own images"} <= named
    assert {"probe, 40 labels", "RankMe", "LiDAR", "t = 0", "random t"} <= named
    assert all(row["loss"] == 0 for row in result["rows"] if row["criterion"] == "t = 0")
    # It selects for each head, and answers for that one alone; the attention head is tried at half of the taps.
    own = [row for row in result["rows"] if row["criterion"] == "consensus"]
    assert len([row for row in own if "loss" in row]) == 8
    assert len([row for row in own if "attention_loss" in row]) == 4
    assert not [row for row in own if {"loss", "attention_loss"} <= row.keys()]
    taps = [row for row in result["rows"] if "tap_loss" in row]
    assert {(row["criterion"], row["truth"]) for row in taps} == {
        (f"tap and timestep: {way}", truth)
        for way in ("consensus", "default tap", "probe")
        for truth in ("ridge", "attention")
    }
    table = (tmp_path / "table.md").read_text()
    assert "over 1 pairs" in table
    assert "\n| consensus | 0." in table
    assert "| points lost, linear head, all pairs | mean ≤ 0.5, worst ≤ 3 | " in table
    assert "\n| consensus, attention head | " in table.split("images that the DiT generates itself")[1]
    with PILImage.open(tmp_path / "tiny.png") as picture:
        assert picture.width > 800
    # Again at one tap, with two attention heads: what is known of the others stays.
    run(
        "benchmarks/selection_regret.py",
        *("--name", "tiny", "--model_name_or_path", pretrained, "--train_file", parquet, "--test_file", parquet),
        *("--image_column", "picture", "--label_column", "class", "--num_timesteps", 3, "--seeds", 0),
        *("--output_dir", tmp_path, "--only_taps", "0.query", "--num_attention_seeds", 2, "--own_pictures", False),
    )
    again = json.loads((tmp_path / "tiny.json").read_text())

    def at_others(rows):
        return [row for row in rows if (row["block"], row["feature"]) != (0, "query") or "tap_loss" in row]

    assert at_others(again["rows"]) == at_others(result["rows"])
    assert [row["num_attention_seeds"] for row in again["again"]] == [2]
    assert len(again["rows"]) == len(result["rows"])
    assert len(again["accuracy"]) == len(result["accuracy"])
    updated = example("benchmarks/selection_regret.py").updated
    other = {**again, "accuracy": [{**row, "accuracies": [0.5]} for row in again["accuracy"]]}
    with pytest.raises(ValueError, match="another search"):
        updated(again, other, [(0, "query")])


def test_taps_that_are_not_known_yet_cannot_be_tried_again(tmp_path):
    known_results = example("benchmarks/selection_regret.py").known_results
    with pytest.raises(ValueError, match="Run it without first"):
        known_results(tmp_path / "tiny.json", [(0, "query")])


def test_a_loss_is_not_the_luck_of_one_attention_head():
    """Of two heads one is right at t = 0 alone and one at t = 1 alone: neither gains by what the other says."""
    hits = np.zeros((2, 2, 100))
    hits[0, 0] = hits[1, 1] = 1
    loss = example("benchmarks/selection_regret.py").loss
    assert loss(hits, 0) == -50
    assert loss(hits[:, :1], 1) == 100
    assert loss(hits[:, :1], 0) == 0


@pytest.mark.slow
def test_sets_of_timesteps_are_compared(parquet, pretrained, tmp_path):
    rows = Dataset.from_parquet(str(parquet)).rename_columns({"picture": "image", "class": "label"})
    rows.to_parquet(tmp_path / "rows.parquet")
    words = ("--train_file", tmp_path / "rows.parquet", "--test_file", tmp_path / "rows.parquet", "--seeds", 0)
    output = tmp_path / "several.json"
    for name in ("one", "other"):
        run(
            "benchmarks/several_timesteps.py",
            *("--name", name, "--model_name_or_path", pretrained, *words, "--num_timesteps", 2, "--output", output),
        )
    known = json.loads(output.read_text())
    assert list(known) == ["one", "other"]
    sets = known["one"]["taps"]["all blocks"]
    assert {"one, by labels", "greedy, by labels", "evenly spaced", "selected at the middle, seed 0"} <= sets.keys()
    assert all(len(row["timesteps"]) == (1 if name.startswith("one") else 2) for name, row in sets.items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read as Linux tells it")
def test_the_cost_of_a_selection_is_measured(parquet, pretrained, tmp_path):
    run(
        "benchmarks/selection_cost.py",
        *("--model_name_or_path", pretrained, "--image_file", parquet, "--image_column", "picture", "--num_seeds", 3),
        *("--num_images", 4, 40, "--num_timesteps", 2, "--output_dir", tmp_path),
    )
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["criterion"] == "consensus"
    assert len(cost["timesteps"]) == len(cost["seconds"]) == 3
    assert [(row["num_images"], row["num_timesteps"]) for row in cost["memory"]] == [(4, 2), (40, 2)]
    assert all(0 <= row["rise_mib"] < row["before_mib"] for row in cost["memory"])


@pytest.mark.slow
def test_the_classification_benchmark_fills_its_table_and_goes_on(parquet, pretrained, tmp_path):
    names = {"picture": "image", "class": "label"}
    Dataset.from_parquet(str(parquet)).rename_columns(names).to_parquet(tmp_path / "pictures.parquet")
    run(
        "pretraining/pretrain_unet.py",
        *("--train_file", parquet, "--output_dir", tmp_path / "unet", "--num_pictures", 16, *PRETRAIN),
        *("--optim", "muon"),
    )
    files = ("--train_file", tmp_path / "pictures.parquet", "--test_file", tmp_path / "pictures.parquet")
    words = [*files, "--dit", pretrained, "--output_dir", tmp_path / "out", "--seeds", 0, "--epochs", 1]
    first = run("benchmarks/cifar10.py", *words, "--without", "efficientnet", "lora", "fine_tune")
    assert "LoRA" not in first
    second = run("benchmarks/cifar10.py", *words, "--unet", tmp_path / "unet", "--without", "efficientnet")
    # What was measured is not measured again.
    assert "raw pixels, linear, seed 0" in first and "raw pixels, linear, seed 0" not in second
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["pretraining"]) == ["DiT", "UNet"]
    assert {name.split(",")[-1].split(" (")[0].strip() for name in results["rows"]} == {
        "linear",
        "attention head",
        "LoRA",
        "all weights",
    }
    assert results["rows"]["raw pixels, linear"]["0"]["accuracy"] >= 0.9  # dark and bright images
    assert str(tmp_path) not in json.dumps(results)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(results["rows"]) + 1 and "85.73" in lines[-1]
    with PILImage.open(tmp_path / "out" / "curve.png") as picture:
        assert picture.width > 800


READ_OUTS = example("benchmarks/read_outs.py")


def test_features_of_others_get_the_head_that_fit_head_makes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (90,), generator=generator)
    features = torch.randn(90, 32, generator=generator) + labels[:, None] * torch.linspace(0, 1, 32)
    config = {"timestep": [5, 9], "block": "all", "feature": "hidden", "head": "linear", "num_labels": 3}
    transformer = {"_class_name": "DiTTransformer2DModel", "num_layers": 2, "num_attention_heads": 1}
    transformer |= {"attention_head_dim": 8, "sample_size": 8, "patch_size": 4, "in_channels": 1}
    model = DiTForImageClassification(ASelectConfig(transformer=transformer, **config))
    fit = model.fit_head({"features": features, "labels": labels})
    solution = READ_OUTS.closed_form(features, labels, 3)
    assert (solution.strength, solution.accuracy) == (fit.strength, fit.accuracy)
    assert torch.allclose(solution.weight.float(), model.classifier.output_projection.weight, rtol=1e-5)
    assert torch.allclose(solution.bias.float(), model.classifier.output_projection.bias, rtol=1e-5)


@pytest.mark.parametrize(("selected", "place"), [(100, 1), (0, 0), (999, 2)])
def test_timesteps_of_a_read_out_lie_around_the_selected_one(selected, place):
    schedule = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"})
    selection = SimpleNamespace(timestep=selected)
    assert READ_OUTS.timestep_set(schedule, selection, 1) == [selected]
    timesteps = READ_OUTS.timestep_set(schedule, selection, 3)
    assert timesteps[place] == selected and len(timesteps) == 3
    levels = [float(schedule.log_snr(timestep)) for timestep in timesteps]
    if selected == 100:
        assert levels == pytest.approx([levels[1] + 2, levels[1], levels[1] - 2], abs=0.1)
    else:
        assert min(levels[0] - levels[1], levels[1] - levels[2]) > 1


@pytest.fixture(scope="module")
def unet_folder(pretrained, tmp_path_factory):
    """A UNet of random weights, as `pretrain_unet.py` writes one."""
    folder = tmp_path_factory.mktemp("unet")
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8, 16)}
    norm = {"norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 3, "attention_head_dim": 8}
    UNet2DModel(**blocks, **sizes, **norm).save_pretrained(folder / "unet")
    shutil.copytree(pretrained / "scheduler", folder / "scheduler")
    shutil.copy(pretrained / "training_log.json", folder)
    return folder


def test_read_outs_fill_their_table_and_go_on(parquet, pretrained, unet_folder, tmp_path):
    names = {"picture": "image", "class": "label"}
    Dataset.from_parquet(str(parquet)).rename_columns(names).to_parquet(tmp_path / "images.parquet")
    output = tmp_path / "out"
    words = ["--dit", pretrained, "--output_dir", output, "--seeds", 0, "--head_epochs", 2]
    words += ["--train_file", tmp_path / "images.parquet", "--test_file", tmp_path / "images.parquet"]
    first = run("benchmarks/read_outs.py", *words, "--rows", "raw pixels", "DiT, all blocks")
    assert "UNet" not in first and "random weights" not in first
    second = run("benchmarks/read_outs.py", *words, "--unet", unet_folder, "--without", "EfficientNet")
    # What was measured is not measured again.
    assert (
        "raw pixels, linear in closed form, seed 0" in first and "raw pixels, linear" not in second.split("| ---")[0]
    )
    results = json.loads((output / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(results)
    rows = {name: row for name, row in results["rows"].items() if row["seeds"]}
    assert [row["kind"] for row in rows.values()].count("attention head") == 8
    widths = {name.partition(", t")[0]: row["width"] for name, row in rows.items() if "attention" in name}
    assert widths["DiT, all blocks"] == 2 * 16 and widths["DiT, blocks 0, 1"] == 3 * 2 * 16
    assert widths["UNet, all stages"] in ((16 + 16 + 8 + 8), 3 * (16 + 16 + 8 + 8))
    for name, row in rows.items():
        if "random" not in name and "linear" in name:
            assert row["seeds"]["0"]["accuracy"] >= 0.9, name  # dark and bright images
    assert set(results["grids"]) == {"dit-all", "unet"}
    table = (output / "table.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith(("| DiT", "| UNet", "| raw"))]) == len(rows)
    # Tokens are removed when no row needs them.
    assert {path.name.rpartition("-")[2] for path in (output / "features").iterdir()} == {"means.npy"}


def test_a_unet_of_another_noise_schedule_is_not_read_beside_a_dit(pretrained, unet_folder, tmp_path):
    folder = shutil.copytree(unet_folder, tmp_path / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="different noise schedules"):
        READ_OUTS.UNetSource(str(folder), DiTModel.from_pretrained(pretrained, timestep=0))


READ_OUTS_SEGMENTATION = example("benchmarks/read_outs_segmentation.py")


def test_crops_of_an_image_are_held_out_together():
    pixels, masks = torch.rand(6, 1, 4, 8), torch.randint(0, 3, (6, 4, 8))
    views = torch.tensor([0, 0, 1, 1, 2, 2])
    dataset = READ_OUTS_SEGMENTATION.dataset_of(pixels, masks, views)
    images = LabelledImages(dataset, DiTForSemanticSegmentation.config_class(num_labels=3), is_dense=True)
    assert images.image_numbers(list(range(6))).tolist() == [0, 1, 0, 1, 0, 1]
    (batch,) = images.labelled_batches(6, Share())
    assert torch.equal(batch.inputs["pixel_values"], pixels) and torch.equal(batch.labels, masks)


@pytest.mark.slow
def test_read_outs_of_segmentation_fill_their_table_and_go_on(tmp_path):
    # UperNet, whose maps the script reads, too, wants four blocks.
    sizes = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 4, "sample_size": 8, "patch_size": 4}
    transformer = DiTTransformer2DModel(**sizes, in_channels=1, out_channels=1, num_embeds_ada_norm=2)
    transformer.save_pretrained(tmp_path / "dit" / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    generator = np.random.default_rng(0)
    rows = [PILImage.fromarray(generator.integers(0, 255, (16, 24, 3), dtype=np.uint8)) for _ in range(8)]
    masks = [PILImage.fromarray(np.repeat(np.arange(16) // 6, 24).reshape(16, 24).astype(np.uint8)) for _ in rows]
    features = Features({"image": Image(), "annotation": Image()})
    path = tmp_path / "scenes.parquet"
    Dataset.from_dict({"image": rows, "annotation": masks}, features=features).to_parquet(path)
    words = ["--model_name_or_path", tmp_path / "dit", "--train_file", path, "--test_file", path]
    words += ["--image_size", 16, 24, "--num_views", 2, "--num_epochs", 1, "--num_linear_epochs", 1, "--seeds", 0]
    words += ["--output_dir", tmp_path / "out", "--class_names", "floor,wall,roof"]
    said = run("benchmarks/read_outs_segmentation.py", *words)
    content = json.loads((tmp_path / "out" / "read_outs.json").read_text())
    fitted = [each for each in content["runs"] if each["method"] == "closed form"]
    assert len(fitted) == 18 and len(content["runs"]) == 21
    assert {each["read_out"]: each["width"] for each in fitted} == {
        "one tap": 16,
        "all blocks": 4 * 16,
        "all blocks, three timesteps": 3 * 4 * 16,
    }
    assert str(tmp_path) not in json.dumps(content)
    table = (tmp_path / "out" / "read_outs.md").read_text()
    assert table in said and len(table.splitlines()) == 2 + 21
    again = run("benchmarks/read_outs_segmentation.py", *words)
    assert "closed-form-one-tap-0:" in said and "closed-form-one-tap-0:" not in again


@pytest.mark.slow
def test_the_cost_of_read_outs_and_of_fitting_is_measured(monkeypatch, tmp_path, capsys):
    script = example("benchmarks/read_outs_speed.py")
    monkeypatch.setattr(script, "NUM_CACHED", 60)
    monkeypatch.setitem(script.read_outs.__globals__, "configuration", tiny_configuration(script.configuration))
    words = ["read_outs_speed.py", "--output", str(tmp_path / "out.json"), "--repetitions", "1", "--num_images", "40"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert script.tables(result) in capsys.readouterr().out
    rows = {(row["size"], row["read_out"]): row for row in result["read_outs"]}
    assert len(rows) == 6 and all(row["processor_seconds"] > 0 for row in rows.values())
    assert rows["embedded", "deepest block"]["times"] == 1
    # Three passes take longer than one, whatever else the machine does.
    assert rows["embedded", "all blocks, three timesteps"]["processor_times"] > 1.5
    assert [row["what"] for row in result["fitting"] if "times" in row] == ["one pass over images", "fit_head, images"]
    (cached,) = [row for row in result["fitting"] if row["what"] == "fit_head, cached means"]
    assert (cached["images"], cached["width"]) == (60, 1024)


def tiny_configuration(configuration):
    """A DiT of two blocks and small images in place of one of real size."""

    def made(size, **fields):
        config = configuration(size, latents=8, **fields)
        transformer = {**config.transformer, "num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16}
        return ASelectConfig(**{**config.to_diff_dict(), "transformer": transformer, "block": 1})

    return made


def test_fashion_mnist_becomes_parquet(tmp_path):
    pictures, labels = bytes(range(196)) * 4 * 3, bytes([9, 0, 3])
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pictures))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))
    run("pretraining/fashion_mnist_to_parquet.py", tmp_path, tmp_path / "out", "--num_test", 2)
    train, test = (Dataset.from_parquet(str(tmp_path / "out" / f"{name}.parquet")) for name in ("train", "test"))
    assert (train["label"][:], test["label"][:]) == ([9, 0, 3], [9, 0])
    assert train[0]["image"].size == (28, 28)


def test_digits_become_parquet(tmp_path):
    said = run("pretraining/digits_to_parquet.py", tmp_path, "--image_size", 16)
    assert f"{tmp_path / 'test.parquet'}: 797 images" in said
    train, test = (Dataset.from_parquet(str(tmp_path / f"{name}.parquet")) for name in ("train", "test"))
    assert (len(train), len(test)) == (1000, 797)
    digits = load_digits()
    assert train["label"][:] + test["label"][:] == digits.target.tolist()
    assert train.features["label"].names == list("0123456789")
    image = np.asarray(train[0]["image"])
    assert image.shape == (16, 16) and image.dtype == np.uint8
    # A black frame, and inside the same digit.
    assert image[:2].max() == image[-2:].max() == image[:, :2].max() == image[:, -2:].max() == 0
    inside = np.asarray(PILImage.fromarray(image[2:-2, 2:-2]).resize((8, 8), PILImage.Resampling.BOX))
    assert np.corrcoef(inside.ravel(), digits.images[0].ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--image_size", 7, "at least 8, .*got 7"), ("--num_train", 1797, r"in \[1, 1796\], got 1797")],
)
def test_digits_are_not_made_smaller_and_some_are_left_to_test(option, value, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["digits_to_parquet.py", str(tmp_path / "out"), option, str(value)])
    with pytest.raises(SystemExit):
        example("pretraining/digits_to_parquet.py").main()
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 takes no free batch here")
def test_a_trained_model_is_written_as_onnx(pretrained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the `export` extra is not installed")
    model = DiTForImageClassification.from_pretrained(pretrained, timestep=50, num_labels=2, head="linear")
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "model.onnx"
    said = run("features/export_onnx.py", "--model_name_or_path", tmp_path / "model", "--output", output)
    assert "within" in said
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(output)
    (logits,) = session.run(["logits"], {"pixel_values": np.zeros((5, 1, 8, 8), np.float32)})
    assert logits.shape == (5, 2)


def test_the_linear_probe_picks_a_learning_rate_and_saves_what_it_measured(pretrained, parquet, tmp_path):
    output = tmp_path / "probe"
    words = ["--model_name_or_path", pretrained, "--train_file", parquet, "--test_file", parquet]
    words += ["--image_column=picture", "--label_column=class", "--timestep=50", "--output_dir", output]
    said = run("image_classification/linear_probe.py", *words, "--num_train_epochs=20", "--learning_rates", 1e-9, 1e-2)
    result = json.loads((output / "results.json").read_text())
    assert result["learning_rate"] == 0.01 and "learning rate 0.01: validation accuracy" in said
    assert result["test_accuracy"] >= 0.9  # dark and bright images
    model = DiTForImageClassification.from_pretrained(output)
    processor = ASelectImageProcessor.from_pretrained(output)
    rows = Dataset.from_parquet(str(parquet))
    with torch.no_grad():
        predicted = model(processor(rows["picture"][:], return_tensors="pt").pixel_values).logits.argmax(-1)
    assert (predicted == torch.tensor(rows["class"][:])).float().mean() == pytest.approx(result["test_accuracy"])
    # A model that has a timestep is read there.
    words = ["--model_name_or_path", output, *words[2:-3], "--output_dir", tmp_path / "again"]
    run("image_classification/linear_probe.py", *words, "--num_train_epochs=1")
    assert json.loads((tmp_path / "again" / "results.json").read_text())["timestep"] == 50


@pytest.mark.parametrize("cached", [False, True])
def test_accelerates_own_loop_trains_and_saves(pretrained, parquet, tmp_path, cached):
    words = ["--model_name_or_path", pretrained, "--train_file", parquet, "--output_dir", tmp_path / "out"]
    words += ["--image_column=picture", "--label_column=class", "--head=linear"]
    words += ["--learning_rate=0.1", "--checkpointing_steps=epoch"]
    words += ["--cache_dir", tmp_path / "cache"] if cached else ["--with_tracking", "--report_to=tensorboard"]
    script = "image_classification/train_image_classification_no_trainer.py"
    run(script, *words, "--timestep=50", "--num_train_epochs=8")
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"] >= 0.75
    model = DiTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "dark", 1: "bright"}
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert len(list((tmp_path / "out").glob("step_*"))) == 8
    if not cached:
        (events,) = (tmp_path / "out" / "hf_aselect").glob("events*")
        logged = EventAccumulator(str(events)).Reload()
        assert [len(logged.Scalars(name)) for name in ("accuracy", "train_loss")] == [8, 8]
    # None is asked for, so that one would be selected were it not for the training that goes on.
    run(script, *words, "--num_train_epochs=9", "--resume_from_checkpoint=latest")
    assert DiTForImageClassification.from_pretrained(tmp_path / "out").config.timestep == 50
    assert len(list((tmp_path / "out").glob("step_*"))) == 9


SPEED = example("benchmarks/speed.py")


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
def test_speed_compares_ways_that_read_the_same(monkeypatch):
    monkeypatch.setattr(SPEED, "SIZES", {"S/2": (4, 32, 2)})
    rows = SPEED.speeds("S/2", [1, 3], 1, "cpu")
    assert {(row["batch"], row["way"]) for row in rows} == {
        (batch, way) for batch in (1, 3) for way in SPEED.ways_on("cpu")
    }
    for row in rows:
        assert row["relative_difference"] <= (3e-2 if "bf16" in row["way"] else 1e-5)
        assert 0 < row["least"] <= row["milliseconds"] <= row["greatest"]
    shares = SPEED.matrix_share("S/2", 2, 1)
    assert [row["way"] for row in shares] == ["folded", "folded bf16", "folded bf16 eager"]
    assert all(row["share_of_time_in_linear_layers"] > 0 for row in shares)


def test_speed_measures_read_outs_as_they_are_and_folded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SPEED, "SIZES", {"S/2": (4, 32, 2)})
    words = ["--output_dir", str(tmp_path), "--sizes", "S/2", "--batches", "2", "--repetitions", "1"]
    # It switches progress bars off for all that this process does later.
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr(sys, "argv", ["speed.py", *words, "--sections", "read_outs"])
    SPEED.main()
    rows = json.loads((tmp_path / "speed.json").read_text())["read_outs"]
    assert [(row["timesteps"], row["way"]) for row in rows] == [
        (count, way) for count in (1, 3) for way in ("early exit", "folded")
    ]
    assert max(row["relative_difference"] for row in rows) <= 1e-5
    # What several timesteps add is little.
    assert rows[1]["parameters"] < rows[3]["parameters"] < rows[0]["parameters"]
    assert SPEED.read_out_table(rows) in capsys.readouterr().out


def test_speed_asks_for_the_names_that_the_package_takes():
    names = SPEED.names_taken_of_the_host()
    assert "PreTrainedModel" in names["transformers"]
    assert all(not name.startswith("_") for taken in names.values() for name in taken)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's exporter, of its own trees
@pytest.mark.slow
def test_speed_from_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SPEED, "SIZES", {"S/2": (4, 32, 2), "B/2": (12, 32, 2)})
    monkeypatch.setattr(SPEED, "EPOCHS", 2)
    monkeypatch.setattr(SPEED, "NUM_PICTURES", 32)
    # In place of 11 GB: the same road with a pipeline of a few weights.
    monkeypatch.setattr(
        SPEED.conversion_cost, "make_pipeline", lambda folder, _: pixart_sigma().save_pretrained(folder)
    )
    monkeypatch.setattr(SPEED, "TEXT_BLOCK", 1)
    words = ["speed.py", "--output_dir", str(tmp_path), "--sizes", "S/2", "--batches", "1", "--repetitions", "1"]
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr(sys, "argv", words)
    SPEED.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]
    result = json.loads((tmp_path / "speed.json").read_text())
    assert SPEED.tables(result) == (tmp_path / "speed.md").read_text()
    assert str(tmp_path) not in json.dumps(result)
    cold = {(row["way"], row["cold"]): row["read"] for row in result["loading"]}
    assert set(cold) == {(way, cold) for way in ("pipeline", "folded", "folded bf16") for cold in (False, True)}
    assert min(cold.values()) > 0
    assert [row["way"] for row in result["text_loading"]] == ["pipeline", "folded bf16"] * 2
    monkeypatch.setattr(sys, "argv", [*words, "--sections", "growth"])
    SPEED.main()
    again = json.loads((tmp_path / "speed.json").read_text())
    assert again["speeds"] == result["speeds"] and again["growth"] != result["growth"]
