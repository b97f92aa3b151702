import json
import shutil
import sqlite3
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from conftest import take_one_step
from diffusers import DDPMScheduler, DiTTransformer2DModel
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BitsAndBytesConfig, Trainer, TrainerState, TrainingArguments
from transformers.utils import is_accelerate_available

from hf_aselect import ASelectCallback, DiTForImageClassification, TimestepSelection, plots, select_timestep
from hf_aselect.hub.push import write_model_card
from hf_aselect.model.configuration_aselect import DIT_XL_2
from hf_aselect.training import trackers
from hf_aselect.training.kept_card import keep_card, restore_card
from hf_aselect.training.metrics import compute_accuracy


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 60)


@pytest.fixture
def trainer(pixel_folder, pictures, pixels, tmp_path):
    model = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep="auto", calibration_images=pictures, num_labels=4, head="linear"
    )
    rows = [{"pixel_values": picture, "labels": index % 4} for index, picture in enumerate(pixels)]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = ASelectCallback(dataset="noise", base_model="me/dit", license="apache-2.0")
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_accuracy, callbacks=[callback]
    )


def test_the_plain_trainer_trains_the_head_and_only_the_head(trainer):
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert value.equal(before[name]) != name.startswith("classifier."), name


def test_what_the_trainer_saves_is_loaded_again(trainer, pixels):
    trainer.train()
    trainer.save_model()
    again = DiTForImageClassification.from_pretrained(trainer.args.output_dir)
    assert again(pixels).logits.equal(trainer.model.eval()(pixels).logits)
    assert again.config.timestep == trainer.model.config.timestep


def test_after_evaluation_the_card_tells_the_accuracy_and_the_choice(trainer, tmp_path):
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == round(accuracy, 4)
    assert card.data.base_model == "me/dit"
    assert f"| timestep | {trainer.model.config.timestep} |" in card.text
    assert "| steps | 3 |" in card.text
    assert (tmp_path / "out" / "timestep_curve.png").exists()


def test_the_card_of_a_chosen_by_hand_timestep_has_no_curve(trainer, tmp_path):
    trainer.model.config.timestep, trainer.model.config.selection = 7, None
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| timestep | 7 |" in card
    assert "Selected by" not in card
    assert not (tmp_path / "out" / "timestep_curve.png").exists()


def test_a_push_that_fails_leaves_the_card_for_the_next(trainer, tmp_path):
    """Between the beginning of a push and Trainer's draft the card says that it is peft's; a later push sees to it."""
    trainer.train()
    folder = tmp_path / "out"
    before = (folder / "README.md").read_text(encoding="utf-8")
    keep_card(trainer.model, folder)
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    assert not restore_card(folder)
    keep_card(trainer.model, folder)
    trainer.create_model_card(tags="mine")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags[-2:] == ["mine", "generated_from_trainer"]
    assert card.text == ModelCard(before).text
    assert not (folder / "_README.md").exists()


def test_other_processes_write_nothing(trainer, tmp_path):
    trainer.state.is_world_process_zero = False
    callback = ASelectCallback()
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model, metrics={})
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_card_of_a_timestep_set_after_a_choice_has_no_curve(trainer, tmp_path):
    trainer.model.config.timestep = 3
    trainer.train()
    assert "Selected by" not in (tmp_path / "out" / "README.md").read_text()


def test_an_evaluation_of_another_set_leaves_the_accuracy(trainer, tmp_path):
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.evaluate(metric_key_prefix="test")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == round(accuracy, 4)


