"""Attacks on what noise, budget and policy promise, by a server or a site, on fedge's own classes; see table.py.

The first line of each function says what the attacker does. Where Flower has a counterpart, its own class is asked too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.message_type import MessageType
from flwr.clientapp.mod import LocalDpMod
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from numpy.typing import NDArray
from torch import nn

from fedge.client.privacy import dp_sgd
from fedge.client.privacy.noise_calibration import Noise
from fedge.client.settings import policy as policies
from fedge.client.settings.policy import Policy
from fedge.client.training.local_steps import Examples
from fedge.server.secagg.group import LostError
from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.sections import TrainSection
from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.checks import per_example_gradients
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import messages, shamir, vector_layout
from fedge.shared.secagg.exact_counters import encode_counters
from fedge.simulations import flower_patches

from . import flower_parties
from .deviant import Server
from .flower_parties import Outcome
from .parties import EXAMPLES, VICTIM, make_sites, task

TRIALS: Final = 300
DELTA: Final = 1e-5
#: Multiplier 1: what one release of this kind is charged.
CHARGED: Final = 4.37718
Words = NDArray[np.uint64]
#: Of one sum, each a trial of its own.
COUNTED: Final = tuple(f"trial-{i}" for i in range(TRIALS))


def section(**values: Any) -> PrivacySection:
    """A privacy section; keys with _ for -."""
    return PrivacySection.model_validate({k.replace("_", "-"): v for k, v in values.items()})


NOISED: Final = {
    "mechanism": "distributed",
    "noise_multiplier": 1.0,
    "metrics": "noised",
    "metrics_noise_multiplier": 1.0,
}


def sent_by_sites(sites: int, victim: float, entropy: Entropy) -> Words:
    """``(sites, TRIALS)``: all sites but the first hold a half, and each adds its part of the noise."""
    counts = noised_counts.plan(section(**NOISED), COUNTED, sites, sensitivity=1.0)
    assert counts is not None
    counters = vector_layout.of_evaluation(COUNTED, noised=True).counters[1:]
    found = np.empty((sites, TRIALS), np.uint64)
    for site in range(sites):
        # The first holds one held-out example, of which it has ``victim`` right.
        own = dict.fromkeys(COUNTED, 0.5 if site else victim) | {noised_counts.EXAMPLES: 1.0}
        values = vector_layout.task_counters(counts.make(own, entropy))
        # The high half is there for the sum alone, which stays below 2^64 here.
        found[site] = encode_counters(values, counters)[:, 0]
    return found


def in_one_element(sent: Words) -> Words:
    """What a server opens: the sums in the ring 2^128; ``(sites, TRIALS)`` becomes ``(TRIALS, 1)``."""
    return sent.sum(axis=0, dtype=np.uint64)[:, None]


def in_limbs(sent: Words) -> Words:
    """What a server opened while a counter travelled as limbs of 20 bits, each with a sum of its own."""
    low = np.uint64(2**20 - 1)
    limbs = [sent >> np.uint64(shift) & low for shift in (0, 20, 40)]
    return np.stack([limb.sum(axis=0) for limb in limbs], axis=1)


def excess(opened: Callable[[Words], Words], zero: Words, half: Words) -> float:
    """By how much the best event found exceeds what epsilon and delta allow, in probability."""
    one, other = opened(zero), opened(half)
    both = np.concatenate([one, other])
    found = []
    for column in range(both.shape[1]):
        # Few values of a carry, many of a sum.
        for value in np.unique(both[:, column])[:50]:
            for event in (np.equal, np.less_equal, np.greater):
                p, q = (event(view[:, column], value).mean() for view in (one, other))
                found += [p - np.exp(CHARGED) * q - DELTA, q - np.exp(CHARGED) * p - DELTA]
    return float(max(found))


def counters_read_word_by_word(_: Path) -> Outcome:
    """A server tells a site at 0 from one at a half by the single words of 100 sites' noised counters."""
    entropy = Entropy(key=bytes(32))
    zero, half = (sent_by_sites(100, victim, entropy) for victim in (0.0, 0.5))
    now, before = (excess(opened, zero, half) for opened in (in_one_element, in_limbs))
    words = (
        f"each counter is one element of the ring 2^128, and the best event found is within what epsilon {CHARGED:.2f} "
        f"allows; with a sum for each 20 bits the same vectors exceed it by {before:.2f}"
    )
    return Outcome("counters-read-word-by-word", verdict(now < 0.12 < before), words)


