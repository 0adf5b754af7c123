from functools import partial

import builders
import numpy as np
import pytest
from flwr.app import Array, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from fedge.client import requests
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.wire.tensors import Spec

SPECS = {"w": Spec((2, 3), "float32"), "n": Spec((), "int64")}
GOOD = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(4)}

refused = partial(builders.refused, 414)


def test_arrays_come_in_the_models_order(ask):
    found = requests.arrays(ask("train", dict(reversed(GOOD.items()))).content, SPECS)
    assert list(found) == ["w", "n"]
    assert np.array_equal(found["w"], GOOD["w"])
    assert found["n"] == 4


def test_fortran_order_is_read_right(ask):
    found = requests.arrays(ask("train", GOOD | {"w": np.asfortranarray(GOOD["w"])}).content, SPECS)
    assert np.array_equal(found["w"], GOOD["w"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, "w: shape must be (2, 3)"),
        ({"w": np.zeros((6,), np.float32)}, "w: shape must be (2, 3)"),
        ({"w": np.zeros((2, 3), np.int32)}, "w: type must be float32"),
        ({"w": np.zeros((2, 3), ">f4")}, "w: type must be float32"),
        ({"w": np.zeros((1,), np.float32)}, "w: shape must be"),
        ({"w": np.zeros((2, 3), np.float64)}, "w: type must be"),
        ({"w": np.zeros((2000, 3), np.float32)}, "w: must hold 24 bytes"),
        ({"w": np.full((2, 3), np.nan, np.float32)}, "w: must be finite"),
        ({"w": np.full((2, 3), np.inf, np.float32)}, "w: must be finite"),
        ({"extra": np.zeros(1)}, "got extra"),
    ],
)
def test_other_arrays_are_refused_by_name(ask, change, named):
    assert named in refused(requests.arrays, ask("train", GOOD | change).content, SPECS)


def test_a_missing_array_is_named(ask):
    assert "w: must be among" in refused(
        requests.arrays, ask("train", {"n": GOOD["n"]}).content, SPECS
    )
    assert "arrays" in refused(requests.arrays, ask("train").content, SPECS)


def test_a_header_cannot_make_us_allocate(ask):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    lie = Array("float32", (2, 3), "numpy.ndarray", data)
    assert "w: shape must be" in refused(
        requests.arrays, ask("train", GOOD | {"w": lie}).content, SPECS
    )


@pytest.mark.slow
@given(st.binary(max_size=1200))
def test_any_bytes_are_refused_or_read(data):
    array = Array("float32", (2, 3), "numpy.ndarray", data)
    try:
        requests._decode("w", array, SPECS["w"])
    except SiteError as error:
        assert error.code == 414


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read(position, value):
    data = bytearray(Array(GOOD["w"]).data)
    data[position % len(data)] = value
    try:
        found = requests._decode(
            "w", Array("float32", (2, 3), "numpy.ndarray", bytes(data)), SPECS["w"]
        )
    except SiteError as error:
        assert error.code == 414
    else:
        assert found.shape == (2, 3)
        assert np.isfinite(found).all()


def record(ask, **changes):
    return ask("train", **changes).content[protocol.CONFIG]


def test_terms_are_read(ask):
    terms = requests.terms(record(ask), 2)
    assert terms.address == requests.Address("r-1", 1)
    assert (terms.seed, terms.threads, terms.own_statistics) == (42, 1, False)
    assert terms.standardise is not None
    assert terms.standardise.mean == (1.5, 1.5)


def test_no_statistics_are_needed_where_none_are_used(ask):
    bare = {"feature_mean": None, "feature_std": None}
    assert requests.terms(record(ask, standardise="site", **bare), 2).own_statistics
    assert requests.terms(record(ask, **bare), None).standardise is None


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "../../etc"},
        {"run_id": ""},
        {"run_id": "r" * 65},
        {"run_id": 3},
        {"run_id": None},
        {"server_round": -1},
        {"server_round": 10**9},
        {"server_round": True},
        {"server_round": 1.0},
        {"seed": -1},
        {"seed": None},
        {"threads": 0},
        {"threads": 10**6},
        {"standardise": "mine"},
        {"feature_mean": [1.0]},
        {"feature_mean": None},
        {"feature_mean": "text"},
        {"feature_mean": [1.0, float("nan")]},
        {"feature_std": [1.0, -1.0]},
        {"feature_std": [1.0, float("inf")]},
    ],
)
def test_other_terms_are_refused(ask, change):
    message = refused(requests.terms, record(ask, **change), 2)
    assert next(iter(change)).replace("_", "-") in message


def test_training_is_read(ask):
    what = requests.training(
        record(
            ask, server_round=5, accepted_round=3, control=True, proximal_mu=1, loss_at="received"
        )
    )
    assert (what.accepted_round, what.control, what.proximal_mu) == (3, True, 1.0)
    assert (what.loss_at, what.settings.learning_rate) == ("received", 0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"server_round": 0},
        {"train": "{"},
        {"train": '{"learning-rate": -1}'},
        {"train": '{"learning-rate": NaN}'},
        {"train": '{"unknown": 1}'},
        {"train": '{"local-epochs": 1, "local-steps": 1}'},
        {"train": " " * 20_000},
        {"train": None},
        {"control": 1},
        {"control": True},
        {"control": True, "accepted_round": 1},
        {"accepted_round": -1},
        {"proximal_mu": -1.0},
        {"proximal_mu": True},
        {"proximal_mu": float("nan")},
        {"loss_at": "never"},
    ],
)
def test_other_training_is_refused(ask, change):
    refused(requests.training, record(ask, **change))


def test_another_task_is_refused(ask):
    assert "task: must be digits" in refused(requests.config_of, ask("train").content, "digits")


@given(
    st.dictionaries(
        st.sampled_from(
            [v for k, v in vars(protocol).items() if k.isupper() and isinstance(v, str)]
        ),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(),
            st.text(max_size=30),
            st.booleans(),
            st.binary(max_size=9),
            st.lists(st.floats(), max_size=3),
        ),
    )
)
def test_any_configuration_is_read_or_refused(values):
    config = ConfigRecord(values)
    for call in (requests.address, requests.training, lambda c: requests.terms(c, 2)):
        try:
            call(config)
        except SiteError as error:
            assert error.code == 414
