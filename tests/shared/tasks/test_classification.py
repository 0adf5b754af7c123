import pytest
import torch

from fedge.shared.tasks.breast_cancer import MALIGNANT, TASK
from fedge.shared.tasks.classification import sigmoid_counters, softmax_counters

# Logit speaks for label 1: the first two rows are called 1, the others 0.
LOGITS = torch.tensor([[2.0], [0.0], [-1.0], [-3.0], [-0.5]])
LABELS = torch.tensor([1, 0, 1, 0, 0])


def test_counts_by_hand_with_label_one_positive():
    found = sigmoid_counters(positive=1)(LOGITS, LABELS)
    loss = found.pop("loss-sum")
    assert found == {
        "examples": 5.0,
        "correct": 3.0,
        "positive": 2.0,
        "true-positive": 1.0,
        "negative": 3.0,
        "true-negative": 2.0,
    }
    wrong_side = torch.where(LABELS == 1, -LOGITS[:, 0], LOGITS[:, 0]).double()
    assert loss == pytest.approx(torch.log1p(wrong_side.exp()).sum().item())


def test_the_other_positive_swaps_the_sides():
    one, zero = (sigmoid_counters(positive=p)(LOGITS, LABELS) for p in (1, 0))
    assert (zero["positive"], zero["true-positive"]) == (one["negative"], one["true-negative"])
    assert zero["correct"] == one["correct"]


def test_sensitivity_is_for_malignant_tumours():
    assert TASK.output.labels[MALIGNANT] == "malignant"
    # Three malignant, of which two are called so; one benign, called malignant.
    logits = torch.tensor([[-1.0], [-1.0], [1.0], [-1.0]])
    values = TASK.values(TASK.counters(logits, torch.tensor([0, 0, 0, 1])))
    assert values["sensitivity"] == pytest.approx(2 / 3)
    assert values["specificity"] == 0.0
    assert values["accuracy"] == 0.5


def test_a_site_without_positives_has_no_sensitivity():
    values = TASK.values(TASK.counters(torch.ones(2, 1), torch.tensor([1, 1])))
    assert "sensitivity" not in values
    assert values["specificity"] == 1.0


def test_softmax_counts():
    logits = torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 1.0]])
    found = softmax_counters(logits, torch.tensor([1, 1, 1]))
    assert (found["examples"], found["correct"]) == (3.0, 2.0)
