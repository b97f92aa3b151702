"""`model.fit_head`: a linear head in closed form, from images in any form to a model that is saved and trained."""

import copy
import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from conftest import END_OF_PROCESSES, HEAD, take_one_step
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets import Image as Pictures
from forking import offline
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation, pipeline

from hf_aselect import (
    ASelectImageProcessor,
    DiTForImageClassification,
    DiTForSemanticSegmentation,
    DiTModel,
    cache_features,
    select_timestep,
)
from hf_aselect.cli import main
from hf_aselect.hub.push import write_model_card
from hf_aselect.selection import sweep
from hf_aselect.training import feature_sums, fit
from hf_aselect.training.labelled_images import LabelledImages

NUM_LABELS = 4
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [170, 170, 60]])
SEGMENTER = {"timestep": 20, "num_labels": 3, "decoder": "linear", "image_size": 16}


def images_of(labels, seed=0, noise=40, size=8):
    """Noise around a colour that the class has."""
    generator = np.random.default_rng(seed)
    values = COLOURS[labels][:, None, None] + generator.normal(0, noise, (len(labels), size, size, 3))
    return [Image.fromarray(each) for each in values.clip(0, 255).astype(np.uint8)]


def dataset_of(labels, **kwargs):
    columns = {"image": images_of(labels, **kwargs), "label": list(labels)}
    return Dataset.from_dict(columns, Features(image=Pictures(), label=ClassLabel(NUM_LABELS)))


@pytest.fixture(scope="module")
def train():
    return dataset_of(np.arange(120) % NUM_LABELS)


@pytest.fixture(scope="module")
def test():
    return dataset_of(np.arange(40) % NUM_LABELS, seed=1)


def load(folder, kind=DiTForImageClassification, **fields):
    torch.manual_seed(0)
    return kind.from_pretrained(folder, **{"timestep": 20, "num_labels": NUM_LABELS, "head": "linear", **fields})


