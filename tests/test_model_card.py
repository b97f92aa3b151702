import pytest
from huggingface_hub import ModelCard

from hf_aselect.criteria import CRITERIA
from hf_aselect.model_card import CardFacts, render_card, write_card

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

CARD = """---
datasets:
- fashion_mnist
library_name: transformers
license: apache-2.0
metrics:
- accuracy
pipeline_tag: image-classification
tags:
- hf_aselect
- a-select
- diffusion-transformer
model-index:
- name: Clothes
  results:
  - task:
      type: image-classification
    dataset:
      name: fashion_mnist
      type: fashion_mnist
    metrics:
    - type: accuracy
      value: 0.8765
---

# Clothes

A diffusion transformer (DiT) with a head that classifies pictures, made with hf_aselect. A DiT learned to generate \
pictures; its tokens at the right noise level, the *timestep*, also tell what is in one.

## The timestep

Chosen by the share of high spatial frequencies in what the features of two noise draws agree on, without labels or \
training.

| what | value |
| --- | --- |
| timestep | 61 |
| log-SNR | 3.10 |
| block | 4 |
| feature | hidden |
| criterion | signal_hfr |
| pictures | 256 |
| confidence | 0.97 |
| seconds | 4.3 |

![Criterion over the timestep](timestep_curve.png)

## Results

| what | accuracy |
| --- | --- |
| **this model** | 87.6% |
| logistic regression on raw pixels | 83.0% |

Command: `hf-aselect demo`

## Use

```python
import hf_aselect  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

folder = "."  # this folder, or the model's id on the Hub
model = AutoModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
classify = pipeline("image-classification", model=folder)
```

## Training

| what | value |
| --- | --- |
| dataset | fashion_mnist |
| epochs | 20 |
| seed | 0 |

## Limits

Only clothes.

## Source

That a timestep can be chosen without labels is A-SelecT's idea (Liu et al., CVPR 2026 Findings,
[arXiv 2603.25758](https://arxiv.org/abs/2603.25758)).
"""


def test_the_whole_card():
    assert render_card(FACTS) == CARD


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
