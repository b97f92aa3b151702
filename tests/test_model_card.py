from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_aselect.criteria import CRITERIA
from hf_aselect.model_card import KEPT, YOURS, CardFacts, facts_of_card, render_card, write_card

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
    # Several runs, a choice that is in doubt, and weights that are not for commercial use.
    "doubtful": replace(
        FACTS,
        repo_id="me/clothes",
        confidence=0.54,
        stopped_by="max_images",
        pictures="generated",
        score=0.51234,
        interval=(0.5, 0.52),
        warnings=("The curve is flat: t = 61 is hardly better than t = 50.", "More pictures would help."),
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
        assert "| licence of its weights, and so of these | cc-by-nc-4.0 |" in card
        assert ("forbids commercial use" in caplog.text) == (given is not None)


def test_the_licence_of_another_base_is_said_beside_ones_own():
    card = render_card(CardFacts(model_name="Clothes", license="mit", base_license="other/some-licence"))
    assert "\nlicense: mit\n" in card.split("---")[1]
    assert "| licence of its weights, and so of these | some-licence |" in card
    assert "commercial" not in card


@pytest.mark.parametrize("facts", [{"accuracy": 87.6}, {"baselines": {"pixels": 83}}, {"accuracy": []}, {"task": "x"}])
def test_what_would_make_a_wrong_card_is_refused(facts):
    with pytest.raises(ValueError, match="must be"):
        CardFacts(model_name="Clothes", **facts)


@pytest.mark.parametrize("name", CRITERIA)
def test_how_the_timestep_was_chosen_is_said_of_each_criterion(name):
    card = render_card(CardFacts(model_name="Clothes", timestep=61, criterion=name))
    (how,) = [line for line in card.splitlines() if line.startswith("Chosen by")]
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
    assert "Chosen by" not in card
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
