"""Under secure aggregation a killed run goes on, with the same bytes, and no site answers a round twice."""

from __future__ import annotations

import json
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedge.client.app import app as client_app
from fedge.client.data.dataset import site_shares
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.training.learner import Learner
from fedge.client.worker.handlers import SiteWorker
from fedge.server.app import app as server_app
from fedge.server.runs.directory import prepare
from fedge.server.runs.listener import NullListener, listening
from fedge.shared.config import reader
from fedge.shared.config.federation import Config
from fedge.shared.failpoints import MASKED
from fedge.shared.secagg import messages
from fedge.shared.tasks.registry import get_task
from fedge.simulations import consortium
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


POINTS = ["before-dispatch", "all-received", *MASKED, "mid-aggregate", "after-commit"]
TOML = """
[task]
name = "breast-cancer"
[run]
rounds = 3
[sites]
count = 4
[train]
local-steps = 3
batch-size = 16
[strategy]
name = "{strategy}"
[secure-aggregation]
enabled = true
min-sites = 3
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name in ("FedAdam", "Scaffold"):
        simulate(reader.from_tree(tomllib.loads(TOML.format(strategy=name))), folder / name)
    return folder


# Scaffold remembers at the sites as well.
CASES = [(point, "FedAdam") for point in POINTS] + [("before-unmask", "Scaffold")]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "strategy"), CASES)
def test_killed_and_resumed_it_ends_with_the_same_bytes(
    point: str,
    strategy: str,
    uninterrupted: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # One case by the path of users, from nothing; forks, which save seconds, for the others.
    fedge = request.getfixturevalue("fresh" if strategy == "Scaffold" else "forked")
    words = ["simulate", tmp_path / "config.toml", "--out", tmp_path / "run", "--quiet"]
    (tmp_path / "config.toml").write_text(TOML.format(strategy=strategy))
    killed = fedge(*words, fail_point=f"{point}:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = list((tmp_path / "run" / "secagg").glob("train-*.json"))
    assert len(kept) == (point in (*MASKED, "mid-aggregate", "after-commit"))
    done = fedge(*words, "--resume")
    assert done.returncode == 0, done.stderr
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert weights == (uninterrupted / strategy / "model.safetensors").read_bytes()
    assert [line["outcome"] for line in lines(tmp_path / "run")] == ["committed"] * 3
    assert not list((tmp_path / "run" / "secagg").glob("*.safetensors"))


# Sites that live on while the coordinator does not, as in a deployment.


class Deployed:
    """Workers of this process that outlive the coordinator."""

    def __init__(self, folder: Path, chosen: Config) -> None:
        self.folder, self.config = folder, chosen
        self.task = get_task(chosen.task.name)
        self.shares = site_shares(chosen, self.task)
        self.anchors = consortium.anchors(self.shares, 3)
        self.trained: list[tuple[str, int]] = []
        self.flower_runs = 0
        self.start()

    def start(self) -> None:
        """New processes of all workers, in the homes of the old ones."""
        for site, data in self.shares.items():
            home = self.folder / "homes" / site
            worker = SiteWorker(site, self.task, data, home, anchors=self.anchors[site])
            message_relay.connect(site, DirectLink(worker))

    def run(self, grid: Callable[..., InProcessGrid] = InProcessGrid, listener: Any = None) -> Path:
        """The coordinator, from where the last one ended."""
        directory, _ = prepare(self.folder / "run", self.config, resume=True)
        self.flower_runs += 1
        network = grid(dict(enumerate(self.shares, start=1)), client_app, self.flower_runs)
        context = Context(self.flower_runs, 0, {}, RecordDict(), {"run-dir": str(directory.path)})
        with directory.lock(), listening(listener or NullListener()):
            server_app(network, context)
        return directory.path

    def end(self) -> None:
        """Disconnect them."""
        for site in self.shares:
            message_relay.disconnect(site)


@pytest.fixture(scope="module")
def chosen() -> Config:
    return reader.from_tree(tomllib.loads(TOML.format(strategy="FedAvg")))


@pytest.fixture(scope="module")
def expected(chosen: Config, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that nothing interrupts."""
    run = simulate(chosen, tmp_path_factory.mktemp("expected") / "run")
    return run.model.read_bytes()


@pytest.fixture
def deployed(
    chosen: Config, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployed]:
    made = Deployed(tmp_path, chosen)
    real = Learner.train

    def fit(worker: Learner, terms: Any, *more: Any) -> Any:
        made.trained.append((worker.site, terms.address.server_round))
        return real(worker, terms, *more)

    monkeypatch.setattr(Learner, "train", fit)
    yield made
    made.end()


class Killed(BaseException):
    """The coordinator has been killed."""


class Mortal(InProcessGrid):
    """Ends the coordinator when a site has answered a message type in a round."""

    site, kind, server_round = "site-3", "", 2

    def __init__(self, sites: Mapping[int, str], app: ClientApp, number: int) -> None:
        super().__init__(sites, app, number)
        self.node = next(n for n, site in sites.items() if site == self.site)

    def _answer(self, message_id: str, message: Message) -> Message:
        reply = super()._answer(message_id, message)
        told = message.content["config"]["server-round"]
        place = (message.metadata.dst_node_id, message.metadata.message_type, told)
        if place == (self.node, self.kind, self.server_round):
            raise Killed
        return reply


def mortal(what: str, server_round: int = 2) -> type[Mortal]:
    return type("Mortal", (Mortal,), {"kind": what, "server_round": server_round})


KINDS = ["train", messages.SHARE, messages.MASKED, messages.COMMIT, messages.UNMASK, "evaluate"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sites_that_live_on_continue_and_answer_no_round_twice(
    kind: str, deployed: Deployed, expected: bytes, tmp_path: Path
) -> None:
    # An evaluation comes after the sum was unmasked: the kept one is there still.
    with pytest.raises(Killed):
        deployed.run(mortal(kind, 3 if kind == "evaluate" else 2))
    done = deployed.run()
    assert (done / "model.safetensors").read_bytes() == expected
    assert [line["outcome"] for line in lines(done)] == ["committed"] * 3
    assert len(deployed.trained) == len(set(deployed.trained)) == 4 * 3, "nothing is trained twice"
    for site in deployed.shares:
        (answered,) = (tmp_path / "homes" / site / "secagg").glob("*.json")
        last = json.loads(answered.read_text())
        assert last == {"statistics": 0, "train": 3, "evaluate": 3}


@pytest.mark.slow
def test_statistics_that_were_about_to_be_unmasked_are_unmasked_too(
    deployed: Deployed, expected: bytes
) -> None:
    with pytest.raises(Killed):
        deployed.run(mortal(messages.UNMASK, 0))
    assert (deployed.run() / "model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_with_other_workers_the_round_is_skipped_and_the_run_goes_on(deployed: Deployed) -> None:
    with pytest.raises(Killed):
        deployed.run(mortal(messages.UNMASK))
    deployed.start()
    done = deployed.run()
    told = lines(done)
    assert [line["outcome"] for line in told] == ["committed", "skipped", "committed"]
    assert "unmask: must be answered by 3 sites" in told[1]["reason"]
    assert {x["exchange"] for x in told[1]["secure"]["lost"]} == {"unmask"}
