"""Two processes on a CPU (gloo): the same losses, timestep and weights as one, and no picture read twice."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin, merge_fsdp_weights
from conftest import END_OF_PROCESSES
from forking import SCRIPT, offline
from generic_pipelines import GENERIC_PIPELINES
from packaging.version import Version
from PIL import Image as PILImage

from hf_aselect import DiTForImageClassification, convert_diffusers

ROOT = Path(__file__).parents[1]
IMAGE_CLASSIFICATION = ROOT / "examples" / "image_classification"
CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}
# accelerate's name for it is `--multi_gpu`, whatever the devices are.
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
BATCH = 8
NUM_ROWS = 24

pytestmark = pytest.mark.process

PREAMBLE = f"""
import hashlib, json, os, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from hf_aselect import ASelectCallback, DiTForImageClassification

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BATCH, NUM_ROWS, EXAMPLES = {BATCH}, {NUM_ROWS}, {str(IMAGE_CLASSIFICATION)!r}
generator = torch.Generator().manual_seed(0)
PIXELS = torch.rand(NUM_ROWS, 3, 8, 8, generator=generator) * 2 - 1
ROWS = [{{"pixel_values": PIXELS[index], "labels": index % 4}} for index in range(NUM_ROWS)]


def load(**fields):
    set_seed(0)
    sizes = {{"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}}
    fields = {{"timestep": 5, "num_labels": 4, **sizes, **fields}}
    return DiTForImageClassification.from_pretrained(folder, **fields)


def note(name, **facts):
    path = output / f"{{name}}-{{RANK}}-of-{{WORLD}}.json"
    path.write_text(json.dumps(facts))
"""

TRAINER = (
    PREAMBLE
    + """
def arguments(**options):
    given = {"per_device_train_batch_size": BATCH // WORLD, "max_steps": 6, "learning_rate": 1e-3, **options}
    return TrainingArguments(
        str(output / "out"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant", **given,
    )


def train(name, model, rows=ROWS, checkpoints=False, **options):
    args = arguments(gradient_checkpointing=checkpoints, **options)
    callback = ASelectCallback(max_images=12)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[callback])
    trainer.train()
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.contiguous().numpy().tobytes())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    note(name, losses=losses, timestep=model.config.timestep, weights=weights.hexdigest())


model = load()
model.config.timestep = "auto"
train("frozen", model)
train("fine_tuned", load(freeze_backbone=False), checkpoints=True)
train(
    "accumulated", load(), per_device_train_batch_size=BATCH // WORLD // 2, gradient_accumulation_steps=2
)
train("bfloat16", load(), bf16=True)
# The timesteps share the linear layers, whose gradients come from both.
train("folded", load(freeze_backbone=False, timestep=[5, 60], block=[1, 2]).fold())
"""
)

STREAM = (
    PREAMBLE
    + """
import datasets

class Seen(DiTForImageClassification):
    rows = []

    def forward(self, pixel_values=None, labels=None, **kwargs):
        Seen.rows += labels.tolist()
        return super().forward(pixel_values, labels % 4, **kwargs)


stream = datasets.load_dataset("parquet", data_files=sorted(map(str, output.glob("shard-*.parquet"))), streaming=True)
stream = stream["train"].shuffle(seed=0, buffer_size=5).map(
    lambda row: {"pixel_values": PIXELS[row["number"]].numpy(), "labels": row["number"]}, remove_columns=["number"]
)
for dispatch in (True, False):
    set_seed(0)
    Seen.rows = []
    model = Seen.from_pretrained(folder, timestep=5, num_labels=4, head="linear")
    args = TrainingArguments(
        str(output / "out"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        max_steps=NUM_ROWS // BATCH, per_device_train_batch_size=BATCH // WORLD,
        accelerator_config={"dispatch_batches": dispatch},
    )
    Trainer(model, args, train_dataset=stream.with_format("torch"), data_collator=default_data_collator).train()
    note(f"stream-{dispatch}", rows=Seen.rows)

# Rows that cannot be shared evenly, of files of different length, judged by the training example's trainer.
sys.path.insert(0, EXAMPLES)
from train_image_classification import LayerWiseTrainer
judged = stream.take(11).with_format("torch")
trainer = LayerWiseTrainer(
    1.0, model=model, args=args, eval_dataset=judged, data_collator=default_data_collator,
    compute_metrics=lambda found: {"rows": found.label_ids.tolist()},
)
args.per_device_eval_batch_size = 2
note("judged", rows=trainer.evaluate()["eval_rows"], dispatch=args.accelerator_config.dispatch_batches)
"""
)

# Three steps of a model, each process with its share of a batch.
STEPS = """
optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
losses = []
for step in range(3):
    batch = range(step * BATCH + RANK, (step + 1) * BATCH, WORLD)
    labels = torch.tensor([index % 4 for index in batch])
    loss = model(pixel_values=PIXELS[list(batch)], labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if WORLD > 1:
        dist.all_reduce(total)
    losses.append(total.item() / WORLD)
"""

SHARDED = (
    PREAMBLE
    + """
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

model = load(freeze_backbone=False).train()
if WORLD > 1:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
"""
    + STEPS
    + """
note("sharded", losses=losses, local=sum(
    (value.to_local() if hasattr(value, "to_local") else value).numel() for value in model.parameters()
))
if WORLD > 1:
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=output / "shards")
    if RANK == 0:
        model.config.save_pretrained(output / "merged")
else:
    model.save_pretrained(output / "whole")
"""
)


# accelerate gives FSDP to accelerators alone, so what its `prepare` calls is called here with what that looks at.
PREPARED = (
    PREAMBLE
    + """
from types import SimpleNamespace
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from hf_aselect import select_timestep

model = load(freeze_backbone=False).train()
if WORLD > 1:
    dist.init_process_group("gloo")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=RANK == 0,
        device=torch.device("cpu"), torch_device_mesh=None, parallelism_config=None,
    )
    model = fsdp2_prepare_model(accelerator, model)
methods = model._read_taps.__func__
options = {"timesteps": [10, 100, 500], "batch_size": 7}
chosen = [select_timestep(model, PIXELS, **options)]  # before the first step, and so before it was ever called
"""
    + STEPS
    + """
chosen += [select_timestep(model, PIXELS, **options)]
try:
    select_timestep(model, **options)
    assert WORLD == 1
except ValueError as error:
    assert "sharded by FSDP2 cannot generate images" in str(error), error
assert model._read_taps.__func__ is methods
note("prepared", losses=losses, chosen=[each.scores for each in chosen], timesteps=[each.timestep for each in chosen])
"""
)


def launch(script, folder, output, world=1):
    path = output / "script.py"
    path.write_text(script + END_OF_PROCESSES)
    code, said = offline().run(SCRIPT, path, folder, output, world=world)
    assert code == 0, said[-3000:]


def notes(output, name, world):
    return [json.loads((output / f"{name}-{rank}-of-{world}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def trained(pixel_folder, tmp_path_factory):
    """What one process and two processes note of the same trainings."""
    output = tmp_path_factory.mktemp("trained")
    launch(TRAINER, pixel_folder, output)
    launch(TRAINER, pixel_folder, output, world=2)
    return output


# Gradients of half a batch each are rounded on their own in bfloat16.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("frozen", 1e-5), ("fine_tuned", 1e-5), ("accumulated", 1e-5), ("bfloat16", 1e-2), ("folded", 1e-5)],
)
def test_two_processes_learn_what_one_does(trained, name, tolerance):
    (alone,) = notes(trained, name, 1)
    both = notes(trained, name, 2)
    assert len(alone["losses"]) == 6
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=tolerance)
    assert both[0]["weights"] == both[1]["weights"]


def test_all_processes_choose_the_timestep_that_one_does(trained):
    (alone,) = notes(trained, "frozen", 1)
    assert {each["timestep"] for each in notes(trained, "frozen", 2)} == {alone["timestep"]}
    assert isinstance(alone["timestep"], int)


def test_a_stream_is_shared_without_a_row_read_twice(pixel_folder, tmp_path):
    for shard in range(4):
        rows = list(range(shard * 6, shard * 6 + 6))
        datasets.Dataset.from_dict({"number": rows}).to_parquet(tmp_path / f"shard-{shard}.parquet")
    launch(STREAM, pixel_folder, tmp_path, world=2)
    for dispatch in (True, False):
        shares = [each["rows"] for each in notes(tmp_path, f"stream-{dispatch}", 2)]
        assert [len(share) for share in shares] == [NUM_ROWS // 2] * 2
        assert sorted(shares[0] + shares[1]) == list(range(NUM_ROWS))
    launch(STREAM, pixel_folder, tmp_path)
    ((alone,), both) = notes(tmp_path, "judged", 1), notes(tmp_path, "judged", 2)
    assert len(set(alone["rows"])) == 11
    for each in both:
        assert each["dispatch"] is False
        assert sorted(each["rows"]) == sorted(alone["rows"])


needs_fsdp2 = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"), reason="FSDP2 on a CPU learns something else before torch 2.10"
)
SEVERAL = ", timestep=[5, 60], block=[1, 2], feature=['key', 'attention']"


@needs_fsdp2
@pytest.mark.parametrize(
    ("fields", "folding"),
    [("", ""), (SEVERAL, ""), (SEVERAL, ".fold()")],
    ids=["one tap", "several", "several, folded"],
)
def test_sharded_over_two_processes_it_learns_the_same_and_is_merged_to_one_checkpoint(
    pixel_folder, tmp_path, fields, folding
):
    """FSDP2. The block that is read is not called as a whole: its shards must be gathered all the same."""
    script = SHARDED.replace("freeze_backbone=False)", f"freeze_backbone=False{fields}, zeroed_channels=[]){folding}")
    launch(script, pixel_folder, tmp_path)
    launch(script, pixel_folder, tmp_path, world=2)
    (alone,), both = notes(tmp_path, "sharded", 1), notes(tmp_path, "sharded", 2)
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert max(each["local"] for each in both) <= 0.6 * alone["local"]
    # What `accelerate merge-weights` runs.
    merge_fsdp_weights(str(tmp_path / "shards"), str(tmp_path / "merged"))
    merged, whole = (DiTForImageClassification.from_pretrained(tmp_path / name) for name in ("merged", "whole"))
    expected = whole.state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@needs_fsdp2
def test_sharded_over_two_processes_a_described_family_learns_the_same(pixel_folder, tmp_path):
    """Its call must end in good order, and what is read inside a block must be what a call of it returns."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    describe = text.split("## Adding a family")[1].split("```python\n")[1].split("```")[0]
    source = shutil.copytree(pixel_folder, tmp_path / "source")
    config = source / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "PlainTransformer2DModel"))
    fields = "freeze_backbone=False, timestep=[5, 60], block=[0, 2], feature=['key', 'attention', 'hidden']"
    script = SHARDED.replace("freeze_backbone=False)", f"{fields}, zeroed_channels=[])").replace(
        "model = load(", f"{describe}\nmodel = load(", 1
    )
    launch(script, source, tmp_path)
    launch(script, source, tmp_path, world=2)
    (alone,), both = notes(tmp_path, "sharded", 1), notes(tmp_path, "sharded", 2)
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert max(each["local"] for each in both) <= 0.6 * alone["local"]