@pytest.mark.process
def test_the_card_tells_of_the_weights_that_are_loaded_at_the_end(trainer, tmp_path):
    """Three steps are evaluated; the first is the best, and its weights are the ones that remain."""
    accuracies = iter([0.5, 0.25, 0.25])
    trainer.compute_metrics = lambda _: {"accuracy": next(accuracies)}
    arguments = trainer.args
    arguments.eval_strategy = arguments.save_strategy = "steps"
    arguments.eval_steps = arguments.save_steps = 1
    arguments.load_best_model_at_end = arguments.greater_is_better = True
    arguments.metric_for_best_model = "accuracy"
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == 0.5
    assert "| steps | 1 |" in card.text
    # The weights of the best step are evaluated once more, as scripts do.
    trainer.compute_metrics = lambda _: {"accuracy": 0.5}
    trainer.evaluate()
    assert "| steps | 1 |" in ModelCard.load(tmp_path / "out" / "README.md").text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model": "facebook/DiT-XL-2-256"}, "license: cc-by-nc-4.0"),
        ({"timestep_embedding": "original", "transformer": DIT_XL_2}, "license: cc-by-nc-4.0"),
        ({"base_model": "stabilityai/stable-diffusion-3.5-large"}, "license_name: stabilityai-ai-community"),
        ({"base_model": "black-forest-labs/FLUX.1-dev"}, "license_name: flux-1-dev-non-commercial-license"),
    ],
)
def test_the_card_says_the_licence_of_what_the_model_is_made_from(classifier, tmp_path, fields, expected):
    for name, value in fields.items():
        setattr(classifier.config, name, value)
    write_model_card(classifier, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert expected in text.split("---")[1]
    if "base_model" in fields:
        assert f"base_model: {fields['base_model']}" in text
        assert "licence of its weights, which also applies here" in text
    # What the user says comes first, but for what forbids commercial use.
    write_model_card(classifier, tmp_path, license="mit")
    is_hidden = "\nlicense: mit\n" in (tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert is_hidden == (fields.get("base_model", "").startswith("stabilityai/"))


def unresolved(pixel_folder, **fields):
    """A classifier whose timestep is still to be selected, with the weights of the tiny DiT."""
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4, head="linear", **fields)
    model.config.timestep = "auto"
    return model


def train_with(callback, model, pixels, tmp_path, **options):
    rows = [{"pixel_values": picture, "labels": index % 4} for index, picture in enumerate(pixels)]
    given = {"max_steps": 2, "report_to": "none", **options}
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        **given,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def test_an_open_timestep_is_chosen_on_the_first_training_pictures(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder)
    callback = ASelectCallback(max_images=6, seed=3)
    trainer = train_with(callback, model, pixels, tmp_path)
    expected = select_timestep(unresolved(pixel_folder), pixels[:6], max_images=6, seed=3)
    assert model.config.timestep == expected.timestep
    assert model.config.selection["scores"] == pytest.approx(expected.scores)
    assert "Selected by" in (tmp_path / "out" / "README.md").read_text()
    (entry,) = [row for row in trainer.state.log_history if "aselect/timestep" in row]
    assert entry["aselect/timestep"] == expected.timestep and entry["step"] == 0 and entry["aselect/drift"] == 0


def test_the_callback_says_how_many_training_images_there_are(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder)
    train_with(ASelectCallback(max_images=4, criterion="consensus"), model, pixels, tmp_path)
    assert model.config.selection["options"]["num_train_images"] == len(pixels)
    train_with(
        ASelectCallback(max_images=4, num_train_images=50), (other := unresolved(pixel_folder)), pixels, tmp_path
    )
    assert other.config.selection["options"]["num_train_images"] == 50


def test_a_chosen_timestep_is_left_alone(trainer):
    timestep = trainer.model.config.timestep
    trainer.callback_handler.callbacks[-1].on_train_begin(
        trainer.args, trainer.state, trainer.control, model=trainer.model, train_dataloader=None
    )
    assert trainer.model.config.timestep == timestep


def test_the_probe_reads_the_labels_of_the_rows(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder)
    train_with(ASelectCallback(max_images=7, criterion="probe"), model, pixels, tmp_path)
    assert model.config.selection["criterion"] == "probe"


@pytest.mark.process
def test_choosing_leaves_the_random_numbers_of_training_alone(pixel_folder, pixels, tmp_path):
    losses, models = [], [unresolved(pixel_folder), unresolved(pixel_folder)]
    models[1].classifier.load_state_dict(models[0].classifier.state_dict())
    for model in models:
        torch.manual_seed(1)
        if not losses:
            trainer = train_with(ASelectCallback(max_images=6), model, pixels, tmp_path, logging_steps=1)
            timestep = model.config.timestep
        else:
            model.config.timestep = timestep
            selected = models[0].classifier.standardization
            model._set_standardization([(selected.scale, selected.shift)])
            trainer = train_with(ASelectCallback(), model, pixels, tmp_path, logging_steps=1)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_the_drift_is_told_while_the_backbone_is_trained(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder, freeze_backbone=False)
    callback = ASelectCallback(max_images=4, reselect_epochs=1)
    trainer = train_with(callback, model, pixels, tmp_path, max_steps=-1, num_train_epochs=2, learning_rate=1e-2)
    assert [epoch for epoch, _ in callback.selections] == [0, 1, 2]
    rows = [row for row in trainer.state.log_history if "aselect/drift" in row]
    first = callback.selections[0][1].timestep
    assert [row["aselect/drift"] for row in rows] == [one.timestep - first for _, one in callback.selections]
    assert model.config.timestep == first
    assert "timestep selected at epoch" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.process
def test_the_drift_is_counted_from_the_timestep_of_the_beginning(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder, freeze_backbone=False)
    model.config.timestep = 123
    callback = ASelectCallback(max_images=4, reselect_epochs=1, follow=True)
    trainer = train_with(callback, model, pixels, tmp_path, max_steps=-1, num_train_epochs=2)
    rows = [row for row in trainer.state.log_history if "aselect/drift" in row]
    assert [row["aselect/drift"] for row in rows] == [one.timestep - 123 for _, one in callback.selections]
    assert len(rows) == 2


@pytest.mark.process
def test_what_was_due_when_a_training_ended_is_chosen_when_it_goes_on(pixel_folder, pixels, tmp_path):
    """A checkpoint of an epoch's last step is written before the callback hears of the epoch's end."""
    rows = [{"pixel_values": picture, "labels": index % 4} for index, picture in enumerate(pixels[:4])]
    timesteps = []
    for folder in ("whole", "killed"):
        callback = ASelectCallback(max_images=4, reselect_epochs=1, follow=True)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            num_train_epochs=2,
            save_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-1,
            report_to="none",
            use_cpu=True,
        )
        model = unresolved(pixel_folder, freeze_backbone=False)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        if folder == "killed":
            shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / folder / "checkpoint-1")
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        timesteps.append([(epoch, one.timestep, one.scores) for epoch, one in callback.selections])
    assert [epoch for epoch, _, _ in timesteps[0]] == [0, 1, 2]
    assert timesteps[0] == timesteps[1]


