"""Loads ONNX Runtime, with its telemetry off, and runs a graph over examples."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime with its telemetry off.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # Read once, while the library loads: otherwise it keeps a device's number and a queue of events
    # in the user's cache folder, and reports to its maker. A later call only stops part of it.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime  # slow to load, and `fedge-edge verify` works without it

    module: ModuleType = onnxruntime
    return module


def run(
    onnx: bytes, x: NDArray[Any], *, batch: int, optimised: bool, threads: int
) -> NDArray[np.float32]:
    """The graph's only output, joined along its first axis.

    Args:
        onnx: the graph, with one input.
        x: ``(n, ...)``, ``n`` 1 or more.
        batch: examples at a time.
        optimised: whether the runtime may optimise the graph.
        threads: number of threads of the runtime.
    """
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    # Beyond these lie changes of layout, which have crashed on half-precision graphs (1.31.1).
    options.graph_optimization_level = (
        levels.ORT_ENABLE_EXTENDED if optimised else levels.ORT_DISABLE_ALL
    )
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    (graph_input,), (output,) = session.get_inputs(), session.get_outputs()
    parts = [
        np.asarray(
            session.run([output.name], {graph_input.name: x[at : at + batch]})[0], np.float32
        )
        for at in range(0, len(x), batch)
    ]
    return np.concatenate(parts)
