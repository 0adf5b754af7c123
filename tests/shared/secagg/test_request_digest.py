"""The job is the same for sites that are asked for the same, and another for everything else."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.shared.errors import SiteError
from fedge.shared.secagg import request_digest

WEIGHTS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}


def request(config=(), secure=(), weights=None, **replaced):
    content = RecordDict(
        {
            "config": ConfigRecord(
                {
                    "run-id": "run-1",
                    "server-round": 3,
                    "seed": 7,
                    "mean": [1.0, 2.0],
                    **dict(config),
                }
            ),
            "secagg": ConfigRecord({"version": 1, "clipping-bound": 10.0, **dict(secure)}),
            "arrays": ArrayRecord({n: Array(a) for n, a in (weights or WEIGHTS).items()}),
        }
    )
    content.update(replaced)
    return content


def test_what_differs_from_site_to_site_or_try_to_try_is_no_part_of_it():
    first = request_digest.digest("train", request())
    assert len(first) == 32
    assert (
        request_digest.digest("train", request({"accepted-round": 2, "cohort": 9}, {"attempt": 4}))
        == first
    )
    # Neither is the order in which records and keys were written.
    other = request()
    turned = RecordDict(
        {
            "arrays": ArrayRecord({n: other["arrays"][n] for n in ("b", "w")}),
            "secagg": ConfigRecord(dict(reversed(other["secagg"].items()))),
            "config": ConfigRecord(dict(reversed(other["config"].items()))),
        }
    )
    assert request_digest.digest("train", turned) == first


def moved():
    return WEIGHTS | {"w": WEIGHTS["w"] + np.float32(2**-23)}


CHANGED = {
    "kind": ("evaluate", request()),
    "setting": ("train", request({"seed": 8})),
    "another type": ("train", request({"seed": 7.0})),
    "text for a number": ("train", request({"seed": "7"})),
    "bytes for text": ("train", request({"run-id": b"run-1"})),
    "list": ("train", request({"mean": [1.0, 2.5]})),
    "one key more": ("train", request({"proximal-mu": 0.0})),
    "bound": ("train", request(secure={"clipping-bound": 10.5})),
    "key in the other record": ("train", request(secure={"seed": 7})),
    "one weight": ("train", request(weights=moved())),
    "shape": ("train", request(weights=WEIGHTS | {"w": WEIGHTS["w"].reshape(3, 2)})),
    "type": ("train", request(weights=WEIGHTS | {"b": np.zeros(1, np.float64)})),
    "name": ("train", request(weights={"w": WEIGHTS["w"], "c": WEIGHTS["b"]})),
    "one tensor less": ("train", request(weights={"w": WEIGHTS["w"]})),
    "tensors swapped": (
        "train",
        request(weights={"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}),
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_everything_else_is(name):
    kind, content = CHANGED[name]
    assert request_digest.digest(kind, content) != request_digest.digest("train", request())


def test_all_these_differ_from_each_other():
    assert len({request_digest.digest(*asked) for asked in CHANGED.values()}) == len(CHANGED)


def test_requests_without_weights_have_a_job():
    content = RecordDict({"config": ConfigRecord({"run-id": "run-1"})})
    other = RecordDict({"config": ConfigRecord({"run-id": "run-2"})})
    assert request_digest.digest("query.secagg_statistics", content) != request_digest.digest(
        "query.secagg_statistics", other
    )


def test_values_that_are_no_json_are_refused():
    with pytest.raises(SiteError, match="FE-414 config: must hold finite numbers, got NaN"):
        request_digest.digest("train", request({"seed": float("nan")}))
    with pytest.raises(
        SiteError, match="FE-414 request: must hold numbers, text and bytes, got set"
    ):
        request_digest.no_json({1})
    assert request_digest.no_json(b"\x01") == "bytes:01"
