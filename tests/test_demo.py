"""The demo, small: the whole road on the embedded DiT, with few pictures and epochs."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_aselect import cli
from hf_aselect.demo import classification as demo
from hf_aselect.demo.classification import DemoSettings, run_demo
from hf_aselect.demo.sample import load_embedded_split
from hf_aselect.demo.tables import format_table

SMALL = DemoSettings(num_train=100, num_test=50, num_calibration=16, num_probe=50, num_views=2, num_epochs=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL)


def test_the_results_are_shares_and_agree_with_each_other(finished):
    _, results = finished
    accuracy = results["accuracy"]
    names = {"attention_head", "selected", "zero", "random_mean", "worst", "best", "raw_pixels"}
    assert accuracy.keys() == names
    assert all(0 <= share <= 1 for share in accuracy.values())
    assert accuracy["worst"] <= accuracy["random_mean"] <= accuracy["best"]
    assert accuracy["worst"] <= accuracy["selected"] <= accuracy["best"]
    assert accuracy["zero"] == results["probe_accuracies"][0]
    chosen = results["timesteps"].index(results["probe_timestep"])
    assert accuracy["selected"] == results["probe_accuracies"][chosen]


def test_the_results_are_written_as_returned(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_written_model_is_the_one_that_was_trained(finished):
    folder, results = finished
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    assert model.config.timestep == results["timestep"]
    assert model.config.id2label[0] == "T-shirt/top"
    assert (folder / "model" / "preprocessor_config.json").exists()


def test_the_card_has_the_figures(finished):
    folder, results = finished
    card = (folder / "model" / "README.md").read_text()
    assert f"| **this model** | {results['accuracy']['attention_head']:.1%} |" in card
    assert f"| logistic regression on raw pixels | {results['accuracy']['raw_pixels']:.1%} |" in card
    assert "![Criterion over the timestep](timestep_curve.png)" in card


@pytest.mark.parametrize("name", ["timestep_curve.png", "predictions.png", "model/timestep_curve.png"])
def test_the_pictures_are_there(finished, name):
    with Image.open(finished[0] / name) as picture:
        assert picture.format == "PNG"


def test_nothing_half_written_is_left(finished):
    assert not [path for path in finished[0].rglob("*") if "incomplete" in path.name]


def test_the_table_has_a_row_for_each_accuracy(finished):
    table = format_table(finished[1])
    for share in finished[1]["accuracy"].values():
        assert f"{share:.1%}" in table


@pytest.mark.process
def test_the_same_seed_gives_the_same_results(finished, tmp_path):
    again = run_demo(tmp_path, SMALL)
    assert {**again, "seconds": 0} == {**finished[1], "seconds": 0}


def test_a_model_that_reloads_differently_is_noticed(finished, tmp_path):
    folder, _ = finished
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    model.head.classifier.bias.data += 1
    test = load_embedded_split("test", 4)
    processor = demo.ASelectImageProcessor.from_model_config(model.config)
    with pytest.raises(RuntimeError, match="gives other logits than the trained one"):
        demo.check_reloaded(model, demo.pixel_values(processor, test), test["image"][:], folder / "model")


def test_the_sample_has_every_class_and_its_names():
    train = load_embedded_split("train", 4000)
    assert len(set(train["label"])) == 10
    assert train.features["label"].names[9] == "Ankle boot"
    assert len(load_embedded_split("test", 2000)) == 2000


def test_more_pictures_than_there_are_is_refused():
    with pytest.raises(ValueError, match="The embedded test sample has 2000 pictures, asked for 2001"):
        load_embedded_split("test", 2001)


def test_the_command_runs_the_demo_and_prints_its_table(monkeypatch, finished, capsys, tmp_path):
    asked = {}

    def small_demo(output, settings):
        asked.update(output=output, seed=settings.seed)
        return finished[1]

    monkeypatch.setattr(demo, "run_demo", small_demo)
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    assert asked == {"output": str(tmp_path / "out"), "seed": 3}
    printed = capsys.readouterr().out
    assert format_table(finished[1]) in printed
    assert "the predictions are equal" in printed


def test_a_folder_that_cannot_be_written_ends_in_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-aselect: error:")
    assert error.count("\n") == 1


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_augmented_pictures_are_mirrored_or_shifted_by_a_pixel():
    picture = torch.rand(1, 5, 6)
    padded = torch.nn.functional.pad(torch.stack([picture, picture.flip(-1)]), [1] * 4, mode="replicate")
    possible = {
        tuple(view[:, top : top + 5, left : left + 6].flatten().tolist())
        for view in padded
        for top in range(3)
        for left in range(3)
    }
    torch.manual_seed(0)
    found = {tuple(view.flatten().tolist()) for view in demo.augmented(picture.expand(500, -1, -1, -1))}
    assert found == possible
    assert len(possible) == 18


def test_the_rows_are_the_tokens_of_the_pictures_and_of_augmented_ones(finished):
    model = AutoModelForImageClassification.from_pretrained(finished[0] / "model")
    pixels, labels = torch.rand(3, 1, 28, 28) * 2 - 1, torch.tensor([4, 5, 6])
    rows = demo.training_rows(model, pixels, labels, num_views=3)
    assert [int(row["labels"]) for row in rows] == [4, 5, 6] * 3
    plain = model.extract_features(pixels)
    torch.testing.assert_close(torch.stack([row["features"] for row in rows[:3]]), plain.half())
    assert not torch.allclose(torch.stack([row["features"] for row in rows[3:6]]).float(), plain, atol=1e-2)
