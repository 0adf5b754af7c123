"""How every contender but ours opens the graph: as our runtime does, on one thread."""

from __future__ import annotations

from typing import Any

import onnxruntime


def open_session(path: str) -> Any:
    """An ONNX Runtime session on the CPU, one thread, every graph optimisation (the default)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
