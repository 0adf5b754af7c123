"""Torch's SGD and Adam without torch's compiler: the same steps, bit by bit.

The first optimiser of a process has torch import ``torch._dynamo``, which takes over a second of processor time, so
that the compiler leaves some methods of optimisers alone. Nothing is compiled here: the methods are taken as they are
beneath those wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any, cast

import torch
from torch.optim import SGD, Adam, Optimizer

_sgd_step: Callable[..., Any] = unwrap(SGD.step)
_adam_step: Callable[..., Any] = unwrap(Adam.step)


class _Eager(Optimizer):
    """Methods of ``Optimizer`` that both optimisers share."""

    add_param_group = cast(Any, unwrap(Optimizer.add_param_group))
    zero_grad = cast(Any, unwrap(Optimizer.zero_grad))


class EagerSGD(_Eager, SGD):
    """``torch.optim.SGD``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the parameters by their gradients."""
        return _sgd_step(self, closure)


class EagerAdam(_Eager, Adam):
    """``torch.optim.Adam``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Change the parameters by their gradients."""
        return _adam_step(self, closure)
