from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_aselect.hub.card import KEPT, YOURS, CardFacts, facts_of_card, render_card, write_card
from hf_aselect.selection.criteria import CRITERIA

FACTS = CardFacts(
    model_name="Clothes",
    timestep=61,
    block=4,
    feature="hidden",
    criterion="signal_hfr",
    log_snr=3.104,
    num_images=256,
    seconds=4.26,
    confidence=0.97,
    figure="timestep_curve.png",
    accuracy=0.8765,
    baselines={"logistic regression on raw pixels": 0.83},
    dataset="fashion_mnist",
    license="apache-2.0",
    training={"epochs": 20, "seed": 0},
    command="hf-aselect demo",
    limits="Only clothes.",
)

CARDS = {
    "classifier": FACTS,
    # Several runs, a selection that is in doubt, and weights that are not for commercial use.
    "doubtful": replace(
        FACTS,
        repo_id="me/clothes",
        confidence=0.54,
        stopped_by="max_images",
        pictures="generated",
        score=0.51234,
        interval=(0.5, 0.52),
        warnings=("The curve is flat: t = 61 is hardly better than t = 50.", "More images would help."),
        accuracy=(0.87, 0.88, 0.86),
        baselines={"logistic regression on raw pixels": 0.83, "linear probe at t = 0": (0.8, 0.82)},
        base_model="facebook/DiT-XL-2-256",
        license=None,
        tags=("clothes",),
    ),
    "segmenter": CardFacts(
        model_name="Streets",
        timestep=4,
        block=5,
        feature="hidden",
        task="image-segmentation",
        mean_iou=0.31,
        dataset="camvid",
        folded=True,
        needs_diffusers=False,
    ),
    "adapter": CardFacts(model_name="Shoes", timestep=61, adapter_of="me/clothes", repo_id="me/shoes"),
    "backbone": CardFacts(
        model_name="maps",
        timestep=4,
        task="image-feature-extraction",
        auto_class="AutoBackbone",
        base_model="someone/dit",
        base_license="other/some-licence",
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_whole_card(name):
    assert render_card(CARDS[name]) == (Path(__file__).parent / "cards" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_keeps_what_it_needs_to_be_written_again(name, tmp_path):
    facts = CARDS[name]
    write_card(facts, tmp_path)
    kept = facts_of_card(tmp_path / "README.md")
    assert {"model_name", "training"} & kept.keys()
    told = {each: getattr(facts, each) for each in vars(facts) if each not in KEPT}
    again = render_card(CardFacts(**told, **kept))
    assert again == (tmp_path / "README.md").read_text(encoding="utf-8")


def test_of_a_card_of_others_results_data_and_licence_are_known(tmp_path):
    data = ModelCardData(
        license="other",
        license_name="ours",
        datasets=["cub"],
        model_name="birds",
        eval_results=[EvalResult("image-classification", "cub", "cub", "accuracy", 0.75)],
    )
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n# Birds\n", encoding="utf-8")
    found = facts_of_card(tmp_path / "README.md")
    assert found == {"license": "other", "license_name": "ours", "dataset": "cub", "accuracy": 0.75}
    (tmp_path / "README.md").write_text("# Birds\n", encoding="utf-8")
    assert facts_of_card(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"front matter of .*README\.md' cannot be read"):
        facts_of_card(tmp_path / "README.md")


def test_a_readers_words_stay_when_the_card_is_written_again(tmp_path):
    write_card(FACTS, tmp_path)
    path = tmp_path / "README.md"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n## My notes\n\nWorks on shoes, too.\n")
    write_card(replace(FACTS, accuracy=0.5), tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "50.0%" in text and text.endswith("## My notes\n\nWorks on shoes, too.\n")
    assert text.count("Works on shoes") == text.count(YOURS) == 1


@pytest.mark.parametrize("given", ["mit", "apache-2.0", None])
def test_a_base_that_is_not_for_commercial_use_is_never_hidden(given, caplog):
    for known in ({"base_model": "facebook/DiT-XL-2-512"}, {"base_license": "cc-by-nc-4.0"}):
        caplog.clear()
        card = render_card(CardFacts(model_name="Clothes", license=given, **known))
        front = card.split("---")[1]
        assert "\nlicense: cc-by-nc-4.0\n" in front
        assert "**Not for commercial use**" in card
        assert "| licence of its weights, which also applies here | cc-by-nc-4.0 |" in card
        assert ("forbids commercial use" in caplog.text) == (given is not None)


def test_the_licence_of_another_base_is_said_beside_ones_own():
    card = render_card(CardFacts(model_name="Clothes", license="mit", base_license="other/some-licence"))
    assert "\nlicense: mit\n" in card.split("---")[1]
    assert "| licence of its weights, which also applies here | some-licence |" in card
    assert "commercial" not in card


@pytest.mark.parametrize("facts", [{"accuracy": 87.6}, {"baselines": {"pixels": 83}}, {"accuracy": []}, {"task": "x"}])
def test_what_would_make_a_wrong_card_is_refused(facts):
    with pytest.raises(ValueError, match="must be"):
        CardFacts(model_name="Clothes", **facts)


@pytest.mark.parametrize("name", CRITERIA)
def test_how_the_timestep_was_chosen_is_said_of_each_criterion(name):
    card = render_card(CardFacts(model_name="Clothes", timestep=61, criterion=name))
    (how,) = [line for line in card.splitlines() if line.startswith("Selected by")]
    needs = {"probe": "with labels.", "patch_probe": "with masks."}
    assert how.endswith(needs.get(name, "without labels or training."))


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("image-classification", "AutoModelForImageClassification"),
        ("image-segmentation", "AutoModelForSemanticSegmentation"),
        ("image-feature-extraction", "AutoModel"),
    ],
)
def test_the_card_is_of_the_models_task(task, auto):
    facts = CardFacts(model_name="Streets", timestep=61, task=task, accuracy=0.5, mean_iou=0.25, dataset="some")
    card = render_card(facts)
    assert f"pipeline_tag: {task}" in card and f"model = {auto}.from_pretrained(folder)" in card
    if task == "image-segmentation":
        assert "| what | mean IoU |" in card and "25.0%" in card and "type: mean_iou" in card


def test_what_is_unknown_is_left_out():
    card = render_card(CardFacts(model_name="Clothes", timestep=61))
    assert "None" not in card
    assert "Selected by" not in card
    for section in ("## Results", "## Training", "## Limits", "Command:", "license", "model-index"):
        assert section not in card


def test_the_front_matter_is_read_by_the_hub(tmp_path):
    write_card(FACTS, tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.pipeline_tag == "image-classification"
    assert data.eval_results[0].metric_value == 0.8765


def test_writing_leaves_nothing_but_the_card(tmp_path):
    write_card(FACTS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "licence",
    [
        "cc-by-nc-sa-4.0",
        "other/my-nc",
        "other/non_commercial",
        "other/Non Commercial",
        "other/research-only",
        "apple-amlr",
    ],
)
def test_non_commercial_licences_are_known_by_their_names(licence):
    card = render_card(CardFacts(model_name="Clothes", base_license=licence, license="mit"))
    assert "**Not for commercial use**" in card and "\nlicense: mit\n" not in card


@pytest.mark.parametrize("licence", ["mit", "apache-2.0", "openrail++", "other/nice", "other/franchise", "cc-by-4.0"])
def test_others_are_not_taken_for_them(licence):
    assert "commercial" not in render_card(CardFacts(model_name="Clothes", base_license=licence))


@pytest.mark.parametrize(
    "name",
    [
        "facebook/dit-xl-2-256",
        "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev",
        "Efficient-Large-Model/SANA1.5_1.6B",
    ],
)
def test_bases_are_known_in_any_spelling(name):
    facts = {"license": "other", "license_name": "very-free"}
    card = render_card(CardFacts(model_name="Clothes", base_model=name, **facts))
    assert "**Not for commercial use**" in card and "license_name: very-free" not in card.split("hf_aselect:")[0]


def test_figures_of_numpy_and_torch_are_kept_as_numbers(tmp_path):
    ours = CardFacts(model_name="Clothes", accuracy=[0.5, 0.25], baselines={"pixels": 0.5, "seeds": [0.5, 0.25]})
    for kind in (np.float32, np.float64, torch.tensor):
        figures = {
            "accuracy": [kind(0.5), kind(0.25)],
            "baselines": {"pixels": kind(0.5), "seeds": [kind(0.5), kind(0.25)]},
        }
        assert render_card(CardFacts(model_name="Clothes", **figures)) == render_card(ours)
        one = CardFacts(model_name="Clothes", accuracy=kind(0.5))
        write_card(one, tmp_path)
        assert facts_of_card(tmp_path / "README.md")["accuracy"] == 0.5
    assert CardFacts(model_name="Clothes", accuracy=np.array([0.5, 0.25])).accuracy == [0.5, 0.25]


def test_odd_words_break_no_table():
    card = render_card(
        CardFacts(
            model_name="Two\nlines", accuracy=0.5, baselines={"a|b\nc": 0.25}, command="run `x`\n now", dataset="a|b"
        )
    )
    assert "# Two lines\n" in card and "| a\\|b c | 25.0% |" in card and "Command: `run 'x' now`" in card
    assert "| dataset | a\\|b |" in card


@pytest.mark.parametrize("kept", ["baselines: 3", "tags: 3", "training: words", "dataset: {a: 1}", "accuracy: 88%"])
def test_a_card_whose_facts_are_broken_is_refused(kept, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nhf_aselect:\n  model_name: x\n  {kept}\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must be"):
        CardFacts(**facts_of_card(tmp_path / "README.md"))


def test_two_may_write_a_card_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_card(FACTS, tmp_path), range(40)))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_model_of_latents_has_no_image_processor_on_its_card():
    card = render_card(CardFacts(model_name="Latents", timestep=5, has_processor=False))
    assert "AutoImageProcessor" not in card and "pipeline(" not in card
    assert card.count("AutoModelForImageClassification.from_pretrained(folder") == 2


def test_a_wheel_has_the_template_and_all_else_that_is_no_code():
    root = Path(__file__).parents[1]
    package = root / "src" / "hf_aselect"
    setup = ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    patterns = setup["options.package_data"]["hf_aselect"].split()
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    data = [path.as_posix() for path in files if path.suffix not in (".py", ".pyc")]
    assert "hub/card_template.md" in data
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []
