"""A pipeline of two transformers, as Wan 2.2's: of them the one for little noise is read, where it was trained."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from pipelines import PIPELINES, dit_transformer, images_of

from hf_aselect import DiTModel, convert_diffusers, select_timestep
from hf_aselect.checkpoints.hub_files import needed_files


def index_of(folder, **changes):
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, **changes}), encoding="utf-8")
    return {**index, **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    pipe = PIPELINES["sit"]()
    pipe.save_pretrained(folder)
    second = dit_transformer()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-0.5)
    second.save_pretrained(folder / "transformer_2")
    index_of(folder, transformer_2=["diffusers", "DiTTransformer2DModel"], boundary_ratio=0.875)
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """A model of the second transformer, as if it were the only one."""
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder, alone, dirs_exist_ok=True)
    shutil.rmtree(alone / "transformer")
    (alone / "transformer_2").rename(alone / "transformer")
    index_of(alone, transformer_2=[None, None], boundary_ratio=None)
    return DiTModel.from_pretrained(alone, timestep=100).eval()


def test_the_transformer_for_little_noise_is_read(folder, expected, tmp_path, caplog):
    caplog.set_level("INFO")
    made = convert_diffusers(folder, tmp_path / "ours", timestep=100)
    assert "has two transformers. Features are read from transformer_2" in caplog.text
    model = DiTModel.from_pretrained(made.output).eval()
    pixel_values = images_of(model)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).last_hidden_state, expected(pixel_values).last_hidden_state)
    # It needs nothing of the other.
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "transformer")
    assert DiTModel.from_pretrained(tmp_path / "half", timestep=100) is not None


def test_no_timestep_beyond_its_training_is_selected_or_taken(folder, expected, tmp_path):
    model = DiTModel.from_pretrained(folder, timestep="auto", calibration_images=images_of(expected, num=16)).eval()
    assert max(model.noise_schedule.even_timesteps()) == 874
    assert max(expected.noise_schedule.even_timesteps()) > 990
    assert max(select_timestep(model, images_of(model, num=16), criterion="hfr").timesteps) <= 874
    model.save_pretrained(tmp_path)
    for source in (folder, tmp_path):
        with pytest.raises((ValueError, StrictDataclassError), match="`timestep` must be below 875, got 900"):
            DiTModel.from_pretrained(source, timestep=900)
    with pytest.raises(ValueError, match="was trained only on low noise"):
        model.generate_latents(1)


def test_without_a_boundary_the_first_is_read(folder, expected, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index_of(tmp_path, boundary_ratio=None)
    model = DiTModel.from_pretrained(tmp_path, timestep=900).eval()
    pixel_values = images_of(model)
    with torch.no_grad():
        assert not torch.allclose(model(pixel_values).last_hidden_state, expected(pixel_values).last_hidden_state)


@pytest.mark.parametrize(("boundary", "wanted"), [(0.875, "transformer_2"), (None, "transformer")])
def test_only_one_of_them_is_fetched(folder, boundary, wanted):
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    index = {**index_of(folder), "boundary_ratio": boundary}
    needed = needed_files(files, index, None)
    assert {file.split("/")[0] for file in needed if file.startswith("transformer")} == {wanted}
