"""The example of which a network's first layers make given values, by Levenberg and Marquardt's least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

#: Values of an example, and inputs of the layer, up to which the example itself is looked for.
MAX_VALUES: Final = 256
MAX_INPUTS: Final = 2048

_STARTS: Final = 4
_TURNS: Final = 15
#: From this residual on, as a share of what is wanted, there is no such example, and two starts are enough.
_HOPELESS: Final = 0.5
#: A fit this close, in the layer's inputs, is the example.
_CLOSE: Final = 1e-4


class Search:
    """Looks for the example of which a network's first layers make given values.

    Args:
        network: with weights as received.
        name: of the layer that takes the values.
        shape: of an example.
    """

    def __init__(self, network: nn.Module, name: str, shape: Sequence[int]) -> None:
        self._network = copy.deepcopy(network).double()
        for p in self._network.parameters():
            p.requires_grad_(False)
        self._name, self._shape = name, tuple(shape)

    def example(self, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
        """The best fit of a few starts at random, ``(n,)``."""
        target, size = torch.from_numpy(wanted), int(np.prod(self._shape))
        generator = np.random.default_rng(0)
        best, least = np.zeros(size), np.inf
        for start in range(_STARTS):
            first = torch.from_numpy(generator.random(size))
            found, distance = _fit(self._made, first, target)
            if distance < least:
                best, least = found.numpy(), distance
            if least < _CLOSE or (start and least > _HOPELESS * float(target.norm())):
                break
        return best

    def _made(self, x: Tensor) -> Tensor:
        """Rows ``(b, n)`` to the layer's inputs ``(b, k)``."""
        kept: list[Tensor] = []
        layer = self._network.get_submodule(self._name)
        hook = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            self._network(x.reshape(-1, *self._shape))
        finally:
            hook.remove()
        return kept[0]


def _fit(made: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Levenberg and Marquardt's least squares from one start: where it ends, and how far off that is."""
    damping, left = 1.0, made(x[None])[0] - target
    for _ in range(_TURNS):
        # A row for each value that is wanted: its gradient is a row of the Jacobian.
        rows = x.repeat(target.numel(), 1).requires_grad_()
        slopes = torch.autograd.grad(made(rows).diagonal().sum(), rows)[0]
        square, down = slopes.T @ slopes, slopes.T @ left
        while damping < 1e8:
            step = torch.linalg.solve(square + damping * torch.eye(x.numel(), dtype=x.dtype), down)
            there = made((x - step)[None])[0] - target
            if there.norm() < left.norm():
                break
            damping *= 4
        else:
            break
        gain = float(left.norm() - there.norm())
        x, left, damping = x - step, there, damping / 5
        if gain < 1e-9 * float(left.norm()) or float(left.norm()) < 1e-9:
            break
    return x, float(left.norm())