class Stream(torch.utils.data.IterableDataset):
    """A stream that knows its length, as WebDataset's can."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.process
def test_a_stream_of_known_length_is_read_from_its_start(pixel_folder, pixels, tmp_path):
    rows = [{"pixel_values": picture, "labels": index % 4} for index, picture in enumerate(pixels)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    model = unresolved(pixel_folder)
    callback = ASelectCallback(max_images=4)
    Trainer(model, arguments, train_dataset=Stream(rows), callbacks=[callback]).train()
    expected = select_timestep(unresolved(pixel_folder), pixels[:4], max_images=4)
    assert model.config.selection["scores"] == pytest.approx(expected.scores)
    model = unresolved(pixel_folder, freeze_backbone=False)
    callback = ASelectCallback(max_images=4, reselect_epochs=1)
    with pytest.raises(ValueError, match="`reselect_epochs` counts passes over a training set of known size"):
        Trainer(model, arguments, train_dataset=Stream(rows), callbacks=[callback]).train()


def test_a_frozen_backbone_has_no_drift(pixel_folder, pixels, tmp_path):
    callback = ASelectCallback(max_images=4, reselect_epochs=1)
    train_with(callback, unresolved(pixel_folder), pixels, tmp_path, max_steps=-1, num_train_epochs=2)
    assert len(callback.selections) == 1


@pytest.mark.process
def test_following_the_drift_reads_at_the_new_choice(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder, freeze_backbone=False)
    callback = ASelectCallback(max_images=4, reselect_epochs=1, follow=True)
    train_with(callback, model, pixels, tmp_path, max_steps=-1, num_train_epochs=1, learning_rate=1e-1)
    assert model.config.timestep == callback.selections[-1][1].timestep


def test_tensorboard_has_the_choice(pixel_folder, pixels, tmp_path):
    callback = ASelectCallback(max_images=4)
    train_with(callback, unresolved(pixel_folder), pixels, tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "aselect")).Reload()
    ((_, selection),) = callback.selections
    (choice,) = events.Scalars("aselect/timestep")
    assert (choice.step, choice.value) == (0, selection.timestep)
    curve = {point.step: point.value for point in events.Scalars("aselect/curve at step 0")}
    assert curve == pytest.approx(dict(zip(selection.timesteps, selection.scores, strict=True)), rel=1e-6)


def test_a_choice_that_was_made_before_is_reported(trainer, tmp_path):
    """`from_pretrained` and the training script select before the trainer is there."""
    trainer.args.report_to = ["tensorboard"]
    trainer.train()
    config = trainer.model.config
    (entry,) = [row for row in trainer.state.log_history if "aselect/timestep" in row]
    assert (entry["aselect/timestep"], entry["step"], entry["aselect/drift"]) == (config.timestep, 0, 0)
    events = EventAccumulator(str(tmp_path / "out" / "runs" / "aselect")).Reload()
    assert [point.value for point in events.Scalars("aselect/timestep")] == [config.timestep]
    assert len(events.Scalars("aselect/curve at step 0")) == len(config.selection["timesteps"])


@pytest.mark.process
def test_the_accuracy_of_before_a_training_went_on_is_kept(trainer, tmp_path):
    """The best weights are of a step that another process evaluated."""
    trainer.args.eval_strategy = trainer.args.save_strategy = "steps"
    trainer.args.eval_steps = trainer.args.save_steps = 1
    trainer.args.load_best_model_at_end = trainer.args.greater_is_better = True
    trainer.args.metric_for_best_model = "accuracy"
    accuracies = iter([0.9, 0.5, 0.4, 0.4])
    trainer.compute_metrics = lambda _: {"accuracy": next(accuracies)}
    trainer.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "README.md").unlink()
    trainer.callback_handler.callbacks[-1].metrics_by_step = {}  # as in a new process
    trainer.train(resume_from_checkpoint=True)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.eval_results[0].metric_value == 0.9


@pytest.mark.process
def test_tensorboards_folder_is_the_hosts(pixel_folder, pixels, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "~/logs")
    monkeypatch.chdir(tmp_path)
    train_with(ASelectCallback(max_images=4), unresolved(pixel_folder), pixels, tmp_path, report_to="tensorboard")
    found = [EventAccumulator(str(path)).Reload().Tags()["scalars"] for path in (tmp_path / "logs").glob("events*")]
    assert any("aselect/timestep" in tags for tags in found)
    assert not (tmp_path / "~").exists()


@pytest.mark.process
def test_trackio_has_the_choice(pixel_folder, pixels, tmp_path, monkeypatch):
    # Read when it is imported, and this is the first to do so.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    callback = ASelectCallback(max_images=4)
    options = {"report_to": "trackio", "project": "tried", "run_name": "first"}
    train_with(callback, unresolved(pixel_folder), pixels, tmp_path, **options)
    ((_, selection),) = callback.selections
    with closing(sqlite3.connect(tmp_path / "trackio" / "tried.db")) as stored:
        logged = [json.loads(row) for (row,) in stored.execute("select metrics from metrics order by id")]
    (choice,) = (each for each in logged if "aselect/timestep" in each)
    assert (choice["aselect/timestep"], choice["aselect/drift"]) == (selection.timestep, 0)
    assert choice["aselect/confidence"] == pytest.approx(selection.confidence)
    assert choice["train/global_step"] == 0
    (curve,) = (tmp_path / "trackio").rglob("*.png")
    with Image.open(curve) as picture:
        assert min(picture.size) > 200


def test_without_matplotlib_trackio_gets_the_figures(pixel_folder, pixels, tmp_path, monkeypatch, caplog):
    callback = ASelectCallback(max_images=4)
    train_with(callback, unresolved(pixel_folder), pixels, tmp_path)
    ((_, selection),) = callback.selections

    def plot(*_, **__):
        raise ImportError("No module named 'matplotlib'")

    logged = []
    monkeypatch.setattr(TimestepSelection, "plot", plot)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(log=logged.append))
    trackers._write_trackio(TrainerState(global_step=7), {"aselect/drift": 3}, selection)
    assert logged == [{"aselect/drift": 3, "train/global_step": 7}]
    assert "The curve of the selection is not sent to trackio" in caplog.text


def test_rows_without_pictures_are_refused(pixel_folder, pixels, tmp_path):
    model = unresolved(pixel_folder)
    rows = [{"features": torch.zeros(4, model.config.feature_size), "labels": 0}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"has no `pixel_values` to select it on, only features, labels"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[ASelectCallback()]).train()


@pytest.mark.parametrize("options", [{"max_images": 0}, {"reselect_epochs": 0}, {"reselect_epochs": 1.5}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(ValueError, match="must be a positive integer"):
        ASelectCallback(**options)


@pytest.mark.process
def test_a_training_that_goes_on_keeps_its_choice(pixel_folder, pixels, tmp_path):
    """The weights that a fine-tuning goes on with are others than those that were selected for."""
    model, again = (unresolved(pixel_folder, freeze_backbone=False) for _ in range(2))
    rows = [{"pixel_values": picture, "labels": index % 4} for index, picture in enumerate(pixels)]
    first, second = ASelectCallback(max_images=4), ASelectCallback(max_images=4)
    for callback, trained, steps in ((first, model, 1), (second, again, 2)):
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=steps, save_steps=1, learning_rate=1e-1, report_to="none", use_cpu=True
        )
        trainer = Trainer(trained, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=steps > 1)
    assert again.config.timestep == model.config.timestep
    assert [one.to_dict() for _, one in second.selections] == [one.to_dict() for _, one in first.selections]


def test_another_tap_is_not_chosen_while_the_backbone_is_trained(pixel_folder, pixels, tmp_path):
    callback = ASelectCallback(max_images=4, criterion="probe", block="auto")
    with pytest.raises(ValueError, match="No other tap can be selected while the backbone is trained"):
        train_with(callback, unresolved(pixel_folder, freeze_backbone=False), pixels, tmp_path)
    # Nor later: a selected timestep moves, and would take the tap with it.
    model = unresolved(pixel_folder, freeze_backbone=False)
    model.config.timestep = 5
    callback = ASelectCallback(max_images=4, block=2, reselect_epochs=1, follow=True)
    with pytest.raises(ValueError, match="No other tap can be selected while the backbone is trained"):
        train_with(callback, model, pixels, tmp_path)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_accumulated_gradients_are_those_of_one_batch(pixel_folder, pixels, tmp_path, problem):
    """Trainer divides by the number of batches, or lets the loss divide by the number of rows: not neither."""
    labels = {
        "single_label_classification": [index % 4 for index in range(4)],
        "multi_label_classification": torch.eye(4).tolist(),
        "regression": torch.arange(16.0).view(4, 4).tolist(),
    }[problem]
    rows = [{"pixel_values": picture, "labels": label} for picture, label in zip(pixels, labels, strict=False)]
    weights = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = DiTForImageClassification.from_pretrained(
            pixel_folder, timestep=5, num_labels=4, head="linear", problem_type=problem
        )
        take_one_step(model, rows, size, tmp_path / "out")
        weights.append(model.classifier.output_projection.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.process
def test_a_compiled_model_learns_the_same(pixel_folder, pixels, tmp_path):
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4, head="linear")
        trainer = train_with(ASelectCallback(), model, pixels, tmp_path, logging_steps=1, **options)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    "places",
    [
        "auto",
        pytest.param(
            {"": "disk"},
            marks=pytest.mark.skipif(
                not is_accelerate_available("1.15"),
                reason="accelerate puts no whole model on a disk before 1.15",
            ),
        ),
        {"backbone": "disk", "classifier": "cpu"},
    ],
    ids=str,
)
def test_spread_over_devices_by_the_host_it_gives_the_same(classifier, pixels, tmp_path, places):
    classifier.save_pretrained(tmp_path)
    options = {} if places == "auto" else {"offload_folder": tmp_path / "offloaded"}
    spread = DiTForImageClassification.from_pretrained(tmp_path, device_map=places, **options)
    assert any(parameter.is_meta for parameter in spread.parameters()) == (places != "auto")
    with torch.no_grad():
        torch.testing.assert_close(spread(pixels).logits, classifier(pixels).logits)


def test_a_subclass_of_another_name_has_the_same_loss(classifier, pixels):
    class Mine(DiTForImageClassification):
        pass

    mine = Mine(classifier.config).eval()
    mine.load_state_dict(classifier.state_dict())
    labels = torch.arange(len(pixels)) % 4
    torch.testing.assert_close(mine(pixels, labels=labels).loss, classifier(pixels, labels=labels).loss)


@pytest.mark.parametrize("bits", [8, 4])
def test_in_few_bits_it_classifies_alike(pixels, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    # On a CPU its 4-bit layers have multiples of 32 outputs and of 64 inputs.
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 3, "num_layers": 3}
    transformer = DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    transformer.save_pretrained(tmp_path / "dit" / "transformer")
    DDPMScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    fields = {"head_hidden_size": 128, "head_num_attention_heads": 2, "head_num_layers": 1}
    model = DiTForImageClassification.from_pretrained(tmp_path / "dit", timestep=5, num_labels=4, **fields)
    model.save_pretrained(tmp_path / "saved")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["classifier", "proj_out_2"],
    )
    small = DiTForImageClassification.from_pretrained(tmp_path / "saved", quantization_config=config)
    assert small.get_memory_footprint() < 0.5 * model.get_memory_footprint()
    with torch.no_grad():
        expected = model(pixels).logits
        # Random weights are rounded to a sixteenth; trained ones have room.
        assert (small(pixels).logits.float() - expected).norm() <= (0.05 if bits == 8 else 0.3) * expected.norm()
