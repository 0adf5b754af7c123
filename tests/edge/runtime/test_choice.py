from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge.backends import trial
from fedge.edge.backends.device import cpu_name
from fedge.edge.runtime.model import EdgeModel
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.bundle.manifest_artefacts import Engine, Qualification
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import BundleError, InputError

Load = Callable[..., EdgeModel]
Graphs = dict[str, bytes]
X = np.random.default_rng(3).random((3, 2, 3)).astype(np.float32)
EXECUTED = Qualification(True, max_abs_difference=0.0, tolerance=1.0, agreement=1.0)
NOT_EXECUTED = Qualification(False, "needs a GPU")


@pytest.fixture
def load(trust: Path) -> Load:
    def from_path(path: Path, **arguments: Any) -> EdgeModel:
        return EdgeModel.from_bundle(open_bundle(path, load_public(trust)), **arguments)

    return from_path


@pytest.mark.usefixtures("patient")
def test_int8_that_was_executed_serves_before_fp32(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["int8"])))
    assert (model.backend, model.artefact) == ("model.int8.onnx on CPU", "model.int8.onnx")
    assert (model.fallbacks, model.device) == ((), cpu_name())
    assert model.why == "the first of the usual order that works here"
    fp32 = load(compiled())
    assert fp32.backend == "model.onnx on CPU"
    ready = model.prepare(X)
    gap = np.abs(model.logits(ready) - fp32.logits(ready)).max()
    assert 0 < gap < 0.1


@pytest.mark.parametrize(("relative", "serves"), [(0.5, "model.int8.onnx"), (1.5, "model.onnx")])
@pytest.mark.usefixtures("patient")
def test_without_an_installation_the_release_s_times_decide(
    load: Load, compiled: Any, extra: Any, graphs: Graphs, relative: float, serves: str
) -> None:
    timed = replace(EXECUTED, relative_p50=relative)
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["int8"], timed)))
    assert (model.artefact, model.fallbacks) == (serves, ())
    assert model.why == "the fastest that works here, as timed at the release"


@pytest.mark.parametrize("qualification", [None, NOT_EXECUTED])
def test_what_was_never_executed_serves_only_where_that_is_asked_for(
    load: Load,
    compiled: Any,
    extra: Any,
    graphs: Graphs,
    qualification: Qualification | None,
    patient: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = compiled(extra("model.int8.onnx", "onnx-int8", graphs["int8"], qualification))
    model = load(path)
    assert model.backend == "model.onnx on CPU"
    (reason,) = model.fallbacks
    assert reason.startswith("FE-710 model.int8.onnx: was not executed at the release")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert load(path, allow_unqualified=True).backend == "model.int8.onnx on CPU"
    assert "may serve" in caplog.text


def test_a_corrupted_artefact_falls_back_with_the_reason(
    load: Load, compiled: Any, extra: Any, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    """Signed, but garbage."""
    load(compiled())  # onnxruntime is loaded
    path = compiled(extra("model.int8.onnx", "onnx-int8", graphs["garbage"]))
    start = time.perf_counter()
    model = load(path)
    assert time.perf_counter() - start < 30
    assert model.backend == "model.onnx on CPU"
    (reason,) = model.fallbacks
    assert reason == "FE-708 model.int8.onnx: must be an ONNX model, got other bytes"
    assert reason in caplog.text
    assert model.predict(X).indices.shape == (3,)


@pytest.mark.parametrize(
    ("graph", "message"),
    [("killer", "crashed (SIGFPE)"), ("nonsense", "does not load (")],
)
@pytest.mark.usefixtures("patient")
def test_what_kills_its_process_does_not_kill_ours(
    load: Load, compiled: Any, extra: Any, graphs: Graphs, graph: str, message: str
) -> None:
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs[graph])))
    assert model.backend == "model.onnx on CPU"
    assert message in model.fallbacks[0]


@pytest.mark.slow
def test_what_never_ends_is_given_up(
    load: Load, compiled: Any, extra: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "DEADLINE", 1.0)
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["endless"])))
    (message,) = model.fallbacks
    assert message.startswith("FE-710 model.int8.onnx on CPU: did not answer within")
    assert model.backend == "model.onnx on CPU"


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_what_computes_something_else_here_is_refused(
    load: Load, compiled: Any, extra: Any, graph_of: Any
) -> None:
    other = graph_of((1, 2, 3), np.full((6, 3), 4.0))
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", other)))
    assert model.backend == "model.onnx on CPU"
    assert "of the fp32 graph" in model.fallbacks[0]


