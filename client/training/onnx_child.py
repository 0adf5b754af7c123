"""Runs graphs over examples in a process of its own: ``python -P -m fedge.client.training.onnx_child``.

A graph that crashes its runtime takes this process with it, and not the worker. Its input comes from the
worker by standard input, and its output leaves by standard output: no example is written to a disk. Each graph's
frame is written when it is done, so that the worker knows over which one the process died.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.daemon.process import die_with_parent, forbid_core_dumps
from fedge.shared.failpoints import reach

#: Before each frame: the length of its header, in JSON; the header describes what follows.
HEADER: Final = struct.Struct(">I")
#: Where a test may kill: over the graph of that number.
FAIL_POINT: Final = "graph-run"
_MAX_TEXT: Final = 300


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


def main(source: BinaryIO, out: BinaryIO) -> None:
    """Read a request frame, run the graphs in it, and write a frame with the result of each."""
    (size,) = HEADER.unpack(source.read(HEADER.size))
    request = json.loads(source.read(size))
    graphs = [source.read(length) for length in request["graphs"]]
    x = np.frombuffer(source.read(), request["dtype"]).reshape(request["shape"])
    options = {key: request[key] for key in ("batch", "optimised", "threads")}
    for number, onnx in enumerate(graphs, start=1):
        body = b""
        # Without a handler, so that the signal ends this process wherever the runtime is.
        signal.setitimer(signal.ITIMER_REAL, request["deadline"])
        try:
            reach(FAIL_POINT, number)
            output = run(onnx, x, **options)
            header: dict[str, Any] = {"shape": list(output.shape)}
            body = np.ascontiguousarray(output).tobytes()
        except Exception as error:  # onnxruntime's exceptions share no base class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            header = {"error": lines[0][:_MAX_TEXT]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        head = json.dumps(header).encode()
        out.write(HEADER.pack(len(head)) + head + body)
        out.flush()


if __name__ == "__main__":
    forbid_core_dumps()
    die_with_parent(signal.SIGKILL)
    # Output that the runtime prints must not mix with the frames.
    real = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(sys.stdin.buffer, real)
