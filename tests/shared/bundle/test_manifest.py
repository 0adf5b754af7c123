from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import Artefact, Engine, Latency, Qualification, Score
from fedge.shared.bundle.manifest_checks import network_shape
from fedge.shared.bundle.manifest_privacy import Privacy
from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import OneHot, Reshape, Scale, Standardise

MANIFEST = Manifest(
    task="heart",
    run="r-1",
    strategy="FedAvg",
    rounds=3,
    sites=("cleveland", "va"),
    created="2026-01-31T12:00:00Z",
    fedge="0.1.0",
    config_sha256="a" * 64,
    model_sha256="b" * 64,
    artefacts=(
        Artefact("model.onnx", "onnx-fp32", "c" * 64, 10, 20),
        Artefact(
            "model.int8.onnx",
            "onnx-int8",
            "d" * 64,
            5,
            20,
            qualification=Qualification(
                True,
                max_abs_difference=0.1,
                tolerance=1.0,
                agreement=0.99,
                peak_rss_mb=60.0,
                latency=Latency(0.05, 0.1, 1, 1, "cpu"),
                score=Score("accuracy", 0.89, 0.9, 400),
            ),
        ),
        Artefact(
            "model.fp16.engine",
            "tensorrt-rtx-fp16",
            "e" * 64,
            5,
            20,
            Engine("tensorrt-rtx", "1.7.1.116", (86, 89)),
            Qualification(False, "no GPU here"),
        ),
    ),
    input=InputSchema(
        shape=(3,),
        features=(
            Feature("age", low=0, high=100, unit="years"),
            Feature("pain", low=1, high=3, categories=(1, 2, 3)),
            Feature("pulse", low=30, high=220, unit="1/min"),
        ),
    ),
    output=OutputSchema(labels=("no", "yes"), activation="sigmoid"),
    preprocessing=(
        OneHot(((1, (1, 2, 3)),)),
        Standardise((50.0, 90.0, 0.3, 0.2), (10.0, 20.0, 0.5, 0.4)),
    ),
    metrics={"pooled": {"accuracy": 0.9}, "site_mean": {"accuracy": 0.8}},
    parity=Parity(1e-7, 1e-4, (1, 2)),
    latency=Latency(0.1, 0.2, 1, 1, "cpu"),
    serial=7,
    builders={"torch": "2.13.0+cpu"},
)
VALUE: dict[str, Any] = json.loads(MANIFEST.to_bytes())


def _read(value: Any) -> Manifest:
    return Manifest.from_bytes(canonical_json(value))


def test_what_is_written_is_read() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert Manifest.from_bytes(MANIFEST.to_bytes()).to_bytes() != b""
    assert _read({**VALUE, "latency": None}).latency is None
    earlier = _read({key: v for key, v in VALUE.items() if key not in ("serial", "builders")})
    assert (earlier.serial, earlier.builders) == (0, {})
    assert not {"serial", "builders"} & earlier.to_json().keys()
    assert network_shape(MANIFEST.input, MANIFEST.preprocessing) == (4,)


CENTRAL = Privacy(
    "central",
    1.0,
    0.5,
    {"va": "d" * 64},
    unit="site",
    sampling_rate=0.25,
    metrics="noised",
    metrics_noise_multiplier=10.0,
    statistics="unprotected",
)
#: As an earlier version wrote it.
BARE = {"mechanism": "example", "noise_multiplier": 1.0, "clipping_bound": 1.0, "ledgers": {}}


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        (
            CENTRAL,
            "central, unit site, noise multiplier 1, clipping bound 0.5, sampling rate 0.25;"
            " metrics noised with noise multiplier 10, statistics unprotected",
        ),
        (
            Privacy("example", 1, 1, {}, unit="example", metrics="unprotected", statistics="off"),
            "example, noise multiplier 1, clipping bound 1; metrics unprotected",
        ),
        (
            Privacy("example", None, 1, {}, 3.0, 1e-5, unit="example", metrics="off"),
            "example, epsilon 3 at delta 1e-05 for training, clipping bound 1; metrics off",
        ),
        (
            Privacy(
                "example",
                None,
                1,
                {},
                3.0,
                1e-5,
                unit="example",
                metrics="noised",
                metrics_noise_multiplier=20.0,
            ),
            "example, epsilon 3 at delta 1e-05 for training and metrics, clipping bound 1;"
            " metrics noised with noise multiplier 20",
        ),
        (
            Privacy("central-mf", 2, 1, {}, unit="site", min_separation=4, metrics="off"),
            "central-mf, unit site, noise multiplier 2, clipping bound 1, min separation 4; metrics off",
        ),
        (
            Privacy("distributed", 2, 1, {}, unit="site", corrupt_sites=0, metrics="off"),
            "distributed, unit site, noise multiplier 2, clipping bound 1, corrupt sites 0; metrics off",
        ),
    ],
)
def test_the_record_of_privacy_is_read_again_and_shown(privacy: Privacy, words: str) -> None:
    read = _read({**VALUE, "privacy": privacy.to_json()}).privacy
    assert read == privacy
    assert read.words() == words


