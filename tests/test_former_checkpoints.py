"""What the first layout of 0.1.0, one flat package of 46 modules, saved and pushed is loaded still.

`former_checkpoints.json` holds what that code wrote: configurations, the names and shapes of all weights, and the
first values that the models gave. The weights themselves are made of their names, then and now.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hf_aselect
from hf_aselect.hub.push import CODE, FORMER_CODE

FORMER = json.loads(Path(__file__).with_name("former_checkpoints.json").read_text(encoding="utf-8"))


def weight(name, shape):
    """A weight that is the same on every machine."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    values = np.random.default_rng(zlib.crc32(name.encode())).integers(-64, 65, size=shape) / 256
    made = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return made.abs() + 0.5 if name.endswith("running_var") else made


def former_folder(name, folder):
    """A checkpoint as the former code saved it."""
    saved = FORMER["checkpoints"][name]
    (folder / "config.json").write_text(json.dumps(saved["config"]), encoding="utf-8")
    weights = {key: weight(key, tuple(shape)) for key, shape in saved["shapes"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for module in FORMER["code"]:
        (folder / module).write_text("raise ImportError('the former code was run')\n", encoding="utf-8")
    return saved


def outputs(model):
    side = model.config.image_height_width[0]
    images = np.random.default_rng(7).integers(-128, 129, size=(2, 3, side, side)) / 128
    with torch.no_grad():
        found = model(torch.from_numpy(images.astype(np.float32)))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("name", FORMER["checkpoints"])
def test_a_checkpoint_that_the_former_code_saved_gives_the_same(name, tmp_path):
    saved = former_folder(name, tmp_path)
    model = getattr(hf_aselect, saved["class"]).from_pretrained(tmp_path)
    found = outputs(model)
    assert list(found.shape) == saved["output"]["shape"]
    # They are rounded to five decimals; other processors add up in another order.
    assert found.flatten()[:8].tolist() == pytest.approx(saved["output"]["first"], abs=2e-5)
    assert float(found.double().abs().sum()) == pytest.approx(saved["output"]["sum"], rel=1e-4)
    # What it says of itself stays: the record of its selection, the layout of what is folded.
    for field in ("selection", "folded_layout", "timestep", "block", "feature"):
        assert getattr(model.config, field) == saved["config"].get(field)


def test_a_folder_with_the_former_code_gets_todays(tmp_path):
    former_folder("classifier of pixels", tmp_path)
    hf_aselect.DiTForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path)
    text = (tmp_path / "modeling_aselect.py").read_text(encoding="utf-8")
    assert "class ASelectPreTrainedModel" in text, "the folder had code, so it is written"
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]


def test_a_push_knows_every_module_that_the_former_code_left():
    assert set(FORMER["code"]) <= {*CODE, *FORMER_CODE}
    assert not set(CODE) & set(FORMER_CODE)
