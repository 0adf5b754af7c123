"""A client of edge_abuse.py: sends what edge_abuse_requests.py makes, several at a time, and reports the outcomes.

python edge_abuse_client.py PORT SEED COUNT LIMIT    prints one JSON object
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections import Counter, deque
from typing import Any, Final

import grpc
import numpy as np
from edge_abuse_requests import INFER, Attack, attacks

#: Requests under way at a time.
WINDOW: Final = 8
#: Requests between two connections of raw bytes.
RAW_EVERY: Final = 500
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def outcome(call: Any) -> str:
    """How a call ended: OK, the number of a refusal, or the status where it has none."""
    try:
        call.result()
    except grpc.FutureCancelledError:
        return "CANCELLED"
    except grpc.RpcError as error:
        details = error.details() or ""
        label = details.partition(" ")[0]
        return label if label.startswith("FE-") else error.code().name
    return "OK"


def raw_bytes(port: int, random: np.random.Generator) -> None:
    """A connection that speaks no gRPC, or begins to, and is cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        if random.random() < 0.7:
            one.sendall(_PREFACE)
        try:
            one.sendall(random.bytes(int(random.integers(1, 5000))))
            if random.random() < 0.5:
                # Closed by a reset instead of a farewell.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            return


def main() -> None:
    """Send all, and print what came back."""
    port, seed, count, limit = map(int, sys.argv[1:])
    random = np.random.default_rng(seed)
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    # Clients may send what the server does not take.
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    waiting: deque[tuple[Attack, Any]] = deque()

    def settle() -> None:
        attack, call = waiting.popleft()
        answer = outcome(call)
        counts[attack.kind, answer] += 1
        if attack.good and answer not in ("OK", "FE-808"):
            wrong.append(answer)

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        calls: dict[str, Any] = {INFER: channel.unary_unary(INFER)}
        for number, attack in enumerate(attacks(seed, count, limit)):
            if attack.method not in calls:
                calls[attack.method] = channel.unary_unary(attack.method)
            call = calls[attack.method].future(attack.data, timeout=attack.timeout)
            if attack.cancel:
                call.cancel()
            waiting.append((attack, call))
            if len(waiting) >= WINDOW:
                settle()
            if number % RAW_EVERY == 0:
                raw_bytes(port, random)
        while waiting:
            settle()
    outcomes = [[kind, answer, number] for (kind, answer), number in sorted(counts.items())]
    json.dump({"outcomes": outcomes, "wrong": wrong[:20]}, sys.stdout)


def doomed() -> None:
    """Send requests until killed: ``edge_abuse_client.py doomed PORT FILE``; a line says that they are under way."""
    with open(sys.argv[3], "rb") as file:  # noqa: PTH123
        data = file.read()
    call = grpc.insecure_channel(f"127.0.0.1:{sys.argv[2]}").unary_unary(INFER)
    waiting = deque(call.future(data) for _ in range(WINDOW))
    os.write(1, b"sent\n")
    while True:
        outcome(waiting.popleft())
        waiting.append(call.future(data))


if __name__ == "__main__":
    doomed() if sys.argv[1] == "doomed" else main()