def statistics_said_to_be_off(home: Path) -> Outcome:
    """A server asks for masked sums of features with privacy.statistics left at "off"."""
    told = section(mechanism="example", noise_multiplier=1.0)
    content = content_of(messages.STATISTICS, told, masked=True)
    worker = make_sites(home)[VICTIM]
    codes = [code_of(worker.answer, messages.STATISTICS, content)]
    codes.append(
        code_of(policies.allow, policy_of(required=True), messages.STATISTICS, content, BUNDLE)
    )
    return _outcome("statistics-said-to-be-off", codes, {"worker": 414, "policy": 418})


def sizes_at_registration(home: Path) -> Outcome:
    """A server asks in clear for the numbers of examples where whole sites are to be hidden."""
    worker = make_sites(home)[VICTIM]
    told = {}
    for mechanism in ("distributed", "central", "central-mf", "local"):
        content = content_of(protocol.REGISTER, section(mechanism=mechanism, noise_multiplier=1.0))
        reply = worker.answer(protocol.REGISTER, content)
        told[mechanism] = dict(reply[protocol.METRICS])[protocol.NUM_TRAIN_EXAMPLES]
    words = f"each of {', '.join(told)}: {_listed(told.values())} example, where it has {EXAMPLES[VICTIM]}"
    return Outcome("sizes-at-registration", verdict(set(told.values()) == {1}), words)


def an_example_s_noise_for_a_site(home: Path) -> Outcome:
    """A server runs DP-SGD at a site whose owner wants the whole site to be hidden."""
    content = content_of(protocol.TRAIN, section(mechanism="example", noise_multiplier=1.0))
    policy = policy_of(required=True, unit="site")
    code = code_of(policies.allow, policy, protocol.TRAIN, content, BUNDLE)
    return _outcome("an-example-s-noise-for-a-site", [code], {"policy": 418})


def a_site_s_noise_counted_for_an_example(home: Path) -> Outcome:
    """A site that hides its whole update once is asked what its examples have cost."""
    home.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.create(home / FILE)
    charge = Charge(
        "heart", "site", "r-1", 1, "train", 0, "distributed", Release(1.0), DELTA, "ab" * 32
    )
    ledger.charge(charge, Budget(1e6, DELTA))
    site, example = (ledger.spent("heart", unit, DELTA).consumers for unit in ("site", "example"))
    words = (
        f"epsilon {site:.3f} for the site, {example:.3f} for an example, "
        "which moves a clipped update by twice the bound"
    )
    right = abs(site - CHARGED) < 1e-3 and abs(example - 9.99726) < 1e-2
    return Outcome("a-site-s-noise-counted-for-an-example", verdict(right), words)


def examples_from_the_ledger_s_digest(home: Path) -> Outcome:
    """A server tries numbers of examples against the digest of the ledger that a masked reply carries."""
    home.mkdir(parents=True, exist_ok=True)
    ledger = Ledger.create(home / FILE)
    release = Release(1.0, 16 / EXAMPLES[VICTIM], 5)
    ledger.charge(
        Charge("heart", "example", "r-1", 1, "train", 0, "example", release, DELTA, "ab" * 32),
        Budget(1e6, DELTA),
    )
    with closing(sqlite3.connect(home / FILE)) as db:
        (name,) = db.execute("SELECT ledger FROM meta").fetchone()
        (text,) = db.execute("SELECT record FROM charge").fetchone()
    known, start = json.loads(text), hashlib.sha256(canonical_json({"ledger": name})).digest()
    salt, digest = known.pop("salt"), ledger.digest("heart")

    def tried(more: Mapping[str, Any]) -> list[int]:
        return [
            n
            for n in range(1, 1000)
            if hashlib.sha256(
                start + canonical_json({**known, **more, "sampling_rate": 16 / n})
            ).hexdigest()
            == digest
        ]

    words = (
        f"{len(tried({}))} of 999 numbers fit; with the record's random salt, which stays at the site, "
        f"{_listed(tried({'salt': salt}))}"
    )
    refused = not tried({}) and tried({"salt": salt}) == [EXAMPLES[VICTIM]]
    return Outcome("examples-from-the-ledger-s-digest", verdict(refused), words)


