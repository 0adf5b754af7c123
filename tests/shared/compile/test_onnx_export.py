from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fedge.edge.backends.graph_file import refuse_external_data
from fedge.shared.compile import onnx_export
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.compile.onnx_export import export_onnx, opset_of, parity
from fedge.shared.errors import ReleaseError
from fedge.shared.models.cnn import CNN


class Recurrent(nn.Module):
    """A bidirectional LSTM, which open dimensions alone do not export."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.lstm(x)[0][:, -1])
        return logits


def _network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    match kind:
        case "cnn":
            return CNN(channels=1, side=8, classes=10), (1, 8, 8)
        case "mlp":
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)), (6,)
        case "norm":
            net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
            net(torch.randn(64, 6))
            return net, (6,)
        case _:
            return Recurrent(), (7, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "mlp", "norm", "recurrent"])
def test_networks_export_and_agree(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    network, shape = _network(kind)
    network.train()
    data = export_onnx(network, shape)
    assert network.training
    found = parity(network, data, shape)
    assert found.max_abs_difference <= 1e-5
    assert found.batch_sizes == (1, 2, 7, 32)
    assert capfd.readouterr() == ("", "")

    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model)
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("input", "logits")
    for value, rest in ((given, shape), (made, (len(network.state_dict()[_last(network)]),))):
        batch, *others = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert tuple(dim.dim_value for dim in others) == rest
    assert opset_of(data) >= 18
    refuse_external_data(data, "model.onnx")


@pytest.mark.slow
def test_parity_leaves_nothing_behind(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would write a device's number below the user's home."""
    (tmp_path / "model.onnx").write_bytes(export_onnx(nn.Linear(3, 2), (3,)))
    home = tmp_path / "home"
    home.mkdir()
    program = """
import sys
from pathlib import Path
from torch import nn
from fedge.shared.compile.onnx_export import parity
parity(nn.Linear(3, 2), Path(sys.argv[1]).read_bytes(), (3,), tolerance=1e9)
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")],
        env={**kept, "HOME": str(home)},
        timeout=300,
        check=True,
    )
    assert list(home.rglob("*")) == []


def _last(network: nn.Module) -> str:
    return [name for name in network.state_dict() if name.endswith("bias")][-1]


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes_and_no_names_of_this_machine() -> None:
    network, shape = _network("mlp")
    data = export_onnx(network, shape)
    assert export_onnx(network, shape) == data
    model = onnx.load_model_from_string(data)
    for words in (
        b".py",
        b"site-packages",
        b"forward",
        os.fsencode(Path.cwd()),
        os.fsencode(Path.home()) + b"/",
    ):
        assert words not in data, words
    assert not model.metadata_props
    assert not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    with torch.no_grad():
        next(iter(network.parameters())).add_(1e-6)
    assert export_onnx(network, shape) != data


@pytest.mark.soak
def test_another_process_exports_the_same_bytes() -> None:
    program = """
import hashlib, torch
from fedge.shared.compile.onnx_export import export_onnx
from fedge.shared.models.cnn import CNN
torch.manual_seed(0)
print(hashlib.sha256(export_onnx(CNN(channels=1, side=8, classes=10), (1, 8, 8))).hexdigest())
"""
    network, shape = _network("cnn")
    expected = hashlib.sha256(export_onnx(network, shape)).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=300,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.slow
def test_a_model_that_differs_is_not_released() -> None:
    network, shape = _network("mlp")
    data = export_onnx(network, shape)
    with torch.no_grad():
        next(iter(network.parameters())).add_(0.01)
    with pytest.raises(ReleaseError) as error:
        parity(network, data, shape)
    assert error.value.code == 603
    assert "batch size" in error.value.message


@pytest.mark.slow
def test_large_logits_may_differ_by_as_many_of_their_digits() -> None:
    """Local noise leaves weights so large that float32 rounds by more than small logits may differ."""
    network, shape = _network("mlp")
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(1000.0)
    data = export_onnx(network, shape)
    found = parity(network, data, shape)
    assert found.tolerance > 5
    assert 1e-4 < found.max_abs_difference < 0.1 * found.tolerance, "the absolute rule refuses it"

    # A thousandth off is still too much.
    with torch.no_grad():
        list(network.parameters())[-2].mul_(1.001)
    with pytest.raises(ReleaseError) as error:
        parity(network, data, shape)
    assert error.value.code == 603


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_logits_of_a_usual_size_are_held_to_the_tolerance_itself(scale: float) -> None:
    torch.manual_seed(0)
    network = nn.Linear(6, 2)
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(scale)
    data = export_onnx(network, (6,))
    assert parity(network, data, (6,)).tolerance == onnx_export.TOLERANCE
    with torch.no_grad():
        network.bias.add_(2 * onnx_export.TOLERANCE)
    with pytest.raises(ReleaseError, match=r"within 0\.0001 of the trained model"):
        parity(network, data, (6,))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_logits_allow_no_difference(value: float) -> None:
    """Else a share of infinity would allow any."""
    network = nn.Linear(6, 2)
    data = export_onnx(network, (6,))
    with torch.no_grad():
        network.bias[0] = value
    with pytest.raises(ReleaseError, match="finite"):
        parity(network, data, (6,))


@pytest.mark.slow
def test_a_model_that_gives_nan_is_not_released() -> None:
    network, shape = _network("mlp")
    with torch.no_grad():
        next(iter(network.parameters()))[0] = float("nan")
    with pytest.raises(ReleaseError) as error:
        parity(network, export_onnx(network, shape), shape)
    assert error.value.code == 603


@pytest.mark.slow
def test_a_graph_of_another_shape_or_none_is_not_released() -> None:
    small, large = nn.Linear(6, 2), nn.Linear(6, 3)
    with pytest.raises(ReleaseError) as error:
        parity(large, export_onnx(small, (6,)), (6,))
    assert error.value.code == 603
    with pytest.raises(ReleaseError) as error:
        parity(small, b"noise", (6,))
    assert error.value.code == 603


@pytest.mark.slow
def test_what_cannot_be_exported_is_named() -> None:
    class Wild(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(np.asarray(x.tolist(), np.float32))

    class Merged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum().reshape(1, 1)

    for network in (Wild(), Merged()):
        with pytest.raises(ReleaseError) as error:
            export_onnx(network, (6,))
        assert error.value.code == 607
        assert "\n" not in error.value.message


def test_too_large_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 100)
    with pytest.raises(ReleaseError) as error:
        export_onnx(nn.Linear(100, 100), (100,))
    assert error.value.code == 607


class Found(NamedTuple):
    scores: Tensor
    labels: Tensor


class Tagger(nn.Module):
    """Two outputs of different types for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Found:
        y = self.embedding(x)
        return Found(y.amax(dim=2), y.argmax(dim=2))


