"""A convolutional autoencoder for images and signals.

Stacked Convolutional Auto-Encoders for Hierarchical Feature Extraction (Masci et al., ICANN 2011,
https://doi.org/10.1007/978-3-642-21735-7_7), with strides in the place of pooling and group
normalisation (https://arxiv.org/abs/1803.08494). Transposed kernels are a multiple of their stride,
so that no chequerboard arises (Odena et al., Distill 2016, https://doi.org/10.23915/distill.00003).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

GROUPS = 4


class ConvAutoencoder(nn.Module):
    """Two convolutions of stride 2, a code of a few channels, and the inverse.

    Args:
        channels: of the image or signal.
        axes: 2 for images, 1 for signals.
        width: channels after the first convolution, a multiple of 4; the second has twice as many.
        code: channels of the code.
    """

    def __init__(
        self, *, channels: int, axes: Literal[1, 2] = 2, width: int = 16, code: int = 8
    ) -> None:
        super().__init__()
        if axes not in (1, 2):
            raise ValueError(f"axes: must be 1 or 2, got {axes!r}")
        conv: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d if axes == 2 else nn.Conv1d
        back: type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] = (
            nn.ConvTranspose2d if axes == 2 else nn.ConvTranspose1d
        )
        self.encoder = nn.Sequential(
            conv(channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            conv(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(GROUPS, 2 * width),
            nn.ReLU(),
            conv(2 * width, code, 1),
        )
        self.decoder = nn.Sequential(
            back(code, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(GROUPS, 2 * width),
            nn.ReLU(),
            back(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            conv(width, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, *size)``, each of size a multiple of 4, to the same shape; a large error marks an anomaly."""
        restored: Tensor = self.decoder(self.encoder(x))
        return restored
