import evaluate
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import EvalPrediction

from hf_aselect import Accuracy, ASelectImageProcessor
from hf_aselect.training.metrics import compute_accuracy


def test_accuracy_is_the_share_of_equal_classes():
    assert Accuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0]) == {"accuracy": 0.75}


def test_accuracy_adds_up_over_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[0, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


class Ones(evaluate.Metric):
    """A metric that somebody wrote: the share of predictions that are 1."""

    def _info(self):
        return Accuracy()._info()

    def _compute(self, predictions, references):
        return {"ones": float(np.mean(np.asarray(predictions) == 1))}


def test_accuracy_combines_with_other_metrics():
    both = evaluate.combine({"accuracy": Accuracy(), "ones": Ones()})
    both.add_batch(predictions=[0, 1], references=[0, 0])
    both.add_batch(predictions=[1, 1], references=[1, 1])
    assert both.compute() == {"accuracy": 0.75, "ones": 0.75}


def test_the_evaluator_judges_a_saved_classifier(classifier, pictures, tmp_path):
    """By its folder: of a model in memory evaluate 0.4 asks transformers for TensorFlow, which version 5 left out."""
    classifier.config.id2label = dict(enumerate("abcd"))
    classifier.config.label2id = {name: index for index, name in enumerate("abcd")}
    classifier.save_pretrained(tmp_path)
    processor = ASelectImageProcessor.from_model_config(classifier.config)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        predicted = classifier(processor(pictures, return_tensors="pt").pixel_values).logits.argmax(-1).tolist()
    labels = [*predicted[:4], *((label + 1) % 4 for label in predicted[4:])]  # four of six are right
    rows = Dataset.from_dict(
        {"image": pictures, "label": labels}, features=Features(image=Image(), label=ClassLabel(names=list("abcd")))
    )
    result = evaluate.evaluator("image-classification").compute(
        str(tmp_path), data=rows, metric=Accuracy(), label_mapping=classifier.config.label2id
    )
    assert result["accuracy"] == pytest.approx(4 / 6)


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one prediction"):
        Accuracy()._compute([], [])


def test_accuracy_of_different_lengths_is_refused():
    with pytest.raises(ValueError, match=r"[Mm]ismatch"):
        Accuracy().compute(predictions=[0, 1], references=[0])


def test_the_trainer_metric_takes_the_largest_logit():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert compute_accuracy(EvalPrediction(logits, np.array([1, 0, 0]))) == {"accuracy": pytest.approx(2 / 3)}
