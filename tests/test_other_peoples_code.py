"""What people write for the models of transformers, written for ours: names of tutorials, Trainer's options."""

import copy

import pytest
import torch
from conftest import build_transformer
from diffusers import DDPMScheduler
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Mask2FormerConfig, MaskFormerConfig, Trainer, TrainerCallback, TrainingArguments

from hf_aselect import ASelectCallback, DiTBackbone, DiTForImageClassification, DiTForSemanticSegmentation
from hf_aselect.hub.push import write_model_card
from hf_aselect.training.metrics import compute_accuracy

SMALL_HEAD = {"head_hidden_size": 16, "head_num_attention_heads": 2, "head_num_layers": 1}


def load(folder, kind=DiTForImageClassification, **fields):
    torch.manual_seed(0)
    return kind.from_pretrained(folder, **{"timestep": 20, "num_labels": 4, **SMALL_HEAD, **fields})


def logits(model, pixels):
    with torch.no_grad():
        return model.eval()(pixels).logits


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A DiT of four blocks, as UperNet reads."""
    folder = tmp_path_factory.mktemp("deep")
    build_transformer(num_layers=4).save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # peft's, of a base that diffusers saved
@pytest.mark.parametrize("head", ["attention", "linear", "linear decoder", "upernet"])
def test_the_words_of_tutorials_mean_the_whole_head(head, deep_folder, pixels, tmp_path):
    """`classifier` of a classifier, as ViT's; `decode_head` of a segmenter, as SegFormer's and UperNet's: siblings."""
    kind, fields, word = DiTForImageClassification, {"head": head}, "classifier"
    if head in ("linear decoder", "upernet"):
        fields = {"decoder": head.removesuffix(" decoder"), "decoder_hidden_size": 8, "auxiliary_hidden_size": 0}
        kind, word = DiTForSemanticSegmentation, "decode_head"
    model = load(deep_folder, kind, **fields)
    whole = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name, _ in model.named_parameters() if word in name} == whole
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=[word], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad and "lora" not in name}
    assert {name.replace(f"{word}.modules_to_save.default", word) for name in trained} == {
        f"base_model.model.{name}" for name in whole
    }
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if name in trained:
                value.add_(torch.randn(value.shape) * 0.1)
    expected = logits(adapted, pixels)
    adapted.save_pretrained(tmp_path)
    for seed in (1, 2):  # the head that the base is given does not matter
        torch.manual_seed(seed)
        base = kind.from_pretrained(deep_folder, **{"timestep": 20, "num_labels": 4, **SMALL_HEAD, **fields})
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), pixels), expected)


@pytest.mark.parametrize("head", ["attention", "linear"])
def test_a_linear_layer_in_the_heads_place_trains_saves_and_loads(head, pixel_folder, pixels, tmp_path):
    model = load(pixel_folder, head=head, calibration_images=pixels)
    model.classifier = nn.Linear(model.classifier.in_features, 7)
    model.config.num_labels = 7
    assert logits(model, pixels).shape == (len(pixels), 7)
    torch.testing.assert_close(logits(model, pixels), model.classifier(model.extract_features(pixels).mean(1)))
    model(pixels, labels=torch.arange(len(pixels)) % 7).loss.backward()
    assert model.classifier.weight.grad.any()
    model.save_pretrained(tmp_path)
    again = DiTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, pixels), logits(model, pixels))
    # Trainer goes on from such a checkpoint by names.
    model.load_state_dict(copy.deepcopy(model).state_dict())


def own_head(model):
    model.classifier = nn.Sequential(nn.Linear(model.classifier.in_features, 5), nn.ReLU(), nn.Linear(5, 4))
    return model.classifier


def own_decoder(model):
    model.decode_head = nn.Sequential(nn.Conv2d(model.config.feature_size, 5, 3, padding=1), nn.Conv2d(5, 4, 1))
    return model.decode_head


def own_last_layer(model):
    model.classifier.output_projection = nn.Sequential(nn.Dropout(0.1), model.classifier.output_projection)
    return model.classifier