class _Kept(nn.Module):
    """A layer that keeps a running mean in a float buffer, under no known name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept.add_(x.mean(dim=0).detach())
        found: torch.Tensor = self.linear(x)
        return found


def state_that_no_noise_covers(_: Path) -> Outcome:
    """A network keeps a mean of its inputs in a buffer, which leaves with the weights."""
    try:
        per_example_gradients.require_apart(task(_Kept), _Kept())
    except ValueError as error:
        said = str(error).partition(",")[0]
        return Outcome(
            "state-that-no-noise-covers", "refused", f"the task is refused before training: {said}"
        )
    return Outcome("state-that-no-noise-covers", "succeeds", "the task was taken")


def a_record_that_makes_nan(_: Path) -> Outcome:
    """A server sends weights with which one record's gradient is NaN, and waits for FE-401 to tell of it."""
    network, x = nn.Linear(2, 2), torch.zeros(8, 2)
    with torch.no_grad():
        network.weight.fill_(3e38)
    x[3] = 3e38
    settings = TrainSection.model_validate(
        {"batch-size": 8, "local-steps": 1, "learning-rate": 0.1}
    )
    examples = Examples(x, torch.zeros(8, dtype=torch.int64))
    outputs = network(x[3:4])
    nn.functional.cross_entropy(outputs, examples.y[3:4]).backward()
    plain = network.weight.grad
    assert plain is not None
    network.zero_grad()
    dp_sgd.train_privately(
        task(), network, examples, settings, Noise(1.0, 1.0), Entropy(key=bytes(32))
    )
    finite = bool(torch.isfinite(network.weight).all())
    broken = not bool(torch.isfinite(plain).all())
    words = "a gradient that is not finite counts as zero: the update is finite, with that record or without"
    return Outcome("a-record-that-makes-nan", verdict(finite and broken), words)


def a_longer_update_than_the_owner_allows(home: Path) -> Outcome:
    """A server asks for distributed noise on updates longer than max-clipping-bound."""
    told = section(**NOISED, clipping_bound=101.0)
    content = content_of(protocol.TRAIN, told, masked=True)
    code = code_of(policies.allow, policy_of(), protocol.TRAIN, content, BUNDLE)
    return _outcome("a-longer-update-than-the-owner-allows", [code], {"policy": 418})


def dealer_of_random_shares(home: Path) -> Outcome:
    """A site deals random shares of what it committed to, round after round."""
    server = Server(make_sites(home)).begin()
    honest = shamir.split

    def at_random(_secret: bytes, _threshold: int, xs: Any) -> dict[int, bytes]:
        return {x: b"\0" + os.urandom(32) for x in xs}

    # Only the victim's sharing: the others are asked before and after it.
    for site in list(server.group.bundles):
        with patch.object(shamir, "split", at_random if site == VICTIM else honest):
            reply = server.tell(site, messages.SHARE, server.group.share_values())
        assert reply is not None
        server.group.take_share(site, messages.values_of(reply))
    server.masked().commit().unmask()
    try:
        server.group.unmask()
        dealers: tuple[str, ...] = ()
    except LostError as error:
        dealers = error.dealers
    rest = {n: s for n, s in server.sites.items() if n != VICTIM}
    following = Server(rest, server_round=2).begin().share().masked().commit().unmask()
    words = (
        f"its round is lost; the shares fit the hashes that it gave, so {_listed(dealers)} is proved to have dealt "
        f"them, is listed as rejected and left out; the next sum, over the other {len(rest)}, was "
        f"{'right' if following.is_right() else 'wrong'}"
    )
    return Outcome(
        "dealer-of-random-shares", verdict(dealers == (VICTIM,) and following.is_right()), words
    )