@pytest.fixture(scope="module")
def loaded(pixel_folder):
    return load(pixel_folder)


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were shown."""
    made, bar = [], sweep.host_logging.tqdm

    def shown(**kwargs):
        made.append(bar(**kwargs))
        return made[-1]

    monkeypatch.setattr(sweep.host_logging, "tqdm", shown)
    # Another test may have switched them off.
    monkeypatch.setattr(sweep.host_logging, "_tqdm_active", True)
    return made


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def fitted(loaded, train, test):
    """A model, and what is known of its fit."""
    model = copy.deepcopy(loaded)
    return model, model.fit_head(train, eval_dataset=test)


def pixel_values(model, images):
    return ASelectImageProcessor.from_model_config(model.config)(list(images), return_tensors="pt").pixel_values


def logits(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values(model, images)).logits


def weights(model):
    return torch.cat(
        [model.classifier.output_projection.weight.flatten(), model.classifier.output_projection.bias]
    ).detach()


def test_progress_bars_know_how_much_there_is_to_do(bars, pixel_folder, train, test):
    model = load(pixel_folder, timestep="auto", calibration_images=train, num_noise_draws=2)
    model.fit_head(train, eval_dataset=test)
    assert [(bar.desc, bar.unit) for bar in bars] == [
        ("Selecting the timestep", "pass"),
        ("Standardizing features", "pass"),
        ("Fitting the head", "image"),
        ("Evaluating the head", "image"),
    ]
    assert all(bar.n == bar.total > 0 for bar in bars), [(bar.desc, bar.n, bar.total) for bar in bars]
    assert [bar.n for bar in bars[2:]] == [120, 40]
    # The size of a stream is unknown.
    model.fit_head(train.to_iterable_dataset(), replace_head=True)
    assert bars[-1].total is None and bars[-1].n == 120


def close(one, other):
    # Batches of another size give tokens with other last bits.
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)


def test_a_fitted_head_is_a_working_classifier(fitted, test):
    model, found = fitted
    assert (logits(model, test["image"]).argmax(1) == torch.tensor(test["label"][:])).double().mean() > 0.95
    assert found.evaluation["accuracy"] > 0.95 and found.accuracy > 0.95 and found.error < 0.5
    assert (found.num_images, found.num_held_out, found.class_counts) == (120, 120, (30, 30, 30, 30))
    assert found.seconds > 0 and found.strength > 0
    with pytest.raises(FrozenInstanceError):
        found.strength = 1


def test_its_scores_are_probabilities(fitted, test):
    model, found = fitted
    likely = logits(model, test["image"]).softmax(1).max(1).values
    assert float(likely.mean()) == pytest.approx(found.evaluation["accuracy"], abs=0.15)
    assert found.scale > 1


def test_the_linear_layer_reads_the_mean_of_the_tokens_and_nothing_else(fitted, test):
    model, _ = fitted
    assert not model.config.head_norm
    with torch.no_grad():
        tokens = model.extract_features(pixel_values(model, test["image"]))
    expected = tokens.mean(1) @ model.classifier.output_projection.weight.T + model.classifier.output_projection.bias
    torch.testing.assert_close(logits(model, test["image"]), expected.detach(), rtol=1e-4, atol=1e-4)


def test_it_is_saved_loaded_and_folded_like_any_other(fitted, test, tmp_path):
    model, _ = fitted
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, test["image"]), logits(model, test["image"]))
    assert not again.config.head_norm
    torch.testing.assert_close(logits(again.fold(), test["image"]), logits(model, test["image"]), rtol=1e-3, atol=1e-3)
    ASelectImageProcessor.from_model_config(model.config).save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    (best,) = classify(test[3]["image"], top_k=1)
    assert best["label"] == "3" and 0.5 < best["score"] <= 1


@pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.6 writes code that lacks torch")
def test_it_is_exported(fitted, test):
    model, _ = fitted
    pixels = pixel_values(model, test["image"][:4])
    program = torch.export.export(model.fold().eval(), (), {"pixel_values": pixels})
    torch.testing.assert_close(
        program.module()(pixel_values=pixels).logits, logits(model, test["image"][:4]), rtol=1e-3, atol=1e-3
    )


def test_trainer_goes_on_from_it(fitted, train, tmp_path):
    model, before = copy.deepcopy(fitted[0]), {}
    pixels = pixel_values(model, train["image"][:16])
    rows = [{"pixel_values": each, "labels": label} for each, label in zip(pixels, train["label"][:16], strict=True)]
    labels = torch.tensor(train["label"][:16])
    with torch.no_grad():
        loss = float(model(pixels, labels=labels).loss)
    assert loss < 0.5, "a new head begins with 1.4"
    before = {name: value.clone() for name, value in model.named_parameters()}
    take_one_step(model, rows, 16, tmp_path)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"classifier.output_projection.weight", "classifier.output_projection.bias"}
    with torch.no_grad():
        assert float(model.eval()(pixels, labels=labels).loss) < loss + 0.01


def moved_with(caplog, model, selection):
    """Apply a selection, and return what is said of the head."""
    caplog.clear()
    model.apply_selection(selection)
    return [record.getMessage() for record in caplog.records if "train it again" in record.getMessage()]


def test_a_fitted_head_that_is_read_elsewhere_is_warned_of_once(model, train, pixels, caplog):
    here, elsewhere = (select_timestep(model, pixels, criterion="hfr", timesteps=[each]) for each in (20, 500))
    assert moved_with(caplog, model, elsewhere) == moved_with(caplog, model, here) == []  # a new head
    model.fit_head(train)
    assert moved_with(caplog, model, here) == []
    told = "The head was fitted at timestep 20. At timestep 500 fit or train it again."
    assert moved_with(caplog, model, elsewhere) == [told]
    assert moved_with(caplog, model, elsewhere) == []
    model.fit_head(train)
    assert moved_with(caplog, model, elsewhere) == []
    key = select_timestep(model, pixels, criterion="hfr", timesteps=[500], feature="key")
    (told,) = moved_with(caplog, model, key)
    assert "fitted at timestep 500 (query of block 1). At timestep 500 (key of block 1) fit" in told


def test_a_loaded_head_that_is_read_elsewhere_is_warned_of(fitted, pixels, tmp_path, caplog):
    fitted[0].save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    here, elsewhere = (select_timestep(model, pixels, criterion="hfr", timesteps=[each]) for each in (20, 500))
    assert moved_with(caplog, model, here) == []
    told = ["The head was trained at timestep 20. At timestep 500 fit or train it again."]
    assert moved_with(caplog, model, elsewhere) == told
    # What it is loaded to read says nothing of where it was trained.
    model = AutoModelForImageClassification.from_pretrained(tmp_path, timestep=500)
    assert moved_with(caplog, model, here) == []
    assert moved_with(caplog, model, elsewhere) == told


NAMES = ["cat", "dog", "bird", "fish"]


def test_a_fit_takes_the_names_of_the_classes_where_nobody_set_any(pixel_folder, model, train):
    named = train.cast_column("label", ClassLabel(names=NAMES))
    model.fit_head(named)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: number for number, name in enumerate(NAMES)}
    own = {number: f"class {number}" for number in range(4)}
    model = load(pixel_folder, id2label=own, label2id={name: number for number, name in own.items()})
    model.fit_head(named)
    assert model.config.id2label == own
    five = load(pixel_folder, num_labels=5)
    five.fit_head(named, allow_missing=True)
    assert five.config.id2label[0] == "LABEL_0" and five.config.num_labels == 5


def test_a_segmenters_fit_takes_the_names_of_the_classes(pixel_folder):
    rows = [(image, np.asarray(mask).astype(int)) for image, mask in scenes(8)]
    kinds = Features(image=Pictures(), label=List(List(ClassLabel(names=NAMES[:3]))))
    masks = [np.where(mask == 255, -1, mask).tolist() for _, mask in rows]
    named = Dataset.from_dict({"image": [image for image, _ in rows], "label": masks}, kinds)
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER, semantic_loss_ignore_index=-1)
    model.fit_head(named)
    assert model.config.id2label == dict(enumerate(NAMES[:3]))


def test_its_card_says_how_it_was_fitted(fitted, tmp_path):
    model, found = fitted
    write_model_card(model, tmp_path, model_name="colours", **model.card_facts)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| head | linear, in closed form (ridge regression) |\n| images it was fitted on | 120 |" in text
    assert f"| accuracy on held-out images, each held out once | {found.accuracy:.1%} |" in text
    assert f"| **this model** | {found.evaluation['accuracy']:.1%} |" in text


def test_a_fit_without_an_evaluation_forgets_the_accuracy_of_the_head_before(model, train):
    model.card_facts = {"accuracy": 0.3, "dataset": "colours"}
    found = model.fit_head(train)
    assert found.evaluation is None
    assert model.card_facts["accuracy"] is None and model.card_facts["dataset"] == "colours"


class Pairs(torch.utils.data.Dataset):
    """A torch dataset, which is no `Iterable`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]["image"], self.rows[index]["label"]


def transformed(train, model):
    def to_pixels(batch):
        return {"pixel_values": pixel_values(model, batch["image"]), "labels": batch["label"]}

    return train.with_transform(to_pixels)