TEXT = GraphInput((6,), tokens=9, open={1: "length"})
SIZES = ({"length": 1}, {"length": 40})


def _axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.slow
def test_tokens_and_several_outputs_by_name() -> None:
    torch.manual_seed(0)
    network = Tagger()
    data = export_onnx(network, TEXT)
    graph = onnx.load_model_from_string(data).graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert {v.name: _axes(v) for v in [*graph.input, *graph.output]} == {
        "input": ["batch", "length"],
        "scores": ["batch", "length"],
        "labels": ["batch", "length"],
    }
    assert parity(network, data, TEXT, sizes=SIZES).max_abs_difference == 0
    assert export_onnx(network, TEXT) == data

    other = Tagger()
    with pytest.raises(ReleaseError, match=r"FE-603 .* (scores|labels)"):
        parity(other, data, TEXT)
    other.load_state_dict(network.state_dict())
    # The same scores, but the labels of other columns.
    with torch.no_grad():
        other.embedding.weight.copy_(network.embedding.weight.flip(1))
    with pytest.raises(ReleaseError, match="FE-603 .*must give the trained model's labels"):
        parity(other, data, TEXT)


@pytest.mark.slow
def test_computed_sizes_have_names_of_their_own() -> None:
    torch.manual_seed(0)
    network = nn.Conv1d(2, 3, 3, stride=2)
    given = GraphInput((2, 16), open={2: "time"})
    data = export_onnx(network, given)
    (made,) = onnx.load_model_from_string(data).graph.output
    assert _axes(made) == ["batch", 3, "logits_2"]
    parity(network, data, given, sizes=({"time": 3}, {"time": 101}))


@pytest.mark.slow
def test_open_axes_are_named_where_named_ones_do_not_export(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 3, padding=1)
    given = GraphInput((1, 6, 8), open={2: "height", 3: "width"})
    expected = onnx.load_model_from_string(export_onnx(network, given)).graph
    real = torch.onnx.export

    def export_by_marks(*arguments: object, **options: object) -> object:
        (axes,) = options["dynamic_shapes"]  # type: ignore[misc]
        if "batch" in axes.values():
            raise RuntimeError("names are not understood")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", export_by_marks)
    found = onnx.load_model_from_string(export_onnx(network, given)).graph
    for value, twin in zip(
        [*found.input, *found.output], [*expected.input, *expected.output], strict=True
    ):
        assert _axes(value) == _axes(twin)
        assert _axes(value)[2:] == ["height", "width"]


@pytest.mark.slow
def test_a_difference_at_another_size_alone_is_found() -> None:
    class Padded(nn.Module):
        def __init__(self, error: float) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: Tensor) -> Tensor:
            return x + self.error * (x.shape[1] - 6) * torch.ones_like(x)

    given = GraphInput((6,), open={1: "length"})
    data = export_onnx(Padded(0.0), given)
    parity(Padded(0.01), data, given)
    with pytest.raises(ReleaseError, match=r"FE-603 .*at batch size \d+, length 40"):
        parity(Padded(0.01), data, given, sizes=SIZES)


def test_outputs_without_a_name_are_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    with pytest.raises(ReleaseError, match="FE-607 .*must be a tensor or a named tuple of tensors"):
        export_onnx(Pair(), (3,))


class Interrupted(nn.Module):
    """What the exporter meets when somebody presses Ctrl-C while it traces."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise KeyboardInterrupt
        return x


@pytest.mark.slow
def test_an_interrupt_is_no_fault_of_the_network() -> None:
    with pytest.raises(KeyboardInterrupt):
        export_onnx(Interrupted(), (3,))
