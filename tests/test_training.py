import pytest
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from hf_aselect import ASelectCallback, DiTForImageClassification
from hf_aselect.metrics import compute_accuracy
from hf_aselect.training import write_model_card


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
        assert value.equal(before[name]) != name.startswith("head."), name


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
    assert "Chosen by" not in card
    assert not (tmp_path / "out" / "timestep_curve.png").exists()


def test_other_processes_write_nothing(trainer, tmp_path):
    trainer.state.is_world_process_zero = False
    callback = ASelectCallback()
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, model=trainer.model, metrics={})
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_card_of_a_timestep_set_after_a_choice_has_no_curve(trainer, tmp_path):
    trainer.model.config.timestep = 3
    trainer.train()
    assert "Chosen by" not in (tmp_path / "out" / "README.md").read_text()


def test_an_evaluation_of_another_set_leaves_the_accuracy(trainer, tmp_path):
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.evaluate(metric_key_prefix="test")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == round(accuracy, 4)


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model": "facebook/DiT-XL-2-256"}, "license: cc-by-nc-4.0"),
        ({"timestep_embedding": "original"}, "license: cc-by-nc-4.0"),
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
        assert "licence of its weights, and so of these" in text
    # What the user says comes first.
    write_model_card(classifier, tmp_path, license="mit")
    assert "license: mit" in (tmp_path / "README.md").read_text(encoding="utf-8")
