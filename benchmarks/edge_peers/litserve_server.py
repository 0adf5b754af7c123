"""LitServe's side: one worker, JSON over HTTP with the tensor's bytes in base64. Runs in LitServe's own environment.

Its queue between the processes is the one that it calls fast; nothing waits for a batch.

python litserve_server.py PORT MODEL.onnx
"""

import base64
import sys
from typing import Any

import litserve
import numpy as np
from session import open_session


class OnnxApi(litserve.LitAPI):
    """``{"shape": [...], "data": base64 of float32}`` to ``{"logits": [[...]]}``."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Open the session, in the worker."""
        self._session: Any = open_session(sys.argv[2])

    # Annotated, FastAPI would take them for models of its own.
    def decode_request(self, request):
        """The tensor."""
        data = base64.b64decode(request["data"])
        return np.frombuffer(data, np.float32).reshape(request["shape"])

    def predict(self, x: Any) -> Any:
        """The logits."""
        return self._session.run(["logits"], {"input": x})[0]

    def encode_response(self, output):
        """As JSON."""
        return {"logits": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        OnnxApi(max_batch_size=1), accelerator="cpu", workers_per_device=1, fast_queue=True
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
