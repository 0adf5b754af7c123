from __future__ import annotations

from dataclasses import replace

import pytest

from fedge.edge.backends.backend import CPU, CUDA, OPENVINO, RTX, TRT
from fedge.edge.backends.candidates import candidates, obstacle, place_of
from fedge.edge.backends.cuda import Gpu
from fedge.edge.backends.device import Device, cpu_name, detect, runtime_versions
from fedge.shared.bundle.manifest_artefacts import KINDS, Artefact, Engine, Qualification

EXECUTED = Qualification(True, max_abs_difference=0.0, tolerance=1.0, agreement=1.0)
PLAIN = Device("cpu")
FULL = Device(
    "cpu",
    (CPU, CUDA, OPENVINO),
    Gpu("GPU", 89),
    "",
    {"tensorrt-rtx": "1.7.1", "tensorrt": "10.9"},
)


def artefact(kind: str, qualification: Qualification | None = EXECUTED) -> Artefact:
    runtime = kind.rpartition("-")[0]
    versions = {"tensorrt-rtx": "1.7.1", "tensorrt": "10.9"}
    engine = Engine(runtime, versions[runtime], (86, 89)) if runtime in versions else None
    if kind == "onnx-fp32":
        qualification = None
    return Artefact(f"m.{kind}", kind, "a" * 64, 1, 18, engine, qualification)


ALL = tuple(artefact(kind) for kind in KINDS)


def test_the_fastest_comes_first_and_the_fp32_graph_on_the_cpu_last() -> None:
    found = candidates(ALL, FULL)
    assert [(c.artefact.kind, c.place) for c in found] == [
        ("tensorrt-rtx-int8", RTX),
        ("tensorrt-int8", TRT),
        ("tensorrt-rtx-fp16", RTX),
        ("tensorrt-fp16", TRT),
        ("onnx-fp16", CUDA),
        ("onnx-fp32", CUDA),
        ("onnx-int8", OPENVINO),
        ("onnx-fp32", OPENVINO),
        ("onnx-int8", CPU),
        ("onnx-fp32", CPU),
    ]
    assert not any(c.refused for c in found)
    assert [c.last_resort for c in found] == [False] * 9 + [True]


@pytest.mark.parametrize(("relative", "first"), [(0.9, "int8"), (1.0, "int8"), (1.2, "fp32")])
def test_on_the_cpu_the_release_s_times_decide(relative: float, first: str) -> None:
    int8 = artefact("onnx-int8", replace(EXECUTED, relative_p50=relative))
    found = candidates((artefact("onnx-fp32"), int8), FULL)
    assert next(c.name for c in found if c.place == CPU) == f"m.onnx-{first} on CPU"
    assert [c.place for c in found] == [CUDA, OPENVINO, OPENVINO, CPU, CPU]


def test_what_was_not_executed_is_refused_unless_it_is_allowed() -> None:
    unproven = tuple(artefact(kind, Qualification(False, "needs a GPU")) for kind in KINDS)
    taken = [(c.artefact.kind, c.place) for c in candidates(unproven, FULL) if not c.refused]
    assert taken == [("onnx-fp32", CUDA), ("onnx-fp32", OPENVINO), ("onnx-fp32", CPU)]
    assert not any(c.refused for c in candidates(unproven, FULL, allow_unqualified=True))


def test_a_plain_device_says_what_it_lacks_and_keeps_the_cpu() -> None:
    found = candidates(ALL, PLAIN)
    assert [c.name for c in found if not c.refused] == [
        "m.onnx-int8 on CPU",
        "m.onnx-fp32 on CPU",
    ]
    refused = {c.artefact.kind: c.refused for c in found if c.refused}
    assert set(refused) == {k for k in KINDS if k.startswith("tensorrt")} | {"onnx-fp16"}
    assert refused["onnx-fp16"] == "needs CUDA"
    assert refused["tensorrt-int8"] == "needs a GPU (device: was not looked for)"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (FULL, ""),
        (replace(FULL, gpu=Gpu("GPU", 90)), "was built for GPUs of sm86, sm89, here is sm90"),
        (
            replace(FULL, wheels={"tensorrt-rtx": "1.7.2"}),
            "was built by TensorRT for RTX 1.7.1, here is 1.7.2",
        ),
        (replace(FULL, wheels={}), "needs TensorRT for RTX, whose wheel is not installed"),
    ],
)
def test_an_engine_is_held_against_the_device(device: Device, reason: str) -> None:
    assert obstacle(artefact("tensorrt-rtx-fp16"), RTX, device) == reason


def test_an_artefact_that_is_named_gets_the_best_place_of_its_kind() -> None:
    places = {kind: place_of(artefact(kind), FULL) for kind in KINDS}
    assert places["tensorrt-rtx-int8"] == RTX and places["tensorrt-fp16"] == TRT
    assert (places["onnx-fp16"], places["onnx-int8"]) == (CUDA, CPU)
    assert place_of(artefact("onnx-fp16"), PLAIN) == CPU


def test_this_device_is_described() -> None:
    found = detect((artefact("onnx-fp32"),))
    assert found.cpu == cpu_name() and found.cpu.isprintable() and 0 < len(found.cpu) <= 100
    assert CPU in found.places
    assert set(runtime_versions()) == {"onnxruntime"}
    detected = detect((artefact("tensorrt-rtx-fp16"),))
    assert (detected.gpu is None) == bool(detected.no_gpu)
