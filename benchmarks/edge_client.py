"""One client of edge.py, a process of its own: sends the same request again and again, and times each answer.

    python edge_client.py PROTOCOL PORT FOLDER SECONDS

PROTOCOL is ``kserve`` (gRPC, bytes made beforehand), ``litserve`` (HTTP on one kept connection, bytes made beforehand)
or ``inprocess`` (no server: ONNX Runtime right here). FOLDER holds what edge_model.py wrote. Checks the first answer
against the expected logits, warms up, prints ``ready``, waits for a line, sends for SECONDS, prints one JSON object.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edge_process
import numpy as np

METHOD = "/inference.GRPCInferenceService/ModelInfer"
#: Seconds: of one request at the most, until the server has loaded, and of warming up.
REQUEST_WITHIN, READY_WITHIN, WARM_UP = 10.0, 60.0, 1.0
#: Another order of the same float32 additions may differ by this much, not more.
TOLERANCE = 1e-4

Call = Callable[[], Any]
Read = Callable[[Any], Any]


def kserve(port: int, folder: Path) -> tuple[Call, Read]:
    """One request over gRPC, and how to read the logits of its answer."""
    import grpc

    request = (folder / "request.bin").read_bytes()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    infer = channel.unary_unary(METHOD)

    def call() -> Any:
        return infer(request, timeout=REQUEST_WITHIN)

    return call, kserve_logits


def kserve_logits(answer: bytes) -> Any:
    """The logits of a ModelInferResponse."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(answer)
    names = [output.name for output in response.outputs]
    at = names.index("logits")
    if response.raw_output_contents:
        return np.frombuffer(response.raw_output_contents[at], np.float32)
    return np.asarray(response.outputs[at].contents.fp32_contents, np.float32)


def litserve(port: int, folder: Path) -> tuple[Call, Read]:
    """One request over HTTP, and how to read the logits of its answer."""
    body = (folder / "request.json").read_bytes()
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_WITHIN)

    def call() -> Any:
        try:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            answer = response.read()
        except BaseException:
            connection.close()
            raise
        if response.status != 200:
            raise OSError(f"status {response.status}: {answer[:200]!r}")
        return answer

    return call, lambda answer: np.asarray(json.loads(answer)["logits"], np.float32)


def inprocess(_: int, folder: Path) -> tuple[Call, Read]:
    """One run of the bare session."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "edge_peers"))
    from session import open_session

    session = open_session(str(folder / "model.onnx"))
    x = np.load(folder / "input.npy")
    return lambda: session.run(["logits"], {"input": x}), lambda answer: answer[0]


PROTOCOLS = {"kserve": kserve, "litserve": litserve, "inprocess": inprocess}


def first_answer(call: Call) -> Any:
    """Ask until the server has loaded its model.

    Raises:
        TimeoutError: it does not within ``READY_WITHIN`` seconds.
    """
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            return call()
        except Exception as error:  # grpc, http.client and sockets share no base class
            if time.monotonic() > deadline:
                text = " ".join(str(error).split())[:500]
                raise TimeoutError(
                    f"server: must answer in {READY_WITHIN:g} s, got {text}"
                ) from None
        time.sleep(0.1)


def check(logits: Any, folder: Path) -> None:
    """End the process where the logits are not those that are expected."""
    logits, expected = logits.ravel(), np.load(folder / "logits.npy").ravel()
    if logits.shape != expected.shape or not np.allclose(logits, expected, rtol=0, atol=TOLERANCE):
        raise SystemExit(f"logits: must be {expected[:3]}..., got {logits[:3]}...")


def send(call: Call, seconds: float) -> tuple[list[float], float]:
    """Call one after the other for a time; the seconds of each call, and of all."""
    taken: list[float] = []
    clock = time.perf_counter
    begun = now = clock()
    end = begun + seconds
    while now < end:
        call()
        after = clock()
        taken.append(after - now)
        now = after
    return taken, now - begun


def main() -> None:
    """Run one client."""
    protocol, port, folder, seconds = sys.argv[1:]
    call, read = PROTOCOLS[protocol](int(port), Path(folder))
    check(read(first_answer(call)), Path(folder))
    send(call, WARM_UP)
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    taken, elapsed = send(call, float(seconds))
    cpu = time.process_time() - before
    print(
        json.dumps(
            {
                "ms": [round(1e3 * s, 4) for s in taken],
                "seconds": elapsed,
                "cpu_s": cpu,
                "peak_rss_mib": edge_process.peak_rss(os.getpid()),
            }
        )
    )


if __name__ == "__main__":
    main()
