"""Logistic regression."""

from __future__ import annotations

from torch import Tensor, nn


class LogisticRegression(nn.Module):
    """One linear layer; the sigmoid or softmax belongs to the loss and to the output schema.

    Args:
        features: number of input columns.
        logits: 1 for two classes with a sigmoid.
    """

    def __init__(self, features: int, logits: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(features, logits)

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``(b, features)`` to logits ``(b, logits)``."""
        logits: Tensor = self.linear(x)
        return logits
