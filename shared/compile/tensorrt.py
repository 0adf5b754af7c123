"""Engines, built by TensorRT for RTX (ahead of time, without a GPU) or by TensorRT (for the GPU at hand).

Both wheels have the same Python API (NVIDIA TensorRT documentation, "Python API"; read off tensorrt_rtx 1.7.1), so one
module serves both. Networks are strongly typed: an engine computes in the types that its graph has.
``build_in_child`` does the same in a child process, as a builder that crashes takes its process with it.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final

from fedge.shared.compile import gpu_capability
from fedge.shared.compile.tensorrt_process import (
    BATCH,
    Built,
    Listener,
    Sizes,
    around,
    build_in_child,
)
from fedge.shared.errors import ReleaseError

#: Python modules of the runtimes, and how each is installed.
MODULES: Final = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_INSTALL: Final = {
    "tensorrt-rtx": "fedge's extra `tensorrt-rtx` brings it",
    "tensorrt": "fedge's extra `tensorrt` brings it, from its vendor's package index",
}
_RTX: Final = "tensorrt-rtx"
#: Errors of the builder that are kept, and characters of one that a message holds.
_KEPT, _MAX_TEXT = 16, 400

#: A process has one logger, that of its first builder; so one build at a time.
_lock = threading.Lock()
_loggers: dict[str, Any] = {}


def version(runtime: str) -> str | None:
    """Version of an installed runtime; None where its wheel is missing or does not load.

    Raises:
        ValueError: there is no such runtime.
    """
    module = _module(runtime)
    return None if module is None else str(module.__version__)


def build(
    onnx: bytes,
    *,
    runtime: str,
    capabilities: Sequence[int] = (),
    sizes: Mapping[str, Sizes] | None = None,
    timing_cache: bytes | None = None,
    listener: Listener | None = None,
) -> Built:
    """Build an engine in this process.

    Args:
        onnx: the graph.
        runtime: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        capabilities: GPUs that the engine is for. Several of ``tensorrt-rtx`` share one engine; ``tensorrt``
            builds for the GPU at hand, which these must be if they are given.
        sizes: smallest, best and largest size of each open axis by its name; only the batch has a default,
            ``BATCH``. See ``around`` for others.
        timing_cache: of an earlier build by ``tensorrt`` on this device; another is not used.
        listener: called with the phase and the share that is done.

    Raises:
        ReleaseError: 608, the wheel or the GPU is missing, or the runtime does not know a capability; 611, the
            graph cannot be parsed or built, in the builder's own words.
        ValueError: the sizes are not those of the graph's open axes, or out of order.
    """
    module = _module(runtime)
    if module is None:
        raise ReleaseError(608, f"{runtime}: must be installed ({_INSTALL[runtime]})")
    built_for = _capabilities(module, runtime, capabilities)
    with _lock:
        logger = _logger(module)
        try:
            return _build(
                module, logger, onnx, runtime, built_for, sizes or {}, timing_cache, listener
            )
        finally:
            logger.errors.clear()


def _build(
    module: Any,
    logger: Any,
    onnx: bytes,
    runtime: str,
    capabilities: tuple[int, ...],
    sizes: Mapping[str, Sizes],
    timing_cache: bytes | None,
    listener: Listener | None,
) -> Built:
    try:
        builder = module.Builder(logger)
    except Exception as error:  # the bindings raise various types: without a driver a TypeError
        raise _failed(runtime, "cannot start", logger, str(error)) from error
    flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = module.OnnxParser(network, logger)
    if not parser.parse(onnx):
        words = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise _failed(runtime, "cannot parse the graph", logger, words)
    config = builder.create_builder_config()
    if runtime == _RTX:
        config.num_compute_capabilities = len(capabilities)
        for index, number in enumerate(capabilities):
            config.set_compute_capability(getattr(module.ComputeCapability, f"SM{number}"), index)
    profile = builder.create_optimization_profile()
    for name, shapes in _shapes(network, sizes).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    if runtime != _RTX:
        # TensorRT for RTX times nothing at build time. A cache of another GPU or a damaged one becomes empty.
        cache = config.create_timing_cache(timing_cache or b"") or config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    monitor = _monitor(module, listener)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if engine is None:
        raise _failed(runtime, "cannot build the engine", logger, "")
    kept = None if runtime == _RTX else bytes(config.get_timing_cache().serialize())
    return Built(bytes(engine), kept, str(module.__version__), capabilities)


def _module(runtime: str) -> ModuleType | None:
    if runtime not in MODULES:
        raise ValueError(f"runtime: must be of {', '.join(MODULES)}, got {runtime!r:.40}")
    # A wheel with incompatible libraries fails to load in various ways.
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        return importlib.import_module(MODULES[runtime])
    return None


def _capabilities(module: Any, runtime: str, requested: Sequence[int]) -> tuple[int, ...]:
    if runtime == _RTX:
        names = set(dir(module.ComputeCapability))
        unknown = [number for number in requested if f"SM{number}" not in names]
        if unknown or not requested or len(set(requested)) != len(requested):
            allowed = ", ".join(f"sm{n}" for n in range(50, 200) if f"SM{n}" in names)
            listed = "+".join(f"sm{number}" for number in requested) or "none"
            raise ReleaseError(608, f"{runtime}: must be built for GPUs of {allowed}, got {listed}")
        return tuple(sorted(requested))
    if not hasattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        message = f"{runtime}: must be of version 10 or newer, got {module.__version__}"
        raise ReleaseError(608, message)
    present = gpu_capability.capability()
    if present is None:
        raise ReleaseError(608, f"{runtime}: must be built where the GPU is, got no GPU here")
    if requested and tuple(requested) != (present,):
        listed = "+".join(f"sm{number}" for number in requested)
        raise ReleaseError(
            608, f"{runtime}: must be built for the GPU here, sm{present}, got {listed}"
        )
    return (present,)


def _shapes(network: Any, sizes: Mapping[str, Sizes]) -> dict[str, list[tuple[int, ...]]]:
    """Smallest, best and largest shape of each input.

    Raises:
        ValueError: see ``build``.
    """
    all_sizes = {"batch": BATCH, **sizes}
    used = set()
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        axes: list[Sizes] = []
        for axis, size in enumerate(tensor.shape):
            name = tensor.get_dimension_name(axis) if size < 0 else ""
            if size < 0 and name not in all_sizes:
                raise ValueError(f"sizes: must hold the graph's open axis {name!r:.40}")
            low, best, high = all_sizes[name] if size < 0 else (size, size, size)
            if not 1 <= low <= best <= high:
                raise ValueError(f"sizes: must ascend from 1, got {all_sizes[name]} for {name}")
            used.add(name)
            axes.append((low, best, high))
        shapes[tensor.name] = [tuple(axis[level] for axis in axes) for level in range(3)]
    if unknown := set(sizes) - used:
        raise ValueError(f"sizes: must be of the graph's open axes, got {sorted(unknown)}")
    return shapes


def _failed(runtime: str, step: str, logger: Any, words: str) -> ReleaseError:
    """The error 611 with the builder's message, or else its last logged error."""
    text = " ".join((words or next(reversed(logger.errors), "it says no reason")).split())
    return ReleaseError(611, f"{runtime}: {step} ({text[:_MAX_TEXT]})")


