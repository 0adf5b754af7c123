from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from fedge.edge.runtime.model import EdgeModel
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import BundleError, InputError, one_line

STATUS = grpc.StatusCode
HEALTH = "/grpc.health.v1.Health/Check"


def tensor(x: np.ndarray[Any, Any]) -> Any:
    found = triton.InferInput("input", list(x.shape), "FP32")
    found.set_data_from_numpy(x)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_published_client_infers_and_gets_what_predict_gives(
    client: Any, image_bundle: Path, trust: Path, images_of: Callable[..., Any]
) -> None:
    x = images_of(3)
    answer = client.infer("image", [tensor(x)], request_id="r1", client_timeout=60)
    model = EdgeModel.from_bundle(open_bundle(image_bundle, load_public(trust)))
    expected = model.predict(x)
    np.testing.assert_allclose(
        answer.as_numpy("probabilities"), expected.probabilities, rtol=1e-5, atol=1e-7
    )
    assert answer.as_numpy("label").tolist() == expected.indices.tolist()
    np.testing.assert_allclose(
        answer.as_numpy("logits"), model.logits(model.prepare(x)), rtol=1e-5, atol=1e-6
    )
    found = answer.get_response()
    assert (found.model_name, found.model_version, found.id) == ("image", "b" * 12, "r1")


def test_only_the_outputs_that_are_asked_for_are_sent(
    client: Any, images_of: Callable[..., Any]
) -> None:
    expected = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("logits")]
    answer = client.infer("image", [tensor(images_of(2))], "b" * 12, outputs=expected)
    assert [o.name for o in answer.get_response().outputs] == ["label", "logits"]
    assert answer.as_numpy("label").dtype == np.int64
    assert answer.as_numpy("probabilities") is None


def test_a_table_with_categories_and_a_single_logit(
    running: Callable[..., Any], table_bundle: Path, trust: Path
) -> None:
    server = running(table_bundle)
    x = np.array([[50, 2, 90], [30, 3, 60]], np.float32)
    with triton.InferenceServerClient(server.address) as client:
        answer = client.infer("table", [tensor(x)])
        model = EdgeModel.from_bundle(open_bundle(table_bundle, load_public(trust)))
        expected = model.predict(x)
        np.testing.assert_allclose(
            answer.as_numpy("probabilities"), expected.probabilities, rtol=1e-5
        )
        assert answer.as_numpy("logits").shape == (2, 1)
        metadata = client.get_model_metadata("table")
        assert [list(o.shape) for o in metadata.outputs] == [[-1, 1], [-1, 2], [-1]]
        for value, code in ((4, 806), (np.nan, 804)):
            x[1, 1] = value
            with pytest.raises(InferenceServerException, match=rf"FE-{code} row 1, column 'pain'"):
                client.infer("table", [tensor(x)])


def test_metadata_configuration_and_health(client: Any, image_server: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("image")
    assert client.is_model_ready("image", "b" * 12)
    assert not client.is_model_ready("image", "1")
    assert not client.is_model_ready("other")
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "fedge-edge"
    assert client.get_model_metadata("image", as_json=True) == {
        "name": "image",
        "versions": ["b" * 12],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": ["-1", "2", "3"]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "label", "datatype": "INT64", "shape": ["-1"]},
        ],
    }
    config = client.get_model_config("image").config
    assert config.max_batch_size == 32
    assert [(i.name, list(i.dims)) for i in config.input] == [("input", [2, 3])]
    values = {
        o.name: (list(o.dims), o.HasField("reshape"), list(o.reshape.shape)) for o in config.output
    }
    assert values == {
        "logits": ([3], False, []),
        "probabilities": ([3], False, []),
        "label": ([1], True, []),  # [batch, 1] as dims say, [batch] after the reshape
    }
    assert json.loads(config.parameters["labels"].string_value) == ["x", "y", "z"]
    assert config.parameters["run"].string_value == "r-1"
    assert (config.platform, config.backend) == ("onnx_onnxv1", "onnxruntime")
    assert config.parameters["serves"].string_value == "model.onnx on CPU"
    assert image_server.raw(b"", HEALTH) == b"\x08\x01"
    assert image_server.refused(b"\x0a\x01x", HEALTH)[0] is STATUS.NOT_FOUND
    for name in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        status, text = image_server.refused(b"\x0a\x01x", f"/inference.GRPCInferenceService/{name}")
        assert status is STATUS.NOT_FOUND
        assert text.startswith("FE-810 model: must be 'image', got 'x'")
    image_server.service.ready = False
    assert not client.is_server_ready()
    assert not client.is_model_ready("image")
    assert image_server.raw(b"", HEALTH) == b"\x08\x02"