def test_a_manifest_of_before_the_details_of_privacy_is_read_as_it_is() -> None:
    manifest = _read({**VALUE, "privacy": BARE})
    assert manifest.privacy == Privacy("example", 1.0, 1.0, {})
    assert json.loads(manifest.to_bytes())["privacy"] == BARE
    assert manifest.privacy.words().endswith("; metrics not told")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"surprise": 1}, "privacy"),
        ({"unit": "person"}, "unit must be one of example, site"),
        ({"unit": None}, "privacy"),
        ({"unit": ["site"]}, "unit must be"),
        ({"metrics": "exact"}, "metrics must be one of"),
        ({"metrics": "noised"}, "metrics_noise_multiplier must be there"),
        (
            {"metrics": "off", "metrics_noise_multiplier": 1.0},
            "metrics_noise_multiplier must be there",
        ),
        ({"metrics": "noised", "metrics_noise_multiplier": 0.0}, "must be above 0"),
        ({"metrics": "noised", "metrics_noise_multiplier": "1"}, "privacy"),
        ({"statistics": "noised"}, "statistics must be one of"),
        ({"sampling_rate": 0.5}, "sampling_rate must be of central only, got 'example'"),
        ({"mechanism": "central", "sampling_rate": 0.0}, "sampling_rate must be above 0"),
        ({"mechanism": "central", "sampling_rate": 1.5}, "sampling_rate must be above 0"),
        ({"mechanism": "central-mf", "min_separation": 0}, "min_separation must be a whole number"),
        (
            {"mechanism": "central-mf", "min_separation": 2.0},
            "min_separation must be a whole number",
        ),
        ({"mechanism": "distributed", "corrupt_sites": -1}, "corrupt_sites must be a whole number"),
        ({"epsilon": 3.0, "delta": 1e-5}, "must hold noise_multiplier, or epsilon and delta"),
    ],
)
def test_an_invalid_record_of_privacy_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError) as error:
        _read({**VALUE, "privacy": {**BARE, **changes}})
    assert error.value.code == 706
    assert named in error.value.message