@needs_fsdp2
def test_sharded_over_two_processes_a_described_family_with_a_text_learns_the_same(tmp_path):
    """Blocks of two streams and of one; the empty prompt's embeddings are buffers of a module that is sharded."""
    GENERIC_PIPELINES["aura_flow"]().save_pretrained(tmp_path / "pipeline")
    convert_diffusers(tmp_path / "pipeline", tmp_path / "source", image_size=64, include_code=False)
    taps = "block=[0, 1, 3], feature=['key', 'attention', 'hidden']"
    script = SHARDED.replace("freeze_backbone=False)", f"freeze_backbone=False, {taps}, zeroed_channels=[])")
    script = script.replace("3, 8, 8", "3, 64, 64")
    launch(script, tmp_path / "source", tmp_path)
    launch(script, tmp_path / "source", tmp_path, world=2)
    (alone,), both = notes(tmp_path, "sharded", 1), notes(tmp_path, "sharded", 2)
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert alone["losses"][-1] != alone["losses"][0]
    assert max(each["local"] for each in both) <= 0.6 * alone["local"]


@needs_fsdp2
def test_sharded_by_accelerate_it_chooses_and_learns_the_same(pixel_folder, tmp_path):
    launch(PREPARED, pixel_folder, tmp_path)
    launch(PREPARED, pixel_folder, tmp_path, world=2)
    (alone,), both = notes(tmp_path, "prepared", 1), notes(tmp_path, "prepared", 2)
    for each in both:
        assert each["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert each["timesteps"] == alone["timesteps"]
        for scores, expected in zip(each["chosen"], alone["chosen"], strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    assert alone["chosen"][0] != alone["chosen"][1]  # it did learn


def test_accelerate_shards_the_blocks_that_there_are(pixel_folder, latent_folder):
    """It refuses a model that names a class of blocks which it does not hold."""
    for source in (pixel_folder, latent_folder):
        model = DiTForImageClassification.from_pretrained(source, timestep=5, num_labels=4)
        for kind in (model, model.fold()):
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
            plugin.set_auto_wrap_policy(kind)
            wrapped = {each.__name__ for each in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
            assert {"AttentionHeadBlock", "FoldedBlock" if kind.config.folded else "BasicTransformerBlock"} <= wrapped


def write_pictures(path):
    generator = np.random.default_rng(0)
    rows = {
        "image": [PILImage.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(NUM_ROWS)],
        "label": [index % 2 for index in range(NUM_ROWS)],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


# Runs a script, which is to end with its group closed.
CLOSING = """
import runpy, sys
import torch

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized(), "the script left its group open"
"""


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("image_classification/train_image_classification_no_trainer.py", []),
        pytest.param(
            "image_classification/train_image_classification.py",
            ["--use_cpu", "True", "--report_to", "none", "--lr_scheduler_type", "constant"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_script_learns_the_same_on_two_processes(pixel_folder, tmp_path, script, options):
    """By accelerate's own launcher, as README tells."""
    write_pictures(tmp_path / "train.parquet")
    (tmp_path / "closing.py").write_text(CLOSING)
    both = [*LAUNCHER, str(tmp_path / "closing.py")]
    for name, batch in (("alone", BATCH), ("both", BATCH // 2)):
        words = [str(ROOT / "examples" / script), *options, "--timestep", "auto"]
        words += ["--model_name_or_path", str(pixel_folder), "--train_file", str(tmp_path / "train.parquet")]
        words += ["--validation_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / name)]
        words += ["--head_hidden_size", "16", "--head_num_attention_heads", "2", "--num_train_epochs", "2"]
        words += ["--per_device_train_batch_size", str(batch), "--learning_rate", "1e-2"]
        if name == "alone":
            code, said = offline().run(SCRIPT, *words)
        else:
            done = subprocess.run([*both, *words], capture_output=True, text=True, env=ENVIRONMENT)
            code, said = done.returncode, done.stderr
        assert code == 0, said[-3000:]
    alone, both = (DiTForImageClassification.from_pretrained(tmp_path / name) for name in ("alone", "both"))
    assert alone.config.timestep == both.config.timestep
    assert alone.config.selection["scores"] == pytest.approx(both.config.selection["scores"])
    expected = alone.state_dict()
    for name, value in both.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_pretraining_on_two_processes_goes_on_where_both_were_killed(tmp_path):
    write_pictures(tmp_path / "train.parquet")
    (tmp_path / "closing.py").write_text(CLOSING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words = [*torchrun, str(tmp_path / "closing.py"), str(ROOT / "examples" / "pretraining" / "pretrain_dit.py")]
    words += ["--train_file", str(tmp_path / "train.parquet")]
    words += ["--image_size", "8", "--num_layers", "1", "--num_attention_heads", "1", "--attention_head_dim", "16"]
    words += ["--batch_size", "4", "--num_pictures", "80", "--warmup_steps", "2", "--optim", "muon"]
    words += ["--mixed_precision", "no", "--checkpoint_minutes", "0", "--output_dir"]
    options = {"text": True, "env": ENVIRONMENT, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*words, str(tmp_path / "b")], stdout=subprocess.PIPE, **options) as process:
        while not (tmp_path / "b" / "checkpoint").exists():
            assert process.poll() is None
            time.sleep(0.01)
        # The launcher's processes have sessions of their own, and would go on without it.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
    done = subprocess.run([*words, str(tmp_path / "b")], stdout=subprocess.PIPE, **options)
    assert done.returncode == 0
    steps = [json.loads(line)["step"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert steps[0] > 1 and steps == list(range(steps[0], 11))
    assert subprocess.run([*words, str(tmp_path / "a")], stdout=subprocess.DEVNULL, **options).returncode == 0
    a, b = (tmp_path / name / "transformer/diffusion_pytorch_model.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    log = json.loads((tmp_path / "a" / "training_log.json").read_text())["log"]
    assert [each["pictures"] for each in log] == list(range(8, 81, 8))


# On a CPU accelerate gives DeepSpeed no group of processes of its own.
ON_GLOO = """
from accelerate import PartialState
PartialState(backend="gloo")
"""


def launch_under_deepspeed(config: Path, *words: str) -> str:
    """Run a script on two processes, and return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *words],
        capture_output=True,
        text=True,
        env={name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
        | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_under_deepspeed_both_scripts_choose_learn_and_save_one_whole_model(pixel_folder, tmp_path, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    write_pictures(tmp_path / "train.parquet")
    (tmp_path / "closing.py").write_text(ON_GLOO + CLOSING)
    config = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / f"deepspeed_zero{stage}.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**config, "num_processes": 2}))
    sizes = ["--head_hidden_size", "16", "--head_num_attention_heads", "2"]
    of_trainer = ["--recipe", "fine_tune", "--bf16", "True", "--use_cpu", "True", "--report_to", "none"]
    of_trainer += ["--save_strategy", "epoch", "--reselect_epochs", "1"]
    of_loop = ["--cache_dir", str(tmp_path / "cache"), "--checkpointing_steps", "epoch"]
    rates = {"train_image_classification": "1e-3", "train_image_classification_no_trainer": "1e-2"}
    found = {}
    for name, options in zip(rates, (of_trainer, of_loop), strict=True):
        words = [str(tmp_path / "closing.py"), str(IMAGE_CLASSIFICATION / f"{name}.py"), "--timestep", "auto", *sizes]
        words += ["--model_name_or_path", str(pixel_folder), "--train_file", str(tmp_path / "train.parquet")]
        words += ["--validation_file", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / name)]
        words += ["--num_train_epochs", "2", "--per_device_train_batch_size", str(BATCH // 2), *options]
        words += ["--learning_rate", rates[name]]
        launch_under_deepspeed(tmp_path / "two.yaml", *words)
        model = DiTForImageClassification.from_pretrained(tmp_path / name)
        found[name] = model.config.selection["timestep"]
        if name == "train_image_classification":  # chosen again after each epoch, by what DeepSpeed made of the model
            (last,) = [path for path in (tmp_path / name).glob("checkpoint-*") if path.name != "checkpoint-3"]
            history = json.loads((last / "trainer_state.json").read_text())["log_history"]
            assert [row["epoch"] for row in history if "aselect/timestep" in row] == [0, 1, 2]
        untrained = DiTForImageClassification.from_pretrained(pixel_folder, timestep=0, num_labels=2)
        before = untrained.backbone.state_dict()
        # DeepSpeed keeps all weights in bf16, and rounds those that are frozen, too.
        moved = [
            name
            for name, value in model.backbone.state_dict().items()
            if not torch.equal(value.bfloat16(), before[name].bfloat16())
        ]
        assert bool(moved) == ("fine_tune" in options)
        # What ended is as what was killed in its second epoch and went on.
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        (tmp_path / name / "model.safetensors").unlink()
        first, second = sorted(
            (path for pattern in ("checkpoint-*", "step_*") for path in (tmp_path / name).glob(pattern)),
            key=lambda path: path.stat().st_mtime,
        )
        shutil.rmtree(second)
        log = launch_under_deepspeed(tmp_path / "two.yaml", *words, "--resume_from_checkpoint", "latest")
        assert first.name in log
        assert (tmp_path / name / "model.safetensors").read_bytes() == weights
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_are_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert str(config.distributed_type.value) == given["distributed_type"]
    assert config.num_processes == given["num_processes"]
    # Handed to scripts that are not Trainer's as a word, of which accelerate makes a number.
    assert isinstance(given.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1), int)
