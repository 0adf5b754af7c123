"""Recurrent networks, LSTM and GRU: a classifier of sequences and a language model.

LSTM: Hochreiter and Schmidhuber, Neural Computation 9(8), 1997,
https://doi.org/10.1162/neco.1997.9.8.1735; both directions: Graves and Schmidhuber, Neural Networks
18, 2005, https://doi.org/10.1016/j.neunet.2005.06.042; GRU: Cho et al., EMNLP 2014,
https://arxiv.org/abs/1406.1078.

Torch's own recurrences are one fast kernel, but know no batching rule, and fix the length of the
sequence when they are exported. So inside a transform of ``torch.func`` (clients stacked, gradients
by example) the same recurrence runs step by step on the same weights, and an export writes the node
that ONNX has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Cell: TypeAlias = Literal["lstm", "gru"]
#: Gate sums of the inputs ``(b, t, g)``, then the recurrent weight and bias, to states ``(b, t, hidden)``.
_Walk: TypeAlias = Callable[[Sequence[Tensor], Tensor, Tensor], list[Tensor]]


class LSTM(nn.LSTM):
    """``nn.LSTM``, batch first, from ``(b, t, features)`` to the outputs ``(b, t, directions * hidden)`` alone."""

    def __init__(
        self, features: int, hidden: int, *, layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__(features, hidden, layers, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Sequences to outputs; the first state is zero."""
        if torch.onnx.is_in_onnx_export():
            return _nodes(self, x, "LSTM", (0, 3, 1, 2))
        if _transformed():
            return _layers(self, x, _lstm)
        return super().forward(x)[0]


class GRU(nn.GRU):
    """``nn.GRU``, batch first, from ``(b, t, features)`` to the outputs ``(b, t, directions * hidden)`` alone."""

    def __init__(
        self, features: int, hidden: int, *, layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__(features, hidden, layers, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Sequences to outputs; the first state is zero."""
        if torch.onnx.is_in_onnx_export():
            return _nodes(self, x, "GRU", (1, 0, 2))
        if _transformed():
            return _layers(self, x, _gru)
        return super().forward(x)[0]


class RecurrentClassifier(nn.Module):
    """A recurrence over a sequence, the mean of its outputs over time, one linear layer.

    The mean, unlike the last output, is within reach of every step's gradient.

    Args:
        features: numbers a step.
        classes: number of logits.
        cell: ``"lstm"`` or ``"gru"``.
        hidden: width of the state of each direction.
        layers: recurrences on top of each other.
        bidirectional: read the sequence from its end as well.
    """

    def __init__(
        self,
        *,
        features: int,
        classes: int,
        cell: Cell = "lstm",
        hidden: int = 64,
        layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.recurrence = _cell(cell)(features, hidden, layers=layers, bidirectional=bidirectional)
        self.fc = nn.Linear(hidden * (2 if bidirectional else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(b, length, features)``, of any one length, to logits ``(b, classes)``."""
        logits: Tensor = self.fc(self.recurrence(x).mean(dim=1))
        return logits


class RecurrentLanguageModel(nn.Module):
    """An embedding, a recurrence, and at every position logits of the next token.

    Args:
        tokens: size of the vocabulary.
        cell: ``"lstm"`` or ``"gru"``.
        embedding: width of a token's vector.
        hidden: width of the state.
        layers: recurrences on top of each other.
    """

    def __init__(
        self,
        *,
        tokens: int,
        cell: Cell = "lstm",
        embedding: int = 64,
        hidden: int = 128,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, embedding)
        self.recurrence = _cell(cell)(embedding, hidden, layers=layers)
        self.fc = nn.Linear(hidden, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(b, length)`` of int64, of any one length, to logits ``(b, length, tokens)``."""
        logits: Tensor = self.fc(self.recurrence(self.embedding(x)))
        return logits


def _cell(name: Cell) -> type[LSTM] | type[GRU]:
    cells: dict[str, type[LSTM] | type[GRU]] = {"lstm": LSTM, "gru": GRU}
    if name not in cells:
        raise ValueError(f"cell: must be lstm or gru, got {name!r}")
    return cells[name]


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is active; torch has no public function for it."""
    return torch._C._functorch.maybe_current_level() is not None


def _weights(module: LSTM | GRU, layer: int, suffix: str) -> tuple[Tensor, ...]:
    """Input weight, recurrent weight and their biases of one direction of a layer."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(getattr(module, f"{name}_l{layer}{suffix}") for name in names)


def _suffixes(module: LSTM | GRU) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def _nodes(module: LSTM | GRU, x: Tensor, operator: str, order: Sequence[int]) -> Tensor:
    """One ONNX node for each layer, whose gates are in another ``order`` than torch's."""
    directions = len(_suffixes(module))
    attributes: dict[str, Any] = {
        "hidden_size": module.hidden_size,
        "direction": "bidirectional" if module.bidirectional else "forward",
    }
    if operator == "GRU":
        attributes["linear_before_reset"] = 1  # as torch does, and Cho et al. do not
    x = x.transpose(0, 1)
    for layer in range(module.num_layers):
        found = [_weights(module, layer, suffix) for suffix in _suffixes(module)]
        w_ih, w_hh, b_ih, b_hh = (
            torch.stack([_reordered(tensor, order) for tensor in tensors])
            for tensors in zip(*found, strict=True)
        )
        states = torch.onnx.ops.symbolic(
            operator,
            (x, w_ih, w_hh, torch.cat([b_ih, b_hh], dim=1)),
            attributes,
            dtype=x.dtype,
            shape=(x.shape[0], directions, x.shape[1], module.hidden_size),
        )
        x = states.transpose(1, 2).flatten(2)
    return x.transpose(0, 1)


def _reordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    size = len(tensor) // len(order)
    # Slices, unlike a split, are folded into one constant by the exporter.
    return torch.cat([tensor[gate * size : (gate + 1) * size] for gate in order])


def _layers(module: LSTM | GRU, x: Tensor, walk: _Walk) -> Tensor:
    """All layers and directions, step by step, as torch's kernels define them."""
    for layer in range(module.num_layers):
        outputs = []
        for suffix in _suffixes(module):
            w_ih, w_hh, b_ih, b_hh = _weights(module, layer, suffix)
            steps = list(functional.linear(x, w_ih, b_ih).unbind(1))
            states = walk(steps[::-1] if suffix else steps, w_hh, b_hh)
            outputs.append(torch.stack(states[::-1] if suffix else states, dim=1))
        x = torch.cat(outputs, dim=-1)
    return x


def _lstm(steps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    h = c = steps[0].new_zeros(steps[0].shape[0], weight.shape[1])
    states = []
    for step in steps:
        i, f, g, o = (step + functional.linear(h, weight, bias)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return states


def _gru(steps: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    h = steps[0].new_zeros(steps[0].shape[0], weight.shape[1])
    states = []
    for step in steps:
        r_x, z_x, n_x = step.chunk(3, dim=-1)
        r_h, z_h, n_h = functional.linear(h, weight, bias).chunk(3, dim=-1)
        z = (z_x + z_h).sigmoid()
        n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
        h = n + z * (h - n)
        states.append(h)
    return states
