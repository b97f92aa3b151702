"""Numbers of the embedded DiT that are not to drift, and the file that holds them.

    python tests/golden.py

writes `tests/golden.json` anew. A test compares; another one wants the file's checksum in CHANGELOG.md, with the
reason for the change.
"""

import hashlib
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from hf_aselect import ASelectImageProcessor, DiTModel, select_timestep
from hf_aselect.hub.push import write_model_card
from hf_aselect.model.layouts import FEATURES

PATH = Path(__file__).with_name("golden.json")
EMBEDDED = files("hf_aselect") / "assets" / "fashion_mnist"
TIMESTEPS = (0, 35, 253, 999)


def values() -> dict[str, Any]:
    """Return scores, the choice, checksums of tokens, and the card, as they are now."""
    pictures = load_dataset("parquet", data_files=str(EMBEDDED / "train.parquet"), split="train")[:128]["image"]
    model = DiTModel.from_pretrained(EMBEDDED, timestep=0)
    pixels = ASelectImageProcessor.from_model_config(model.config)(pictures[:8], return_tensors="pt").pixel_values
    selections = {
        name: select_timestep(model, pictures, criterion=name, max_images=128)
        for name in ("consensus", "hfr", "signal_hfr")
    }
    with torch.no_grad():
        tokens = {
            f"t = {timestep}, {feature} of block {block}": _sums(
                model.extract_features(pixels, timestep=timestep, block=block, feature=feature)
            )
            for timestep in TIMESTEPS
            for block in (0, 3, 7)
            for feature in FEATURES
        }
        model.apply_selection(selections["consensus"])
        folded = _sums(model.fold()(pixels).last_hidden_state)
    model.config.selection = {**model.config.selection, "seconds": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        write_model_card(model, folder, model_name="embedded")
        card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    return {
        "selections": {
            name: {
                "timestep": each.timestep,
                "timesteps": each.timesteps,
                "scores": [round(score, 5) for score in each.scores],
                "confidence": each.confidence,
            }
            for name, each in selections.items()
        },
        "tokens": tokens,
        "folded tokens": folded,
        "card": card,
    }


def _sums(tokens: torch.Tensor) -> list[float]:
    """Return what a change of any token changes: mean, spread, and a sum with weights of both signs."""
    flat = tokens.double().flatten()
    weights = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return [round(float(each), 5) for each in (flat.mean(), flat.std(), (flat * weights).mean() * 100)]


def checksum() -> str:
    """Return what CHANGELOG.md names the file by."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    PATH.write_text(json.dumps(values(), indent=1) + "\n", encoding="utf-8")
    print(f"Saved {PATH}. Say in CHANGELOG.md why: golden values {checksum()}.")
