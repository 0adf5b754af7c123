"""Residual networks for small colour images.

Deep Residual Learning for Image Recognition (He et al., CVPR 2016, https://arxiv.org/abs/1512.03385),
in the form for 32x32 images of its section 4.2, with group normalisation (Wu and He, ECCV 2018,
https://arxiv.org/abs/1803.08494) in the place of batch normalisation.
"""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        inputs, outputs: channels, multiples of 4.
        stride: 2 to halve height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                nn.GroupNorm(GROUPS, outputs),
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(b, inputs, h, w)`` to ``(b, outputs, h / stride, w / stride)``."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet(nn.Module):
    """One convolution, three stages of residual blocks, the mean over the image, one linear layer.

    Of one block a stage it is ResNet-8, of n blocks ResNet-(6n + 2).

    Args:
        channels: of the image.
        classes: number of logits.
        width: channels of the first stage, a multiple of 4; the others have two and four times as many.
        blocks: in each stage.
    """

    def __init__(
        self, *, channels: int = 3, classes: int, width: int = 16, blocks: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(ResidualBlock(inputs, outputs, stride))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, channels, h, w)``, such as 32x32 or 64x64, to logits ``(b, classes)``."""
        x = self.stages(self.relu(self.norm(self.conv(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
