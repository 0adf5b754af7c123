"""Engines, run by TensorRT or TensorRT for RTX on the device's GPU.

Written against the API of the ``tensorrt_rtx`` wheel 1.7.1, which ``tensorrt`` shares. No engine has been
executed: no GPU was at hand. The order of calls is tested with stand-ins for the driver and the wheel.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from types import ModuleType
from typing import Any, Final

import numpy as np

from fedge.edge.backends.backend import RTX, TRT, Array, Shapes, first_line
from fedge.edge.backends.cuda import Context, Driver
from fedge.shared.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from fedge.shared.bundle.manifest_artefacts import Artefact, Engine
from fedge.shared.errors import BundleError

#: Python module and display name of each runtime.
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
TITLES: Final = {"tensorrt-rtx": RTX, "tensorrt": TRT}
#: Largest input or output of one call, in bytes; larger batches go in several.
_MAX_BYTES: Final = 2**28
_NO_REASON: Final = "no reason given"

_logs: list[tuple[Any, Any]] = []


def load_wheel(runtime: str) -> ModuleType | None:
    """The Python module of a runtime, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(MODULES[runtime])
    except (ImportError, OSError, RuntimeError):
        return None


def refusal(engine: Engine, version: str | None, capability: int) -> str:
    """Why an engine cannot run here, in a few words; empty where it can.

    Args:
        engine: the runtime and the GPUs that it was built for.
        version: of the installed runtime; None where there is none.
        capability: compute capability of the GPU, for example 89 for 8.9.
    """
    title = TITLES[engine.runtime]
    if version is None:
        return f"needs {title}, whose wheel is not installed"
    if version != engine.version:
        return f"was built by {title} {engine.version}, here is {version}"
    if capability not in engine.capabilities:
        listed = ", ".join(f"sm{c}" for c in engine.capabilities)
        return f"was built for GPUs of {listed}, here is sm{capability}"
    return ""


