"""The least that gRPC costs: takes the request's bytes and sends as many as a response has.

python echo.py PORT ANSWER_FILE
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

#: More than there are clients, so that none waits for a thread.
WORKERS = 8


def main() -> None:
    """Serve on loopback until killed."""
    port, answer = int(sys.argv[1]), Path(sys.argv[2]).read_bytes()
    handler = grpc.unary_unary_rpc_method_handler(lambda *_: answer)
    server = grpc.server(ThreadPoolExecutor(WORKERS))
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "inference.GRPCInferenceService", {"ModelInfer": handler}
            )
        ]
    )
    if server.add_insecure_port(f"127.0.0.1:{port}") != port:
        raise SystemExit(f"port: must be free, got {port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