def test_a_model_may_leave_the_statistics_to_each_site() -> None:
    value = copy.deepcopy(VALUE)
    value["preprocessing"][1].update(mean=[], std=[])
    assert _read(value).site_statistics
    assert not MANIFEST.site_statistics


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *way, key, new = path

    def change(value: Any) -> None:
        for step in way:
            value = value[step]
        value[key] = new

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("format", "fedge.manifest/2"), "format"),
        (_set("surprise", 1), "surprise"),
        (_set("rounds", -1), "rounds"),
        (_set("rounds", "3"), "whole number"),
        (_set("rounds", True), "whole number"),
        (_set("created", "yesterday"), "created"),
        (_set("model_sha256", "B" * 64), "model_sha256"),
        (_set("task", "\x1b[31m"), "printable"),
        (_set("task", 3), "task"),
        (_set("sites", "ab"), "sites"),
        (_set("artefacts", []), "artefacts"),
        (_set("artefacts", 0, "name", "../model.onnx"), "plain file name"),
        (_set("artefacts", 0, "name", "manifest.json"), "plain file name"),
        (_set("artefacts", 0, "bytes", -1), "bytes"),
        (_set("artefacts", 0, "bytes", 2**60), "bytes"),
        (_set("artefacts", 0, "bytes", 1.0), "whole number"),
        (_set("artefacts", 0, "kind", "pickle"), "kind"),
        (_set("artefacts", 0, "opset", 0), "opset"),
        (_set("artefacts", 0, "sha256", "../../x"), "sha256"),
        (_set("artefacts", 0, "kind", "onnx-fp16"), "one of kind 'onnx-fp32'"),
        (_set("artefacts", 1, "kind", "onnx-fp32"), "one of kind 'onnx-fp32'"),
        (_set("artefacts", 1, "engine", {}), "does not parse"),
        (_set("artefacts", 1, "kind", "tensorrt-rtx-int8"), "engine must be of an engine"),
        (_set("artefacts", 1, "qualification", "executed", 1), "true or false"),
        (_set("artefacts", 1, "qualification", "executed", False), "reason"),
        (_set("artefacts", 1, "qualification", "agreement", 1.5), "agreement"),
        (_set("artefacts", 1, "qualification", "tolerance", True), "artefacts"),
        (_set("artefacts", 1, "qualification", "score", "surprise", 1), "artefacts"),
        (_set("artefacts", 2, "qualification", "executed", True), "reason"),
        (_set("artefacts", 2, "qualification", "reason", ""), "reason"),
        (_set("artefacts", 2, "engine", "runtime", "tensorrt"), "runtime"),
        (_set("artefacts", 2, "engine", "version", "latest"), "version"),
        (_set("artefacts", 2, "engine", "capabilities", [89, 86]), "ascending"),
        (_set("input", "shape", [-3]), "input"),
        (_set("input", "shape", []), "input"),
        (_set("input", "shape", [2**20, 2**20]), "input"),
        (_set("input", "shape", [1] * 9), "input"),
        (_set("input", "shape", ["3"]), "whole number"),
        (_set("input", "dtype", "object"), "dtype"),
        (_set("input", "features", 0, "name", "pain"), "different features"),
        (_set("output", "activation", "exec"), "output"),
        (_set("output", "labels", ["one"]), "labels"),
        (_set("output", "labels", ["a", "a"]), "labels"),
        (_set("output", "labels", ["a", "b", "c"]), "sigmoid"),
        (_set("output", "threshold", 0), "threshold"),
        (_set("preprocessing", 0, "op", "eval"), "eval"),
        (_set("preprocessing", 0, "columns", [[7, [1, 2]]]), "columns"),
        (_set("preprocessing", 0, "columns", [[1, []]]), "categories"),
        (_set("preprocessing", 1, "mean", [1.0]), "columns"),
        (_set("preprocessing", 1, "std", [1, 1, 1, -1]), "negative"),
        (_set("preprocessing", 1, {"op": "reshape", "shape": [-1, 4]}), "shape"),
        (_set("preprocessing", 1, {"op": "reshape", "shape": [3]}), "cannot make"),
        (_set("preprocessing", 1, {"op": "reshape", "shape": [2**900] * 9}), "shape"),
        (_set("preprocessing", 1, {"op": "scale", "factor": "nan"}), "preprocessing"),
        (_set("parity", "batch_sizes", [0]), "parity"),
        (_set("metrics", "secret", {}), "metrics"),
        (_set("latency", {}), "does not parse"),
        (_set("parity", None), "does not parse"),
        (_set("sites", [[[[[[[[[[1]]]]]]]]]]), "deeply"),
        (_set("rounds", 10**400), "range"),
    ],
)
def test_what_no_device_could_run_is_refused(
    change: Callable[[dict[str, Any]], None], named: str
) -> None:
    value = copy.deepcopy(VALUE)
    change(value)
    with pytest.raises(BundleError) as error:
        _read(value)
    assert error.value.code == 706
    assert named in error.value.message
    assert error.value.message.startswith("manifest")


def test_steps_are_followed_through_shapes() -> None:
    image = InputSchema(shape=(8, 8))
    assert network_shape(image, (Scale(1 / 16), Reshape((1, 8, 8)))) == (1, 8, 8)
    with pytest.raises(BundleError, match="standardise needs columns"):
        network_shape(image, (Standardise((0.0,), (1.0,)),))
    with pytest.raises(BundleError, match="one-hot needs columns"):
        network_shape(image, (OneHot(((0, (1.0,)),)),))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def _paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [before] if before else []
    match value:
        case dict():
            return found + [path for key in value for path in _paths(value[key], (*before, key))]
        case list():
            return found + [path for i, x in enumerate(value) for path in _paths(x, (*before, i))]
    return found


PRIVATE: dict[str, Any] = {**VALUE, "privacy": CENTRAL.to_json()}


@pytest.mark.slow
@settings(max_examples=400)
@given(st.sampled_from(_paths(PRIVATE)), _JSON)
def test_any_value_anywhere_is_read_or_refused(path: tuple[Any, ...], new: Any) -> None:
    value = copy.deepcopy(PRIVATE)
    _set(*path, new)(value)
    try:
        manifest = _read(value)
    except BundleError as error:
        assert error.code == 706
    else:
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_bytes(data)


def test_a_qualification_comes_back_and_one_of_an_earlier_fedge_keeps_its_bytes():
    latency = Latency(1.0, 2.0, 32, 1, "a CPU")
    loss = Score("loss", 0.5, 0.4, 400, higher_is_better=False, share=False)
    full = Qualification(
        True, max_abs_difference=0.1, tolerance=1.0, batched=latency, relative_p50=0.5,
        batched_relative_p50=0.75, score=loss,
    )  # fmt: skip
    assert Qualification.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert (loss.lost, loss.allowed(0.01)) == (pytest.approx(0.1), pytest.approx(0.004))
    old = {"metric": "accuracy", "value": 0.89, "reference": 0.9, "num_examples": 400}
    before = {"executed": True, "reason": "", "score": old}
    again = Qualification.from_json(before)
    assert again.to_json() == before
    assert (again.score.lost, again.score.allowed(0.01)) == (pytest.approx(0.01), 0.01)
