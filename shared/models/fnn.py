"""A feed-forward network for tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class FNN(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: of input, hidden layers and output, at least two numbers.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``(b, widths[0])`` to logits ``(b, widths[-1])``."""
        logits: Tensor = self.layers(x)
        return logits
