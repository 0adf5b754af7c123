import pytest

from fedge.edge.backends.backend import CPU, CUDA, OPENVINO
from fedge.edge.backends.onnx_graph import provider_options


@pytest.mark.parametrize(
    ("place", "options"),
    [
        (CPU, {}),  # the session's own threads hold there
        (CUDA, {"use_tf32": "0"}),
        # It took every core whatever the session said (onnxruntime-openvino 1.24.1).
        (OPENVINO, {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}),
    ],
)
def test_a_provider_keeps_to_fp32_and_to_its_threads(place: str, options: dict[str, str]) -> None:
    assert provider_options(place, 3) == options
