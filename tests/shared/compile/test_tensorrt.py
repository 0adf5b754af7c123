"""Engines, built for real by TensorRT for RTX; none can be run without a GPU."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from onnx import TensorProto, helper

from fedge.shared.compile import gpu_capability, tensorrt
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.compile.onnx_export import export_onnx
from fedge.shared.compile.quantisation import to_fp16
from fedge.shared.compile.tensorrt import Phases, around, build, build_in_child, version
from fedge.shared.errors import ReleaseError
from fedge.shared.models.cnn1d import CNN1d
from fedge.shared.models.fnn import FNN

RTX = "tensorrt-rtx"
pytestmark = pytest.mark.skipif(version(RTX) is None, reason="needs fedge[tensorrt-rtx]")


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(FNN((6, 8, 3)), (6,))


@pytest.fixture(scope="module")
def series():
    torch.manual_seed(0)
    calls = GraphInput((20, 3), open={1: "length"})
    return export_onnx(CNN1d(features=3, classes=2, width=4), calls)


@pytest.mark.slow
def test_one_engine_of_several_generations(graph):
    reports = []
    built = build(
        graph, runtime=RTX, capabilities=[120, 86], listener=lambda *news: reports.append(news)
    )
    assert built.capabilities == (86, 120)
    assert built.version == version(RTX)
    assert built.timing_cache is None
    alone = build(graph, runtime=RTX, capabilities=[86])
    assert built.engine != alone.engine
    shares = [share for _, share in reports]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1
    assert all(phase for phase, _ in reports)


def test_the_child_does_the_same(graph, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reports = []
    built = build_in_child(
        graph, runtime=RTX, capabilities=[86, 89], listener=lambda *news: reports.append(news)
    )
    assert (built.capabilities, built.version, built.timing_cache) == ((86, 89), version(RTX), None)
    assert len(built.engine) > 10_000
    assert reports and reports[-1][1] > 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_open_axes_need_sizes(series):
    sizes = around({"length": 20})
    assert sizes == {"length": (10, 20, 80)}
    assert build(series, runtime=RTX, capabilities=[89], sizes=sizes).engine
    for call in (build, build_in_child):
        with pytest.raises(ValueError, match="sizes: must hold the graph's open axis 'length'"):
            call(series, runtime=RTX, capabilities=[89])
    for wrong, words in (
        ({"length": (20, 10, 80)}, "must ascend"),
        ({"length": (0, 10, 80)}, "must ascend"),
        ({**sizes, "width": (1, 2, 3)}, r"got \['width'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            build(series, runtime=RTX, capabilities=[89], sizes=wrong)


def test_turing_multiplies_matrices_in_half_precision_alone(graph):
    with pytest.raises(ReleaseError, match=r"FE-611 .*cannot build the engine .*FP32 GEMM"):
        build(graph, runtime=RTX, capabilities=[75])
    assert build(to_fp16(graph), runtime=RTX, capabilities=[75]).engine


@pytest.mark.parametrize("requested", [(), (87,), (86, 90), (86, 86)])
def test_gpus_that_nothing_is_built_for_are_refused(graph, requested):
    with pytest.raises(ReleaseError, match="FE-608 .*must be built for GPUs of sm75, sm80, sm86"):
        build(graph, runtime=RTX, capabilities=requested)


def test_the_parser_speaks_for_itself():
    node = helper.make_node("Hardmax", ["input"], ["logits"])
    values = [
        helper.make_tensor_value_info(n, TensorProto.STRING, ["batch", 3])
        for n in ("input", "logits")
    ]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    for data in (model.SerializeToString(), b"noise"):
        for call in (build, build_in_child):
            with pytest.raises(
                ReleaseError, match=r"FE-611 .*cannot parse the graph \(.+\)"
            ) as error:
                call(data, runtime=RTX, capabilities=[86])
            assert "\n" not in error.value.message


def test_a_missing_wheel_is_named_with_how_to_install_it(graph, monkeypatch):
    monkeypatch.setitem(tensorrt.MODULES, RTX, "no_such_wheel")
    assert version(RTX) is None
    with pytest.raises(ReleaseError, match=r"FE-608 .*installed \(fedge's extra `tensorrt-rtx`"):
        build(graph, runtime=RTX, capabilities=[86])
    with pytest.raises(
        ValueError, match="runtime: must be of tensorrt-rtx, tensorrt, got 'openvino'"
    ):
        version("openvino")


# The other wheel is not at hand; its API is the same, so this one stands for it.
@pytest.mark.filterwarnings("ignore:.*Deprecated in TensorRT-RTX:DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_at_hand(graph, monkeypatch):
    monkeypatch.setitem(tensorrt.MODULES, "tensorrt", "tensorrt_rtx")
    monkeypatch.setattr(gpu_capability, "capability", lambda: None)
    with pytest.raises(ReleaseError, match="FE-608 tensorrt: .*got no GPU here"):
        build(graph, runtime="tensorrt")
    monkeypatch.setattr(gpu_capability, "capability", lambda: 87)
    with pytest.raises(ReleaseError, match="FE-608 tensorrt: .*sm87, got sm86"):
        build(graph, runtime="tensorrt", capabilities=[86])
    for cache in (None, b"damaged"):
        built = build(graph, runtime="tensorrt", timing_cache=cache)
        assert built.capabilities == (87,)
        assert built.timing_cache


def test_no_driver_is_no_gpu():
    assert gpu_capability.capability("libno-such-driver.so") is None


def test_a_listener_that_fails_stops_the_build(graph):
    def listener(phase, share):
        raise KeyboardInterrupt

    for call in (build, build_in_child):
        with pytest.raises(KeyboardInterrupt):
            call(graph, runtime=RTX, capabilities=[86], listener=listener)
    assert build(graph, runtime=RTX, capabilities=[86]).engine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("raise SystemExit('out of luck')", r"ended with 1 \(out of luck\)"),
        ("print('no JSON'); print([1])", "got no word from the builder"),
        ("import time; print('{}'); time.sleep(60)", r"within 2 s"),
        ("import os, time; os.close(1); time.sleep(60)", r"within 2 s"),
    ],
)
def test_a_builder_that_crashes_or_hangs_ends_alone(graph, program, words):
    command, deadline = [sys.executable, "-c", program], 2 if "within" in words else 120
    with pytest.raises(ReleaseError, match=f"FE-611 tensorrt-rtx: .*{words}"):
        build_in_child(graph, runtime=RTX, capabilities=[86], deadline=deadline, command=command)


def test_builds_of_several_threads_run_one_after_the_other(graph):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(build(graph, runtime=RTX, capabilities=[86])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3


def test_a_device_needs_none_of_what_training_needs():
    program = """
import sys
import fedge.shared.compile.tensorrt, fedge.shared.compile.tensorrt_child
found = {"torch", "onnx", "flwr", "pydantic", "tensorrt", "tensorrt_rtx"} & sys.modules.keys()
assert not found, found
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env={**os.environ})


def test_the_share_of_nested_phases_never_falls():
    phases = Phases()
    phases.start("all", None, 4)
    phases.start("first", "all", 2)
    assert phases.step("first", 0) == 0.125
    assert phases.step("first", 1) == 0.25
    phases.finish("first")
    assert phases.step("all", 0) == 0.25
    phases.start("second", "all", 10)
    assert phases.step("second", 4) == pytest.approx(0.375)
    phases.finish("second")
    assert phases.step("all", 1) == 0.5
    assert phases.step("unheard of", 0) <= 1
    assert phases.step("all", 3) == 1.0
