"""Adapters of peft in a folder of their own: loaded by class, by Auto and by peft, with our card or without."""

import shutil

import peft
import pytest
import torch
from conftest import HEAD
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSemanticSegmentation

from hf_aselect import DiTForImageClassification, DiTForSemanticSegmentation
from hf_aselect.hub.push import write_model_card

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks by its old name
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # peft's, of a base that diffusers saved
]
FIELDS = {"timestep": 50, "block": 1, "feature": "hidden", "num_labels": 3}


def classifier(source, **options):
    torch.manual_seed(0)
    return DiTForImageClassification.from_pretrained(source, **options)


def adapted(model, **options):
    torch.manual_seed(1)
    given = {
        "r": 2,
        "target_modules": model.lora_targets(),
        "modules_to_save": ["classifier"],
        "init_lora_weights": False,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**{**given, **options}))


@pytest.fixture(scope="module")
def base(pixel_folder, tmp_path_factory):
    """A classifier that was saved."""
    folder = tmp_path_factory.mktemp("base")
    classifier(pixel_folder, **FIELDS, **HEAD).save_pretrained(folder)
    return folder


def by_class(folder, **options):
    return DiTForImageClassification.from_pretrained(folder, **options)


def by_auto(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize("load", [by_class, by_auto])
@pytest.mark.parametrize("has_card", [False, True])
@pytest.mark.parametrize("has_statistics", [False, True])
@pytest.mark.parametrize("saved_by", ["us", "diffusers"])
def test_an_adapter_is_loaded_with_its_model(
    base, pixel_folder, pictures, pixels, tmp_path, saved_by, has_statistics, has_card, load
):
    source, fields = (base, {}) if saved_by == "us" else (pixel_folder, {**FIELDS, **HEAD})
    model = classifier(source, **fields)
    if has_statistics:
        model.standardize(pictures)
    model = adapted(model)
    expected = model(pixel_values=pixels).logits
    model.save_pretrained(tmp_path)
    if has_card:
        write_model_card(model, tmp_path)
    elif saved_by == "diffusers" and load is by_auto:
        # Nothing in either folder says what kind of model it is: a ViT's base could not be loaded by Auto either.
        with pytest.raises(ValueError, match="Unrecognized model"):
            load(tmp_path)
        return
    again = load(tmp_path, **({} if has_card else fields))
    torch.testing.assert_close(again(pixels).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.config.standardized_grid == model.config.standardized_grid
    if has_card:
        # The card's own code.
        config = AutoConfig.from_pretrained(tmp_path)
        under = AutoModelForImageClassification.from_pretrained(source, config=config) if saved_by == "us" else None
        under = under or DiTForImageClassification.from_pretrained(source, config=config)
        found = peft.PeftModel.from_pretrained(under, tmp_path)(pixel_values=pixels).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_segmenter_is_loaded_too(pixel_folder, pixels, tmp_path):
    """A sibling: another class, another name of what is saved beside the adapter, and an adapter that is DoRA."""
    torch.manual_seed(0)
    model = DiTForSemanticSegmentation.from_pretrained(pixel_folder, timestep=50, num_labels=2, decoder="linear")
    model.save_pretrained(tmp_path / "base")
    model = DiTForSemanticSegmentation.from_pretrained(tmp_path / "base")
    model = adapted(model, modules_to_save=["decoder"], use_dora=True).eval()
    model.save_pretrained(tmp_path / "adapter")
    for card in (False, True):
        if card:
            write_model_card(model, tmp_path / "adapter")
        for kind in (DiTForSemanticSegmentation, AutoModelForSemanticSegmentation):
            again = kind.from_pretrained(tmp_path / "adapter")
            torch.testing.assert_close(again(pixels).logits, model(pixel_values=pixels).logits)


def test_fields_and_loading_info_are_taken_with_an_adapter(base, tmp_path):
    adapted(classifier(base)).save_pretrained(tmp_path)
    model, info = DiTForImageClassification.from_pretrained(tmp_path, timestep=7, output_loading_info=True)
    assert model.config.timestep == 7 and not info["missing_keys"]


def test_an_adapter_whose_model_is_gone_says_so(base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    adapted(classifier(tmp_path / "moved")).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(OSError, match=r"The base model of the adapter '.*adapter' cannot be loaded\. '.*moved' is"):
        DiTForImageClassification.from_pretrained(tmp_path / "adapter")


def test_an_adapter_that_names_no_model_says_so(base, tmp_path):
    model = adapted(classifier(base))
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace(f'"{base}"', "null"))
    with pytest.raises(ValueError, match="must name the base model as `base_model_name_or_path`, got None"):
        DiTForImageClassification.from_pretrained(tmp_path)


def test_what_an_adapter_brings_is_neither_missing_nor_left_over(base, pictures, pixels, tmp_path):
    """A sibling: loaded into a model that is there, as a Hub id's is, with DoRA's lengths and statistics."""
    model = classifier(base)
    model.standardize(pictures)
    model = adapted(model, use_dora=True).eval()
    model.save_pretrained(tmp_path)
    again = classifier(base)
    info = again.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(again(pixels).logits, model(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["class", "auto", "peft"])
@pytest.mark.parametrize("has_card", [False, True])
def test_an_adapter_is_loaded_by_the_guides_three_ways(base, pixels, tmp_path, how, has_card):
    """Of peft's own Auto class `import_allowlist` has to name the package, whose code it imports."""
    model = adapted(classifier(base))
    expected = model(pixel_values=pixels).logits
    model.save_pretrained(tmp_path)
    if has_card:
        write_model_card(model, tmp_path)
    if how == "peft":
        with pytest.raises(ValueError, match=r"import_allowlist=\['hf_aselect"):
            peft.AutoPeftModel.from_pretrained(tmp_path)
        again = peft.AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["hf_aselect"])
    else:
        again = (by_class if how == "class" else by_auto)(tmp_path)
    torch.testing.assert_close(again(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
