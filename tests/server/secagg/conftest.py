"""Real sites behind a grid that loses what it is told to lose, asked by the server's side of a secure sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedge.client.app import app
from fedge.client.data.dataset import SiteData
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.secagg.session import Anchors
from fedge.client.training.learner import Learner
from fedge.client.worker.handlers import SiteWorker
from fedge.server.aggregation import strategies
from fedge.server.participants import request_content as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.participants.registration import Registry
from fedge.server.runs.journal import Journal
from fedge.server.runs.listener import NullListener
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.server.secagg.secure_sums import SecureSums
from fedge.server.transport.grid_calls import GridClient
from fedge.server.transport.node_status import NodeStatus
from fedge.shared import protocol
from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.secagg import messages
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.task import Task
from fedge.simulations import consortium, flower_patches
from fedge.simulations.grid import InProcessGrid

#: The exchanges by the names that a round's line has for them.
KINDS = {
    "begin": protocol.TRAIN,
    "share": messages.SHARE,
    "masked": messages.MASKED,
    "commit": messages.COMMIT,
    "unmask": messages.UNMASK,
}
RUN_ID = "r-1"

Alter = Callable[[RecordDict], None]


@dataclass
class Fault:
    """What happens to a site's answers to a message type, ``times`` times."""

    site: str
    kind: str
    action: str | Alter
    times: int = 1 << 30


class LosingGrid(InProcessGrid):
    """A grid in this process with faults.

    Attributes:
        faults: silent, late, error, garbage, or a function that alters the reply.
        log: site and message type of every request that came through, with its content and its reply.
    """

    def __init__(self, sites: Mapping[int, str], *more: Any) -> None:
        super().__init__(sites, *more)
        self.sites = dict(sites)
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, RecordDict, Message | None]] = []
        self.late: set[str] = set()

    def _answer(self, message_id: str, message: Message) -> Message | None:
        site, kind = self.sites[message.metadata.dst_node_id], message.metadata.message_type
        fault = next(
            (f for f in self.faults if (f.site, f.kind) == (site, kind) and f.times > 0), None
        )
        action = fault.action if fault else ""
        if fault:
            fault.times -= 1
        if action == "silent":
            self.log.append((site, kind, message.content, None))
            return None
        reply = super()._answer(message_id, message)
        if action == "late":
            self.late.add(reply.metadata.reply_to_message_id)
        elif action == "error":
            reply = Message(Error(code=413, reason="patient 4711"), reply_to=message)
        elif action == "garbage":
            reply = Message(_garbled(reply.content), reply_to=message)
        elif callable(action):
            action(reply.content)
        if action in ("error", "garbage"):
            flower_patches.number(reply, f"{message_id}-reply")
        self.log.append((site, kind, message.content, reply))
        return reply

    def pull_messages(self, message_ids: Any) -> list[Message]:
        for message_id in message_ids:
            if message_id in self._waiting:
                reply = self._answer(message_id, self._waiting.pop(message_id))
                if reply is not None:
                    return [reply]
        return []

    def elapsed(self, reply: Message) -> float:
        number = reply.metadata.reply_to_message_id
        return 1e6 if number in self.late else super().elapsed(reply)


def _garbled(content: RecordDict) -> RecordDict:
    """The reply with all of its values cut short."""
    cut = {k: v[:-1] if isinstance(v, bytes) else v for k, v in content[messages.SECURE].items()}
    return RecordDict(
        {protocol.CONFIG: content[protocol.CONFIG], messages.SECURE: ConfigRecord(cut)}
    )


def blobs() -> Task:
    """Two blobs in the plane."""
    return Task(
        name="blobs",
        summary="two blobs",
        input=InputSchema((2,), features=(Feature("x", -9, 9), Feature("y", -9, 9))),
        output=OutputSchema(("left", "right"), "softmax"),
        preprocessing=(Standardise(),),
        network=lambda: FNN((2, 4, 2)),
        loss=softmax_loss,
        counters=softmax_counters,
        metrics=(ACCURACY, LOSS),
        load=lambda _: pytest.fail("no files"),
    )


def examples(index: int, rows: int) -> SiteData:
    """A site's own."""
    draw = np.random.default_rng(index)
    labels = np.arange(rows) % 2
    features = (draw.normal(size=(rows, 2)) + 3.0 * labels[:, None]).astype(np.float32)
    test = rows // 4
    return SiteData(features[test:], labels[test:], features[:test], labels[:test])


