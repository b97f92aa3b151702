"""Processes are killed at random moments of what writes files: afterwards there is the old state or the new one.

    python tests/killing.py --kills 26
    python tests/killing.py --kills 10 --signal INT

kills each of `OPERATIONS` so many times (or interrupts it, as Ctrl-C does), looks at what is there, lets the same run
go on to its end, and prints a table.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler

sys.path.insert(0, str(Path(__file__).parent))

from conftest import build_transformer
from forking import Forking
from writable_hub import WritableHub, serve

from hf_aselect.checkpoints.atomic import finish_files

TOKEN = "hf_goodgoodgoodgoodgood"
PREAMBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off in what a shell runs in the background
from pathlib import Path
import torch
torch.set_num_threads(1)
from hf_aselect import DiTForImageClassification, DiTModel, cache_features, convert_diffusers
from hf_aselect.cli import main
source, target = Path(sys.argv[1]), Path(sys.argv[2])

def model(timestep, **fields):
    torch.manual_seed(timestep)
    sizes = {"head_hidden_size": 256, "head_num_attention_heads": 2, "head_num_layers": 8}
    return DiTForImageClassification.from_pretrained(source, timestep=timestep, num_labels=4, **sizes, **fields)
"""
# What writes, by name: code that makes the old state, and code that makes the new one.
OPERATIONS = {
    "save": ("model(5).save_pretrained(target)", "model(7).save_pretrained(target)"),
    "save in shards": (
        "model(5).save_pretrained(target, max_shard_size='2MB')",
        "model(7).save_pretrained(target, max_shard_size='2MB')",
    ),
    "convert": ("", "convert_diffusers(source, target, timestep=5)"),
    "fold": ("", "assert main(['fold', str(source), str(target), '--timestep', '5']) == 0"),
    "select": (
        "assert main(['select', str(source), '--output', str(target), '--max-images', '16', '--seed', '1']) == 0",
        "assert main(['select', str(source), '--output', str(target), '--max-images', '16', '--seed', '2']) == 0",
    ),
    "cache": (
        "",
        """
from datasets import Dataset, Image
from PIL.Image import fromarray
pixels = torch.randint(256, (400, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
rows = Dataset.from_dict({"image": [fromarray(each) for each in pixels]}).cast_column("image", Image())
cached = cache_features(model(5), rows, target, batch_size=4)
torch.save(cached["features"][:], target / "read.pt")
""",
    ),
    "train": (
        "",
        """
from transformers import Trainer, TrainingArguments, set_seed
pixels = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
rows = [{"pixel_values": each, "labels": index % 4} for index, each in enumerate(pixels)]
set_seed(0)
args = TrainingArguments(str(target), max_steps=8, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
    per_device_train_batch_size=4)
trainer = Trainer(model(5), args, train_dataset=rows)
# The newest one that is whole, as in examples/image_classification/train_image_classification.py: this file is written
# last.
whole = {int(path.parent.name.split("-")[1]): path.parent for path in target.glob("checkpoint-*/trainer_state.json")}
trainer.train(resume_from_checkpoint=str(whole[max(whole)]) if whole else None)
trainer.save_model(str(target / "final"))
""",
    ),
    "push": ("model(5).push_to_hub('me/killed')", "model(7).push_to_hub('me/killed')"),
}