def _logger(module: Any) -> Any:
    """The process's logger of a runtime, which keeps errors and prints nothing."""
    name = module.__name__
    if name not in _loggers:

        class Logger(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.errors: collections.deque[str] = collections.deque(maxlen=_KEPT)

            def log(self, severity: Any, message: str) -> None:
                if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)

        _loggers[name] = Logger()
    return _loggers[name]


class Phases:
    """Progress of a build, from its nested phases and their steps."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of a number of steps has begun, within another or by itself."""
        self._open[name] = (parent, max(1, steps), 0)

    def step(self, name: str, index: int) -> float:
        """A step is done; the share of the outermost phase, which never falls."""
        parent, steps, _ = self._open.get(name, (None, index + 1, 0))
        self._open[name] = (parent, steps, min(index + 1, steps))
        share, current = 0.0, name
        for _ in range(len(self._open)):
            parent, steps, done = self._open[current]
            share = min(1.0, (done + share) / steps)
            if parent not in self._open:
                break
            current = parent
        self._share = max(self._share, share)
        return self._share

    def finish(self, name: str) -> None:
        """A phase has ended."""
        self._open.pop(name, None)


def _monitor(module: Any, listener: Listener | None) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Called by the builder's threads; nothing may be raised through it."""

        def __init__(self) -> None:
            super().__init__()
            self.failure: BaseException | None = None
            self._phases = Phases()
            self._mutex = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._mutex:
                self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._mutex:
                share = self._phases.step(phase_name, step)
                if listener is not None and self.failure is None:
                    try:
                        listener(phase_name, share)
                    except BaseException as error:  # raised again once the builder has stopped
                        self.failure = error
                return self.failure is None

        def phase_finish(self, phase_name: str) -> None:
            with self._mutex:
                self._phases.finish(phase_name)

    return Monitor()


__all__ = ["BATCH", "MODULES", "Built", "around", "build", "build_in_child", "version"]
