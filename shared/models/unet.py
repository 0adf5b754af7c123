"""A U-Net for segmentation.

U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al., MICCAI 2015,
https://arxiv.org/abs/1505.04597), with padded convolutions, so that the output is as large as the
input, and group normalisation (https://arxiv.org/abs/1803.08494).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPS = 4


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """An encoder that halves the resolution and a decoder, with skip connections at every resolution.

    Args:
        channels: of the image.
        classes: logits of each pixel.
        width: channels at full resolution, a multiple of 4; doubled at every halving.
        depth: number of halvings.
    """

    def __init__(self, *, channels: int = 3, classes: int, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _convolutions(inputs, outputs)
            for inputs, outputs in zip([channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(2 * outputs, outputs, 2, stride=2) for outputs in widths[-2::-1]
        )
        self.up = nn.ModuleList(_convolutions(2 * outputs, outputs) for outputs in widths[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, channels, h, w)``, h and w multiples of ``2**depth``, to logits ``(b, classes, h, w)``."""
        levels = []
        for level, convolutions in enumerate(self.down):
            x = convolutions(self.pool(x) if level else x)
            levels.append(x)
        for grow, convolutions, beside in zip(self.grow, self.up, levels[-2::-1], strict=True):
            x = convolutions(torch.cat([beside, grow(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits
