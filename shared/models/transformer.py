"""Transformers over tokens: an encoder that classifies, and a language model.

Attention Is All You Need (Vaswani et al., NeurIPS 2017, https://arxiv.org/abs/1706.03762), with
normalisation before each part (Xiong et al., ICML 2020, https://arxiv.org/abs/2002.04745), learned
positions and GELU as in GPT-2, without dropout, which would need a generator for every client of a
stack.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PADDING = 0
#: Score of a position that is not seen. Finite, so that a sequence of padding alone gives no NaN, and within float16.
HIDDEN = -1e4


class Attention(nn.Module):
    """Scaled dot-product attention of several heads, written out, as torch's fused one cannot be stacked.

    Args:
        width: of a position, a multiple of ``heads``.
        heads: that attend side by side.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: must be a multiple of {heads} heads, got {width}")
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``(b, t, width)`` to the same; see ``Block``."""
        parts = self.project(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q * self.scale) @ k.transpose(2, 3)
        weights = scores.masked_fill(~seen, HIDDEN).softmax(dim=3)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a feed-forward network, each on normalised input and added to it.

    Args:
        width: of a position.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Apply attention and the feed-forward network.

        Args:
            x: ``(b, t, width)``.
            seen: bool, ``(b or 1, 1, t or 1, t)``, which position (third axis) sees which (last axis).

        Returns:
            ``(b, t, width)``.
        """
        x = x + self.attention(self.norm1(x), seen)
        y: Tensor = x + self.feed_forward(self.norm2(x))
        return y


class _Tokens(nn.Module):
    """Token and position embeddings, blocks, and a final normalisation."""

    def __init__(self, *, tokens: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Tokens ``(b, t)`` of int64, t at most ``length``, to ``(b, t, width)``."""
        # Positions are looked up for every example, so that per-example gradients can be computed.
        y: Tensor = self.token(x) + self.position(_positions(x).expand(x.shape))
        for block in self.blocks:
            y = block(y, seen)
        normed: Tensor = self.norm(y)
        return normed


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


class TransformerClassifier(nn.Module):
    """Blocks in which every token attends to every other, the mean over the tokens, one linear layer.

    Sequences of a batch are filled up with token 0; how far does not change their logits.

    Args:
        tokens: size of the vocabulary, with the padding.
        classes: number of logits.
        length: most tokens of a sequence.
        width: of a position, a multiple of ``heads``.
        heads: of each attention.
        layers: number of blocks.
    """

    def __init__(
        self,
        *,
        tokens: int,
        classes: int,
        length: int,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = _Tokens(
            tokens=tokens, length=length, width=width, heads=heads, layers=layers
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, t)`` of int64, t at most ``length``, to logits ``(b, classes)``."""
        real = x != PADDING
        y = self.encoder(x, real[:, None, None, :])
        weight = real.to(y.dtype)[:, :, None]
        logits: Tensor = self.fc((y * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))
        return logits


class TransformerLanguageModel(nn.Module):
    """Blocks in which a token attends to itself and earlier ones, and at every position logits of the next token.

    Args:
        tokens: size of the vocabulary.
        length: most tokens of a sequence.
        width: of a position, a multiple of ``heads``.
        heads: of each attention.
        layers: number of blocks.
    """

    def __init__(
        self, *, tokens: int, length: int, width: int = 128, heads: int = 4, layers: int = 4
    ) -> None:
        super().__init__()
        self.decoder = _Tokens(
            tokens=tokens, length=length, width=width, heads=heads, layers=layers
        )
        self.fc = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, t)`` of int64, t at most ``length``, to logits ``(b, t, tokens)``."""
        positions = _positions(x)
        seen = positions[:, None] >= positions[None, :]
        logits: Tensor = self.fc(self.decoder(x, seen[None, None]))
        return logits
