"""The table of what leaves a site, held against real workers, and every policy against the table: the whole product."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedge.client.secagg import participant
from fedge.client.secagg.input_vector import InputVector
from fedge.client.settings import policy as policies
from fedge.client.settings.disclosure import ABOUT_DATA, Disclosure, disclosed
from fedge.client.settings.policy import Policy, SecurePolicy
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.config.privacy import CENTRAL, PrivacySection
from fedge.shared.errors import SiteError
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages, transcript
from fedge.simulations import consortium

MECHANISMS = ("off", "example", "distributed", "central", "central-mf", "local")
BUNDLE = "ab" * 32
TRAIN, EXAMPLES, HELD_OUT = '{"learning-rate": 0.1, "batch-size": 37, "local-steps": 1}', 37, 13


def sections() -> Iterator[PrivacySection]:
    """Every mechanism with all that decides what leaves."""
    for mechanism, metrics, statistics in itertools.product(
        MECHANISMS, ("off", "noised", "unprotected"), ("off", "unprotected")
    ):
        if (mechanism, metrics) == ("off", "noised"):
            continue
        noise = {} if mechanism == "off" else {"noise-multiplier": 1.0}
        of_counts = {"metrics-noise-multiplier": 1.0} if metrics == "noised" else {}
        values = {"mechanism": mechanism, "metrics": metrics, "statistics": statistics}
        yield PrivacySection.model_validate(values | noise | of_counts)


def named(section: PrivacySection) -> str:
    return f"{section.mechanism}-{section.metrics}-{section.statistics}"


def requests(kind: str) -> Iterator[tuple[PrivacySection, bool, bool]]:
    """Section, whether it is under secure aggregation, and whether it registers for a common standardisation."""
    for section, masked in itertools.product(sections(), (False, True)):
        for standardise in (False, True) if kind == protocol.REGISTER else (False,):
            yield section, masked, standardise


SECURE: dict[str, int | float] = {
    messages.PROTOCOL: transcript.VERSION,
    messages.ATTEMPT: 1,
    messages.CLIPPING_BOUND: 10.0,
    messages.VALUE_BOUND: 4.0,
    messages.STATE_BOUND: 100.0,
    messages.WEIGHT_CAP: 1000,
    messages.MIN_SITES: 3,
}


class Observed:
    """What a real worker gives out, told from the exact figures of its data."""

    def __init__(self, worker: SiteWorker, exact: dict[str, Any]) -> None:
        self.worker, self.exact = worker, exact
        self.inputs: list[InputVector] = []

    def of(self, kind: str, reply: RecordDict) -> Disclosure:
        """The form of each quantity; "clear" too where a server is trusted with it."""
        if self.inputs:
            return self._in_sum(kind, self.inputs[-1])
        metrics = dict(reply.get(protocol.METRICS, {}))
        found: dict[Any, Any] = {}
        if kind == protocol.REGISTER:
            found = {
                "sizes": "clear" if metrics.get(protocol.NUM_TRAIN_EXAMPLES) == EXAMPLES else None,
                "counts": "clear" if metrics.get(protocol.NUM_TEST_EXAMPLES) == HELD_OUT else None,
                "sums": "clear" if protocol.FEATURE_TOTAL in metrics else None,
            }
        elif kind == protocol.TRAIN:
            arrays = {n: a.numpy() for n, a in reply[protocol.ARRAYS].items()}
            same = all(np.array_equal(arrays[n], a) for n, a in self.exact["update"].items())
            told = metrics[protocol.NUM_EXAMPLES] == EXAMPLES
            found = {"update": "clear" if same else "noised", "sizes": "clear" if told else None}
        elif kind == protocol.CALIBRATE:
            found = {"ranges": "clear" if protocol.RANGE_LOW in metrics else "noised"}
        else:
            # Of a candidate: ran, correct, examples, loss-sum; with noise correct and examples alone.
            listed = list(metrics.get(protocol.COUNTS, ()))
            counts = [metrics[n] for n in ("correct", "examples") if n in metrics] or listed[-3:3]
            whole = all(float(value).is_integer() for value in counts)
            told = metrics[protocol.NUM_EXAMPLES] == HELD_OUT
            found = {"counts": "clear" if whole and told else "noised"}
            assert whole == told
        return {quantity: form for quantity, form in found.items() if form}

    def _in_sum(self, kind: str, given: InputVector) -> Disclosure:
        counters = dict(given.counters)
        if kind == messages.STATISTICS:
            # One, of the means, where whole sites are hidden.
            assert counters["examples"] in (1, EXAMPLES)
            return {"sums": "masked"}
        if kind == protocol.TRAIN:
            moved = given.layout.flatten(self.exact["moved"])
            exact = given.noise is None and np.allclose(given.values, moved, atol=1e-6)
            told: dict[Any, Any] = (
                {"sizes": "masked"} if counters.get("examples") == EXAMPLES else {}
            )
            return {"update": "masked" if exact else "noised", **told}
        values = [
            v for name, v in counters.items() if name.startswith("task/") and "loss" not in name
        ]
        whole = all(float(v).is_integer() for v in values)
        quantity: Any = "ranges" if kind == protocol.CALIBRATE else "counts"
        return {quantity: "masked" if whole else "noised"}


@pytest.fixture
def observe(task, data, weights, ask, about, scores, tmp_path, monkeypatch):
    """Asks a new worker for something, and says what has left it; None where it refuses."""
    session = participant.Session
    worker_of = itertools.count()
    anchors = consortium.anchors(["site-1"], 3)["site-1"]

    def make() -> SiteWorker:
        home = tmp_path / str(next(worker_of))
        return SiteWorker("site-1", task, data, home, anchors=anchors)

    plain = make().answer(protocol.TRAIN, ask(protocol.TRAIN, weights, train=TRAIN).content)
    trained = {n: a.numpy() for n, a in plain[protocol.ARRAYS].items()}
    weight = EXAMPLES / 1000
    moved = {n: trained[n] - weights[n] for n in trained}
    exact = {"update": trained, "moved": moved, "weight": weight}

    def request(kind: str, section: PrivacySection, *, masked: bool, standardise: bool) -> Message:
        told = {"privacy": section.model_dump_json(by_alias=True, exclude_none=True)}
        if kind in (protocol.CALIBRATE, protocol.QUALIFY):
            found = (
                about(kind, **told)
                if kind == protocol.CALIBRATE
                else scores(("onnx-fp16",), **told)
            )
        elif kind == protocol.TRAIN:
            found = ask(kind, weights, train=TRAIN, rounds=3, **told)
        elif kind == protocol.EVALUATE:
            found = ask(kind, weights, **told)
        else:
            mode = "federated" if standardise or kind == messages.STATISTICS else "site"
            found = ask(kind, standardise=mode, server_round=0, **told)
        if masked:
            found.content[messages.SECURE] = messages.record(SECURE)
        return found

    def observed(
        kind: str, section: PrivacySection, *, masked: bool, standardise: bool
    ) -> tuple[Disclosure | None, int]:
        worker = make()
        seen = Observed(worker, exact)

        def recorded(anchors, attempt, given, *more):
            seen.inputs.append(given)
            return session(anchors, attempt, given, *more)

        monkeypatch.setattr(participant, "Session", recorded)
        asked = request(kind, section, masked=masked, standardise=standardise)
        try:
            reply = worker.answer(kind, asked.content)
        except SiteError as error:
            assert error.code in (414, 418), error
            return None, 0
        ledger = worker.home / FILE
        return seen.of(kind, reply), len(Ledger(ledger).entries()) if ledger.exists() else 0

    return observed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ABOUT_DATA)
def test_the_table_says_what_leaves_a_real_worker(kind, observe):
    for section, masked, standardise in requests(kind):
        table = disclosed(kind, section, masked=masked, standardise=standardise)
        found, charges = observe(kind, section, masked=masked, standardise=standardise)
        case = (kind, named(section), "masked" if masked else "clear", standardise)
        if found is None:
            # The worker may refuse more: this task standardises, which the section must then allow.
            refuses = section.mechanism != "off" and section.statistics == "off"
            assert table is None or refuses, case
            continue
        assert table is not None, (case, found)
        assert found == {q: "clear" if f == "trusted" else f for q, f in table.items()}, case
        # Whatever has noise, or will get it from the server, is in the ledger; and nothing else.
        assert charges == any(form in ("noised", "trusted") for form in table.values()), case
        assert ("trusted" in table.values()) == (
            kind == protocol.TRAIN and section.mechanism in CENTRAL
        )


def test_nothing_that_tells_of_a_site_leaves_exact_where_sites_are_hidden():
    """But for what the configuration declares to have no noise."""
    for kind in ABOUT_DATA:
        for section, masked, standardise in requests(kind):
            table = disclosed(kind, section, masked=masked, standardise=standardise)
            if table is None or not section.hides_sites:
                continue
            assert "sizes" not in table
            exact = {q for q, form in table.items() if form in ("clear", "masked")}
            if section.metrics != "unprotected":
                assert not exact & {"counts", "ranges"}
            if kind != messages.STATISTICS and section.statistics == "off":
                assert "sums" not in exact
            assert "update" not in exact


FLAGS = ("share-metrics", "share-statistics", "trust-server")


def privacy_policies() -> Iterator[PrivacyPolicy]:
    for unit, *flags in itertools.product(("example", "site"), *[(False, True)] * len(FLAGS)):
        values = dict(zip(FLAGS, flags, strict=True))
        yield PrivacyPolicy.model_validate({"required": True, "unit": unit, **values})


def policy_of(privacy: PrivacyPolicy, **changes: Any) -> Policy:
    values = {"tasks": ["blobs"], "bundles": [BUNDLE], "versions": ["0.1.0"], "min-cohort": 0}
    read = Policy.model_validate(values | changes)
    return read.model_copy(update={"privacy": privacy})


def served(
    policy: Policy, ask: Any, kind: str, section: PrivacySection, *, masked: bool, standardise: bool
) -> bool:
    told = {
        "privacy": section.model_dump_json(by_alias=True, exclude_none=True),
        protocol.VERSION: "0.1.0",
        protocol.STANDARDISE: "federated" if standardise else "site",
    }
    content = ask(kind, **told).content
    if masked:
        content[messages.SECURE] = messages.record(SECURE)
    try:
        policies.allow(policy, kind, content, BUNDLE)
    except SiteError as error:
        assert error.code == 418
        return False
    return True


def missing(
    privacy: PrivacyPolicy, ranges: bool, section: PrivacySection, table: Disclosure
) -> set[str]:
    """The permissions that a request needs and the owner has not given."""
    exact = {q for q, form in table.items() if form in ("clear", "masked")}
    wanted = {
        "unit": privacy.unit == "site" and section.unit == "example",
        "mechanism": section.mechanism == "off",
        "trust-server": "trusted" in table.values() and not privacy.trust_server,
        "share-metrics": "counts" in exact and not privacy.share_metrics,
        # Exact sums in every row that trains are no more covered by its noise than those that leave.
        "share-statistics": ("sums" in exact or section.statistics == "unprotected")
        and not privacy.share_statistics,
        "share-ranges": "ranges" in exact and not ranges,
        "update": "update" in exact,
    }
    return {name for name, lacking in wanted.items() if lacking}


@pytest.mark.parametrize("kind", ABOUT_DATA)
def test_every_policy_serves_what_its_owner_permits_and_no_more(kind, ask):
    """Over the whole product of policies and requests, by what a request makes the site send."""
    count = 0
    for privacy, ranges in itertools.product(privacy_policies(), (False, True)):
        policy = policy_of(privacy, **{"share-ranges": ranges})
        for section, masked, standardise in requests(kind):
            table = disclosed(kind, section, masked=masked, standardise=standardise)
            lacking = missing(privacy, ranges, section, table or {})
            found = served(policy, ask, kind, section, masked=masked, standardise=standardise)
            assert found == (not lacking), (kind, privacy, named(section), masked, lacking)
            count += 1
    assert count == 32 * len(list(requests(kind)))


@pytest.mark.parametrize("kind", ABOUT_DATA)
def test_where_secure_aggregation_is_required_nothing_leaves_in_clear(kind, ask):
    policy = policy_of(PrivacyPolicy())
    policy = policy.model_copy(update={"secure_aggregation": SecurePolicy(required=True)})
    for section, masked, standardise in requests(kind):
        if served(policy, ask, kind, section, masked=masked, standardise=standardise):
            table = disclosed(kind, section, masked=masked, standardise=standardise)
            assert "clear" not in (table or {}).values()


def test_exact_statistics_of_the_site_s_own_are_used_only_where_the_owner_shares_them(ask):
    """`standardise = "site"` sends no sums, and yet one row scales all others."""
    section = PrivacySection.model_validate(
        {"mechanism": "example", "noise-multiplier": 1.0, "statistics": "unprotected"}
    )
    for shared in (False, True):
        policy = policy_of(
            PrivacyPolicy.model_validate({"required": True, "share-statistics": shared})
        )
        for kind in (protocol.REGISTER, protocol.TRAIN):
            assert served(policy, ask, kind, section, masked=False, standardise=False) == shared


def test_a_policy_that_permits_sums_of_no_feature_serves_none(ask):
    policy = policy_of(PrivacyPolicy(), **{"share-statistics": False})
    for section, masked, standardise in requests(protocol.REGISTER):
        table = disclosed(protocol.REGISTER, section, masked=masked, standardise=standardise) or {}
        found = served(
            policy, ask, protocol.REGISTER, section, masked=masked, standardise=standardise
        )
        assert found == (table.get("sums") != "clear")


def test_the_unit_is_a_key_of_the_file(tmp_path: Path):
    read = PrivacyPolicy.model_validate({"unit": "site"})
    assert (read.unit, PrivacyPolicy().unit) == ("site", "example")
    with pytest.raises(ValueError, match="unit"):
        PrivacyPolicy.model_validate({"unit": "patient"})
    assert json.loads(read.model_dump_json(by_alias=True))["unit"] == "site"


@pytest.mark.parametrize("rows", [0, 1])
def test_under_masks_the_ledger_s_digest_tells_no_site_without_examples(
    task, data, weights, ask, tmp_path: Path, rows: int
):
    section = PrivacySection.model_validate(
        {"mechanism": "example", "noise-multiplier": 1.0, "statistics": "unprotected"}
    )
    few = replace(
        data, train_features=data.train_features[:rows], train_labels=data.train_labels[:rows]
    )
    anchors = consortium.anchors(["site-1"], 3)["site-1"]
    worker = SiteWorker("site-1", task, few, tmp_path / "home", anchors=anchors)
    digests = []
    for server_round in (1, 2):
        told = {"privacy": section.model_dump_json(by_alias=True, exclude_none=True)}
        asked = ask(
            protocol.TRAIN, weights, train=TRAIN, rounds=3, server_round=server_round, **told
        )
        asked.content[messages.SECURE] = messages.record(SECURE)
        reply = worker.answer(protocol.TRAIN, asked.content)
        digests.append(reply[protocol.CONFIG][protocol.PRIVACY_LEDGER])
    assert len(set(digests)) == 2
    assert len(Ledger(worker.home / FILE).entries()) == 2
