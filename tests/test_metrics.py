import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_aselect import Accuracy
from hf_aselect.metrics import compute_accuracy


def test_accuracy_is_the_share_of_equal_classes():
    assert Accuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 3, 0]) == {"accuracy": 0.75}


def test_accuracy_adds_up_over_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    metric.add_batch(predictions=[0, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


def test_accuracy_combines_with_other_metrics():
    both = evaluate.combine([Accuracy(), Accuracy()])
    assert both.compute(predictions=[0], references=[0])


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one prediction"):
        Accuracy()._compute([], [])


def test_accuracy_of_different_lengths_is_refused():
    with pytest.raises(ValueError, match=r"[Mm]ismatch"):
        Accuracy().compute(predictions=[0, 1], references=[0])


def test_the_trainer_metric_takes_the_largest_logit():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert compute_accuracy(EvalPrediction(logits, np.array([1, 0, 0]))) == {"accuracy": pytest.approx(2 / 3)}
