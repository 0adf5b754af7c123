"""MLServer's side: a custom runtime, as its documentation has it. Runs in MLServer's own environment."""

from __future__ import annotations

from typing import Any

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri
from session import open_session


class OnnxModel(MLModel):
    """Runs the graph of the model's ``uri``."""

    async def load(self) -> bool:
        """Open the session."""
        self._session: Any = open_session(await get_model_uri(self._settings))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Tensor ``input`` to tensor ``logits``."""
        x = NumpyCodec.decode_input(payload.inputs[0])
        (logits,) = self._session.run(["logits"], {"input": x})
        output = NumpyCodec.encode_output("logits", logits)
        return InferenceResponse(model_name=self.name, outputs=[output])
