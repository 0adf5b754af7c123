"""An anchor-free detector: an object is the peak of a heat map, with its box's size beside it.

Objects as Points (Zhou, Wang and Krähenbühl, 2019, https://arxiv.org/abs/1904.07850) on a small
convolutional network with group normalisation (https://arxiv.org/abs/1803.08494). Peaks are what a
3x3 maximum leaves as it is, so nothing has to be suppressed afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 4
#: Pixels of the image a cell of the maps, along each axis.
STRIDE = 4
#: The heat map begins near this probability, as most cells hold no object (section 3 of RetinaNet,
#: https://arxiv.org/abs/1708.02002).
_PRIOR_LOGIT = -2.19


class Maps(NamedTuple):
    """The network's output maps for training, in cells of 4x4 pixels.

    Attributes:
        heat: logits of an object's centre, ``(b, classes, h / 4, w / 4)``.
        size: width and height of the box in cells, ``(b, 2, h / 4, w / 4)``.
        offset: of the centre within its cell along x and y, ``(b, 2, h / 4, w / 4)``.
    """

    heat: Tensor
    size: Tensor
    offset: Tensor


class Detections(NamedTuple):
    """The most probable objects of each image, best first.

    Attributes:
        boxes: left, top, right and bottom in pixels, ``(b, k, 4)``.
        scores: probability, 0 where an image has fewer peaks, ``(b, k)``.
        labels: class, int64, ``(b, k)``.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, outputs),
        nn.ReLU(),
    )


class CenterDetector(nn.Module):
    """Downsampling to an eighth of the resolution, one step of upsampling, and three maps at a quarter.

    Args:
        channels: of the image.
        classes: of objects.
        width: channels at half the resolution, a multiple of 4; doubled at each halving.
    """

    def __init__(self, *, channels: int = 3, classes: int, width: int = 16) -> None:
        super().__init__()
        self.down2 = _convolution(channels, width, stride=2)
        self.down4 = nn.Sequential(
            _convolution(width, 2 * width, stride=2), _convolution(2 * width, 2 * width)
        )
        self.down8 = nn.Sequential(
            _convolution(2 * width, 4 * width, stride=2), _convolution(4 * width, 4 * width)
        )
        self.grow = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join = _convolution(4 * width, 2 * width)
        likelihood = nn.Conv2d(2 * width, classes, 1)
        nn.init.constant_(likelihood.get_parameter("bias"), _PRIOR_LOGIT)
        self.heat = nn.Sequential(_convolution(2 * width, 2 * width), likelihood)
        self.size = nn.Sequential(_convolution(2 * width, 2 * width), nn.Conv2d(2 * width, 2, 1))
        self.offset = nn.Sequential(_convolution(2 * width, 2 * width), nn.Conv2d(2 * width, 2, 1))

    def forward(self, x: Tensor) -> Maps:
        """Images ``(b, channels, h, w)``, h and w multiples of 8, to the maps that are trained."""
        quarter = self.down4(self.down2(x))
        joined = self.join(torch.cat([quarter, self.grow(self.down8(quarter))], dim=1))
        return Maps(self.heat(joined), self.size(joined), self.offset(joined))


def peaks(maps: Maps, k: int) -> Detections:
    """Decode the ``k`` most probable peaks; k at most classes * h * w / 16."""
    heat = maps.heat.sigmoid()
    peak = functional.max_pool2d(heat, 3, stride=1, padding=1) == heat
    # What is no peak ranks below every peak, and in a fixed order: equal zeros would be in any.
    ranked = torch.where(peak, heat, heat - 1)
    best, index = ranked.flatten(1).topk(k, dim=1)
    area, columns = heat.shape[2] * heat.shape[3], heat.shape[3]
    # Products and differences, as the exporter knows no remainder of an open size.
    labels = index // area
    cell = index - labels * area
    row = cell // columns
    centre = torch.stack([cell - row * columns, row], dim=2).to(heat.dtype)
    centre = centre + _at(maps.offset, cell)
    half = _at(maps.size, cell).clamp(min=0) / 2
    boxes = torch.cat([centre - half, centre + half], dim=2) * STRIDE
    return Detections(boxes, best.clamp(min=0), labels)


def _at(values: Tensor, cell: Tensor) -> Tensor:
    """Values of ``(b, 2, h, w)`` at cells ``(b, k)`` of the flattened map, ``(b, k, 2)``."""
    return values.flatten(2).transpose(1, 2).gather(1, cell[:, :, None].expand(-1, -1, 2))


class PeakDetector(nn.Module):
    """A trained detector with decoding of its peaks in one graph, for export.

    Args:
        detector: the network, shared with this module.
        k: objects an image.
    """

    def __init__(self, detector: CenterDetector, k: int = 100) -> None:
        super().__init__()
        self.detector = detector
        self.k = k

    def forward(self, x: Tensor) -> Detections:
        """Images ``(b, channels, h, w)``, h and w multiples of 8, to the most probable objects."""
        return peaks(self.detector(x), self.k)