@pytest.mark.usefixtures("no_gpu")
def test_engines_say_what_the_device_lacks(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    engine = Engine("tensorrt-rtx", "1.7.1.116", (86, 89))
    path = compiled(
        extra("model.engine", "tensorrt-rtx-fp16", b"engine", NOT_EXECUTED, engine),
        extra("model.fp16.onnx", "onnx-fp16", graphs["fp16"]),
    )
    model = load(path)
    assert model.backend == "model.onnx on CPU"
    first, second = model.fallbacks
    assert first.startswith("FE-710 model.engine: needs a GPU (")
    assert second == "FE-710 model.fp16.onnx: needs CUDA"
    with pytest.raises(BundleError) as error:
        load(path, artefact="model.engine")
    assert error.value.code == 710
    assert error.value.remedy.startswith("Name another with --artifact, or leave that out")


def test_a_named_artefact_runs_alone_or_not_at_all(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    path = compiled(
        extra("model.int8.onnx", "onnx-int8", graphs["int8"], NOT_EXECUTED),
        extra("model.fp16.onnx", "onnx-fp16", graphs["fp16"], NOT_EXECUTED),
        extra("model.s8.onnx", "onnx-int8-symmetric", graphs["garbage"], NOT_EXECUTED),
    )
    for name in ("model.onnx", "model.int8.onnx", "model.fp16.onnx"):
        model = load(path, artefact=name)
        assert (model.backend, model.fallbacks) == (f"{name} on CPU", ())
        assert model.why == "named by --artifact"
        assert model.predict(X).indices.shape == (3,)
    for name, code in (("model.s8.onnx", 708), ("other.onnx", 706)):
        with pytest.raises(BundleError) as error:
            load(path, artefact=name)
        assert error.value.code == code


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_backend_that_fails_to_run_is_dropped_and_the_request_answered(
    load: Load, compiled: Any, extra: Any, graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["fragile"])))
    assert (model.backend, model.fallbacks) == ("model.int8.onnx on CPU", ())
    expected = load(compiled())
    few, many = model.prepare(X), np.repeat(model.prepare(X), 3, axis=0)
    np.testing.assert_allclose(model.logits(few), expected.logits(few), atol=1e-5)
    start = time.perf_counter()
    np.testing.assert_array_equal(model.logits(many), expected.logits(many))
    assert time.perf_counter() - start < 30
    assert model.backend == "model.onnx on CPU"
    assert model.why == "what was in use failed"
    (reason,) = model.fallbacks
    assert reason.startswith("FE-708 model.int8.onnx: fails to run")
    assert f"{reason}; model.onnx on CPU goes on" in caplog.text
    model.logits(many)
    assert len(model.fallbacks) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_threads_that_meet_a_failure_together_drop_it_once(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["fragile"])))
    many = np.repeat(model.prepare(X), 3, axis=0)
    expected = load(compiled()).logits(many)
    start = threading.Barrier(8)
    wrong: list[int] = []

    def work() -> None:
        start.wait()
        found = [model.logits(many) for _ in range(20)]
        wrong.extend(1 for logits in found if not np.array_equal(logits, expected))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (wrong, len(model.fallbacks)) == ([], 1)


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_fault_of_the_caller_costs_no_backend_its_place(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    model = load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["int8"])))
    ready = model.prepare(X)
    for wrong, code in ((ready[:, :, :1], 802), (ready.astype(np.float64), 803)):
        with pytest.raises(InputError) as error:
            model.logits(wrong)
        assert error.value.code == code
    assert model.logits(ready[:0]).shape == (0, 3)
    assert (model.backend, model.fallbacks) == ("model.int8.onnx on CPU", ())


def test_what_always_works_is_checked_first(
    load: Load, compiled: Any, extra: Any, graphs: Graphs
) -> None:
    with pytest.raises(BundleError) as error:
        load(compiled(extra("model.int8.onnx", "onnx-int8", graphs["int8"]), graph=b"nothing"))
    assert error.value.code == 708


def test_a_closed_model_fails_by_number(load: Load, compiled: Any) -> None:
    model = load(compiled())
    ready = model.prepare(X)
    model.close()
    model.close()
    with pytest.raises(BundleError) as error:
        model.logits(ready)
    assert error.value.code == 708
