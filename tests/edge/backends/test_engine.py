"""The order of calls, with stand-ins for the driver (in C) and the wheel: no engine is executed here."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedge.edge.backends.backend import Shapes
from fedge.edge.backends.cuda import Driver
from fedge.edge.backends.engine import EngineBackend, load_wheel
from fedge.shared.bundle.manifest_artefacts import Engine
from fedge.shared.errors import BundleError

SHAPES = Shapes((2, 3), 4)
WEIGHTS = np.random.default_rng(0).random((6, 4)).astype(np.float32)
STREAM = 0xFEDCBA0987654321


class Execution:
    """Computes on the host's memory, which the stand-in driver takes for the GPU's."""

    def __init__(self, calls: list[int]) -> None:
        self.calls = calls
        self.addresses: dict[str, int] = {}
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.batch = shape[0]
        return name == "input" and shape[1:] == (2, 3) and shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, 4)

    def execute_async_v3(self, stream: int) -> bool:
        if stream != STREAM or self.fails:
            return False
        self.calls.append(self.batch)
        x = np.ctypeslib.as_array(_floats(self.addresses["input"]), (self.batch * 6,))
        y = np.ctypeslib.as_array(_floats(self.addresses["logits"]), (self.batch * 4,))
        y[:] = (x.reshape(-1, 6) @ WEIGHTS).reshape(-1)
        return True


def _floats(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_float))


def wheel(calls: list[int], **changes: Any) -> Any:
    """A module as the wheel's; ``changes`` replace what its engine says of itself."""
    properties: dict[str, Any] = {
        "num_io_tensors": 2,
        "get_tensor_name": ["input", "logits"].__getitem__,
        "get_tensor_shape": {"input": (-1, 2, 3), "logits": (-1, 4)}.__getitem__,
        "get_tensor_dtype": lambda name: "float",
        "get_tensor_profile_shape": lambda name, index: [(1, 2, 3), (2, 2, 3), (4, 2, 3)],
        "create_execution_context": lambda: Execution(calls),
    }

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    class Runtime:
        def __init__(self, log: Any) -> None:
            self.log = log

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            if data == b"damaged":
                self.log.log(3, "nothing of interest")
                self.log.log(1, "the header\nis damaged")
                return None
            return SimpleNamespace(**{**properties, **changes})

    return SimpleNamespace(
        __version__="1.7.1",
        ILogger=ILogger,
        Runtime=Runtime,
        DataType=SimpleNamespace(FLOAT="float"),
    )


@pytest.fixture
def stub(driver_library: Path) -> Any:
    found = ctypes.CDLL(str(driver_library))
    before = found.stub_held(), found.stub_streams(), found.stub_contexts()
    yield found
    found.stub_fail_after(-1)
    assert (found.stub_held(), found.stub_streams(), found.stub_contexts()) == before
    assert found.stub_current() == 0


@pytest.fixture
def artefact(extra: Any) -> Any:
    engine = Engine("tensorrt-rtx", "1.7.1", (86, 89))
    return extra("m.engine", "tensorrt-rtx-fp16", b"engine", engine=engine).artefact


def test_batches_go_in_parts_that_the_profile_allows(
    stub: Any, driver_library: Path, artefact: Any
) -> None:
    calls: list[int] = []
    driver = Driver(str(driver_library))
    backend = EngineBackend(artefact, b"engine", SHAPES, driver=driver, wheel=wheel(calls))
    assert (backend.name, backend.device) == ("m.engine on TensorRT for RTX", "Stand-in GPU")
    for batch in (1, 3, 4, 11, 2):
        x = np.random.default_rng(batch).random((batch, 2, 3)).astype(np.float32)
        np.testing.assert_allclose(backend.run(x), x.reshape(batch, 6) @ WEIGHTS, rtol=1e-5)
    assert calls == [1, 3, 4, 4, 4, 3, 2]
    assert stub.stub_held() == 2  # buffers grow and are kept
    backend.close()
    backend.close()
    with pytest.raises(BundleError, match="is closed"):
        backend.run(np.zeros((1, 2, 3), np.float32))


