import pytest

from fedge.shared.bundle.manifest_artefacts import KINDS, ONNX_FP16, ONNX_FP32, RTX_INT8
from fedge.shared.bundle.tolerance import tolerance


def test_a_kinds_tolerance_grows_with_the_logits() -> None:
    assert tolerance(ONNX_FP32, 1.0) == 1e-4
    assert tolerance(ONNX_FP32, 1000.0) == pytest.approx(1e-2)
    assert tolerance(ONNX_FP16, 10.0) == pytest.approx(0.1)
    assert tolerance(RTX_INT8, 10.0) == pytest.approx(2.5)
    assert all(tolerance(kind, 1.0) > 0 for kind in KINDS)
