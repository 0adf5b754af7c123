"""A site under differential privacy: charged before anything is made, the same again for nothing, and a hard stop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from builders import refused
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedge.client import requests
from fedge.client.privacy.charging import FOLDER, ChargedReplies, ReleaseRequest
from fedge.client.requests import Address
from fedge.client.settings import privacy_policy
from fedge.client.settings.disclosure import disclosed
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages

RELEASE = Release(1.0, 1.0, 1)
ONCE = epsilon([RELEASE], 1e-5)


def request(server_round=1, run_id="r-1", value=0.0):
    config = {protocol.RUN_ID: run_id, protocol.SERVER_ROUND: server_round, protocol.TASK: "t"}
    arrays = ArrayRecord({"w": Array(np.full(3, value, np.float32))})
    return RecordDict({protocol.CONFIG: ConfigRecord(config), protocol.ARRAYS: arrays})


def asked(server_round=1, run_id="r-1", value=0.0):
    content = request(server_round, run_id, value)
    return ReleaseRequest.of(protocol.TRAIN, content, Address(run_id, server_round), 1e-5)


class Site:
    def __init__(self, home, **policy):
        self.home, self.policy, self.made = home, PrivacyPolicy(**policy), 0
        self.privacy = ChargedReplies(home, lambda: self.policy)

    def answer(self, what, release=RELEASE):
        def make(spent):
            self.made += 1
            metrics = MetricRecord({"epsilon": spent.consumers, "made": self.made})
            return RecordDict({protocol.METRICS: metrics})

        reply = self.privacy.answer(what, "example", "example", release, make)
        return dict(reply[protocol.METRICS])

    def charges(self):
        return Ledger(self.home / FILE).entries()


def test_an_answer_is_charged_and_the_same_again_costs_nothing(tmp_path):
    site = Site(tmp_path)
    first = site.answer(asked())
    assert first == {"epsilon": pytest.approx(ONCE), "made": 1}
    assert site.answer(asked()) == first
    # Nor does it in another process.
    again = Site(tmp_path)
    assert again.answer(asked()) == first
    assert again.made == 0
    (charge,) = site.charges()
    assert (charge.charge.study, charge.charge.unit, charge.charge.run_id) == (
        "default",
        "example",
        "r-1",
    )
    assert charge.charge.digest == asked().digest.hex()


def test_what_is_told_is_at_the_run_s_delta_and_the_budget_counts_at_the_policy_s(tmp_path):
    """A run asked to cost at most so much at one delta is not shown at another."""
    site = Site(tmp_path, delta=1e-4)
    what = replace(asked(), delta=1e-6)
    spent = site.privacy.charge(what, "example", "example", RELEASE)
    at_run, at_policy = (epsilon([RELEASE], delta) for delta in (1e-6, 1e-4))
    assert (spent.consumers, spent.delta) == (pytest.approx(at_run), 1e-6)
    assert site.privacy.told(spent)[protocol.EPSILON_DELTA] == 1e-6
    (entry,) = site.charges()
    assert (entry.charge.delta, entry.epsilon_delta) == (1e-6, 1e-4)
    assert entry.epsilon_consumers == pytest.approx(at_policy)
    assert at_policy < at_run


@pytest.mark.parametrize(
    "other", [asked(2), asked(run_id="r-2"), asked(value=1.0)], ids=["round", "run", "weights"]
)
def test_any_other_request_is_a_charge_of_its_own(tmp_path, other):
    site = Site(tmp_path)
    site.answer(asked())
    assert site.answer(other)["epsilon"] == pytest.approx(epsilon([RELEASE] * 2, 1e-5))
    assert len(site.charges()) == 2


def test_the_budget_stops_before_the_noise_is_made_and_also_in_the_next_process(tmp_path):
    site = Site(tmp_path, epsilon=ONCE * 1.01)
    first = site.answer(asked())
    for here in (site, Site(tmp_path, epsilon=ONCE * 1.01)):
        text = refused(427, here.answer, asked(2))
        assert "epsilon against the server must be at most" in text
        assert here.made == (1 if here is site else 0)
        # What was paid for is still sent.
        assert here.answer(asked()) == first
    assert len(site.charges()) == 1
    # Another run, another name of a study at the server: it is the site's own budget.
    refused(427, site.answer, asked(1, "r-2"))


def test_a_failure_after_the_charge_leaves_it_and_new_noise_is_charged_again(tmp_path):
    site = Site(tmp_path)

    def fail(spent):
        raise SiteError(401, "weights: must be finite, got NaN")

    refused(401, site.privacy.answer, asked(), "example", "example", RELEASE, fail)
    assert len(site.charges()) == 1
    site.answer(asked())
    assert len(site.charges()) == 2


def test_a_damaged_reply_is_made_anew_and_charged(tmp_path):
    site = Site(tmp_path)
    site.answer(asked())
    path = tmp_path / FOLDER / "last-reply"
    path.write_bytes(path.read_bytes()[:60])
    assert site.answer(asked())["made"] == 2
    assert len(site.charges()) == 2


def test_a_ledger_that_is_gone_stops_everything(tmp_path):
    site = Site(tmp_path)
    site.answer(asked())
    for path in tmp_path.glob(f"{FILE}*"):
        if not path.name.endswith(".made"):
            path.unlink()
    refused(428, site.answer, asked(2))
    assert site.made == 1


def test_a_study_s_budget_is_by_the_policy_of_the_moment(tmp_path):
    site = Site(tmp_path, epsilon=ONCE * 1.01)
    site.answer(asked())
    refused(427, site.answer, asked(2))
    site.policy = PrivacyPolicy(study="other data", epsilon=ONCE * 1.01)
    assert site.answer(asked(2))["epsilon"] == pytest.approx(ONCE)


# The policy


def config(privacy=None, **values):
    given = {} if privacy is None else {protocol.PRIVACY: privacy}
    return ConfigRecord({**given, **values})


EXAMPLE = '{"mechanism": "example", "noise-multiplier": 1.0}'


@pytest.mark.parametrize(
    ("kind", "told", "says"),
    [
        (protocol.TRAIN, config(), "train: must be under differential privacy"),
        (
            protocol.EVALUATE,
            config(EXAMPLE[:-1] + ', "metrics": "unprotected"}'),
            "evaluate: must be left out while privacy.share-metrics",
        ),
        (protocol.REGISTER, config(standardise="site"), "query.register: must be under"),
        (messages.STATISTICS, config(), "query.secagg_statistics: must be under"),
        (
            protocol.REGISTER,
            config(EXAMPLE[:-1] + ', "statistics": "unprotected"}', standardise="federated"),
            "privacy.statistics: must be off while privacy.share-statistics",
        ),
        # What it says of itself changes nothing.
        (
            messages.STATISTICS,
            config(EXAMPLE),
            "privacy.statistics: must be off while privacy.share-statistics is false, and no sums",
        ),
        (
            messages.STATISTICS,
            config(EXAMPLE[:-1] + ', "statistics": "unprotected"}'),
            "privacy.statistics: must be off while privacy.share-statistics",
        ),
        (
            protocol.TRAIN,
            config(EXAMPLE.replace("example", "central")),
            "privacy.mechanism: must be of the site's own while privacy.trust-server",
        ),
    ],
)
def test_a_site_that_requires_privacy_serves_nothing_without(kind, told, says):
    text = refused(418, allow, PrivacyPolicy(required=True), kind, told)
    assert text.startswith(says)
    allow(PrivacyPolicy(), kind, told)


def allow(policy, kind, told):
    section = requests.section_of(told)
    masked = kind == messages.STATISTICS
    standardise = told.get(protocol.STANDARDISE) == "federated"
    given = disclosed(kind, section, masked=masked, standardise=standardise)
    privacy_policy.allow(policy, kind, section, given or {})


def test_what_is_under_privacy_is_served():
    policy = PrivacyPolicy(**{"required": True, "share-metrics": True})
    allow(policy, protocol.TRAIN, config(EXAMPLE))
    allow(policy, protocol.EVALUATE, config(EXAMPLE))
    # Digits learn no mean: whether sums would leave is for the worker to see.
    allow(policy, protocol.REGISTER, config(EXAMPLE, standardise="federated"))
    central = config(EXAMPLE.replace("example", "central"))
    trusting = PrivacyPolicy(**{"required": True, "trust-server": True})
    allow(trusting, protocol.TRAIN, central)


def test_the_site_says_how_many_may_collude():
    section = EXAMPLE.replace("example", "distributed")[:-1] + ', "corrupt-sites": %d}'
    policy = PrivacyPolicy(**{"required": True, "corrupt-sites": 2})
    text = refused(418, allow, policy, protocol.TRAIN, config(section % 1))
    assert text.startswith("privacy.corrupt-sites: must be at least 2")
    allow(policy, protocol.TRAIN, config(section % 2))


@pytest.mark.parametrize(
    "told",
    [
        config("{}}"),
        config('{"mechanism": "example"}'),
        config('{"mechanism": "example", "noise-multiplier": 0}'),
        config('{"noise-multiplier": 1.0}'),
        config('{"mechanism": "magic", "noise-multiplier": 1.0}'),
        config("x" * 10_001),
        ConfigRecord({protocol.PRIVACY: 3}),
    ],
)
def test_a_section_that_cannot_be_read_is_refused(told):
    assert refused(414, requests.section_of, told).startswith("privacy")


@pytest.mark.parametrize(
    "bad", [{"study": "a\nb"}, {"study": ""}, {"epsilon": -1.0}, {"delta": 0.0}, {"delta": 1e-11}]
)
def test_a_policy_has_bounds(bad):
    with pytest.raises(ValueError, match="validation error"):
        PrivacyPolicy(**bad)
