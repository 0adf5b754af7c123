"""A trial of the gradients that are clipped: each must be that of its example, or the noise hides less than it says.

Opacus takes them from what each layer gets and gives, along the first axis, and multiplies by the size of the batch. So
they are wrong where a layer's first axis is another one, or a loss is no mean over its examples; and nothing in the
training says so.
"""

from __future__ import annotations

import warnings
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedge.shared.errors import brief
from fedge.shared.tasks.dry_run import preprocessed
from fedge.shared.tasks.task import Task

_Gradients: TypeAlias = dict[str, Tensor | None]

_EXAMPLES: Final = 3
#: By how much the two may differ: of the parameter's own gradient, and of all parameters' together.
_OF_OWN: Final = 1e-4
_OF_ALL: Final = 1e-5


def require_apart(task: Task, network: nn.Module) -> None:
    """Hold the gradients that are clipped against those of single examples.

    Args:
        task: whose loss, and of whose schema the examples are.
        network: on the CPU; its mode is changed.

    Raises:
        ValueError: the gradients of a parameter differ, or it has none; a training pass changes a value that is no
            parameter, or its outputs depend on more than weights, inputs and torch's generator. It is named.
    """
    x, y = _examples(task)
    network.train()
    _require_no_state(network, x)
    for module in network.modules():
        # Dropout samples for each pass; what has no weights is not looked at by Opacus.
        if next(module.parameters(), None) is None:
            module.eval()
    with torch.no_grad():
        # A network that still samples has no gradients that two passes agree on.
        drawing = not torch.equal(network(x), network(x))
    exact = [_of_one(task, network, x[[row]], y[[row]]) for row in range(_EXAMPLES)]
    clipped = _by_example(task, network, x, y)
    whole = [_norm(*(g for g in one.values() if g is not None)) for one in exact]
    for name, gradients in clipped.items():
        if gradients is None or len(gradients) != _EXAMPLES:
            got = "none" if gradients is None else tuple(gradients.shape)
            raise ValueError(
                f"{name}: must have a gradient for each of {_EXAMPLES} examples, got {got}"
            )
        for row in range(0 if drawing else _EXAMPLES):
            one = exact[row][name]
            wanted = torch.zeros_like(gradients[row]) if one is None else one
            off, own = _norm(gradients[row] - wanted), _norm(wanted)
            if not off <= _OF_OWN * own + _OF_ALL * whole[row]:
                raise ValueError(
                    f"{name}: must have the gradient of each example by itself, as the loss must be a mean over"
                    f" examples and a layer's first axis theirs, got one that is off by {off:.3g} of {own:.3g}"
                )


def _require_no_state(network: nn.Module, x: Tensor) -> None:
    """Hold passes in training mode against each other, by what they do and not by the names of layers.

    Raises:
        ValueError: what a pass writes into the network leaves the site without noise, and what depends on the passes
            before is no function of one example.
    """
    # Parameters too, as one that takes no gradient can be written like a buffer; and buffers that no file keeps.
    before = {name: t.detach().clone() for name, t in _state(network)}
    outputs = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(2):
            torch.manual_seed(1)
            outputs.append(network(x))
    for name, tensor in _state(network):
        if not torch.equal(tensor, before[name]):
            raise ValueError(
                f"{name}: must be the same after a training pass, as no noise protects what no gradient changes;"
                " GroupNorm keeps nothing where BatchNorm keeps something"
            )
    if not torch.equal(*outputs):
        raise ValueError(
            "network: must give the same outputs for the same weights, examples and torch.manual_seed, got others"
        )


def _state(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _examples(task: Task) -> tuple[Tensor, Tensor]:
    """Of zeros and ones, which are numbers, grey levels and tokens alike; of two classes, one of them twice."""
    raw = np.random.default_rng(0).integers(0, 2, (_EXAMPLES, *task.input.shape))
    x = preprocessed(task, raw.astype(np.float32))
    last = len(task.output.labels) - 1
    return torch.from_numpy(x), torch.tensor([0, last, last])


def _of_one(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> _Gradients:
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    loss = task.loss(network(x), y)
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


def _by_example(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> _Gradients:
    # Only where it is needed: Opacus takes a second to import.
    from opacus import GradSampleModule

    try:
        module = GradSampleModule(network)
    except NotImplementedError as error:
        raise ValueError(
            f"network: must have layers that Opacus knows, got {brief(error)}"
        ) from None
    try:
        with warnings.catch_warnings():
            # Torch says of every network's first layer that its input has no gradient.
            warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
            try:
                task.loss(module(x), y).backward()  # type: ignore[no-untyped-call]
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"network: must have gradients by example, got {brief(error)}"
                ) from None
        gradients = {
            n: getattr(p, "grad_sample", None)
            for n, p in network.named_parameters()
            if p.requires_grad
        }
        return {n: g.detach() if isinstance(g, Tensor) else None for n, g in gradients.items()}
    finally:
        module.to_standard_module()


def _norm(*tensors: Tensor) -> float:
    return float(np.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors)))