def flower_local_dp() -> str:
    """What a reply through Flower's own LocalDpMod tells besides the weights."""
    arrays, trained = (ArrayRecord({"w": Array(np.full(3, value))}) for value in (0.0, 1.0))
    told = MetricRecord({protocol.NUM_EXAMPLES: EXAMPLES[VICTIM], "accuracy": 0.75})

    def reply(message: Message, _: Context) -> Message:
        return Message(RecordDict({"arrays": trained, "metrics": told}), reply_to=message)

    flower_patches.identify(1, 0)
    asked = Message(RecordDict({"arrays": arrays}), dst_node_id=1, message_type=MessageType.TRAIN)
    context = Context(1, 1, {}, RecordDict(), {})
    answer = LocalDpMod(1.0, 1.0, 1.0, DELTA)(asked, context, reply)
    found = dict(answer.content["metrics"])
    count = found[protocol.NUM_EXAMPLES]
    return (
        f"LocalDpMod adds noise to the weights alone: {count} examples and the exact accuracy leave"
    )


def flower_dealer(seed: int = 7) -> str:
    """What Flower's SecAgg+ makes of a site that dealt the shares of another seed than its mask's."""
    server = flower_parties.Server(flower_parties.make_sites(seed))
    _, masked = flower_parties.until_masked(server)
    pool = server.unmask(server.sites)
    others = create_shares(os.urandom(32), server.threshold, len(server.sites))
    pool[flower_parties.VICTIM, "b"] = list(others)
    found = flower_parties.decode(flower_parties.total(masked, pool), len(masked))[1]
    off = flower_parties.steps_off(found, flower_parties.true_sum(server.sites.values()))
    silent = "nobody raises, and the sum is wrong by more than a million quantisation steps"
    return silent if off > 1e6 else f"the sum is wrong by {off:.0f} quantisation steps"


BUNDLE: Final = "ab" * 32

PRIVACY: Final[tuple[Callable[[Path], Outcome], ...]] = (
    counters_read_word_by_word,
    statistics_said_to_be_off,
    sizes_at_registration,
    an_example_s_noise_for_a_site,
    a_site_s_noise_counted_for_an_example,
    examples_from_the_ledger_s_digest,
    state_that_no_noise_covers,
    a_record_that_makes_nan,
    a_longer_update_than_the_owner_allows,
    dealer_of_random_shares,
)


def content_of(kind: str, told: PrivacySection, *, masked: bool = False) -> RecordDict:
    config = {
        protocol.RUN_ID: "run-1",
        protocol.SERVER_ROUND: int(kind == protocol.TRAIN),
        protocol.TASK: "blobs",
        protocol.VERSION: "0.1.0",
        protocol.COHORT: 6,
        protocol.STANDARDISE: "site",
        protocol.PRIVACY: told.model_dump_json(by_alias=True, exclude_none=True),
    }
    content = RecordDict({protocol.CONFIG: ConfigRecord(config)})
    if masked:
        content[messages.SECURE] = messages.record({messages.ATTEMPT: 1})
    return content


def policy_of(**privacy: Any) -> Policy:
    values = {"tasks": ["blobs"], "bundles": [BUNDLE], "versions": ["0.1.0"], "privacy": privacy}
    return Policy.model_validate(values)


def code_of(call: Callable[..., object], *arguments: Any) -> int:
    try:
        call(*arguments)
    except SiteError as error:
        return error.code
    return 0


def _outcome(name: str, codes: list[int], wanted: Mapping[str, int]) -> Outcome:
    said = ", ".join(
        f"the {who} raised FE-{code}" if code else f"the {who} raised nothing"
        for who, code in zip(wanted, codes, strict=True)
    )
    return Outcome(name, verdict(codes == list(wanted.values())), said)


def verdict(refused: bool) -> Any:
    return "refused" if refused else "succeeds"


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(values)) or "none"
