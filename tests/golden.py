"""Numbers of the embedded DiT that are not to drift, and the file that holds them.

    python tests/golden.py

writes `tests/golden.json` again. A test compares; another one wants the file's checksum in CHANGELOG.md, with the
reason for the change.
"""

import functools
import hashlib
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from hf_aselect import ASelectImageProcessor, DiTModel, TimestepSelection, select_timestep
from hf_aselect.hub.push import write_model_card
from hf_aselect.model.layouts import FEATURES

PATH = Path(__file__).with_name("golden.json")
EMBEDDED = files("hf_aselect") / "assets" / "fashion_mnist"
TIMESTEPS = (0, 35, 253, 999)


@functools.cache
def sample() -> list[Any]:
    """Return images."""
    return load_dataset("parquet", data_files=str(EMBEDDED / "train.parquet"), split="train")[:128]["image"]


@functools.cache
def selection(criterion: str) -> TimestepSelection:
    """Return what a criterion selects now."""
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0)
    return select_timestep(model, sample(), criterion=criterion, max_images=128)


def scores(criterion: str) -> dict[str, Any]:
    """Return the selection by a criterion and its scores, as they are now."""
    found = selection(criterion)
    return {
        "timestep": found.timestep,
        "timesteps": found.timesteps,
        "scores": [round(score, 5) for score in found.scores],
        "confidence": found.confidence,
    }


def reading() -> dict[str, Any]:
    """Return checksums of tokens, and the card, as they are now."""
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0)
    pixels = ASelectImageProcessor.from_model_config(model.config)(sample()[:8], return_tensors="pt").pixel_values
    with torch.no_grad():
        tokens = {
            f"t = {timestep}, {feature} of block {block}": _sums(
                model.extract_features(pixels, timestep=timestep, block=block, feature=feature)
            )
            for timestep in TIMESTEPS
            for block in (0, 3, 7)
            for feature in FEATURES
        }
        model.apply_selection(selection("consensus"))
        folded = _sums(model.fold()(pixels).last_hidden_state)
    model.config.selection = {**model.config.selection, "seconds": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        write_model_card(model, folder, model_name="embedded")
        card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    return {"tokens": tokens, "folded tokens": folded, "card": card}


def _sums(tokens: torch.Tensor) -> list[float]:
    """Return what a change of any token changes: mean, spread, and a sum with weights of both signs."""
    flat = tokens.double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return [round(float(each), 5) for each in (flat.mean(), flat.std(), (flat * weights).mean() * 100)]


def checksum() -> str:
    """Return what CHANGELOG.md names the file by."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    found = {"selections": {name: scores(name) for name in ("consensus", "hfr", "signal_hfr")}, **reading()}
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Saved {PATH}. Say in CHANGELOG.md why: golden values {checksum()}.")
