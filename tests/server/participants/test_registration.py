"""Registration through real apps on an in-process Grid: who is admitted, and which numbers are fixed by it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge.server.participants import registration
from fedge.server.participants.members import Member
from fedge.server.runs.journal import Journal
from fedge.server.runs.listener import NullListener
from fedge.server.training import run
from fedge.server.transport.grid_calls import Clock, GridClient
from fedge.server.transport.node_status import NodeStatus
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.config.sections import DataSection
from fedge.shared.errors import RunError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Scale, Standardise
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task
from fedge.simulations.grid import InProcessGrid

Reply = dict[str, Any]
RUN = "r-20260101-abc"
TASK = get_task("breast-cancer")
FEATURES = TASK.load(None).features


def config(count: int = 3, **round_options: Any) -> Config:
    timed = {"deadline": 20.0, **round_options}
    return builders.config("breast-cancer", sites={"count": count}, round=timed)


def rows(node: int) -> np.ndarray[Any, Any]:
    """The training rows that a node holds: twenty of its own."""
    return FEATURES[20 * node : 20 * node + 20]


def honest(node: int) -> Reply:
    sums = preprocessing.statistics(TASK.preprocessing, rows(node))
    return {
        "site": f"site-{node}",
        "num-train-examples": 20,
        "num-test-examples": 5,
        "feature-total": list(sums.total),
        "feature-total-of-squares": list(sums.total_of_squares),
    }


def grid(
    count: int, change: Callable[[int, Reply], Any] = lambda node, reply: None
) -> InProcessGrid:
    """Nodes that register as they should, except for what ``change`` does to a reply."""
    app = ClientApp()

    @app.query("register")
    def register(message: Message, context: Context) -> Message:
        reply_values = honest(context.node_id)
        change(context.node_id, reply_values)
        asked = message.content.config_records["config"]
        answer = ConfigRecord(
            {
                "run-id": asked["run-id"],
                "server-round": asked["server-round"],
                "task": asked["task"],
                "site": reply_values.pop("site"),
            }
        )
        return Message(
            RecordDict({"config": answer, "metrics": MetricRecord(reply_values)}), reply_to=message
        )

    return InProcessGrid({n: f"site-{n}" for n in range(1, count + 1)}, app, 7)


@pytest.fixture
def journal(tmp_path: Path):
    opened = Journal(tmp_path / "journal.db")
    opened.begin_run(RUN, "", "then")
    yield opened
    opened.close()


def still() -> Clock:
    """A clock that takes no time: sleeping moves it."""
    at = [1000.0]

    def sleep(seconds: float) -> None:
        at[0] += max(seconds, 0.001)

    return Clock(lambda: at[0], sleep)


def take(
    nodes: InProcessGrid,
    given: Config,
    journal: Journal,
    task: Task = TASK,
    clock: Clock | None = None,
):
    node_status = NodeStatus(GridClient(nodes, clock or still()))
    registry = registration.Registry(node_status, given, task, RUN, journal, NullListener())
    taken = registry.take(7)
    run.fit_preprocessing(journal, task, given, registry)
    return taken


def test_all_register_in_name_order_and_are_written_down(journal: Journal):
    members, refused = take(grid(3), config(3), journal)
    assert refused == []
    assert list(members) == ["site-1", "site-2", "site-3"]
    assert members["site-2"] == Member("site-2", 2, 20, 5)
    assert journal.sites() == {f"site-{n}": (20, 5) for n in (1, 2, 3)}


def test_the_fitted_preprocessing_is_that_of_all_sites_rows(journal: Journal):
    take(grid(3), config(3), journal)
    row = journal.run()
    assert row is not None
    (step,) = preprocessing.from_json(row.preprocessing)
    assert isinstance(step, Standardise)
    whole = np.concatenate([rows(n) for n in (1, 2, 3)]).astype(np.float64)
    np.testing.assert_allclose(step.mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(step.std, whole.std(axis=0, ddof=1), rtol=1e-9)


def test_a_task_that_learns_nothing_is_written_down_as_it_is(journal: Journal):
    steps = (Scale(0.5),)
    task = Task(**{**vars(TASK), "preprocessing": steps})
    members, _ = take(grid(3), config(3), journal, task)
    assert len(members) == 3
    assert journal.run().preprocessing == [{"op": "scale", "factor": 0.5}]  # type: ignore[union-attr]


def test_sites_that_standardise_by_themselves_need_report_no_sums(journal: Journal):
    def silent(node: int, reply: Reply) -> None:
        del reply["feature-total"], reply["feature-total-of-squares"]

    own = config(3).model_copy(update={"data": DataSection(standardise="site")})
    members, refused = take(grid(3, silent), own, journal)
    assert len(members) == 3
    assert refused == []
    assert journal.run().preprocessing == [Standardise().to_json()]  # type: ignore[union-attr]


def test_sums_are_asked_of_every_site_where_they_are_pooled(journal: Journal):
    def silent(node: int, reply: Reply) -> None:
        if node == 2:
            del reply["feature-total"]

    members, (rejection,) = take(grid(3, silent), config(3), journal)
    assert list(members) == ["site-1", "site-3"]
    assert rejection.code == 412


def test_of_two_with_one_name_the_second_is_refused(journal: Journal):
    def double(node: int, reply: Reply) -> None:
        if node == 3:
            reply |= {"site": "site-1", "num-test-examples": 6}

    members, refused = take(grid(3, double), config(3), journal)
    assert list(members) == ["site-1", "site-2"]
    assert members["site-1"].node_id == 1
    (rejection,) = refused
    assert (rejection.site, rejection.code, rejection.outcome) == ("site-1", 412, "duplicate")
    assert journal.sites()["site-1"] == (20, 5)


def test_registering_again_on_resume_changes_nothing(journal: Journal):
    take(grid(3), config(3), journal)
    before = (journal.sites(), journal.run())
    members, refused = take(grid(3), config(3), journal)
    assert len(members) == 3
    assert refused == []
    assert (journal.sites(), journal.run()) == before


def test_statistics_are_fitted_once_a_run(journal: Journal):
    take(grid(3), config(3), journal)
    before = journal.run()
    take(grid(2), config(3), journal)
    assert journal.run() == before


@pytest.mark.parametrize(("train", "test"), [(19, 5), (21, 5), (20, 4), (20, 6)])
def test_another_size_on_resume_is_refused(train: int, test: int, journal: Journal):
    take(grid(3), config(3), journal)

    def regrown(node: int, reply: Reply) -> None:
        if node == 2:
            sums = preprocessing.statistics(TASK.preprocessing, FEATURES[40 : 40 + train])
            reply |= {
                "num-train-examples": train,
                "num-test-examples": test,
                "feature-total": list(sums.total),
                "feature-total-of-squares": list(sums.total_of_squares),
            }

    members, refused = take(grid(3, regrown), config(3), journal)
    assert list(members) == ["site-1", "site-3"]
    assert [(r.site, r.code, r.outcome) for r in refused] == [("site-2", 412, "rejected")]
    assert journal.sites()["site-2"] == (20, 5)


@pytest.mark.parametrize(
    "name",
    ["", "Site-1", "-a", "a-", "a" * 65, "../../etc", "a b", "a\n", "site-1\0", "é", "<b>", 7, b"site-2"],
)  # fmt: skip
def test_hostile_names_are_refused_and_not_repeated_at_length(name: Any, journal: Journal):
    def named(node: int, reply: Reply) -> None:
        if node == 2:
            reply["site"] = name

    members, (rejection,) = take(grid(3, named), config(3), journal)
    assert list(members) == ["site-1", "site-3"]
    assert (rejection.site, rejection.code) == ("node 2", 412)
    assert rejection.reason.isprintable()
    assert len(rejection.reason) < 200


def _scaled(key: str, by: float) -> Callable[[Reply], Reply]:
    return lambda reply: {key: [by * v for v in reply[key]]}


@pytest.mark.parametrize(
    "poison",
    [
        lambda reply: {"num-train-examples": 0},
        lambda reply: {"num-train-examples": -3},
        lambda reply: {"num-train-examples": 20.0},
        lambda reply: {"num-train-examples": 10**12},
        lambda reply: {"num-test-examples": -1},
        lambda reply: {"feature-total": reply["feature-total"][:-1]},
        lambda reply: {"feature-total": [float("nan"), *reply["feature-total"][1:]]},
        lambda reply: {"feature-total-of-squares": [float("inf")] * 30},
        lambda reply: {"feature-total": 3.0},
        _scaled("feature-total", -1.0),
        _scaled("feature-total", 1e6),
        _scaled("feature-total-of-squares", 0.5),
        _scaled("feature-total-of-squares", 1e9),
        lambda reply: {"feature-total-of-squares": [-1.0] * 30},
    ],
)
def test_sizes_and_statistics_out_of_range_are_refused_and_do_not_count(
    poison: Callable[[Reply], Reply], journal: Journal
):
    def poisoned(node: int, reply: Reply) -> None:
        if node == 2:
            reply |= poison(reply)

    members, (rejection,) = take(grid(3, poisoned), config(3), journal)
    assert list(members) == ["site-1", "site-3"]
    assert rejection.code == 412
    (step,) = preprocessing.from_json(journal.run().preprocessing)  # type: ignore[union-attr]
    honest_rows = np.concatenate([rows(1), rows(3)]).astype(np.float64)
    np.testing.assert_allclose(step.mean, honest_rows.mean(axis=0), rtol=1e-12)  # type: ignore[union-attr]


def test_501_fewer_than_min_sites_says_why(journal: Journal):
    def refused(node: int, reply: Reply) -> None:
        if node > 1:
            reply["num-train-examples"] = 0

    clock = still()
    started = clock.now()
    with pytest.raises(RunError, match="num-train-examples") as stopped:
        take(grid(3, refused), config(3, **{"min-sites": 2}), journal, clock=clock)
    assert stopped.value.code == 501
    assert stopped.value.message.startswith("sites: must be at least 2, got 1: site-2: ")
    assert clock.now() - started < 10, "nobody is waited for who has spoken"
    assert journal.run().preprocessing is None  # type: ignore[union-attr]


def test_501_with_very_many_reasons_is_cut_between_words(journal: Journal):
    def refused(node: int, reply: Reply) -> None:
        reply["num-train-examples"] = 0

    with pytest.raises(RunError) as stopped:
        take(grid(30, refused), config(30), journal)
    message = stopped.value.message
    assert 700 < len(message) <= 800
    assert message.endswith(" …")
    first, last = message.partition("; ")[0].split(), message.split()[-2].rstrip(";")
    assert last in first or last.startswith("site-")


def test_501_after_the_deadline_where_sites_never_come(journal: Journal):
    clock = still()
    started = clock.now()
    with pytest.raises(RunError) as stopped:
        take(grid(1), config(3), journal, clock=clock)
    assert stopped.value.code == 501
    assert 20 <= clock.now() - started < 25


def test_enough_but_not_all_start_after_the_deadline(journal: Journal):
    members, _ = take(grid(2), config(3), journal)
    assert list(members) == ["site-1", "site-2"]


@pytest.mark.slow
def test_a_site_that_comes_later_is_taken_in(journal: Journal):
    class Growing(InProcessGrid):
        asked = 0

        def get_node_ids(self) -> Any:
            self.asked += 1
            return [1] if self.asked == 1 else list(super().get_node_ids())

    nodes = grid(3)
    nodes.__class__ = Growing
    members, _ = take(nodes, config(3), journal)
    assert list(members) == ["site-1", "site-2", "site-3"]


def test_502_a_required_site_is_missing(journal: Journal):
    with pytest.raises(RunError, match="site-9") as stopped:
        take(grid(3), config(3, **{"require-sites": ["site-1", "site-9"]}), journal)
    assert stopped.value.code == 502


def test_a_node_that_fails_is_refused_with_its_number_only(journal: Journal):
    def failing(node: int, reply: Reply) -> None:
        if node == 2:
            raise RuntimeError("patient 4711 is missing")

    members, (rejection,) = take(grid(3, failing), config(3), journal)
    assert list(members) == ["site-1", "site-3"]
    assert (rejection.site, rejection.outcome) == ("node 2", "error")
    assert "4711" not in rejection.reason


def test_the_request_says_run_task_and_round_zero(journal: Journal):
    seen: list[dict[str, Any]] = []
    app = ClientApp()

    @app.query("register")
    def register(message: Message, context: Context) -> Message:
        seen.append(dict(message.content.config_records["config"]))
        raise LookupError

    with pytest.raises(RunError):
        take(InProcessGrid({1: "site-1"}, app, 7), config(1, **{"min-sites": 1}), journal)
    assert seen == [
        {
            protocol.RUN_ID: RUN,
            protocol.SERVER_ROUND: 0,
            protocol.TASK: "breast-cancer",
            protocol.STANDARDISE: "federated",
            protocol.VERSION: version("fedge"),
            protocol.COHORT: 1,
        }
    ]
