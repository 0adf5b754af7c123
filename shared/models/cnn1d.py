"""A convolutional network for time series.

Time Series Classification from Scratch with Deep Neural Networks: A Strong Baseline (Wang, Yan and
Oates, IJCNN 2017, https://arxiv.org/abs/1611.06455): its fully convolutional network, with odd
kernels and group normalisation (https://arxiv.org/abs/1803.08494).
"""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 4
KERNELS = (7, 5, 3)


class CNN1d(nn.Module):
    """Three convolutions along time, of kernels 7, 5 and 3, the mean over time, one linear layer.

    Args:
        features: numbers a step.
        classes: number of logits.
        width: channels of the first and third convolution, a multiple of 4; the second has twice as many.
    """

    def __init__(self, *, features: int, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = features
        for kernel, outputs in zip(KERNELS, (width, 2 * width, width), strict=True):
            layers += [
                nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
                nn.GroupNorm(GROUPS, outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(b, length, features)``, of any one length, to logits ``(b, classes)``."""
        x = self.layers(x.transpose(1, 2))
        logits: Tensor = self.fc(x.mean(dim=2))
        return logits