@dataclass
class Rig:
    """Sites, the grid to them, and the server's side.

    Attributes:
        trained: names of sites, one for each time that one of them trained.
    """

    folder: Path
    task: Task
    config: Any
    workers: dict[str, SiteWorker]
    grid: LosingGrid
    talk: MemberExchange
    ledger: RecoveryStore
    sums: SecureSums
    arrays: dict[str, Any]
    members: list[Member]
    anchors: Mapping[str, Anchors]
    trained: list[str] = field(default_factory=list)

    def fault(self, site: str, exchange: str, action: str | Alter, times: int = 1 << 30) -> None:
        """Let an exchange with a site go wrong."""
        self.grid.faults.append(Fault(site, KINDS.get(exchange, exchange), action, times))

    def compose(
        self, server_round: int, asked: list[Member], secure: ConfigRecord | None = None
    ) -> list[Message]:
        """Requests to train."""
        settings = requests.settings(self.config, RUN_ID, server_round, (), len(asked))
        strategy = strategies.build(
            self.config.strategy, client_learning_rate=0.1, num_sites=len(self.members)
        )
        return requests.train(
            self.grid,
            strategy,
            self.arrays,
            settings,
            asked,
            {},
            self.config,
            needs_loss=False,
            secure=secure,
        )

    def train(self, server_round: int = 1) -> Any:
        """The secure sum of a round."""
        return self.sums.train(
            server_round,
            self.members,
            lambda some, secure: self.compose(server_round, some, secure),
            self.arrays,
            control=False,
        )

    def plain(self, sites: list[str], server_round: int = 1) -> tuple[dict[str, Any], int, float]:
        """What the same sites bring in clear: the weighted mean, its weight, the total loss."""
        some = [m for m in self.members if m.site in sites]
        replies = [
            self.workers[m.site].answer(protocol.TRAIN, message.content)
            for m, message in zip(some, self.compose(server_round, some), strict=True)
        ]
        counts = [int(r[protocol.METRICS][protocol.NUM_EXAMPLES]) for r in replies]
        losses = [float(r[protocol.METRICS][protocol.TRAIN_LOSS]) for r in replies]
        weights = [
            {k: a.numpy().astype(np.float64) for k, a in r[protocol.ARRAYS].items()}
            for r in replies
        ]
        mean = {k: np.average([w[k] for w in weights], axis=0, weights=counts) for k in weights[0]}
        return mean, sum(counts), float(np.dot(counts, losses))

    def check(self, found: Any, sites: list[str]) -> None:
        """Whether a sum is that of these sites alone, to the quantisation step."""
        mean, weight, loss = self.plain(sites)
        assert list(found.sites) == sorted(sites)
        assert found.weight == weight
        assert found.loss_total == pytest.approx(loss, abs=1e-4)
        for name, expected in mean.items():
            np.testing.assert_allclose(found.mean[name], expected, atol=2e-7, rtol=0)

    def restart(self) -> None:
        """New workers over the same homes: what the old ones had in memory alone is gone."""
        for name, old in self.workers.items():
            new = SiteWorker(
                name, self.task, old.learner.data, old.home, anchors=self.anchors[name]
            )
            self.workers[name] = new
            message_relay.connect(name, DirectLink(new))

    def restart_server(self) -> None:
        """A new coordinator over the same run directory."""
        self.sums = SecureSums(self.talk, self.ledger, self.config, self.task)

    def invited(self) -> list[str]:
        """Sites that the newest attempt has asked."""
        (*_, newest), begun = self.asked("begin"), KINDS["begin"]
        number = newest["secagg"]["attempt"]
        return [
            name
            for name, kind, content, _ in self.grid.log
            if kind == begun and content["secagg"]["attempt"] == number
        ]

    def asked(self, exchange: str, site: str | None = None) -> list[RecordDict]:
        """Requests of an exchange."""
        return [
            content
            for name, kind, content, _ in self.grid.log
            if kind == KINDS.get(exchange, exchange) and site in (None, name)
        ]


@pytest.fixture
def rig(
    tmp_path: Path, fake_time: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Rig]]:
    """Build a rig: ``count`` sites; keywords are those of ``[secure-aggregation]``, with _ for -.

    ``own_min_sites``: of the sites' policies, where it is not the run's.
    """
    connected: list[str] = []
    numbers = itertools.count()

    def build(
        count: int = 6,
        sections: Mapping[str, Any] | None = None,
        own_min_sites: int = 0,
        **section: Any,
    ) -> Rig:
        folder = tmp_path / f"rig-{next(numbers)}"
        (folder / "run").mkdir(parents=True)
        masks = {"enabled": True, "min-sites": 3, "weight-cap": 100, "deadline": 20.0, **section}
        own: dict[str, Any] = {
            "sites": {"count": count},
            "data": {"standardise": "site"},
            "train": {"local-steps": 2, "learning-rate": 0.5},
            "round": {"deadline": 20.0},
            "secure-aggregation": masks,
        }
        config, task = builders.config("blobs", **{**own, **(sections or {})}), blobs()
        names = [f"site-{i}" for i in range(1, count + 1)]
        least = own_min_sites or config.secure_aggregation.min_sites
        anchors = consortium.anchors(names, least)
        workers = {
            name: SiteWorker(
                name, task, examples(i, 20 + 4 * i), folder / name, anchors=anchors[name]
            )
            for i, name in enumerate(names)
        }
        for name, worker in workers.items():
            message_relay.connect(name, DirectLink(worker))
            connected.append(name)
        grid = LosingGrid(dict(enumerate(names, start=1)), app)
        live = NodeStatus(GridClient(grid, clock=fake_time))
        journal = Journal(folder / "journal.db")
        census = Registry(live, config, task, RUN_ID, journal, NullListener())
        members, _ = census.take(1)
        journal.close()
        talk = MemberExchange(
            RUN_ID, config, live, Availability(census, members, []), NullListener()
        )
        ledger = RecoveryStore(folder / "run")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            arrays = {k: t.numpy().copy() for k, t in task.network().state_dict().items()}
        made = Rig(
            folder,
            task,
            config,
            workers,
            grid,
            talk,
            ledger,
            SecureSums(talk, ledger, config, task),
            arrays,
            list(members.values()),
            anchors,
        )
        real = Learner.train

        def counting(worker: Learner, *arguments: Any) -> Any:
            made.trained.append(worker.site)
            return real(worker, *arguments)

        monkeypatch.setattr(Learner, "train", counting)
        return made

    yield build
    for name in connected:
        message_relay.disconnect(name)