@pytest.mark.parametrize(
    ("kind", "replace", "part"),
    [
        (DiTForImageClassification, own_head, "classifier"),
        (DiTForImageClassification, own_last_layer, "classifier"),
        (DiTForSemanticSegmentation, own_decoder, "decode_head"),
    ],
)
def test_a_head_that_cannot_be_built_again_is_told_on_saving(
    kind, replace, part, pixel_folder, pixels, tmp_path, caplog
):
    """And what is said then does load it."""
    model = load(pixel_folder, kind)
    head = replace(model)
    expected = logits(model.eval(), pixels)
    model.save_pretrained(tmp_path)
    assert f"The head is a custom {type(head).__name__}, which `from_pretrained` cannot build" in caplog.text
    assert f"set `model.{part}` to" in caplog.text and "load_state_dict" in caplog.text
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True"):
        kind.from_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    replace(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(again.eval(), pixels), expected)


@pytest.mark.parametrize("head", ["linear", "attention", "upernet", "decoder"])
def test_a_last_layer_of_another_number_of_classes_comes_back(head, deep_folder, pixels, tmp_path, caplog):
    """`model.classifier.output_projection = nn.Linear(...)`, and of a decoder as of transformers' UperNet."""
    if head in ("linear", "attention"):
        model = load(deep_folder, head=head)
        model.classifier.output_projection = nn.Linear(model.classifier.output_projection.in_features, 7)
    else:
        fields = {"decoder": "linear"} if head == "decoder" else {"decoder": "upernet", "auxiliary_hidden_size": 0}
        model = load(deep_folder, DiTForSemanticSegmentation, decoder_hidden_size=8, **fields)
        owner = model.decode_head if head == "decoder" else model.decode_head.head
        owner.classifier = nn.Conv2d(owner.classifier.in_channels, 7, 1)
    expected = logits(model.eval(), pixels)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert (
        again.config.num_labels == len(again.config.id2label) == 7
        and "which `from_pretrained` cannot build" not in caplog.text
    )
    torch.testing.assert_close(logits(again, pixels), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # peft's, of a base that diffusers saved
def test_an_adapter_from_before_the_heads_name_brings_its_head(pixel_folder, pixels, tmp_path):
    """It was saved with `modules_to_save=["head"]`."""
    from safetensors.torch import load_file, save_file

    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(load(pixel_folder), config)
    expected = logits(adapted, pixels)
    adapted.save_pretrained(tmp_path)
    names = {"classifier.output_projection.": "head.classifier.", "classifier.": "head."}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name in list(weights):
        for today, former in names.items():
            if f".model.{today}" in name:
                weights[name.replace(f".model.{today}", f".model.{former}")] = weights.pop(name)
                break
    assert any(".head.classifier." in name for name in weights)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    text = (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text(text.replace('"classifier"', '"head"'), encoding="utf-8")
    torch.manual_seed(5)
    base = DiTForImageClassification.from_pretrained(pixel_folder, timestep=20, num_labels=4, **SMALL_HEAD)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), pixels), expected)