FORMS = {
    "stream": lambda train, model: train.to_iterable_dataset(num_shards=3),
    "pairs": lambda train, model: list(zip(train["image"], train["label"], strict=True)),
    "torch dataset": lambda train, model: Pairs(train),
    "generator": lambda train, model: ((row["image"], torch.tensor(row["label"])) for row in train),
    "other columns": lambda train, model: train.rename_columns({"image": "photo"}).add_column("age", range(120)),
    "transform": transformed,
    "pixel values": lambda train, model: {
        "pixel_values": pixel_values(model, train["image"]),
        "labels": torch.tensor(train["label"][:]),
    },
    "pixel pairs": lambda train, model: torch.utils.data.TensorDataset(
        pixel_values(model, train["image"]), torch.tensor(train["label"][:])
    ),
    "processor's output": lambda train, model: (
        ASelectImageProcessor.from_model_config(model.config)(train["image"][:], return_tensors="pt")
        | {"labels": np.array(train["label"][:])}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_come_in_any_form(model, fitted, train, form):
    found = model.fit_head(FORMS[form](train, model))
    assert found.num_images == 120 and found.class_counts == fitted[1].class_counts
    close(model, fitted[0])


@pytest.mark.parametrize(
    ("what", "dtype"), [("tokens", "float32"), ("pooled", "float32"), ("latents", "float32"), ("tokens", "float16")]
)
def test_cached_features_give_the_same_head(model, fitted, train, tmp_path, what, dtype):
    cached = cache_features(model, train, tmp_path, what=what, dtype=dtype)
    found = model.fit_head(cached)
    if dtype == "float32":
        close(model, fitted[0])
    # Half precision rounds differences between images.
    assert found.accuracy == pytest.approx(fitted[1].accuracy, abs=0.03)


@pytest.mark.parametrize("change", [{"timestep": 500}, {"block": 0}, {"noise_seed": 3}])
def test_features_that_were_read_elsewhere_are_rejected(model, pixel_folder, train, test, tmp_path, change):
    other = load(pixel_folder, **change)
    cached = cache_features(other, train, tmp_path, what="pooled")
    name = "tap" if "block" in change else next(iter(change))
    with pytest.raises(ValueError, match=rf"cached with `{name}` .*, and this model reads \[\(20, 1, 'query'\)\]"):
        model.fit_head(cached)
    with pytest.raises(ValueError, match="Cache them with this model"):
        model.fit_head(train, eval_dataset=cached.select(range(8)))
    other.fit_head(cached.shuffle(seed=0))
    # What several caches say is no fingerprint.
    own = cache_features(model, train, tmp_path, what="pooled")
    model.fit_head(concatenate_datasets([cached, own]))


def test_views_of_an_image_are_held_out_together(model, train, tmp_path):
    cached = cache_features(model, train, tmp_path, what="pooled", num_views=3)
    images = LabelledImages(cached, model.config)
    assert images.image_numbers([0, 7, 127, 247]).tolist() == [0, 7, 7, 7]
    assert model.fit_head(cached).num_images == 360
    # Copies of images whose labels say nothing: whoever has seen a view of an image knows its label by heart.
    noise = dataset_of(np.random.default_rng(0).integers(0, 4, 40) * 0, noise=60)
    noise = noise.remove_columns("label").add_column("label", np.random.default_rng(1).integers(0, 4, 40).tolist())
    same = cache_features(model, noise, tmp_path, what="pooled", num_views=4, augment=lambda image: image)
    assert model.fit_head(same).accuracy < 0.5


def test_the_order_of_the_images_does_not_matter(model, fitted, train, test):
    found = model.fit_head(train.shuffle(seed=7))
    assert found.accuracy == pytest.approx(fitted[1].accuracy, abs=0.03)
    # Other images are held out together, and the strength and the scale may be those of a neighbour.
    one, other = logits(model, test["image"]), logits(fitted[0], test["image"])
    torch.testing.assert_close(one / one.std(), other / other.std(), rtol=0, atol=0.3)


def test_more_images_than_are_kept_give_the_same_head(model, fitted, train, test, monkeypatch):
    monkeypatch.setattr(fit, "KEPT_BYTES", 4000)
    found = model.fit_head(train)
    assert found.num_images == 120 and found.num_held_out < 60
    assert found.accuracy == pytest.approx(fitted[1].accuracy, abs=0.1)
    guesses = [logits(each, test["image"]).argmax(1) for each in (model, fitted[0])]
    assert float((guesses[0] == guesses[1]).double().mean()) > 0.94


def test_a_sample_of_the_images_is_that_of_its_seed(model, train):
    assert model.fit_head(train, max_images=30, seed=3).num_images == 30
    first = weights(model)
    model.fit_head(train, max_images=30, seed=3, batch_size=5)
    torch.testing.assert_close(weights(model), first, rtol=1e-3, atol=1e-4)
    model.fit_head(train, max_images=30, seed=4)
    assert not torch.allclose(weights(model), first, rtol=1e-2)
    assert model.fit_head(train.to_iterable_dataset(), max_images=24).num_images == 24


def test_images_without_a_label_are_left_out(model, fitted, train):
    rows = [(row["image"], row["label"]) for row in train]
    empty = [(image, -100) for image in images_of(np.zeros(9, dtype=int), seed=5)]
    found = model.fit_head(rows[:60] + empty + rows[60:])
    assert found.num_images == 120 and found.class_counts == (30, 30, 30, 30)
    assert float(torch.cosine_similarity(weights(model), weights(fitted[0]), dim=0)) > 0.98


def test_a_model_in_training_stays_in_training(model, train):
    model.train()
    model.fit_head(train)
    assert model.training and model.classifier.training and not model.backbone.denoiser.training


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_a_head_is_evaluated_on_each_of_several_sets(model, train, test, kind, tmp_path):
    sets = kind({"near": test, "far_away": test.select(range(20))})
    found = model.fit_head(train, eval_dataset=sets).evaluation
    assert found == {
        f"{name}_{key}": value
        for name, rows in sets.items()
        for key, value in model.fit_head(train, eval_dataset=rows).evaluation.items()
    }
    model.fit_head(train, eval_dataset=sets)
    write_model_card(model, tmp_path, **{**model.card_facts, "dataset": "stripes"})
    card = ModelCard.load(tmp_path / "README.md")
    results = {each.dataset_split: each.metric_value for each in card.data.eval_results}
    assert results == {name: pytest.approx(found[f"{name}_accuracy"], abs=1e-4) for name in sets}


def test_a_head_of_standardized_features_is_fitted_to_these(pixel_folder, train, test):
    model = load(pixel_folder, timestep=900, calibration_images=train["image"][:64])
    found = model.fit_head(train, eval_dataset=test)
    assert found.evaluation["accuracy"] > 0.95
    with torch.no_grad():
        tokens = model.extract_features(pixel_values(model, test["image"]))
        expected = model.classifier.output_projection(model.classifier.pool(tokens))
    torch.testing.assert_close(logits(model, test["image"]), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_fitted(pixel_folder, train, test):
    model = load(pixel_folder, dtype=torch.bfloat16)
    assert model.fit_head(train, eval_dataset=test).evaluation["accuracy"] > 0.9
    assert model.classifier.output_projection.weight.dtype == torch.bfloat16


def test_a_callers_autocast_rounds_no_features(model, fitted, train):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.fit_head(train)
    close(model, fitted[0])


def test_a_folded_model_is_fitted(loaded, fitted, train):
    folded = loaded.fold()
    folded.fit_head(train)
    close(folded, fitted[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_a_head_on_adapters_is_fitted_and_saved_once_they_are_merged(model, train, test, tmp_path, caplog):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    adapted.fit_head(train)
    assert "The fitted head is no part of the model's adapters, and is not saved with them" in caplog.text
    expected = logits(adapted, test["image"])
    caplog.clear()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, test["image"]), expected, rtol=1e-3, atol=1e-3)
    again.fit_head(train)
    assert "adapters" not in caplog.text


def test_an_attention_head_is_replaced_where_that_is_asked_for(pixel_folder, fitted, train, tmp_path):
    model = load(pixel_folder, head="attention", head_num_layers=1, **HEAD)
    with pytest.raises(
        ValueError, match=r"this model's head is 'attention'. Load it with `head='linear'`, or pass `replace_h"
    ):
        model.fit_head(train)
    model.fit_head(train, replace_head=True)
    close(model, fitted[0])
    assert (model.config.head, model.config.head_norm) == ("linear", False)
    assert "AttentionHeadBlock" not in model._no_split_modules
    model.save_pretrained(tmp_path)
    close(AutoModelForImageClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("head", ["attention", "linear"])
def test_a_fit_that_fails_changes_nothing(pixel_folder, train, head):
    model = load(pixel_folder, head=head, head_num_layers=1, **HEAD)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    # The last row cannot be a class.
    rows = [(row["image"], row["label"]) for row in train] + [(train[0]["image"], 9)]
    with pytest.raises(ValueError, match=r"`labels` must be class indices in \[0, 4\), got \[9\]"):
        model.fit_head(iter(rows), replace_head=True)
    assert model.config.to_dict() == config and model.card_facts == {}
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_rare_classes_count_the_same_where_that_is_asked_for(model, test):
    labels = np.array([0] * 140 + [1] * 140 + [2] * 140 + [3] * 4)
    train, judged = dataset_of(labels, noise=120), dataset_of(np.arange(200) % 4, noise=120, seed=1)

    def recall(given, **how):
        model.fit_head(given, **how)
        guesses, truth = logits(model, judged["image"]).argmax(1), torch.tensor(judged["label"][:])
        return float((guesses == 3)[truth == 3].double().mean())

    balanced = recall(train, balance_classes=True)
    assert balanced > recall(train) + 0.3
    first = weights(model)
    # Of a stream the labels are counted first.
    assert recall(train.to_iterable_dataset(), balance_classes=True) == pytest.approx(balanced, abs=0.05)
    assert not torch.allclose(weights(model), first)


def test_several_labels_an_image(pixel_folder, train, test, tmp_path):
    def marked(rows):
        """Whether there is much red, and much green."""
        labels = torch.tensor(rows["label"][:])
        marks = torch.stack([(labels == 0) | (labels == 3), (labels == 1) | (labels == 3)], dim=1).float()
        return {"pixel_values": pixel_values(model, rows["image"]), "labels": marks}

    model = load(pixel_folder, num_labels=2)
    found = model.fit_head(marked(train), eval_dataset=marked(test))
    assert model.config.problem_type == "multi_label_classification"
    assert found.accuracy > 0.9 and found.evaluation["accuracy"] > 0.9 and found.class_counts == (60, 60)
    scores = logits(model, test["image"]).sigmoid()
    truth = marked(test)["labels"]
    assert float(torch.nn.functional.binary_cross_entropy(scores, truth)) < 0.35
    model.save_pretrained(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.problem_type == model.config.problem_type


def test_values(pixel_folder, train, test):
    def bright(rows):
        pixels = pixel_values(model, rows["image"])
        return {"pixel_values": pixels, "labels": 10 + 3 * pixels[:, 0].mean((1, 2))}

    model = load(pixel_folder, num_labels=1)
    found = model.fit_head(bright(train), eval_dataset=bright(test))
    assert (model.config.problem_type, found.accuracy, found.class_counts, found.scale) == ("regression", None, (), 1)
    assert found.error < 0.2 and found.evaluation["error"] < 0.2
    torch.testing.assert_close(logits(model, test["image"])[:, 0], bright(test)["labels"], rtol=0, atol=0.6)
    assert "share of variance explained" in str(model.card_facts["training"])


def scenes(num, seed=0, rare=False):
    """Images of 16 × 16 with a coloured half, and masks of it; a strip of each has no class."""
    generator, rows = np.random.default_rng(seed), []
    for index in range(num):
        mask = np.zeros((16, 16), dtype=np.uint8)
        columns = slice(0, 8) if index % 2 else slice(8, 16)
        mask[:, columns] = 1 + (index // 2) % 2
        if rare:
            mask[mask == 2] = 1
            mask[:2, :2] = 2
        values = COLOURS[mask] + generator.normal(0, 40, (16, 16, 3))
        mask[-2:] = 255
        rows.append((Image.fromarray(values.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)))
    return rows


def test_a_segmenter_is_fitted_patch_by_patch(pixel_folder, tmp_path):
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    found = model.fit_head(scenes(40), eval_dataset=scenes(20, seed=1))
    assert found.evaluation["accuracy"] > 0.85 and found.evaluation["mean_iou"] > 0.7 and found.accuracy > 0.85
    assert found.num_images == 40 and sum(found.class_counts) == 40 * 14 * 16
    # Tokens without a class, the last row of eight, are no rows.
    assert found.num_held_out == 40 * 7 * 8
    assert model.card_facts["mean_iou"] == found.evaluation["mean_iou"]
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    picture = scenes(1, seed=2)[0][0]
    assert torch.equal(logits(again, [picture]), logits(model, [picture]))


def test_a_segmenters_training_goes_on_from_the_fit(pixel_folder):
    """In train mode the batch norm standardizes by the batch, which is near what it standardizes by in eval mode."""
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    model.fit_head(scenes(40))
    processor = ASelectImageProcessor.from_model_config(model.config, do_center_crop=False)
    batch = processor(*map(list, zip(*scenes(40), strict=True)), return_tensors="pt")
    with torch.no_grad():
        losses = [float(model.train(mode)(**batch).loss) for mode in (True, False)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02) and max(losses) < 0.5


def test_a_segmenter_reads_masks_in_any_form(pixel_folder):
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    rows = scenes(24)
    model.fit_head(rows)
    weight, mean = model.decode_head.classifier.weight.detach().clone(), model.decode_head.norm.running_mean.clone()
    images, masks = map(list, zip(*rows, strict=True))
    processor = ASelectImageProcessor.from_model_config(model.config, do_center_crop=False)
    features = Features(image=Pictures(), annotation=Pictures())
    for form in (
        processor(images, masks, return_tensors="pt"),
        Dataset.from_dict({"image": images, "annotation": masks}, features),
        Dataset.from_dict({"image": images, "annotation": masks}, features).to_iterable_dataset(),
    ):
        model.fit_head(form, batch_size=7)
        torch.testing.assert_close(model.decode_head.classifier.weight, weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.decode_head.norm.running_mean, mean, rtol=1e-3, atol=1e-4)


def test_rare_classes_of_pixels_count_the_same_where_that_is_asked_for(pixel_folder):
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    train, judged = scenes(60, rare=True), scenes(30, rare=True, seed=1)

    def recall(**how):
        model.fit_head(train, **how)
        guesses = logits(model, [image for image, _ in judged]).argmax(1)
        truth = torch.stack([torch.from_numpy(np.array(mask)) for _, mask in judged])
        return float((guesses == 2)[truth == 2].double().mean())

    assert recall(balance_classes=True) > recall() + 0.2


def without(train, label):
    return train.select([index for index, each in enumerate(train["label"]) if each != label])


BAD = {
    "no dataset": (
        lambda train: "train.parquet",
        "Images must be a list of PIL images or arrays, a dataset with an image column",
    ),
    "several splits": (lambda train: DatasetDict(train=train), "Pass one split of a `DatasetDict`"),
    "no rows": (lambda train: [], "The dataset has no rows"),
    "no labels": (
        lambda train: train.remove_columns("label"),
        "no label column, only image. Pass its name as `label_c",
    ),
    "images alone": (lambda train: train["image"][:4], "The dataset's rows must be pairs (image, label)"),
    "lone tensors": (
        lambda train: torch.zeros(4, 3, 8, 8),
        "or a dictionary with `pixel_values` (or `features`, `latents`) and `labels`",
    ),
    "other lengths": (
        lambda train: {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(3)},
        "Each image must have a label, got {'pixel_values': 4, 'labels': 3}",
    ),
    "a class without an image": (
        lambda train: without(train, 2),
        "1 of 4 classes have no image among 90: 'LABEL_2' (2",
    ),
    "in a stream": (lambda train: without(train, 2).to_iterable_dataset(), "1 of 4 classes have no image among 90"),
    "fewer images than classes": (lambda train: train.select(range(3)), "1 of 4 classes have no image among 3"),
    "one class": (lambda train: [(image, 0) for image in train["image"][:9]], "The labels are the same for all"),
    "one image": (lambda train: train.select([0]), "at least 2 images with a label, got 1"),
    "none labelled": (lambda train: [(image, -100) for image in train["image"][:9]], "at least 2 images with a label"),
    "equal images": (
        lambda train: [(train[0]["image"], index % 4) for index in range(20)],
        "The features are the same for all images",
    ),
    "out of range": (
        lambda train: [(image, 4) for image in train["image"][:9]],
        "`labels` must be class indices in [0,",
    ),
    "negative": (lambda train: [(image, -1) for image in train["image"][:9]], "class indices in [0, 4), got [-1]"),
    "names": (
        lambda train: [(image, "red") for image in train["image"][:9]],
        "The label of image 0 is 'red', but must",
    ),
    "none": (lambda train: [(train[0]["image"], each) for each in (0, None)], "The label of image 1 is None"),
    "floats": (lambda train: [(image, 0.5) for image in train["image"][:9]], "must be class indices, integers in"),
    "mixed kinds": (
        lambda train: [(train[0]["image"], 1), (train[1]["image"], [0.0, 1.0, 0.0, 0.0])],
        "All labels must be of one kind, got 4 numbers (float32) for image 1, and a number (int64) for image 0",
    ),
    "mixed rows": (
        lambda train: [*train.select(range(9)), {"image": 0}],
        "does not have `image` and `label`, unlike the first",
    ),
    "unreadable": (
        lambda train: [*zip(train["image"], train["label"], strict=True), (None, 0)],
        "Image 120 cannot be read",
    ),
    "bytes for pixel values": (
        lambda train: {"pixel_values": torch.full((9, 3, 8, 8), 255.0), "labels": torch.arange(9) % 4},
        "`pixel_values` must be in [-1, 1], got values up to 255",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_datasets_are_rejected(model, train, name):
    make, words = BAD[name]
    with pytest.raises(ValueError) as rejected:
        model.fit_head(make(train))
    assert words in str(rejected.value)


def test_labels_are_looked_at_before_an_image_is_read(model, train, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="classes have no image"):
        model.fit_head(without(train, 1))


def test_classes_without_an_image_may_be_allowed(model, train, test):
    found = model.fit_head(without(train, 2), allow_missing=True)
    assert found.class_counts == (30, 30, 0, 30)
    assert 2 not in logits(model, test["image"]).argmax(1).tolist()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image_column": "photo"}, "no column 'photo', only image, label"),
        ({"label_column": "kind"}, "no column 'kind', only image, label"),
        ({"max_images": 0}, "`max_images` must be a positive integer"),
        ({"batch_size": True}, "`batch_size` must be a positive integer"),
        ({"seed": -1}, "`seed` must be an integer in"),
    ],
)
def test_bad_options_are_rejected(model, train, given, words):
    with pytest.raises(ValueError, match=words):
        model.fit_head(train, **given)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_bad_models_are_rejected(pixel_folder, model, train):
    with pytest.raises(ValueError, match="A DiTModel has no head to fit"):
        DiTModel.from_pretrained(pixel_folder, timestep=20).fit_head(train)
    replaced = copy.deepcopy(model)
    replaced.classifier = torch.nn.Linear(16, NUM_LABELS)
    with pytest.raises(ValueError, match="The head of this model is a Linear that took the place of its own"):
        replaced.fit_head(train)
    auto = copy.deepcopy(model)
    auto.config.timestep = "auto"
    with pytest.raises(ValueError, match="The timestep of this model is still 'auto'"):
        auto.fit_head(train)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["classifier"])
    ).get_base_model()
    with pytest.raises(ValueError, match="Fit the head before you add"):
        adapted.fit_head(train)
    with torch.no_grad():
        model.backbone.denoiser.transformer.transformer_blocks[0].attn1.to_v.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="The features of image 0 are NaN or infinite"):
        model.fit_head(train)


def test_a_segmenter_is_fitted_with_a_linear_decoder_to_masks(latent_folder, pixel_folder, train, tmp_path):
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    with pytest.raises(ValueError, match="needs images and masks, but the dataset has `features`"):
        model.fit_head({"features": torch.zeros(3, 4, 16), "labels": torch.zeros(3, 8, 8)})
    with pytest.raises(ValueError, match="`labels` must be class indices in"):
        model.fit_head([(image, Image.fromarray(np.array(mask) + 3)) for image, mask in scenes(4)])
    with pytest.raises(ValueError, match="must have the size of its image"):
        model.fit_head([(image, mask.resize((4, 4))) for image, mask in scenes(4)])


def test_what_cannot_be_balanced_is_rejected(model, pixel_folder, train):
    with pytest.raises(ValueError, match="an iterator can only be read once"):
        model.fit_head(((row["image"], row["label"]) for row in train), balance_classes=True)
    values = load(pixel_folder, num_labels=1)
    rows = {"pixel_values": pixel_values(model, train["image"]), "labels": torch.rand(120)}
    with pytest.raises(ValueError, match="`balance_classes` needs one class per image"):
        values.fit_head(rows, balance_classes=True)


def test_features_too_wide_for_the_memory_are_rejected_before_an_image_is_read(model, train, monkeypatch):
    monkeypatch.setattr(fit, "KEPT_BYTES", 1000)
    monkeypatch.setattr(feature_sums, "available_memory", lambda: 1000)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="The moments of features of width 16 need"):
        model.fit_head(train)


def test_a_pushed_copy_of_the_code_is_fitted(fitted, model, train, tmp_path):
    """With the package and the code of a checkpoint there are two classes of each name."""
    model.save_pretrained(tmp_path, include_code=True)
    kind = type(AutoModelForImageClassification.from_pretrained(tmp_path))
    assert kind is DiTForImageClassification
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    other = get_class_from_dynamic_module("modeling_classification.DiTForImageClassification", str(tmp_path))
    assert other is not kind
    copied = other.from_pretrained(tmp_path)
    copied.fit_head(train)
    close(copied, fitted[0])


TWO = """
import os, sys, json, torch
from pathlib import Path
from datasets import Dataset
import torch.distributed
from hf_aselect import DiTForImageClassification
from hf_aselect.training import fit
folder, output = sys.argv[1], Path(sys.argv[2])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if WORLD > 1:
    torch.distributed.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
labels = torch.arange(90) % 3
pixels = (torch.rand(90, 3, 8, 8, generator=generator) - 0.5) * 0.6
pixels[torch.arange(90), labels] += 0.5
for name, kept in (("rows", 2**28), ("moments", 3000)):
    fit.KEPT_BYTES = kept
    torch.manual_seed(RANK)
    model = DiTForImageClassification.from_pretrained(folder, timestep=5, num_labels=3, head="linear")
    rows = {"pixel_values": pixels, "labels": labels}
    found = model.fit_head(rows, eval_dataset=rows, balance_classes=True)
    facts = {"strength": found.strength, "scale": found.scale, "error": found.error, "accuracy": found.accuracy}
    facts |= {"images": found.num_images, "held": found.num_held_out, "evaluation": found.evaluation}
    with torch.no_grad():
        logits = model.eval()(pixels).logits
    torch.save((facts, model.classifier.state_dict(), logits), output / f"{name}-{RANK}-of-{WORLD}.pt")
# What is wrong in one process ends all of them.
pixels[1] = 300
try:
    model.fit_head({"pixel_values": pixels, "labels": labels})
except (ValueError, RuntimeError) as error:
    (output / f"error-{RANK}-of-{WORLD}.txt").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.process
def test_two_processes_end_with_the_head_of_one(pixel_folder, tmp_path):
    for world in (1, 2):
        code, said = offline().run(TWO + END_OF_PROCESSES, pixel_folder, tmp_path, world=world)
        assert not code, said[-3000:]
    for name in ("rows", "moments"):
        alone, first, second = (
            torch.load(tmp_path / f"{name}-{which}.pt") for which in ("0-of-1", "0-of-2", "1-of-2")
        )
        assert first[0] == second[0]
        assert all(torch.equal(value, second[1][key]) for key, value in first[1].items()), "to the bit"
        assert (first[0]["images"], first[0]["evaluation"]) == (90, alone[0]["evaluation"])
        if name == "rows":
            assert first[0]["strength"] == alone[0]["strength"] and first[0]["held"] == 90
            # Batches of other images give tokens with other last bits.
            torch.testing.assert_close(first[2], alone[2], rtol=1e-2, atol=1e-2)
        else:
            assert first[0]["held"] < 60
            assert float((first[2].argmax(1) == alone[2].argmax(1)).double().mean()) > 0.95
    said = [(tmp_path / f"error-{rank}-of-2.txt").read_text() for rank in (0, 1)]
    assert said[1].startswith("ValueError: `pixel_values` must be in [-1, 1], got values up to 300")
    assert said[0].startswith("RuntimeError: Another process failed to fit the head (ValueError: `pixel_values`")


def write(rows, path):
    rows.to_parquet(path)
    return str(path)


def test_the_command_fits_evaluates_and_saves(pixel_folder, train, test, tmp_path, capsys):
    words = ["--images", write(train, tmp_path / "train.parquet"), "--output", str(tmp_path / "out")]
    words += ["--eval-images", write(test, tmp_path / "test.parquet"), "--timestep", "20", "--num-images", "100"]
    assert main(["fit", str(pixel_folder), *words, "--block", "-1", "--feature", "hidden"]) == 0
    shown = capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    accuracy = (logits(model, test["image"]).argmax(1) == torch.tensor(test["label"][:])).double().mean()
    rows = dict(line.split(None, 1) for line in shown.splitlines() if line and not line.startswith("accuracy"))
    assert rows["timestep"] == "20" and rows["features"] == "hidden of block 2"
    assert rows["images"] == "100 of 4 classes"
    assert f"accuracy, evaluation   {accuracy:.1%} on 40 images" in shown
    assert model.config.standardized_grid == [4, 4] and not model.config.head_norm
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| images it was fitted on | 100 |" in card and f"| **this model** | {accuracy:.1%} |" in card
    content = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert content["auto_map"] and (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert not list(tmp_path.glob(".*incomplete*"))


def test_the_command_selects_the_timestep_where_there_is_none(pixel_folder, train, tmp_path, capsys):
    for index, row in enumerate(train.select(range(40))):
        folder = tmp_path / "images" / f"class {row['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{index}.png")
    words = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--num-images", "35"]
    assert main(["fit", str(pixel_folder), *words]) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"timestep               {model.config.timestep}, selected from 40 images" in printed
    assert "`--block all --feature hidden`" in printed
    assert model.config.selection["settings"]["pooling"] == "mean"
    assert model.config.selection["options"]["num_train_images"] == 35
    assert model.config.id2label == {number: f"class {number}" for number in range(4)}
    assert (tmp_path / "out" / "timestep_curve.png").is_file()
    # Again, from what it wrote: the timestep stays, and the head is another one.
    words = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "again"), "--num-images", "30"]
    assert main(["fit", str(tmp_path / "out"), *words, "--block", "all"]) == 0
    assert "`--block all --feature hidden`" not in capsys.readouterr().out
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert again.config.timestep == model.config.timestep and not torch.equal(weights(again), weights(model))


def test_the_command_takes_names_numbers_and_masks_for_labels(pixel_folder, train, test, tmp_path):
    numbers = Features(image=Pictures(), label=Value("int64"))
    split = write(train.cast(numbers), tmp_path / "numbers.parquet")
    common = ["--timestep", "20", "--output"]
    assert main(["fit", str(pixel_folder), "--images", split, *common, str(tmp_path / "numbers")]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "numbers").config.id2label[3] == "3"
    names = [f"colour {label}" for label in train["label"]]
    named = train.remove_columns("label").add_column("kind", names)
    words = ["--images", write(named, tmp_path / "names.parquet"), "--label-column", "kind"]
    assert main(["fit", str(pixel_folder), *words, *common, str(tmp_path / "names")]) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "names").config.label2id["colour 2"] == 2
    images, masks = map(list, zip(*scenes(16), strict=True))
    dense = Dataset.from_dict({"image": images, "mask": masks}, Features(image=Pictures(), mask=Pictures()))
    words = ["--images", write(dense, tmp_path / "masks.parquet"), "--label-column", "mask"]
    words += ["--eval-images", str(tmp_path / "masks.parquet"), "--class-names", "red", "green", "blue"]
    assert main(["fit", str(pixel_folder), *words, *common, str(tmp_path / "masks")]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "masks")
    assert model.config.id2label[2] == "blue"
    assert "mean IoU" in (tmp_path / "masks" / "README.md").read_text(encoding="utf-8")


def test_the_command_takes_more_classes_than_255(pixel_folder, tmp_path, capsys):
    """A mask of 0 and 255, whose foreground would be no class, is the sibling."""
    images, masks = map(list, zip(*scenes(16), strict=True))
    values = [np.asarray(mask).astype(np.uint16) * 140 for mask in masks]
    for each in values:
        each[each == 255 * 140] = 65535
    rows = Dataset.from_dict(
        {"image": images, "mask": [Image.fromarray(each) for each in values]},
        Features(image=Pictures(), mask=Pictures()),
    )
    words = ["fit", str(pixel_folder), "--images", write(rows, tmp_path / "masks.parquet"), "--label-column", "mask"]
    words += ["--class-names", *map(str, range(300)), "--allow-missing", "--timestep", "20", "--output"]
    assert main([*words, str(tmp_path / "none")]) == 1
    assert "There are 300 classes, so 255 cannot mark pixels without a class" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "many"), "--ignore-index", "65535"]) == 0
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "many")
    assert model.config.semantic_loss_ignore_index == 65535
    pixels = ASelectImageProcessor.from_pretrained(tmp_path / "many")(images[:4], return_tensors="pt").pixel_values
    assert set(model(pixels).logits.argmax(1).unique().tolist()) <= {0, 140, 280}
    binary = [(image, Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)) for image, mask in scenes(8)]
    with pytest.raises(ValueError, match="class"):
        load(pixel_folder, DiTForSemanticSegmentation, **{**SEGMENTER, "num_labels": 2}).fit_head(binary)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--images", "missing.parquet"], "The file 'missing.parquet' does not exist."),
        (["--images", "nowhere"], "No folder or file 'nowhere' exists here."),
        (["--label-column", "kind"], "The images have no column 'kind', only image, label."),
        (
            ["--label-column", "image"],
            "The labels in 'image' are masks. Pass the names of their classes as `--class-names`.",
        ),
        (
            ["--eval-split", "test"],
            "A parquet file has no splits, so `--eval-split` cannot be used. Pass the evaluation file as",
        ),
        (["--timestep", "1000"], "`timestep` must be an integer in [0, 1000)"),
        (["--num-images", "0"], "`max_images` must be a positive integer"),
        (["--num-images", "3"], "classes have no image among 3"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(pixel_folder, train, tmp_path, capsys, words, complaint):
    split = write(train, tmp_path / "train.parquet")
    given = ["--images", split, "--output", str(tmp_path / "out"), "--timestep", "20"]
    assert main(["fit", str(pixel_folder), *given, *words]) == 1
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([0, 1, None, 1], "Image 2 has no label in 'label'. Leave such images out, or give them the label -100."),
        ([-100] * 4, "No image has a label in 'label'"),
        ([0, 1, 10**12, 1], "go up to 1000000000000, so there are 1000000000001 classes, and only 4 images"),
    ],
)
def test_the_command_rejects_numbers_that_are_no_classes(pixel_folder, tmp_path, capsys, labels, complaint):
    rows = Dataset.from_dict({"image": images_of(np.arange(4)), "label": labels}).cast_column("image", Pictures())
    words = ["--images", write(rows, tmp_path / "rows.parquet"), "--output", str(tmp_path / "out"), "--timestep", "20"]
    assert main(["fit", str(pixel_folder), *words]) == 1
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_looks_at_the_labels_before_it_selects_a_timestep(
    pixel_folder, train, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(DiTForImageClassification, "from_pretrained", None)
    for rows, complaint in (
        (without(train, 2), "1 of 4 classes have no image among 90: '2' (2)"),
        (train.filter(lambda row: row["label"] == 1), "The labels are the same for all images"),
    ):
        words = ["--images", write(rows, tmp_path / "rows.parquet"), "--output", str(tmp_path / "out")]
        assert main(["fit", str(pixel_folder), *words, "--timestep", "auto"]) == 1
        assert complaint in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_overwrites_nothing(pixel_folder, train, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    split = write(train, tmp_path / "train.parquet")
    assert main(["fit", str(pixel_folder), "--images", split, "--output", str(tmp_path)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["attention", "linear"])
def test_an_evaluation_that_fails_changes_nothing(pixel_folder, train, head):
    model = load(pixel_folder, head=head, head_num_layers=1, **HEAD)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    for last in ((train[0]["image"], -100), (None, 0)):
        # A stream, whose labels are not known before.
        rows = [(row["image"], row["label"]) for row in train] if last[0] is None else []
        with pytest.raises(ValueError, match=r"Image 120 cannot be read|No image of `eval_dataset` has"):
            model.fit_head(train, replace_head=True, eval_dataset=iter([*rows, last]))
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert model.config.to_dict() == config and model.card_facts == {}


def test_a_failed_evaluation_of_a_segmenter_changes_nothing(pixel_folder):
    model = load(pixel_folder, DiTForSemanticSegmentation, **SEGMENTER)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Image 2 cannot be read"):
        model.fit_head(scenes(8), eval_dataset=[*scenes(2), (None, scenes(1)[0][1])])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_labels_to_evaluate_on_are_looked_at_before_an_image_is_read(model, train, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    rows = [(image, 9) for image in train["image"][:3]]
    with pytest.raises(ValueError, match=r"The labels of `eval_dataset` do not fit: .* got \[9\]"):
        model.fit_head(train, eval_dataset=rows)


def test_values_that_are_all_the_same_are_rejected(pixel_folder, train, monkeypatch):
    model = load(pixel_folder, num_labels=1)
    pixels = pixel_values(model, train["image"])
    bright = {"pixel_values": pixels, "labels": pixels[:, 0].mean((1, 2))}
    same = {"pixel_values": pixels[:5], "labels": torch.full((5,), 0.1)}
    with pytest.raises(ValueError, match="The labels of `eval_dataset` are the same for all images"):
        model.fit_head(bright, eval_dataset=iter([(each, 0.1) for each in train["image"][:5]]))
    with pytest.raises(ValueError, match="The labels are the same for all images, so there is nothing to predict"):
        model.fit_head(iter([(each, 1e6 + 0.1) for each in train["image"]]))
    marks = load(pixel_folder, num_labels=2)
    # Before an image is read.
    for each in (model, marks):
        monkeypatch.setattr(each, "forward", None)
    with pytest.raises(ValueError, match="The labels are the same for all images, so there is nothing to predict"):
        model.fit_head(same)
    with pytest.raises(ValueError, match="The labels of `eval_dataset` are the same for all images"):
        model.fit_head(bright, eval_dataset=same)
    with pytest.raises(ValueError, match="The labels are the same for all images, so there is nothing to predict"):
        marks.fit_head({"pixel_values": pixels, "labels": torch.tensor([[1.0, 0.0]]).repeat(120, 1)})


def test_several_values_count_the_same_in_any_unit(pixel_folder, train):
    """Noise in a large unit does not say how strongly what can be predicted is penalized."""
    alone, both = load(pixel_folder, num_labels=1), load(pixel_folder, num_labels=2, problem_type="regression")
    pixels = pixel_values(alone, train["image"])
    red, noise = pixels[:, 0].mean((1, 2)), torch.rand(120, generator=torch.Generator().manual_seed(0))
    constant = torch.full((120,), 5.0)
    expected = alone.fit_head({"pixel_values": pixels, "labels": red}).error
    errors = []
    for unit in (1.0, 1e4):
        labels = torch.stack([unit * noise, red], dim=1)
        found = both.fit_head(
            {"pixel_values": pixels, "labels": labels}, eval_dataset={"pixel_values": pixels, "labels": labels}
        )
        with torch.no_grad():
            rest = both.eval()(pixels).logits[:, 1] - red
        assert float(rest.var() / red.var()) < 0.1
        errors.append((found.error, found.evaluation["error"]))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    # One that is the same for all images is predicted, and counts for nothing.
    labels = torch.stack([constant, red], dim=1)
    found = both.fit_head({"pixel_values": pixels, "labels": labels})
    assert found.error == pytest.approx(expected, rel=1e-3)


def test_classes_that_are_numbered_otherwise_are_rejected(pixel_folder, train, test):
    names = ["red", "green", "blue", "yellow"]
    model = load(pixel_folder, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    named, other = ClassLabel(names=names), ClassLabel(names=names[::-1])
    turned = train.cast_column("label", other)
    with pytest.raises(ValueError, match="Class 'yellow' has number 0 in `dataset`, and number 3 in the model"):
        model.fit_head(turned)
    with pytest.raises(ValueError, match="Class 'yellow' has number 0 in `dataset`"):
        model.fit_head(turned.to_iterable_dataset())
    model.fit_head(turned.align_labels_with_mapping(model.config.label2id, "label"))
    # What a transform makes of labels, their column does not say.
    model.fit_head(transformed(turned, model))
    # Without names of its own the model takes any, and both sets are to have the same.
    unnamed = load(pixel_folder)
    with pytest.raises(ValueError, match="number 0 in `eval_dataset`, and number 3 in `dataset`"):
        unnamed.fit_head(train.cast_column("label", named), eval_dataset=test.cast_column("label", other))
    sets = {"near": train.cast_column("label", named), "far": test.cast_column("label", other)}
    with pytest.raises(ValueError, match=r"in `eval_dataset\['far'\]`, and number 3 in `eval_dataset\['near'\]`"):
        unnamed.fit_head(train, eval_dataset=sets)
    unnamed.fit_head(turned, eval_dataset=test)


def test_weights_beyond_half_precision_are_rejected(pixel_folder, train, monkeypatch):
    model = load(pixel_folder, dtype=torch.float16)
    before = copy.deepcopy(model.state_dict())
    solved = fit.solve

    def large(*given):
        solution = solved(*given)
        return replace(solution, weight=solution.weight * 1e8)

    monkeypatch.setattr(fit, "solve", large)
    with pytest.raises(ValueError, match=r"beyond what torch.float16 holds. Load the model in bfloat16 or float32"):
        model.fit_head(train.select(range(8)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
