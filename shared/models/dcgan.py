"""Generator and discriminator of images.

Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks (Radford,
Metz and Chintala, ICLR 2016, https://arxiv.org/abs/1511.06434), with group normalisation
(https://arxiv.org/abs/1803.08494) in the place of batch normalisation.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

GROUPS = 4
#: The smallest image inside the networks is below this side: 4 pixels for 32 or 64, 7 for 28.
_MAX_START = 8


def _halvings(side: int) -> tuple[int, int]:
    """Side of the smallest image, and how often it is doubled to reach ``side``."""
    start, count = side, 0
    while start >= _MAX_START and start % 2 == 0:
        start, count = start // 2, count + 1
    if start >= _MAX_START or count == 0:
        raise ValueError(f"side: must be 4 to 7 pixels doubled once or more, got {side}")
    return start, count


class Generator(nn.Module):
    """Transposed convolutions from noise to an image.

    Args:
        channels: of the image.
        side: its height and width in pixels, 4 to 7 doubled once or more: 28, 32, 64.
        latent: numbers of noise an image.
        width: channels before the last doubling, a multiple of 4; twice as many at every one before.
    """

    def __init__(self, *, channels: int = 3, side: int, latent: int = 100, width: int = 32) -> None:
        super().__init__()
        start, count = _halvings(side)
        widths = [width * 2**level for level in range(count)][::-1]
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent, widths[0], start, bias=False),
            nn.GroupNorm(GROUPS, widths[0]),
            nn.ReLU(),
        ]
        for inputs, outputs in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(GROUPS, outputs),
                nn.ReLU(),
            ]
        layers += [nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Noise ``(b, latent)``, standard normal, to images ``(b, channels, side, side)`` from -1 to 1."""
        images: Tensor = self.layers(x[:, :, None, None])
        return images


class Discriminator(nn.Module):
    """Convolutions of stride 2 from an image to one logit, high for a real image.

    Args:
        channels: of the image.
        side: its height and width in pixels, as the generator's.
        width: channels after the first convolution, a multiple of 4; doubled at every further one.
    """

    def __init__(self, *, channels: int = 3, side: int, width: int = 32) -> None:
        super().__init__()
        start, count = _halvings(side)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for level in range(1, count):
            outputs = width * 2**level
            layers += [
                nn.Conv2d(outputs // 2, outputs, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(GROUPS, outputs),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width * 2 ** (count - 1), 1, start))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, channels, side, side)`` from -1 to 1 to logits ``(b, 1)``."""
        logits: Tensor = self.layers(x).flatten(1)
        return logits
