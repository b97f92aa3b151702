"""The recipes of the training example: each moves what it is to move and nothing else, and what it saves is loaded."""

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import example
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from peft import PeftModel
from PIL import Image as PILImage

from hf_aselect import ASelectConfig, ASelectImageProcessor, DiTForImageClassification, DiTModel

TRAIN = example("image_classification/train_image_classification.py")
SIZES = ["--head_hidden_size", "16", "--head_num_attention_heads", "2", "--head_num_layers", "1"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # peft's, of a base that diffusers saved
]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Forty-eight colour images of 10 × 12 in two classes, dark and bright."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    generator = np.random.default_rng(0)
    values = generator.integers(0, 100, (48, 10, 12, 3)) + 150 * (np.arange(48) % 2)[:, None, None, None]
    columns = {
        "image": [PILImage.fromarray(value.astype(np.uint8)) for value in values],
        "label": (np.arange(48) % 2).tolist(),
    }
    features = Features(image=Image(), label=ClassLabel(names=["dark", "bright"]))
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


class Watched(TRAIN.LayerWiseTrainer):
    """A trainer that notes what a training moves, and what is there when it is saved in the end."""

    seen: "Watched"

    def save_model(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            output = Path(self.args.output_dir)
            self.saved_card = (output / "README.md").read_text()
            self.saved_files = {path.name for path in output.iterdir()}
        super().save_model(output_dir, _internal_call)

    def train(self, *args, **kwargs):
        Watched.seen = self
        self.before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        result = super().train(*args, **kwargs)
        self.moved = {name for name, value in self.model.named_parameters() if not value.equal(self.before[name])}
        self.trainable = {name for name, value in self.model.named_parameters() if value.requires_grad}
        return result


@pytest.fixture
def train(monkeypatch, pixel_folder, parquet, tmp_path):
    """Run the example with a recipe, for a few steps."""
    monkeypatch.setattr(TRAIN, "LayerWiseTrainer", Watched)

    def run(recipe, *words):
        given = ["--model_name_or_path", str(pixel_folder), "--timestep", "5", "--train_file", str(parquet), *SIZES]
        given += ["--output_dir", str(tmp_path / "out"), "--recipe", recipe, "--num_train_epochs", "1", *words]
        given += ["--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True"]
        monkeypatch.setattr(sys, "argv", ["train_image_classification.py", *given])
        TRAIN.main()
        return Watched.seen

    return run


@pytest.mark.parametrize("recipe", ["attention_probe", "linear_probe"])
def test_probes_move_the_head_alone(train, recipe, tmp_path):
    trainer = train(recipe)
    assert trainer.moved == trainer.trainable
    assert {name.split(".")[0] for name in trainer.moved} == {"classifier"}
    again = DiTForImageClassification.from_pretrained(tmp_path / "out")
    assert again.config.head == recipe.removesuffix("_probe")
    assert again.config.id2label == {0: "dark", 1: "bright"}


@pytest.mark.parametrize("recipe", TRAIN.RECIPES)
def test_one_step_moves_what_is_trained_by_its_gradient_alone(train, recipe):
    """Plain gradient descent without decay: a weight that no gradient reaches would stay."""
    plain = {
        "--optim": "sgd",
        "--max_steps": "1",
        "--learning_rate": "1",
        "--weight_decay": "0",
        "--warmup_steps": "0",
    }
    trainer = train(recipe, *(word for pair in plain.items() for word in pair))
    # Of LoRA's two factors one begins at zero, which the first gradient of the other has as a factor. A bias of all
    # keys alike changes no attention.
    still = {name for name in trainer.trainable if "lora_A" in name or name.endswith("to_k.bias")}
    assert bool(still) == (recipe in ("lora", "fine_tune"))
    assert trainer.trainable - still == trainer.moved - still


def test_the_best_epoch_is_told_by_training_pictures_that_are_not_trained_on(train, parquet, tmp_path):
    # Ten of twelve labels are wrong, so that no share of the training images gives such a figure.
    test = load_dataset("parquet", data_files=str(parquet), split="train").select(range(12))
    kind = test.features["label"]
    test = test.remove_columns("label").add_column("label", [0, 1] + 5 * [1, 0]).cast_column("label", kind)
    test.to_parquet(tmp_path / "test.parquet")
    words = ["--held_out_share", "0.25", "--num_train_epochs", "2"]
    trainer = train("attention_probe", "--validation_file", str(tmp_path / "test.parquet"), *words)
    picked, trained = trainer.eval_dataset.split, trainer.train_dataset.split
    assert (len(trained), sorted(picked["label"])) == (36, [0] * 6 + [1] * 6)
    assert not {row.tobytes() for row in picked["image"]} & {row.tobytes() for row in trained["image"]}
    first, second, last = (entry for entry in trainer.state.log_history if "eval_accuracy" in entry)
    assert trainer.state.best_metric == max(first["eval_accuracy"], second["eval_accuracy"])
    # Of the test split, and the best epoch's, of whole images: what was saved gives the same.
    model = DiTForImageClassification.from_pretrained(tmp_path / "out")
    processor = ASelectImageProcessor.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(**processor(test["image"][:], return_tensors="pt")).logits
    accuracy = (logits.argmax(1) == torch.tensor(test["label"])).double().mean().item()
    assert last["eval_accuracy"] == pytest.approx(accuracy)
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"] == last["eval_accuracy"]
    assert f"accuracy: {accuracy}\n" in (tmp_path / "out" / "README.md").read_text()
    # What is pushed when the model is saved.
    assert f"accuracy: {accuracy}\n" in trainer.saved_card
    assert trainer.saved_files >= {"confusion_matrix.png", "config.json", "README.md"}


def test_with_persistent_workers_the_set_that_is_asked_for_is_judged(train):
    trainer = train("linear_probe", "--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True")
    for split in (trainer.eval_dataset, trainer.train_dataset):
        assert trainer.get_eval_dataloader(split).dataset is split


def test_a_share_that_cannot_hold_each_class_is_refused(train):
    with pytest.raises(ValueError, match=r"A share of 0\.01 of 43 training images cannot contain each class"):
        train("attention_probe", "--held_out_share", "0.01")


def test_fine_tuning_moves_all_up_to_the_tap(train):
    trainer = train("fine_tune")
    assert trainer.moved == trainer.trainable
    frozen = set(trainer.before) - trainer.trainable
    # The tapped block is read for its query: its keys, values, attention and MLP are not run, nor is what comes after.
    assert any("transformer_blocks.1.attn1.to_q" in name for name in trainer.moved)
    later = ("blocks.1.", "blocks.2.", "blocks.3.", "proj_out", "norm_out")
    assert all(any(part in name for part in later) for name in frozen)
    assert any("transformer_blocks.0.ff" in name for name in trainer.moved)


def test_the_learning_rate_falls_from_block_to_block(train):
    trainer = train("fine_tune", "--learning_rate", "0.01", "--layer_decay", "0.5", "--warmup_steps", "0")
    rates = {}
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        (value,) = group["params"]
        rates[names[id(value)]] = group["initial_lr"]
        assert group["weight_decay"] == (0.05 if value.ndim > 1 else 0.0)
    assert {rate for name, rate in rates.items() if name.startswith("classifier.")} == {0.01}
    assert {rate for name, rate in rates.items() if "transformer_blocks.1." in name} == {0.005}
    assert {rate for name, rate in rates.items() if "transformer_blocks.0." in name} == {0.0025}
    assert {rate for name, rate in rates.items() if "pos_embed" in name} == {0.00125}


def test_weights_that_deepspeed_takes_apart_decay_as_whole_ones_do():
    """What is left of them has one axis, as biases have."""
    apart = torch.nn.Parameter(torch.empty(0))
    apart.ds_shape = torch.Size([4, 4])
    assert TRAIN.num_axes(apart) == TRAIN.num_axes(torch.nn.Parameter(torch.empty(4, 4))) == 2
    assert TRAIN.num_axes(torch.nn.Parameter(torch.empty(4))) == 1


def test_lora_moves_adapters_and_head_and_saves_them_alone(train, pixel_folder, tmp_path):
    trainer = train("lora", "--num_train_epochs", "4")
    assert trainer.moved == trainer.trainable
    adapted = {name for name in trainer.moved if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition("transformer_blocks.")[2] for name in adapted} == {
        "0.attn1.to_q",
        "0.attn1.to_v",
        "1.attn1.to_q",
    }
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trainer.moved)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert ASelectConfig.from_pretrained(tmp_path / "out").timestep == 5
    base = DiTForImageClassification.from_pretrained(
        pixel_folder, timestep=5, num_labels=2, head_hidden_size=16, head_num_attention_heads=2, head_num_layers=1
    )
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(again(pixel_values=pixels).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(pixels).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.fold()(pixels).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["linear_probe", "lora"])
def test_a_training_that_goes_on_keeps_its_timestep(train, recipe, tmp_path, caplog):
    """Another choice (other images, another version, another machine) would not fit the head."""
    words = ["--timestep", "auto", "--num_calibration_images", "8", "--save_steps", "1"]
    words += ["--per_device_train_batch_size", "24"]
    with caplog.at_level(logging.INFO, logger="hf_aselect"):
        train(recipe, *words)
    assert caplog.text.count("Selected timestep") == 1
    (path,) = {"lora": [tmp_path / "out"]}.get(recipe, [tmp_path / "out" / "checkpoint-2"])
    config = ASelectConfig.from_pretrained(path)
    other = next(timestep for timestep in config.selection["timesteps"] if timestep != config.timestep)
    config.timestep = config.selection["timestep"] = other
    config.save_pretrained(path)
    words += ["--num_train_epochs", "2", "--resume_from_checkpoint", "latest"]
    with caplog.at_level(logging.INFO, logger="hf_aselect"):
        trainer = train(recipe, *words)
    assert trainer.state.global_step == 4
    assert caplog.text.count("Selected timestep") == 1
    again = ASelectConfig.from_pretrained(tmp_path / "out")
    assert (again.timestep, again.selection["timestep"]) == (other, other)
    with pytest.raises(ValueError, match=f"This training started with timestep {other}, got --timestep 7"):
        train(recipe, *words, "--timestep", "7")


