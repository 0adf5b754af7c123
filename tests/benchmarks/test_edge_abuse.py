"""The requests that the server is abused with are what they claim to be, and the same each time."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fedge.edge.serving.codec import Signature, decode
from fedge.shared.errors import FedgeError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def requests():
    name = "edge_abuse_requests"
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def test_the_same_seed_gives_the_same_requests(requests):
    first, again, other = (list(requests.attacks(seed, 200, 1000)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_good_ones_are_good_and_most_others_are_not(requests):
    signature = Signature(requests.NAME, "v", requests.SHAPE, 64, 10, 10, requests.MAX_BATCH)
    refused = dict.fromkeys(requests._CHANGES, 0)
    sent = dict(refused)
    for attack in requests.attacks(0, 2000, 1000):
        try:
            decode(attack.data, signature)
        except FedgeError:
            assert not attack.good
            if attack.kind in refused:
                refused[attack.kind] += 1
        if attack.kind in sent:
            sent[attack.kind] += 1
    assert all(n > 50 for n in sent.values())
    for kind in ("shape", "names", "amounts"):
        assert refused[kind] > sent[kind] / 2
