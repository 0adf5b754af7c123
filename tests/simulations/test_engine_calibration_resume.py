"""A masked calibration whose coordinator dies: the same figures, no second sum over other sites, one charge a site."""

from __future__ import annotations

import json
import signal
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedge.client.app import app as client_app
from fedge.client.data.dataset import site_shares
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.secagg import input_vector
from fedge.client.worker.handlers import SiteWorker
from fedge.server.app import app as server_app
from fedge.server.runs.directory import RunDirectory, prepare
from fedge.server.runs.listener import NullListener, listening
from fedge.shared import protocol
from fedge.shared.bundle.manifest_artefacts import ONNX_FP16, ONNX_FP32, ONNX_KINDS
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Calibration
from fedge.shared.config import reader
from fedge.shared.config.federation import Config
from fedge.shared.errors import SiteError
from fedge.shared.failpoints import BETWEEN
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages
from fedge.shared.tasks.registry import get_task
from fedge.simulations import consortium
from fedge.simulations.grid import InProcessGrid

CALIBRATE, QUALIFY = protocol.CALIBRATE, protocol.QUALIFY
NOISED = """
[privacy]
mechanism = "distributed"
noise-multiplier = 1.0
metrics = "noised"
metrics-noise-multiplier = 1.0
"""
TOML = """
[task]
name = "digits"
[run]
rounds = 1
[sites]
count = 3
[data]
partition = "iid"
[train]
local-steps = 1
batch-size = 16
[secure-aggregation]
enabled = true
min-sites = 3
[calibration]
enabled = true
examples = 64
"""


def parsed(text: str) -> Config:
    return reader.from_tree(tomllib.loads(text))


class Killed(BaseException):
    """The coordinator has been killed."""


@dataclass(frozen=True)
class Heard:
    """A request of the server, and the site's reply; ``purpose`` as the request says."""

    site: str
    kind: str
    purpose: str
    request: RecordDict
    reply: RecordDict


class Sites:
    """Workers of this process that outlive the coordinator, and all that it and they say to each other."""

    def __init__(self, folder: Path, chosen: Config) -> None:
        self.folder, self.config = folder, chosen
        self.task = get_task(chosen.task.name)
        self.shares = site_shares(chosen, self.task)
        self.anchors = consortium.anchors(self.shares, 3)
        self.heard: list[Heard] = []
        self.workers: dict[str, SiteWorker] = {}
        self.runs = 0

    def worker(self, site: str) -> SiteWorker:
        """A new process of a worker, in the home of the old one."""
        home, data = self.folder / "homes" / site, self.shares[site]
        return SiteWorker(site, self.task, data, home, anchors=self.anchors[site])

    def start(self) -> None:
        """Connect new workers of all sites."""
        for site in self.shares:
            self.workers[site] = self.worker(site)
            message_relay.connect(site, DirectLink(self.workers[site]))

    def end(self) -> None:
        for site in self.shares:
            message_relay.disconnect(site)

    def coordinate(self, dies: Callable[[str, str, str], bool] = lambda *_: False) -> Path:
        """A coordinator, from where the last one ended.

        Args:
            dies: of site, message type and purpose of a request that is about to be answered: it dies before.
        """
        directory, _ = prepare(self.folder / "run", self.config, resume=True)
        self.runs += 1
        heard = self.heard

        class Watched(InProcessGrid):
            def _answer(self, message_id: str, message: Message) -> Message:
                site, kind = names[message.metadata.dst_node_id], message.metadata.message_type
                secure = message.content.get(messages.SECURE)
                told = secure.get(messages.PURPOSE) if isinstance(secure, ConfigRecord) else None
                purpose = str(told or kind.removeprefix("evaluate."))
                if dies(site, kind, purpose):
                    raise Killed
                reply = super()._answer(message_id, message)
                content = reply.content if reply.has_content() else RecordDict()
                heard.append(Heard(site, kind, purpose, message.content, content))
                return reply

        names = dict(enumerate(self.shares, start=1))
        network = Watched(names, client_app, self.runs)
        context = Context(self.runs, 0, {}, RecordDict(), {"run-dir": str(directory.path)})
        with directory.lock(), listening(NullListener()):
            server_app(network, context)
        return directory.path

    def of(self, kind: str, purpose: str = "") -> list[Heard]:
        """What was asked with a message type."""
        return [h for h in self.heard if h.kind == kind and purpose in ("", h.purpose)]