class EngineBackend:
    """A deserialised engine with a context and memory on the GPU.

    Args:
        artefact: the engine's entry in the manifest or in the installation's record.
        data: its bytes.
        shapes: of its input and output by the manifest.
        driver: of the GPU; the device's own where None.
        wheel: the runtime's module; the installed one where None.

    Raises:
        BundleError: 710, there is no GPU or wheel, the engine is for another version or GPU, does not
            load, or is not what the manifest says.
    """

    engine: Final = True

    def __init__(
        self,
        artefact: Artefact,
        data: bytes,
        shapes: Shapes,
        *,
        driver: Driver | None = None,
        wheel: ModuleType | None = None,
    ) -> None:
        if artefact.engine is None:
            raise BundleError(710, f"{artefact.name}: must be an engine, got {artefact.kind}")
        driver = driver or Driver()
        gpu = driver.gpu()
        wheel = wheel or load_wheel(artefact.engine.runtime)
        version = None if wheel is None else str(wheel.__version__)
        # Before a byte of it reaches the library.
        if reason := refusal(artefact.engine, version, gpu.capability):
            raise BundleError(710, f"{artefact.name}: {reason}")
        self.name = f"{artefact.name} on {TITLES[artefact.engine.runtime]}"
        self.device = gpu.name
        self.artefact, self._shapes = artefact.name, shapes
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._runtime: Any = None
        self._engine: Any = None
        self._execution: Any = None
        self._cuda: Context | None = driver.context()
        try:
            with self._cuda.current():
                self._open(wheel, data)
        except BaseException:
            self.close()
            raise

    def run(self, x: Array) -> Array:
        """Logits ``(n, k)`` of ``x``, ``(n, *input)`` of float32, in as many calls as the engine's profile asks.

        Raises:
            BundleError: 710, the engine or the GPU fails.
        """
        x = np.ascontiguousarray(x, dtype=np.float32)
        logits = np.empty((len(x), self._shapes.logits), np.float32)
        with self._lock:
            if self._cuda is None:
                raise BundleError(710, f"{self.artefact}: is closed")
            with self._cuda.current():
                for start in range(0, len(x), self._largest):
                    part = slice(start, start + self._largest)
                    self._call(self._cuda, x[part], logits[part])
        return logits

    def close(self) -> None:
        """Free the memory, the engine and the stream, in that order."""
        with self._lock:
            cuda, self._cuda = self._cuda, None
            if cuda is None:
                return
            # After a failure of the GPU each of these may fail; the others are tried all the same.
            with contextlib.suppress(BundleError), cuda.current():
                for address, _ in self._buffers.values():
                    with contextlib.suppress(BundleError):
                        cuda.free(address)
                # In this order, as each refers to the next.
                self._execution = None
                self._engine = None
                self._runtime = None
            self._buffers.clear()
            with contextlib.suppress(BundleError):
                cuda.close()

    def __del__(self) -> None:
        """Free the resources if ``close`` was not called, as after a reload."""
        if getattr(self, "_cuda", None) is not None:
            self.close()

    def _open(self, wheel: Any, data: bytes) -> None:
        log = _log_of(wheel)
        try:
            self._runtime = wheel.Runtime(log)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise BundleError(710, f"{self.artefact}: does not load ({log.last})")
            self._largest = self._check(wheel)
            self._execution = self._engine.create_execution_context()
            if self._execution is None:
                raise BundleError(710, f"{self.artefact}: gets no memory ({log.last})")
        except BundleError:
            raise
        except Exception as error:  # the wheel lets exceptions of every kind through
            raise BundleError(
                710, f"{self.artefact}: does not load ({first_line(error)})"
            ) from None

    def _check(self, wheel: Any) -> int:
        """Compare the engine's own description with the manifest; returns the largest batch of one call."""
        engine, shapes = self._engine, self._shapes
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if sorted(names) != sorted((GRAPH_INPUT, GRAPH_OUTPUT)):
            raise BundleError(
                710, f"{self.artefact}: must have {GRAPH_INPUT!r} and {GRAPH_OUTPUT!r} only"
            )
        for name, expected in ((GRAPH_INPUT, shapes.input), (GRAPH_OUTPUT, (shapes.logits,))):
            shape = tuple(engine.get_tensor_shape(name))
            if shape[1:] != expected or shape[0] != -1:
                raise BundleError(
                    710,
                    f"{self.artefact}: {name} must have shape [batch, {', '.join(map(str, expected))}],"
                    f" got {list(shape)}",
                )
            if engine.get_tensor_dtype(name) != wheel.DataType.FLOAT:
                raise BundleError(710, f"{self.artefact}: {name} must be float32")
        profile = engine.get_tensor_profile_shape(GRAPH_INPUT, 0)
        row = 4 * max(int(np.prod(shapes.input)), shapes.logits)
        return max(1, min(int(next(iter(profile[2]))), _MAX_BYTES // row))

    def _call(self, cuda: Context, x: Array, logits: Array) -> None:
        """One call of the engine; ``logits`` is filled in."""
        source = self._buffer(cuda, GRAPH_INPUT, x.nbytes)
        target = self._buffer(cuda, GRAPH_OUTPUT, logits.nbytes)
        execution = self._execution
        try:
            accepted = execution.set_input_shape(GRAPH_INPUT, tuple(x.shape))
            accepted = accepted and execution.set_tensor_address(GRAPH_INPUT, source)
            accepted = accepted and execution.set_tensor_address(GRAPH_OUTPUT, target)
            output_shape = tuple(execution.get_tensor_shape(GRAPH_OUTPUT)) if accepted else None
            if output_shape != logits.shape:
                raise BundleError(
                    710, f"{self.artefact}: refuses a batch of {len(x)}, got {output_shape}"
                )
            cuda.to_device(source, x.ctypes.data, x.nbytes)
            if not execution.execute_async_v3(cuda.stream):
                raise BundleError(710, f"{self.artefact}: fails to run")
            cuda.to_host(logits.ctypes.data, target, logits.nbytes)
            cuda.synchronise()
        except BundleError:
            # Copies that are under way may still use the arrays.
            with contextlib.suppress(BundleError):
                cuda.synchronise()
            raise
        except Exception as error:  # the wheel lets exceptions of every kind through
            with contextlib.suppress(BundleError):
                cuda.synchronise()
            raise BundleError(710, f"{self.artefact}: fails to run ({first_line(error)})") from None

    def _buffer(self, cuda: Context, name: str, size: int) -> int:
        """Memory on the GPU of at least ``size`` bytes, kept for the next call."""
        address, held = self._buffers.get(name, (0, 0))
        if held < size:
            if address:
                del self._buffers[name]
                cuda.free(address)
            address = cuda.allocate(size)
            self._buffers[name] = address, size
        return address


def _log_of(wheel: Any) -> Any:
    """The process's logger of a wheel: it keeps the runtime's first error, which would otherwise be printed.

    The library holds on to the first logger that it gets for as long as the process lives, so that must live as long.
    """
    for module, log in _logs:
        if module is wheel:
            log.last = _NO_REASON
            return log

    class Log(wheel.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            wheel.ILogger.__init__(self)
            self.last = _NO_REASON

        def log(self, severity: Any, message: str) -> None:
            worse = severity in (wheel.ILogger.ERROR, wheel.ILogger.INTERNAL_ERROR)
            # Later errors only repeat the first.
            if worse and self.last == _NO_REASON:
                self.last = " ".join(message.split())[:200]

    _logs.append((wheel, Log()))
    return _logs[-1][1]