def test_an_engine_that_was_not_closed_is_freed(
    stub: Any, driver_library: Path, artefact: Any
) -> None:
    driver = Driver(str(driver_library))
    backend = EngineBackend(artefact, b"engine", SHAPES, driver=driver, wheel=wheel([]))
    backend.run(np.zeros((1, 2, 3), np.float32))
    del backend


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Engine("tensorrt-rtx", "1.7.1", (86, 120)), "was built for GPUs of sm86, sm120, here is"),
        (Engine("tensorrt-rtx", "1.7.0", (89,)), "was built by TensorRT for RTX 1.7.0, here is"),
    ],
)
def test_an_engine_for_another_gpu_or_version_never_reaches_the_library(
    stub: Any, driver_library: Path, extra: Any, engine: Engine, reason: str
) -> None:
    found = extra("m.engine", "tensorrt-rtx-fp16", b"engine", engine=engine).artefact
    untouched = SimpleNamespace(__version__="1.7.1")  # anything more would be an AttributeError
    with pytest.raises(BundleError) as error:
        EngineBackend(found, b"engine", SHAPES, driver=Driver(str(driver_library)), wheel=untouched)
    assert error.value.code == 710
    assert reason in error.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_io_tensors": 1}, "must have 'input' and 'logits' only"),
        ({"get_tensor_shape": {"input": (-1, 3, 2), "logits": (-1, 4)}.get}, "input must have"),
        ({"get_tensor_shape": {"input": (1, 2, 3), "logits": (-1, 4)}.get}, "input must have"),
        ({"get_tensor_shape": {"input": (-1, 2, 3), "logits": (-1, 5)}.get}, "logits must have"),
        ({"get_tensor_dtype": lambda name: "half"}, "input must be float32"),
        ({"create_execution_context": lambda: None}, "gets no memory"),
        ({"get_tensor_profile_shape": lambda name, index: 1 / 0}, "division by zero"),
    ],
)
def test_an_engine_that_is_not_the_manifests_is_refused(
    stub: Any, driver_library: Path, artefact: Any, changes: dict[str, Any], reason: str
) -> None:
    driver = Driver(str(driver_library))
    with pytest.raises(BundleError) as error:
        EngineBackend(artefact, b"engine", SHAPES, driver=driver, wheel=wheel([], **changes))
    assert error.value.code == 710
    assert reason in error.value.message


def test_damaged_bytes_are_refused_in_the_librarys_words(
    stub: Any, driver_library: Path, artefact: Any
) -> None:
    driver = Driver(str(driver_library))
    with pytest.raises(BundleError) as error:
        EngineBackend(artefact, b"damaged", SHAPES, driver=driver, wheel=wheel([]))
    assert error.value.message == "m.engine: does not load (the header is damaged)"


def test_a_failing_gpu_is_reported_and_memory_comes_back(
    stub: Any, driver_library: Path, artefact: Any
) -> None:
    driver = Driver(str(driver_library))
    backend = EngineBackend(artefact, b"engine", SHAPES, driver=driver, wheel=wheel([]))
    x = np.zeros((1, 2, 3), np.float32)
    stub.stub_fail_after(0)
    with pytest.raises(BundleError, match="cuStreamSynchronize failed .CUDA_ERROR_LAUNCH_FAILED"):
        backend.run(x)
    backend._execution.fails = True
    with pytest.raises(BundleError, match="m.engine: fails to run"):
        backend.run(x)
    backend.close()


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_real_wheel_is_not_even_asked(artefact: Any) -> None:
    with pytest.raises(BundleError) as error:
        EngineBackend(artefact, b"engine", SHAPES)
    assert error.value.code == 710
    assert load_wheel("tensorrt") is None


def test_the_real_wheel_has_what_is_called() -> None:
    real: Any = pytest.importorskip("tensorrt_rtx")
    for owner, names in (
        (real.Runtime, ("deserialize_cuda_engine",)),
        (
            real.ICudaEngine,
            (
                "num_io_tensors",
                "get_tensor_name",
                "get_tensor_shape",
                "get_tensor_dtype",
                "get_tensor_profile_shape",
                "create_execution_context",
            ),
        ),
        (
            real.IExecutionContext,
            ("set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3"),
        ),
        (real.ILogger, ("ERROR", "INTERNAL_ERROR", "log")),
    ):
        for name in names:
            assert hasattr(owner, name), name
    assert real.DataType.FLOAT
    assert load_wheel("tensorrt-rtx") is real