def test_fine_tuning_takes_the_optimizer_that_is_asked_for(train, tmp_path):
    trainer = train("fine_tune", "--adam_epsilon", "1e-3", "--optim", "adamw_torch")
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-3}
    trainer = train("fine_tune", "--optim", "sgd", "--output_dir", str(tmp_path / "another"))
    assert trainer.optimizer.optimizer.__class__ is torch.optim.SGD


def test_a_frozen_backbone_is_not_chosen_for_again(train):
    with pytest.raises(ValueError, match="fine-tuned, but it is frozen: pass --recipe fine_tune or lora"):
        train("attention_probe", "--reselect_epochs", "5")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layer_decay", "1.5"], "--layer_decay must be in (0, 1], got 1.5"),
        (["--crop_share", "0"], "--crop_share must be in (0, 1], got 0.0"),
        (["--held_out_share", "-0.1"], "--held_out_share must be in [0, 1), got -0.1"),
        (["--held_out_share", "0.1"], "holds out images that are not used: pass --eval_strategy epoch"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(words, complaint, capsys):
    with pytest.raises(SystemExit):
        TRAIN.parse(["--model_name_or_path", "x", "--output_dir", "out", *words])
    assert complaint in capsys.readouterr().err


def test_a_recipe_is_not_abbreviated():
    """Transformers would take it, and its arguments would not be the recipe's."""
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser: .*--recip"):
        TRAIN.parse(["--model_name_or_path", "x", "--output_dir", "out", "--recip", "lora"])


@pytest.mark.parametrize("kind", ["diffusers", "checkpoint"])
def test_the_card_of_an_adapter_loads_it(train, kind, pixel_folder, tmp_path, monkeypatch):
    """Its base may be what diffusers saved, or an hf_aselect checkpoint without a head, at another timestep."""
    words = ["--timestep", "7", "--feature", "value"]
    if kind == "checkpoint":
        DiTModel.from_pretrained(pixel_folder, timestep=300).save_pretrained(tmp_path / "base")
        words += ["--model_name_or_path", str(tmp_path / "base")]
    trainer = train("lora", *words)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    base = Path(pixel_folder if kind == "diffusers" else tmp_path / "base")
    monkeypatch.chdir(base.parent)
    found = {}
    exec(re.sub(r'folder = "\S*"', f"folder = {str(tmp_path / 'out')!r}", code), found)
    model = found["model"].eval()
    assert (model.config.timestep, model.config.feature) == (7, "value")
    assert model.config.id2label == {0: "dark", 1: "bright"}
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(model(pixel_values=pixels).logits, expected)


def test_an_argument_given_beats_the_recipe(parquet, pixel_folder):
    words = ["--model_name_or_path", str(pixel_folder), "--output_dir", "out", "--recipe=attention_probe"]
    args, config_args, training_args = TRAIN.parse([*words, "--learning_rate", "0.5", "--head", "linear"])
    assert (training_args.learning_rate, config_args.head) == (0.5, "linear")
    assert (training_args.per_device_train_batch_size, training_args.weight_decay) == (8, 0.01)
    assert training_args.lr_scheduler_type == "cosine" and args.crop_share == 8 / 9


def test_an_unknown_recipe_is_refused(capsys):
    with pytest.raises(SystemExit):
        TRAIN.parse(["--model_name_or_path", "x", "--output_dir", "out", "--recipe", "magic"])
    assert "must be one of attention_probe, linear_probe, fine_tune, lora, got 'magic'" in capsys.readouterr().err