def digest(path: Path) -> str:
    """Return a checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def state_of(name: str, target: Path, hub: WritableHub) -> object:
    """Return what is there, so that two equal states are equal: None for nothing."""
    if name == "push":
        repo = hub.repos.get(("model", "me/killed"))
        found = repo and repo.files("main")
        return found and {path: blob for path, blob in sorted(found.items()) if path != "README.md"}
    if name in ("cache", "train"):  # work in progress is there, too; the end is what counts
        end = target / ("read.pt" if name == "cache" else "final/model.safetensors")
        return digest(end) if end.exists() else None
    if not target.exists():
        return None
    finish_files(target)  # as whoever loads it does
    files = {path.name: path for path in sorted(target.iterdir()) if not path.name.startswith(".")}
    if "selection.json" in files:
        record = json.loads(files["selection.json"].read_text())
        record.pop("seconds")
        return record, digest(files["timestep_curve.png"])
    return {name: digest(path) for name, path in files.items()} or None


def left_overs(folder: Path) -> list[str]:
    """Return what a run did not clean up."""
    return [str(path) for path in folder.rglob("*") if "incomplete" in path.name]


def _late(chance: random.Random) -> float:
    """Return a share of a run, more often a late one: what comes first is loading."""
    return 1.05 * max(chance.random(), chance.random(), chance.random())


def kill_often(
    name: str,
    kills: int,
    seed: int,
    hub: WritableHub,
    forking: Forking,
    environment: dict,
    sign: signal.Signals = signal.SIGKILL,
) -> dict:
    """Kill an operation at random moments, and return how often what was there; raise if it was neither state.

    A run that ends before its kill is counted beside them, and makes room for another.

    Raises:
        AssertionError: If the old state is lost and the new one is not there, or the next run does not reach it.
    """
    before, after = OPERATIONS[name]
    chance = random.Random(f"{name} {seed}")
    counts = {"old": 0, "new": 0, "ended before": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "source"
        torch.manual_seed(0)
        build_transformer().save_pretrained(source / "transformer")
        DDPMScheduler().save_pretrained(source / "scheduler")

        def run(code: str, target: Path, **options: object) -> int:
            status, said = forking.run(PREAMBLE + code, source, target, environment=environment, sign=sign, **options)
            # An interrupt in the middle of a library's compiled code may come out as an error of any kind.
            ends = (-signal.SIGKILL,) if sign == signal.SIGKILL else range(1, 256)
            assert status == 0 or ("kill_after" in options and status in ends), said[-3000:]
            return status

        def fresh(number: int) -> Path:
            hub.repos.clear()
            target = folder / f"place-{number}" / "target"
            target.parent.mkdir()
            if before:
                run(before, target)
            return target

        place = fresh(0)
        old = state_of(name, place, hub)
        begun = time.monotonic()
        run(after, place)
        seconds, new = time.monotonic() - begun, state_of(name, place, hub)
        assert new is not None and new != old
        number = 0
        while counts["old"] + counts["new"] < kills:
            number += 1
            target = fresh(number)
            begun = time.monotonic()
            status = run(after, target, kill_after=_late(chance) * seconds)
            found = state_of(name, target, hub)
            assert found in (old, new), f"{name}: neither the old state nor the new one is there"
            if status == 0:  # too late; the first run may have been a slow one
                seconds = min(seconds, time.monotonic() - begun)
            counts["ended before" if status == 0 else "old" if found == old else "new"] += 1
            if found != new:
                run(after, target)
            assert state_of(name, target, hub) == new, f"{name}: the next run did not reach the new state"
            assert not left_overs(target.parent), left_overs(target.parent)
            shutil.rmtree(target.parent)
    return {"kills": kills, "seconds of a run": round(seconds, 2), **counts}


def environment_of(hub: WritableHub, home: Path) -> dict:
    """Return the environment of the processes."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return {**given, **own, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=26, help="of each operation (%(default)s)")
    parser.add_argument("--signal", choices=("KILL", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=list(OPERATIONS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, serve(WritableHub({TOKEN: "me"})) as hub:
        environment = environment_of(hub, Path(home))
        forking = Forking(environment)
        print(
            "| killed | kills | seconds of a run | old state | new state | had ended before |\n" + "| --- " * 6 + "|"
        )
        for name in args.operations:
            sign = signal.Signals[f"SIG{args.signal}"]
            row = kill_often(name, args.kills, args.seed, hub, forking, environment, sign)
            print(f"| {name} | " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
        forking.close()


if __name__ == "__main__":
    main()
