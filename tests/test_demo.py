"""The demo, small: the whole way on the embedded DiT, with few images and epochs."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_aselect import cli
from hf_aselect.demo import attention_head
from hf_aselect.demo import classification as demo
from hf_aselect.demo.classification import DemoSettings, run_demo
from hf_aselect.demo.sample import load_embedded_split
from hf_aselect.demo.tables import format_table

SMALL = DemoSettings(num_train=100, num_test=50, num_calibration=16, num_probe=50, few=(50, 20), num_draws=2)
FEW = {"read_out_50", "raw_pixels_50", "read_out_20", "raw_pixels_20"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL)


def test_the_results_are_shares_and_agree_with_each_other(finished):
    _, results = finished
    accuracy = results["accuracy"]
    assert accuracy.keys() == {"read_out", "raw_pixels", "selected", "zero", "random_mean", "worst", "best"} | FEW
    assert all(0 <= share <= 1 for share in accuracy.values())
    assert accuracy["worst"] <= accuracy["random_mean"] <= accuracy["best"]
    assert accuracy["worst"] <= accuracy["selected"] <= accuracy["best"]
    assert accuracy["zero"] == results["probe_accuracies"][0]
    assert accuracy["selected"] == results["probe_accuracies"][results["timesteps"].index(results["probe_timestep"])]
    for name in FEW:
        assert accuracy[name] == pytest.approx(sum(results["few_accuracies"][name]) / 2)


def test_the_results_are_written_as_returned(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_command_fits_to_as_few_labels_as_its_table_says():
    assert DemoSettings().few == (500, 100)


def test_the_written_model_is_the_one_that_was_fitted(finished):
    folder, results = finished
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    assert model.config.timestep == results["timestep"]
    assert model.config.id2label[0] == "T-shirt/top"
    assert [list(entry) for entry in model.config.read_outs()] == results["read_out"]
    test = load_embedded_split("test", SMALL.num_test)
    processor = demo.ASelectImageProcessor.from_model_config(model.config)
    with torch.no_grad():
        found = model(demo.pixel_values(processor, test)).logits.argmax(-1)
    assert float((found == torch.tensor(test["label"][:])).double().mean()) == results["accuracy"]["read_out"]
    assert (folder / "model" / "preprocessor_config.json").exists()


def test_the_card_has_the_figures(finished):
    folder, results = finished
    card = (folder / "model" / "README.md").read_text()
    assert f"| **this model** | {results['accuracy']['read_out']:.1%} |" in card
    assert f"| this read-out from 20 labels | {results['accuracy']['read_out_20']:.1%} |" in card
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
    assert table.splitlines()[3].startswith("closed-form head" if is_best(finished[1]) else "logistic regression")


def is_best(results):
    return results["accuracy"]["read_out"] >= results["accuracy"]["raw_pixels"]


def test_as_many_images_of_each_class_are_drawn():
    labels = torch.arange(60) % 3
    first, second = demo.draw_labels(labels, 12, num_draws=2, seed=0)
    assert labels[first].bincount().tolist() == [4, 4, 4] == labels[second].bincount().tolist()
    assert len(set(first.tolist())) == 12 and set(first.tolist()) != set(second.tolist())
    assert [each.tolist() for each in demo.draw_labels(labels, 12, 2, 0)] == [first.tolist(), second.tolist()]


@pytest.fixture(scope="module")
def with_attention_head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    settings = replace(SMALL, num_probe=20, few=(20,), num_draws=1, attention_head=True, num_views=2, num_epochs=1)
    return folder, run_demo(folder, settings)


def test_the_attention_head_is_trained_where_it_is_asked_for(with_attention_head):
    folder, results = with_attention_head
    assert 0 <= results["accuracy"]["attention_head"] <= 1
    assert f"{results['accuracy']['attention_head']:.1%}" in format_table(results)
    model = AutoModelForImageClassification.from_pretrained(folder / "attention_head")
    assert model.config.head == "attention" and model.config.timestep == results["attention_head_timestep"]


@pytest.mark.process
def test_the_same_seed_gives_the_same_results(finished, tmp_path):
    again = run_demo(tmp_path, SMALL)
    assert {**again, "seconds": 0} == {**finished[1], "seconds": 0}


def test_a_model_that_reloads_differently_is_noticed(finished, tmp_path):
    folder, _ = finished
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    model.classifier.output_projection.bias.data += 1
    test = load_embedded_split("test", 4)
    processor = demo.ASelectImageProcessor.from_model_config(model.config)
    with pytest.raises(RuntimeError, match="gives other logits than the fitted one"):
        demo.check_reloaded(model, demo.pixel_values(processor, test), test["image"][:], folder / "model")


def test_the_sample_has_every_class_and_its_names():
    train = load_embedded_split("train", 4000)
    assert len(set(train["label"])) == 10
    assert train.features["label"].names[9] == "Ankle boot"
    assert len(load_embedded_split("test", 2000)) == 2000


def test_more_pictures_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match=r"must be in \[1, 2000\], the number of images in the embedded test sample, got 2001"
    ):
        load_embedded_split("test", 2001)


def test_the_command_runs_the_demo_and_prints_its_table(monkeypatch, finished, capsys, tmp_path):
    asked = {}

    def small_demo(output, settings):
        asked.update(output=output, seed=settings.seed, attention_head=settings.attention_head)
        return finished[1]

    monkeypatch.setattr(demo, "run_demo", small_demo)
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--seed", "3"]) == 0
    assert asked == {"output": str(tmp_path / "out"), "seed": 3, "attention_head": False}
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
    found = {tuple(view.flatten().tolist()) for view in attention_head.augmented(picture.expand(500, -1, -1, -1))}
    assert found == possible
    assert len(possible) == 18


def test_the_rows_are_the_tokens_of_the_images_and_of_augmented_ones(with_attention_head):
    model = AutoModelForImageClassification.from_pretrained(with_attention_head[0] / "attention_head")
    pixels, labels = torch.rand(3, 1, 28, 28) * 2 - 1, torch.tensor([4, 5, 6])
    rows = attention_head.training_rows(model, pixels, labels, num_views=3)
    assert [int(row["labels"]) for row in rows] == [4, 5, 6] * 3
    plain = model.extract_features(pixels)
    torch.testing.assert_close(torch.stack([row["features"] for row in rows[:3]]), plain.half())
    assert not torch.allclose(torch.stack([row["features"] for row in rows[3:6]]).float(), plain, atol=1e-2)
