"""The segmentation demo, small: the whole road on scenes composed of the embedded sample."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from hf_aselect import ASelectImageProcessor, cli
from hf_aselect.demo import segmentation as demo_segmentation
from hf_aselect.demo.sample import load_embedded_split
from hf_aselect.demo.scenes import DARK, NUM_ITEMS, compose_scenes
from hf_aselect.demo.segmentation import (
    PatchProbes,
    SegmentationDemoSettings,
    check_segmenter_reloaded,
    run_segmentation_demo,
)
from hf_aselect.demo.tables import format_segmentation_table

pytestmark = pytest.mark.process

SMALL = SegmentationDemoSettings(num_train=16, num_test=8, num_calibration=8, num_probe=8, num_epochs=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_segmentation_demo(folder, SMALL)


def test_the_results_are_shares_and_agree_with_each_other(finished):
    _, results = finished
    figures = results["mean_iou"]
    names = {"upernet", "selected", "zero", "random_mean", "worst", "best", "random_weights", "colours"}
    assert figures.keys() == names
    assert all(0 <= share <= 1 for share in figures.values())
    assert figures["worst"] <= figures["random_mean"] <= figures["best"]
    assert figures["worst"] <= figures["selected"] <= figures["best"]
    assert figures["zero"] == results["probe_mean_ious"][0]
    assert figures["random_weights"] != figures["selected"]


def test_the_results_are_written_as_returned(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_written_model_is_the_one_that_was_trained(finished):
    folder, results = finished
    model = AutoModelForSemanticSegmentation.from_pretrained(folder / "model")
    assert model.config.timestep == results["timestep"]
    assert model.config.id2label[10] == "background"
    assert model.config.decoder == "upernet"


def test_the_card_has_the_figures_and_says_that_scenes_are_composed(finished):
    folder, results = finished
    card = (folder / "model" / "README.md").read_text()
    assert f"| **this model** | {results['mean_iou']['upernet']:.1%} |" in card
    assert f"| grey level of a pixel | {results['mean_iou']['colours']:.1%} |" in card
    assert "Scenes are composed of images of single items of clothing on black" in card


@pytest.mark.parametrize("name", ["timestep_curve.png", "overlays.png", "model/timestep_curve.png"])
def test_the_pictures_are_there(finished, name):
    with Image.open(finished[0] / name) as picture:
        assert picture.format == "PNG"


def test_nothing_half_written_is_left(finished):
    assert not [path for path in finished[0].rglob("*") if "incomplete" in path.name]


def test_the_table_has_a_row_for_each_figure(finished):
    table = format_segmentation_table(finished[1])
    for share in finished[1]["mean_iou"].values():
        assert f"{share:.1%}" in table
    assert "composed of two images" in table


def test_scenes_are_the_same_each_time_and_of_either_split_s_items():
    scenes, names = compose_scenes("train", 3)
    again, _ = compose_scenes("train", 3)
    assert scenes["image"][:] == again["image"][:]
    assert len(names) == 11 and names[-1] == "background"
    assert compose_scenes("test", 3)[0]["image"][:] != scenes["image"][:]


def test_a_mask_names_the_item_that_is_seen():
    scenes, names = compose_scenes("test", 20)
    for image, mask in zip(scenes["image"][:], scenes["annotation"][:], strict=True):
        scene, classes = np.asarray(image), np.asarray(mask)
        assert ((scene == 0) == (classes == 10)).all()
        assert 1 <= len(set(np.unique(classes)) - {10}) <= NUM_ITEMS
        assert classes.max() < len(names)


def test_an_item_lies_in_the_scene_as_it_is_in_the_sample():
    scenes, _ = compose_scenes("test", 1)
    scene, classes = np.asarray(scenes[0]["image"]), np.asarray(scenes[0]["annotation"])
    sample = load_embedded_split("test", 2000)
    items, labels = np.stack([np.asarray(picture) for picture in sample["image"][:]]), sample["label"][:]
    # The last item lies over the others, so it is there whole, with its class.
    found = []
    for top, left in np.ndindex(29, 29):
        here = np.s_[top : top + 28, left : left + 28]
        same = ((items == scene[here]) | (items <= DARK)).reshape(len(items), -1).all(1)
        found += [
            set(classes[here][items[place] > DARK].tolist()) == {labels[place]} for place in np.flatnonzero(same)
        ]
    assert any(found)


def test_random_weights_leave_the_model_as_it_was(finished):
    model = AutoModelForSemanticSegmentation.from_pretrained(finished[0] / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scenes, _ = compose_scenes("train", 8)
    processor = ASelectImageProcessor.from_model_config(model.config)
    batch = processor(scenes["image"][:], scenes["annotation"][:], return_tensors="pt")
    probes = PatchProbes(model, {"train": batch, "test": batch}, scenes, 8)
    trained, state = probes.mean_iou(5), torch.random.get_rng_state()
    assert probes.of_random_weights(5, 0) == probes.of_random_weights(5, 0) != trained
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_reloads_differently_is_noticed(finished):
    folder, _ = finished
    model = AutoModelForSemanticSegmentation.from_pretrained(folder / "model")
    scenes, _ = compose_scenes("test", 2)
    pixels = ASelectImageProcessor.from_model_config(model.config)(scenes["image"][:], return_tensors="pt")
    check_segmenter_reloaded(model, pixels.pixel_values, scenes["image"][:], folder / "model")
    model.decode_head.head.classifier.bias.data[3] += 1
    with pytest.raises(RuntimeError, match="gives other logits than the trained one"):
        check_segmenter_reloaded(model, pixels.pixel_values, scenes["image"][:], folder / "model")


def test_the_command_runs_the_demo_and_prints_its_table(monkeypatch, finished, capsys, tmp_path):
    asked = {}

    def small_demo(output, settings):
        asked.update(output=output, seed=settings.seed)
        return finished[1]

    monkeypatch.setattr(demo_segmentation, "run_segmentation_demo", small_demo)
    assert cli.main(["demo", "--task", "segmentation", "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    assert asked == {"output": str(tmp_path / "out"), "seed": 3}
    printed = capsys.readouterr().out
    assert format_segmentation_table(finished[1]) in printed
    assert "overlays.png" in printed and "AutoModelForSemanticSegmentation" in printed


def test_another_task_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--task", "detection"])
    assert "invalid choice: 'detection'" in capsys.readouterr().err