def figures(run: Path) -> Calibration:
    """All that the sites said, without the name of the run."""
    return replace(calibration.load(run / calibration.FILE), run="")


def last_line(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    return found


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupts, and the vectors that its sites masked, by purpose."""

    sites: Sites
    run: Path
    plain: dict[str, list[Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    sites = Sites(tmp_path_factory.mktemp("whole"), parsed(TOML))
    plain: dict[str, list[Any]] = {"calibrate": [], "qualify": [], "evaluate": []}
    real = input_vector.evaluation

    def evaluation(layout: Any, counters: Any) -> Any:
        made = real(layout, counters)
        scores = any("/" in name for name in counters)
        kind = "calibrate" if "bin-0" in counters else "qualify" if scores else "evaluate"
        plain[kind].append(made.encode(3, bytes(32)))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_vector, "evaluation", evaluation)
        sites.start()
        yield Whole(sites, sites.coordinate(), plain)
    sites.end()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    made = Sites(tmp_path, parsed(TOML))
    made.start()
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["calibrate", "qualify"])
def test_the_server_learns_nothing_of_one_site_under_secure_aggregation(
    whole: Whole, purpose: str
) -> None:
    plain = whole.plain[purpose]
    assert len(plain) == 3
    told = [h for h in whole.sites.heard if h.purpose == purpose]
    assert Counter(h.kind for h in told) == dict.fromkeys(
        (f"evaluate.{purpose}", *messages.STEPS), 3
    )
    total = np.zeros_like(plain[0])
    for heard in told:
        vector = heard.kind == messages.MASKED
        assert set(heard.reply) == {protocol.CONFIG, messages.SECURE} | (
            {protocol.ARRAYS} if vector else set()
        )
        # Who answers what; nothing that was counted.
        assert set(heard.reply[protocol.CONFIG]) == {"site", "run-id", "server-round", "task"}
        if not vector:
            continue
        masked = np.frombuffer(heard.reply[protocol.ARRAYS][messages.VECTOR].data, "<u4")[
            -plain[0].size :
        ]
        total += masked
        for own in plain:
            # Of 2^32 values one is met by chance.
            assert np.count_nonzero(masked == own) <= 1
        assert masked.mean() / 2**32 == pytest.approx(0.5, abs=0.25)
    assert all((own == 0).mean() > 0.2 for own in plain)
    # Their self-masks are on the sum too.
    assert np.count_nonzero(total == np.sum(plain, axis=0, dtype=np.uint32)) <= 1


def at(kind: str, purpose: str) -> Callable[[str, str, str], bool]:
    """When the second site is about to get this request: the first has answered it."""
    return lambda *asked: asked == ("site-2", kind, purpose)


KILLS = {
    "between the exchanges": lambda site, kind, purpose: kind == QUALIFY,
    "ranges about to be unmasked": at(messages.UNMASK, "calibrate"),
    "ranges under masks": at(messages.MASKED, "calibrate"),
    "scores about to be unmasked": at(messages.UNMASK, "qualify"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_coordinator_that_died_ends_with_the_same_figures(
    moment: str, whole: Whole, sites: Sites
) -> None:
    with pytest.raises(Killed):
        sites.coordinate(KILLS[moment])
    before = len(sites.heard)
    run = sites.coordinate()
    assert figures(run) == figures(whole.run)
    assert figures(run).ranges is not None
    assert set(figures(run).candidates) == set(ONNX_KINDS)
    anew = moment == "ranges under masks"
    assert len(sites.of(CALIBRATE)) == (6 if anew else 3)
    assert len(sites.of(QUALIFY)) == 3
    bundles = {bytes(h.reply[messages.SECURE][messages.BUNDLE]) for h in sites.of(CALIBRATE)}
    assert len(bundles) == len(sites.of(CALIBRATE)), "another attempt has other keys"
    if moment == "between the exchanges":
        # Unmasked sums are in the journal, so that no site is asked again.
        assert {h.purpose for h in sites.heard[before:]} == {"query.register", "qualify"}
    assert not list((run / "secagg").glob("*.safetensors"))


@pytest.mark.slow
def test_unmasked_ranges_outlive_coordinator_and_workers(whole: Whole, sites: Sites) -> None:
    with pytest.raises(Killed):
        sites.coordinate(KILLS["between the exchanges"])
    # No key that unmasked their sum is left.
    sites.start()
    assert figures(sites.coordinate()) == figures(whole.run)


@pytest.mark.slow
def test_ranges_that_were_about_to_be_unmasked_are_lost_with_the_workers(sites: Sites) -> None:
    with pytest.raises(Killed):
        sites.coordinate(KILLS["ranges about to be unmasked"])
    sites.start()
    found = figures(sites.coordinate())
    assert found.ranges is None
    assert "no ranges: unmask: must be answered by 3 sites" in found.reason
    assert set(found.candidates) == {ONNX_FP32, ONNX_FP16}
    assert len(sites.of(CALIBRATE)) == 3, "the first site has given out its shares for good"


# A server that wants a second sum, over fewer sites: the difference of both would be one site's.


@pytest.mark.parametrize("kind", [CALIBRATE, QUALIFY])
def test_a_sum_that_was_unmasked_is_not_begun_again(whole: Whole, kind: str) -> None:
    for site, code, changes in (
        # Asked among fewer; by a further attempt; as if a round had followed. Also after a restart.
        ("site-1", 423, {protocol.COHORT: 2}),
        ("site-2", 423, {messages.ATTEMPT: 2}),
        ("site-1", 414 if kind == CALIBRATE else 423, {protocol.SERVER_ROUND: 2}),
    ):
        asked = deepcopy(next(h.request for h in whole.sites.of(kind) if h.site == site))
        for record in (asked[protocol.CONFIG], asked[messages.SECURE]):
            record.update({key: value for key, value in changes.items() if key in record})
        for worker in (whole.sites.workers[site], whole.sites.worker(site)):
            with pytest.raises(SiteError) as caught:
                worker.answer(kind, asked)
            assert caught.value.code == code, caught.value


@pytest.mark.slow
def test_keys_of_an_abandoned_attempt_unmask_nothing(sites: Sites) -> None:
    """A server keeps the masked sum of all sites, and begins again with fewer."""
    with pytest.raises(Killed):
        sites.coordinate(at(messages.COMMIT, "calibrate"))
    signed = sites.of(messages.COMMIT, "calibrate")[0].request
    again = deepcopy(sites.of(CALIBRATE)[0].request)
    again[messages.SECURE][messages.ATTEMPT] = 2
    for site in ("site-2", "site-3"):
        worker = sites.workers[site]
        before = next(h.reply for h in sites.of(CALIBRATE) if h.site == site)
        fresh = worker.answer(CALIBRATE, again)
        names = (messages.SECURE, messages.BUNDLE)
        assert fresh[names[0]][names[1]] != before[names[0]][names[1]]
        with pytest.raises(SiteError) as caught:
            worker.answer(messages.COMMIT, signed)
        assert caught.value.code == 422
    # The one that has signed the survivors already takes part in no other.
    with pytest.raises(SiteError) as caught:
        sites.workers["site-1"].answer(CALIBRATE, again)
    assert caught.value.code == 423


# With noise.

NOISED_PURPOSES = ["train", "evaluate", "calibrate", "qualify"]


def spent_once(run: Path, homes: Path) -> None:
    """Each site was charged once for each exchange, and the run accounts for no more."""
    for site in ("site-1", "site-2", "site-3"):
        entries = Ledger(homes / site / FILE).entries()
        assert [entry.charge.purpose for entry in entries] == NOISED_PURPOSES
    told = last_line(run)["masked_epsilon"]
    assert (told["updates"], told["evaluations"]) == (1, 3)
    assert told["consumers"] == pytest.approx(epsilon([Release(1.0, steps=4)], 1e-5))


@pytest.mark.slow
def test_noised_sums_are_charged_once_where_the_coordinator_died(tmp_path: Path) -> None:
    sites = Sites(tmp_path, parsed(TOML + NOISED))
    sites.start()
    try:
        with pytest.raises(Killed):
            sites.coordinate(KILLS["ranges about to be unmasked"])
        run = sites.coordinate()
    finally:
        sites.end()
    assert figures(run).mode == "noised"
    spent_once(run, tmp_path / "homes")


@pytest.mark.slow
def test_a_simulation_that_is_killed_between_charges_once_too(
    tmp_path: Path, forked: Callable[..., Any]
) -> None:
    """Its sites die with it, keys and all."""
    (tmp_path / "config.toml").write_text(TOML + NOISED)
    words = ["simulate", tmp_path / "config.toml", "--out", tmp_path / "run", "--quiet"]
    killed = forked(*words, fail_point=f"{BETWEEN}:1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / calibration.FILE).exists()
    done = forked(*words, "--resume")
    assert done.returncode == 0, done.stderr
    spent_once(tmp_path / "run", RunDirectory(tmp_path / "run").sites)
