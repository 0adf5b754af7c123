import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedge.shared.errors import DataError
from fedge.shared.preprocessing.schema import OutputSchema
from fedge.shared.preprocessing.steps import OneHot, Reshape, Standardise
from fedge.shared.tasks.classification import softmax_counters
from fedge.shared.tasks.dry_run import check
from fedge.shared.tasks.registry import get_task

WINE = replace(
    get_task("digits"),
    name="wine",
    preprocessing=(Reshape((64,)), Standardise()),
    output=OutputSchema(("a", "b", "c"), "softmax"),
    network=lambda: nn.Linear(64, 3),
)


class Double(nn.Linear):
    def forward(self, x):
        return super().forward(x).double()


class Infinite(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 0.0


class Tuple(nn.Linear):
    def forward(self, x):
        return (super().forward(x),)


def counting(**changes):
    def counters(logits, labels):
        found = softmax_counters(logits, labels) | changes
        return {name: value for name, value in found.items() if value is not None}

    return counters


@pytest.mark.parametrize("name", ["breast-cancer", "digits", "heart"])
def test_fedges_own_tasks_fit_together(name):
    check(get_task(name))


def test_a_fitting_task_passes_and_the_generator_stays_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check(WINE)
    assert torch.equal(torch.get_rng_state(), before)


def loss_of_each(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


BROKEN = {
    "labels": (
        {"network": lambda: nn.Linear(64, 2)},
        "network must give (2, 3) logits for labels a, b, c, got (2, 2)",
    ),
    "sigmoid": (
        {"output": OutputSchema(("no", "yes"), "sigmoid")},
        "network must give (2, 1) logits for labels no, yes, got (2, 3)",
    ),
    "width": (
        {"network": lambda: nn.Linear(13, 3)},
        "network failed on shape (2, 64): RuntimeError: mat1 and mat2 shapes",
    ),
    "build": ({"network": lambda: nn.Linear(64, -1)}, "network failed: RuntimeError: "),
    "module": ({"network": lambda: 3}, "network must build a Module, got int"),
    "tuple": (
        {"network": lambda: Tuple(64, 3)},
        "network must give (2, 3) logits for labels a, b, c, got tuple",
    ),
    "float64": (
        {"network": lambda: Double(64, 3)},
        "network must give float32 logits, got float64",
    ),
    "infinite": (
        {"network": lambda: Infinite(64, 3)},
        "network must give finite logits, got NaN or infinity",
    ),
    "reshape": (
        {"preprocessing": (Reshape((5, 5)),)},
        "preprocessing step Reshape failed on shape (2, 8, 8): ValueError: cannot reshape",
    ),
    "one-hot": (
        {"preprocessing": (Reshape((64,)), OneHot(((70, (1.0, 2.0)),)))},
        "preprocessing step OneHot failed on shape (2, 64): IndexError: ",
    ),
    "loss-shape": ({"loss": loss_of_each}, "loss must give one number as a Tensor, got shape (2,)"),
    "loss-nan": (
        {"loss": lambda logits, labels: logits.sum() * float("nan")},
        "loss must be finite, got nan",
    ),
    "loss-number": (
        {"loss": lambda logits, labels: logits.sum().item()},
        "loss must give one number as a Tensor, got float",
    ),
    "loss-detached": (
        {"loss": lambda logits, labels: logits.detach().sum()},
        "loss must follow from the network's weights, got no gradient",
    ),
    "loss-raises": (
        {"loss": lambda logits, labels: [][1]},
        "loss failed: IndexError: list index out of range",
    ),
    "counter-missing": (
        {"counters": counting(correct=None)},
        "counters must hold correct, got none",
    ),
    "counter-examples": (
        {"counters": counting(examples=1.0)},
        "counter examples: must be 2 of 2, got 1.0",
    ),
    "counter-range": (
        {"counters": counting(correct=3.0)},
        "counter correct: must be 0 to 2 of 2, got 3.0",
    ),
    "counter-nan": (
        {"counters": counting(**{"loss-sum": float("nan")})},
        "counter loss-sum: must be a finite number, got nan",
    ),
    "counter-tensor": (
        {"counters": counting(correct=torch.tensor(1.0))},
        "counter correct: must be a finite number, got Tensor",
    ),
    "counters": ({"counters": lambda logits, labels: 2}, "counters must give a dict, got int"),
}


@pytest.mark.parametrize("part", sorted(BROKEN))
def test_the_part_that_does_not_fit_is_named(part):
    changes, said = BROKEN[part]
    with pytest.raises(DataError) as caught:
        check(replace(WINE, **changes))
    assert caught.value.code == 305
    assert caught.value.message.startswith(f"task wine: {said}")
    assert "\n" not in caught.value.message


class Half(nn.Module):
    """A layer in bfloat16, which NumPy does not have."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 8).to(torch.bfloat16)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x.to(torch.bfloat16)).float())


def weight_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(64, 8)), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(3)), "0.weight must have its shape"),
        (Half, "first.weight must be of a type that arrays have, as float32, got bfloat16"),
        (weight_normed, "0.weight must be a parameter or a buffer, got a tensor that is computed"),
    ],
    ids=["lazy", "bfloat16", "weight_norm"],
)
def test_what_cannot_be_sent_or_copied_is_named(network, message):
    with pytest.raises(DataError, match=message) as caught:
        check(replace(WINE, network=network))
    assert caught.value.code == 305
    assert "\n" not in caught.value.message


def test_what_torch_keeps_as_parametrizations_can_be_sent_and_copied():
    normed = nn.utils.parametrizations.weight_norm
    check(replace(WINE, network=lambda: nn.Sequential(normed(nn.Linear(64, 8)), nn.Linear(8, 3))))
