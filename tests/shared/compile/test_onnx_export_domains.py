"""Networks with a domain are compared on inputs that can come; what release would refuse is said before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedge.server.runs.trained_model import Trained
from fedge.shared.compile import onnx_export
from fedge.shared.compile.onnx_export import export_onnx, require_exportable
from fedge.shared.compile.parity import parity
from fedge.shared.errors import DataError, ReleaseError
from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

D, K = 4, 3


class Codes(nn.Module):
    """Whole numbers 0 to 9 in each column, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(10, 4), nn.Linear(4 * D, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.table(x.long()).flatten(1))
        return found


class Logarithm(nn.Module):
    """Counts, which are never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FNN((D, 8, K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(torch.log1p(x))
        return found


class Branch(nn.Module):
    """Decides by a value in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FNN((D, 8, K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(x)
        if x.mean() > 0:
            return found
        return -found


class Random(nn.Module):
    """Adds random numbers also where it does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FNN((D, 8, K))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(x)
        return found + torch.rand(())


def task(network: type[nn.Module], high: float, **changes: object) -> Task:
    features = tuple(Feature(f"c{i}", 0, high) for i in range(D))
    made = replace(
        get_task("breast-cancer"),
        name="domain",
        input=InputSchema((D,), features=features),
        output=OutputSchema(("a", "b", "c"), "softmax"),
        preprocessing=(),
        network=network,
    )
    return replace(made, **changes)


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks here are in no entry point, as a user's own is none of fedge's."""
    monkeypatch.setattr(onnx_export, "is_shipped", lambda _: False)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "high"), [(Codes, 9), (Logarithm, 1000)])
def test_a_network_with_a_domain_is_compared_within_it(
    network: type[nn.Module], high: float
) -> None:
    own = task(network, high)
    require_exportable(own)
    model = Trained(own, network().eval(), (), (D,), "", {}, None)
    graph = export_onnx(model.network, (D,))
    found = parity(model.network, graph, (D,), examples=model.examples)
    assert found.max_abs_difference <= found.tolerance
    # The failing twin: standard normal numbers are none that can come.
    with pytest.raises(ReleaseError, match="fails at batch size|must give finite"):
        parity(model.network, graph, (D,))


def test_inputs_are_drawn_from_the_schema_and_preprocessed() -> None:
    steps = (Standardise((5.0,) * D, (2.0,) * D),)
    model = Trained(task(Codes, 9), Codes(), steps, (D,), "", {}, None)
    x = model.examples(1000, 3)
    assert (x.shape, x.dtype) == ((1000, D), np.float32)
    assert x.min() >= -2.5
    assert x.max() <= 2.0
    assert x.std() == pytest.approx(9 / 12**0.5 / 2, rel=0.05)
    assert not np.array_equal(x, model.examples(1000, 4))


@pytest.mark.slow
def test_control_flow_on_values_is_named_by_its_line_before_training() -> None:
    with pytest.raises(DataError, match="cannot be exported at ") as caught:
        require_exportable(task(Branch, 1))
    assert caught.value.code == 305
    where = f"{Path(__file__).name}:"
    assert where in caught.value.message
    assert "`if x.mean() > 0:`" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_a_graph_that_is_not_the_network_is_found_before_training() -> None:
    with pytest.raises(DataError, match="model.onnx: must") as caught:
        require_exportable(task(Random, 1))
    assert caught.value.code == 305


def test_fedge_s_own_tasks_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(onnx_export, "export_onnx", None)
    require_exportable(get_task("digits"))