def test_metadata_names_an_engine_where_one_serves(
    client: Any, image_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the backend that is at work when it is asked for."""
    monkeypatch.setattr(type(image_server.service.served.model), "engine", True)
    assert client.get_model_metadata("image").platform == "tensorrt_plan"
    config = client.get_model_config("image").config
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")


def test_statistics_count_the_requests(client: Any, images_of: Callable[..., Any]) -> None:
    client.infer("image", [tensor(images_of(3))])
    with pytest.raises(InferenceServerException):
        client.infer("image", [tensor(np.full((1, 2, 3), np.nan, np.float32))])
    (model,) = client.get_inference_statistics("image").model_stats
    assert (model.inference_count, model.execution_count) == (3, 1)
    assert model.inference_stats.success.count == 1
    assert model.inference_stats.fail.count == 1
    assert model.inference_stats.compute_infer.ns > 0
    with pytest.raises(InferenceServerException, match="FE-810"):
        client.get_inference_statistics("other")


def test_refusals_are_one_line_with_their_number(
    image_server: Any, request_of: Callable[..., Any], images_of: Callable[..., Any]
) -> None:
    x = images_of(2)
    x[1, 0, 2] = np.inf
    expected = one_line(InputError(804, "row 1, column 2: must be finite, got inf"))
    sent = request_of(x).SerializeToString()
    assert image_server.refused(sent) == (STATUS.INVALID_ARGUMENT, expected)
    for change, expected in (
        ({"model_name": "other"}, STATUS.NOT_FOUND),
        ({"model_version": "2"}, STATUS.NOT_FOUND),
        ({"id": "x" * 300}, STATUS.INVALID_ARGUMENT),
    ):
        status, text = image_server.refused(request_of(images_of(1), **change).SerializeToString())
        assert status is expected
        assert text.startswith("FE-810 ")
    for x, code in ((np.zeros((1, 6), np.float32), 802), (np.zeros((33, 2, 3), np.float32), 805)):
        assert image_server.refused(request_of(x).SerializeToString())[1].startswith(f"FE-{code} ")
    assert image_server.refused(b"\xff\xff")[1].startswith("FE-810 ")
    limit = image_server.service.served.max_bytes
    assert (
        f"FE-805 request: must be at most {limit} bytes"
        in image_server.refused(b"\0" * (limit + 1))[1]
    )
    # What is much too large does not get as far as our own words.
    assert image_server.refused(b"\0" * (limit + 2**20 + 1))[0] is STATUS.RESOURCE_EXHAUSTED
    assert (
        image_server.refused(b"", "/inference.GRPCInferenceService/Nothing")[0]
        is STATUS.UNIMPLEMENTED
    )
    for method in ("ModelMetadata", "ModelConfig", "ModelReady"):
        name = f"/inference.GRPCInferenceService/{method}"
        assert image_server.refused(b"\xff", name)[1].startswith("FE-810 ")
        assert image_server.refused(b"\0" * 5000, name)[1].startswith("FE-805 ")
    image_server.raw(request_of(images_of(1)).SerializeToString())


def test_values_that_overflow_in_preprocessing_are_refused(
    running: Callable[..., Any], bundle_of: Callable[..., Path], request_of: Callable[..., Any]
) -> None:
    from fedge.shared.preprocessing.steps import Reshape, Scale

    server = running(bundle_of(preprocessing=(Scale(1e30), Reshape((1, 2, 3)))))
    sent = request_of(np.full((1, 2, 3), 1e20, np.float32)).SerializeToString()
    assert server.refused(sent)[1].startswith("FE-804 row 0: must stay finite in preprocessing")


def test_a_model_that_gives_nan_is_709(
    running: Callable[..., Any],
    bundle_of: Callable[..., Path],
    graph_of: Callable[..., bytes],
    request_of: Callable[..., Any],
) -> None:
    weights = np.full((6, 3), 3e38)
    server = running(bundle_of(graph_of((1, 2, 3), weights)))
    x = np.zeros((2, 2, 3), np.float32)
    x[1] = 1e3
    expected = BundleError(709, "row 1: must give finite logits, got NaN or infinity")
    assert server.refused(request_of(x).SerializeToString()) == (
        STATUS.OUT_OF_RANGE,
        one_line(expected),
    )


def test_a_defect_is_reported_without_its_text(
    image_server: Any,
    request_of: Callable[..., Any],
    images_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(x: Any) -> Any:
        raise RuntimeError("secret 12345")

    model = image_server.service.served.model
    monkeypatch.setattr(model, "prepare", broken)
    status, text = image_server.refused(request_of(images_of(1)).SerializeToString())
    assert status is STATUS.INTERNAL
    assert text.startswith("FE-104 request: unexpected RuntimeError")
    assert "FE-104" in caplog.text
    assert "12345" not in text + caplog.text