class Tracker(TrainerCallback):
    """Stands for any tracker: W&B, MLflow and the like listen to `on_log` alone."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def trainer(model, rows, tmp_path, callbacks, **options):
    given = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", **options}
    data = {name: given.pop(name) for name in ("eval_dataset", "compute_metrics") if name in given}
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, report_to="none", **given)
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks, **data)


def rows_of(pixels):
    return [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(pixels)]


@pytest.mark.parametrize("is_open", [True, False])
def test_every_tracker_hears_of_a_selection(is_open, pixel_folder, pixels, tmp_path):
    model = load(pixel_folder, **({} if is_open else {"timestep": "auto", "calibration_images": pixels}))
    if is_open:
        model.config.timestep = "auto"
    tracker = Tracker()
    options = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
    trainer(model, rows_of(pixels), tmp_path, [ASelectCallback(max_images=6), tracker], **options).train()
    ((step, facts),) = [each for each in tracker.logs if "aselect/timestep" in each[1]]
    assert (step, facts["aselect/timestep"], facts["aselect/drift"]) == (0, model.config.timestep, 0)
    assert any("loss" in logs for _, logs in tracker.logs), "what is logged at an epoch's end is logged still"


def test_a_selection_while_the_backbone_is_trained_is_logged_beside_the_epochs_loss(pixel_folder, pixels, tmp_path):
    """A sibling: a selection in the middle of a training."""
    model = load(pixel_folder, freeze_backbone=False)
    tracker = Tracker()
    options = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    callback = ASelectCallback(max_images=6, reselect_epochs=1)
    trainer(model, rows_of(pixels), tmp_path, [callback, tracker], **options).train()
    assert len([logs for _, logs in tracker.logs if "aselect/timestep" in logs]) == 2
    assert len([logs for _, logs in tracker.logs if "loss" in logs]) == 2


def test_a_card_has_one_result_for_each_evaluation_set(pixel_folder, pixels, tmp_path):
    """Two sets by name were met; siblings: a name with an underscore, a metric whose name could be a set's."""
    rows = rows_of(pixels)
    sets = {"near": rows[:4], "far_away": rows[4:]}
    options = {"eval_dataset": sets, "compute_metrics": compute_accuracy, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(load(pixel_folder), rows, tmp_path, [ASelectCallback(dataset="noise")], **options)
    run.train()
    found = {name: run.evaluate()[f"eval_{name}_accuracy"] for name in sets}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {each.dataset_split: each.metric_value for each in card.data.eval_results} == pytest.approx(found, abs=1e-4)
    for name, value in found.items():
        assert f"| **this model**, {name} | {value:.1%} |" in card.text
    # One set alone, afterwards, with a metric whose name could be a set's.
    run.callback_handler.callbacks[-2].metrics_by_step = {}
    run.compute_metrics = lambda _: {"accuracy": 0.5, "top5_accuracy": 0.75}
    run.evaluate(rows)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert [(each.dataset_split, each.metric_value) for each in card.data.eval_results] == [(None, 0.5)]


@pytest.mark.parametrize("given", ["features", "latents", "pixel_values"])
def test_metrics_are_handed_the_inputs_whatever_they_are(given, pixel_folder, pixels, tmp_path):
    """Cached features were met; cached latents are their sibling."""
    model, seen = load(pixel_folder), []
    with torch.no_grad():
        made = {"features": model.extract_features, "latents": model.encode}.get(given, lambda images: images)(pixels)
    rows = [{given: value, "labels": index % 4} for index, value in enumerate(made)]

    def measure(prediction):
        seen.append(torch.as_tensor(prediction.inputs))
        return compute_accuracy(prediction)

    options = {"include_for_metrics": ["inputs"], "eval_dataset": rows, "compute_metrics": measure}
    run = trainer(model, rows, tmp_path, [], **options)
    run.train()
    run.evaluate()
    assert torch.equal(seen[0], made)


@pytest.mark.parametrize("kind", [Mask2FormerConfig, MaskFormerConfig])
def test_heads_of_transformers_do_not_warn_of_the_backbone(kind, pixel_folder, caplog):
    """Each of them names the backbones that it warns of not."""
    config = load(pixel_folder, DiTBackbone, num_labels=2, out_indices=[1, 2, 3]).config
    assert kind(backbone_config=config).backbone_config is config
    assert "not a supported model" not in caplog.text


def test_the_card_of_a_backbone_in_a_folder_runs(pixel_folder, pixels, tmp_path, monkeypatch):
    """The code for the package was met; the code that comes with the weights is its sibling."""
    model = load(pixel_folder, DiTBackbone, num_labels=2)
    model.save_pretrained(tmp_path, include_code=True)
    write_model_card(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = (tmp_path / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    for code in (block.partition("```")[0] for block in blocks[:2]):
        names = {}
        exec(code.replace("processor = AutoImageProcessor.from_pretrained(folder", "# "), names)
        with torch.no_grad():
            expected, found = model(pixels).feature_maps, names["model"](pixels).feature_maps
        assert torch.equal(found[0], expected[0])


def test_a_layer_without_a_bias_comes_back(pixel_folder, tmp_path):
    """A sibling of another number of classes."""
    model = DiTForImageClassification.from_pretrained(pixel_folder, timestep=5, num_labels=4)
    model.classifier = nn.Linear(model.classifier.in_features, 4, bias=False)
    pixel_values = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = model.eval()(pixel_values).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(DiTForImageClassification.from_pretrained(tmp_path)(pixel_values).logits, expected)
