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

from fedge.shared.bundle.onnx_session import run
from fedge.shared.daemon.process import die_with_parent, forbid_core_dumps
from fedge.shared.failpoints import reach

#: Before each frame: the length of its header, in JSON; the header describes what follows.
HEADER: Final = struct.Struct(">I")
#: Where a test may kill: over the graph of that number.
FAIL_POINT: Final = "graph-run"
_MAX_TEXT: Final = 300


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
