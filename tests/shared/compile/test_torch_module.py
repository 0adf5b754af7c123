"""A torch module becomes a bundle without a federation, by the lines of docs/how-to/compile.md; what is refused."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedge.edge.cli import main as edge
from fedge.edge.runtime.model import EdgeModel
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.compile.torch_module import bundle_module
from fedge.shared.crypto.dsse import load_public, new_key, public_path
from fedge.shared.errors import FedgeError
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Scale, Standardise

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "compile.md"
EXAMPLES = np.random.default_rng(5).normal(size=(40, 8, 8)).astype(np.float32)
DIGIT = {"input": InputSchema((8, 8)), "output": OutputSchema(("no", "yes"), "softmax")}


def network(width=2):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, width))


@pytest.fixture
def key(tmp_path):
    new_key(tmp_path / "mine.key")
    return tmp_path / "mine.key"


def opened(path, key):
    return open_bundle(path, load_public(public_path(key)))


def test_the_lines_of_the_page_make_a_bundle_that_a_device_runs(key, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    trained = network()
    before = copy.deepcopy(trained.state_dict())
    exec(compile(block, str(PAGE), "exec"), {"network": trained, "examples": EXAMPLES})  # noqa: S102 - our own page
    assert all(torch.equal(before[name], t) for name, t in trained.state_dict().items())
    argv = [str(tmp_path / "mine.fedge"), "--trust", str(public_path(key)), "--task", "mine"]
    assert edge(["verify", *argv]) == 0
    told = capsys.readouterr().out
    assert "none: a network that was bundled by itself" in told
    assert f"torch {torch.__version__}" in told
    assert "model.int8.onnx: onnx-int8" in told
    bundle = opened(tmp_path / "mine.fedge", key)
    assert [a.kind for a in bundle.manifest.artefacts] == [
        "onnx-fp32", "onnx-int8", "onnx-fp16", "onnx-int8-symmetric",
    ]  # fmt: skip
    with torch.no_grad():
        expected = trained(torch.from_numpy(EXAMPLES)).numpy()
    model = EdgeModel.from_bundle(bundle)
    assert model.artefact == "model.onnx", "nothing else was executed yet"
    np.testing.assert_allclose(model.logits(EXAMPLES), expected, atol=1e-5)
    # The ranges are those of the examples: with those of examples a hundred times as small it would saturate.
    int8 = EdgeModel.from_bundle(bundle, artefact="model.int8.onnx").logits(EXAMPLES)
    assert 0 < np.abs(int8 - expected).max() < 0.05 * np.abs(expected).max()
    assert edge(["install", *argv, "--into", str(tmp_path / "there"), "--seconds", "1"]) == 0


def test_preprocessing_and_a_single_logit(key, tmp_path):
    schema = InputSchema((2,), features=(Feature("a", 0, 10), Feature("b", -1, 1)))
    steps = (Standardise((5.0, 0.0), (2.0, 0.5)), Scale(0.5))
    trained = nn.Linear(2, 1)
    bundle_module(
        trained, tmp_path / "t.fedge", task="t", input=schema, preprocessing=steps, key=key,
        output=OutputSchema(("low", "high"), "sigmoid"), metrics={"auc": 0.9}, serial=7,
    )  # fmt: skip
    bundle = opened(tmp_path / "t.fedge", key)
    assert (bundle.manifest.serial, bundle.manifest.metrics) == (7, {"pooled": {"auc": 0.9}})
    raw = np.array([[7.0, 0.25]], np.float32)
    model = EdgeModel.from_bundle(bundle)
    with torch.no_grad():
        expected = trained(torch.tensor([[0.5, 0.25]])).numpy()
    np.testing.assert_allclose(model.logits(model.prepare(raw)), expected, atol=1e-6)


def test_an_image_of_whole_numbers_without_a_scale_is_compared_on_such_numbers(key, tmp_path):
    """Of [0, 1) it would be black, and INT8 by the ranges of real images coarse beyond its tolerance."""
    images = np.random.default_rng(2).integers(0, 256, (60, 8, 8))
    torch.manual_seed(4)
    trained = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    bundle_module(
        trained, str(tmp_path / "t.fedge"), task="t", key=str(key), for_targets="cpu-int8",
        calibration=images.tolist(), **DIGIT,
    )  # fmt: skip
    schema = opened(tmp_path / "t.fedge", key).manifest.input
    assert (schema.low, schema.high) == (0.0, 255.0)
    argv = [str(tmp_path / "t.fedge"), "--trust", str(public_path(key))]
    assert (
        edge(["install", *argv, "--into", str(tmp_path / "there"), "--seconds", "1", "--json"]) == 0
    )


def test_the_indices_of_an_embedding_are_drawn_from_all_that_it_has(key, tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.table(x.long()).mean(1))

    given = {"task": "t", "key": key, "output": DIGIT["output"]}
    bundle_module(Words(), tmp_path / "t.fedge", input=InputSchema((3,), low=0, high=19.9), **given)
    with pytest.raises(FedgeError) as error:
        bundle_module(
            Words(), tmp_path / "u.fedge", input=InputSchema((3,), low=0, high=99), **given
        )
    assert error.value.code == 603
    assert "fails at batch size" in error.value.message


class Branches(nn.Module):
    def forward(self, x):
        return x[:, 0, :2] if x.sum() > 0 else x[:, 1, :2]


class Computed(nn.Module):
    """Keeps a tensor that is computed from others, as the old weight_norm does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(64, 2, requires_grad=True) * 2

    def forward(self, x):
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"network": network(3)}, 607, r"must give logits (batch, 2), got [2, 3]"),
        ({"network": Branches()}, 607, "test_torch_module.py"),
        ({"network": network().half()}, 607, "network: cannot be exported"),
        ({"network": Computed()}, 607, "network: cannot be copied"),
        ({"metrics": {"auc": math.nan}}, 305, "metrics: must be finite"),
        ({"task": "../Mine"}, 305, "task: must be lower-case"),
        ({"serial": -1}, 706, "serial"),
        ({"input": InputSchema((8, 8), dtype="int64")}, 706, "dtype must be float32"),
        ({"input": InputSchema((8, 8), low=1, high=0)}, 706, "low below high"),
        ({"calibration": [["a"]]}, 609, "must be numbers"),
        ({"for_targets": "cpu-int8"}, 609, "must come with calibration examples"),
        ({"for_targets": "cpu-int9"}, 608, "cpu-int8"),
        ({"calibration": EXAMPLES[:, :4]}, 609, "must be examples (n, 8, 8), got [40, 4, 8]"),
        ({"calibration": EXAMPLES[:0]}, 609, "must be examples"),
        ({"calibration": EXAMPLES * math.nan}, 609, "must be finite"),
        ({"preprocessing": (Standardise((), ()),)}, 706, "standardise needs columns"),
        ({"input": InputSchema((64,)), "preprocessing": (Standardise((), ()),)}, 305, "mean and std"),
    ],
)  # fmt: skip
def test_what_no_device_could_run_is_refused_and_nothing_written(
    key, tmp_path, change, code, words
):
    arguments = {"network": network(), "task": "t", "key": key, **DIGIT, **change}
    with pytest.raises(FedgeError) as error:
        bundle_module(arguments.pop("network"), tmp_path / "t.fedge", **arguments)
    assert error.value.code == code
    assert words in error.value.message
    assert "fedge[edge]" not in error.value.remedy, "nobody has a device yet"
    assert not (tmp_path / "t.fedge").exists()


def test_a_refusal_is_all_that_is_printed(key, tmp_path, capfd):
    with pytest.raises(FedgeError):
        bundle_module(Branches(), tmp_path / "t.fedge", task="t", key=key, **DIGIT)
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_stays_unless_it_may_be_replaced(key, tmp_path):
    out = tmp_path / "t.fedge"
    out.write_bytes(b"mine")
    with pytest.raises(FedgeError) as error:
        bundle_module(network(), out, task="t", key=key, **DIGIT)
    assert (error.value.code, out.read_bytes()) == (605, b"mine")
    part = bundle_module(network(), out, task="t", key=key, replace=True, **DIGIT)
    assert part.bytes == out.stat().st_size
