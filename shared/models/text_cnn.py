"""A convolutional network for sentences.

Convolutional Neural Networks for Sentence Classification (Kim, EMNLP 2014,
https://arxiv.org/abs/1408.5882), without its dropout, which would need a generator for every client
of a stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING = 0


class TextCNN(nn.Module):
    """An embedding, convolutions of several widths side by side, their maxima over time, one linear layer.

    Sentences of a batch are filled up with token 0; how far does not change their logits.

    Args:
        tokens: size of the vocabulary, with the padding.
        classes: number of logits.
        embedding: width of a token's vector.
        kernels: tokens that each convolution spans.
        maps: channels of each convolution.
    """

    def __init__(
        self,
        *,
        tokens: int,
        classes: int,
        embedding: int = 64,
        kernels: Sequence[int] = (3, 4, 5),
        maps: int = 64,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding, padding_idx=PADDING)
        # Every window with at least one token of the sentence counts, so one token is enough.
        self.convolutions = nn.ModuleList(
            nn.Conv1d(embedding, maps, kernel, padding=kernel - 1) for kernel in kernels
        )
        self.kernels = tuple(kernels)
        self.fc = nn.Linear(maps * len(self.kernels), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, length)`` of int64, of any one length, to logits ``(b, classes)``."""
        vectors = self.embedding(x).transpose(1, 2)
        real = (x != PADDING).to(vectors.dtype)[:, None]
        found = []
        for kernel, convolution in zip(self.kernels, self.convolutions, strict=True):
            maps = functional.relu(convolution(vectors))
            # A window of padding alone would bring in the bias: as no map is negative, zero hides it.
            padded = functional.pad(real, (kernel - 1, kernel - 1))
            inside = functional.max_pool2d(padded, (1, kernel), stride=1)
            found.append((maps * inside).amax(dim=2))
        logits: Tensor = self.fc(torch.cat(found, dim=1))
        return logits
