"""A worker whose training ends in NaN: an error in clear, and an update of zeros where noise hides what it tells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import privacy_asked

from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

NOISED = ("local", "central", "central-mf")
#: One step over all examples, which moves no finite weight by a visible distance.
ONE_STEP = '{"learning-rate": 1e-30, "batch-size": 37, "local-steps": 1}'


@pytest.fixture
def overflowing(weights):
    """Weights of a server's choice, with which one record's logits overflow, and no other's."""
    chosen = {name: np.zeros_like(a) for name, a in weights.items()}
    first, *_, last = [name for name in chosen if name.endswith("weight")]
    chosen[first][...] = 1e36
    chosen[last][0], chosen[last][1] = 1, -1
    return chosen


@pytest.fixture
def trained(tell, task, data, ask, overflowing, tmp_path):
    """The reply of a site with or without that record, and what its ledger holds."""

    def reply(mechanism, *, record):
        features = data.train_features.copy()
        if record:
            features[0] = 1000.0
        home = tmp_path / str(record)
        worker = SiteWorker("site-1", task, replace(data, train_features=features), home)
        privacy = None if mechanism == "off" else privacy_asked(mechanism)
        found = tell(
            worker,
            ask(protocol.TRAIN, overflowing, privacy=privacy, rounds=3, train=ONE_STEP),
        )
        entries = Ledger(home / FILE).entries() if (home / FILE).exists() else ()
        return found, [entry.charge for entry in entries]

    return reply


@pytest.mark.parametrize("mechanism", NOISED)
def test_under_noise_that_record_is_told_from_none_by_the_noised_update_alone(
    trained, overflowing, caplog, mechanism
):
    without, paid = trained(mechanism, record=False)
    assert "not finite" not in caplog.text
    with_it, also_paid = trained(mechanism, record=True)
    assert "the trained weights are not finite: no update" in caplog.text
    assert not isinstance(with_it, SiteError), with_it
    assert dict(with_it[protocol.METRICS]) == dict(without[protocol.METRICS])
    assert paid == also_paid and paid
    if mechanism != "local":
        for name, array in with_it[protocol.ARRAYS].items():
            assert np.array_equal(array.numpy(), overflowing[name])


def test_in_clear_the_site_fails(trained):
    without, _ = trained("off", record=False)
    assert not isinstance(without, SiteError)
    found, _ = trained("off", record=True)
    assert isinstance(found, SiteError)
    assert (found.code, "must be finite" in found.message) == (401, True)
