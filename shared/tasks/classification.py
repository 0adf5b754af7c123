"""Losses and counters that classification tasks share.

A counter is a sum over examples, so sites are pooled exactly by adding; a metric is a ratio of
two.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from fedge.shared.tasks.task import Counters, Metric

ACCURACY = Metric("accuracy", "correct", "examples")
LOSS = Metric("loss", "loss-sum", "examples", higher_is_better=False, share=False)
SENSITIVITY = Metric("sensitivity", "true-positive", "positive")
SPECIFICITY = Metric("specificity", "true-negative", "negative")


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``(b, k)`` logits and ``(b,)`` int64 labels, in nats."""
    return functional.cross_entropy(logits, labels)


def softmax_counters(logits: Tensor, labels: Tensor) -> Counters:
    """Examples, correct ones and the summed loss of ``(b, k)`` logits and ``(b,)`` labels."""
    logits = logits.detach()
    return {
        "examples": float(len(labels)),
        "correct": float((logits.argmax(dim=1) == labels).sum()),
        "loss-sum": float(functional.cross_entropy(logits.double(), labels, reduction="sum")),
    }


def sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of ``(b, 1)`` logits and ``(b,)`` int64 labels 0 or 1, in nats."""
    return functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))


def sigmoid_counters(positive: int) -> Callable[[Tensor, Tensor], Counters]:
    """The counters of a one-logit task, at threshold probability 0.5.

    Args:
        positive: the label, 0 or 1, whose recall is the sensitivity. The logit is always that of
            label 1; the clinically positive finding may be label 0.
    """

    def counters(logits: Tensor, labels: Tensor) -> Counters:
        logits = logits.detach()
        chosen = (logits[:, 0] >= 0).long()
        right, is_positive = chosen == labels, labels == positive
        return {
            "examples": float(len(labels)),
            "correct": float(right.sum()),
            "loss-sum": float(
                functional.binary_cross_entropy_with_logits(
                    logits[:, 0].double(), labels.double(), reduction="sum"
                )
            ),
            "positive": float(is_positive.sum()),
            "true-positive": float((right & is_positive).sum()),
            "negative": float((~is_positive).sum()),
            "true-negative": float((right & ~is_positive).sum()),
        }

    return counters
