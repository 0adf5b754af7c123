"""A small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn


class CNN(nn.Module):
    """Two 3x3 convolutions with group normalisation, one pooling, two linear layers.

    Group normalisation (Wu and He, ECCV 2018, https://arxiv.org/abs/1803.08494) keeps no running statistics of
    the data, so the weights are all that a site sends, and unlike sites do not disagree over them.

    Args:
        channels: of the image.
        side: height and width of the image in pixels, even.
        classes: number of logits.
        width: channels after the first convolution, a multiple of 4; the second has twice as many.
        hidden: width of the first linear layer.
    """

    def __init__(
        self, *, channels: int, side: int, classes: int, width: int = 16, hidden: int = 32
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1)
        self.norm1 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, 2 * width, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(4, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(2 * width * (side // 2) ** 2, hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, channels, side, side)`` to logits ``(b, classes)``."""
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.pool(self.relu(self.norm2(self.conv2(x))))
        x = self.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
