"""The server's requests to the sites, as Flower messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord, ConfigRecordValues, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedge.server.aggregation.updates import record
from fedge.server.participants.members import Member
from fedge.server.transport.delivery import GRACE
from fedge.server.transport.grid_wrappers import CohortView
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing.steps import Standardise, Step
from fedge.shared.secagg.messages import PROTOCOL, SECURE
from fedge.shared.secagg.transcript import VERSION
from fedge.shared.wire.tensors import NDArrays


@cache
def own_version() -> str:
    """Version of this fedge, which every request carries."""
    return version("fedge")


def address(
    run_id: str, server_round: int, task: str, cohort_size: int
) -> dict[str, ConfigRecordValues]:
    """The values that every request holds in its ``config`` record, a probe included.

    Args:
        run_id: fedge's id of the run.
        server_round: from 1; 0 before the first round.
        task: name of the task.
        cohort_size: number of nodes in the exchange.
    """
    return {
        protocol.RUN_ID: run_id,
        protocol.SERVER_ROUND: server_round,
        protocol.TASK: task,
        protocol.VERSION: own_version(),
        protocol.COHORT: cohort_size,
    }


def probe(run_id: str, server_round: int, task: str, cohort_size: int) -> RecordDict:
    """The content of a probe; arguments as in ``address``."""
    return RecordDict(
        {protocol.CONFIG: ConfigRecord(address(run_id, server_round, task, cohort_size))}
    )


def register(run_id: str, config: Config, nodes: Sequence[int], deadline: float) -> list[Message]:
    """Compose requests to register, one a node.

    Args:
        run_id: fedge's id of the run.
        config: configuration of the run.
        nodes: Flower's ids of the nodes.
        deadline: time for the reply, in seconds.
    """
    content: dict[str, ConfigRecordValues] = {
        **address(run_id, 0, config.task.name, len(nodes)),
        protocol.STANDARDISE: config.data.standardise,
    }
    if config.privacy.mechanism != "off":
        # The mechanism decides what a site may report about its data.
        content[protocol.PRIVACY] = config.privacy.model_dump_json(by_alias=True)
    # Under secure aggregation a site does not report its numbers of examples, and this does not ask for them.
    secure = ConfigRecord({PROTOCOL: VERSION}) if config.secure_aggregation.enabled else None
    return [
        Message(
            _with({protocol.CONFIG: ConfigRecord({**content})}, secure),
            dst_node_id=node,
            message_type=protocol.REGISTER,
            ttl=deadline + GRACE,
        )
        for node in nodes
    ]


def settings(
    config: Config, run_id: str, server_round: int, steps: Sequence[Step], cohort_size: int
) -> dict[str, ConfigRecordValues]:
    """The values that every request to train or evaluate holds in its ``config`` record.

    Args:
        config: configuration of the run.
        run_id: fedge's id of the run.
        server_round: from 1.
        steps: the run's preprocessing, with the fitted means and standard deviations.
        cohort_size: number of invited sites.
    """
    values: dict[str, ConfigRecordValues] = {
        **address(run_id, server_round, config.task.name, cohort_size),
        protocol.SEED: config.run.seed,
        protocol.THREADS: config.run.threads,
        protocol.STANDARDISE: config.data.standardise,
    }
    if config.privacy.mechanism != "off":
        values[protocol.PRIVACY] = config.privacy.model_dump_json(by_alias=True)
        values[protocol.ROUNDS] = config.run.rounds
    if config.privacy.metrics == "noised":
        values[protocol.EVALUATE_EVERY] = min(config.run.evaluate_every, config.run.rounds)
        if config.calibration.enabled:
            values[protocol.CALIBRATION] = config.calibration.model_dump_json(by_alias=True)
    for step in steps:
        if isinstance(step, Standardise) and step.mean:
            values[protocol.FEATURE_MEAN], values[protocol.FEATURE_STD] = (
                list(step.mean),
                list(step.std),
            )
    return values


def train(
    grid: Grid,
    strategy: flower.FedAvg,
    arrays: NDArrays,
    common: Mapping[str, ConfigRecordValues],
    members: Sequence[Member],
    accepted_rounds: Mapping[str, int],
    config: Config,
    *,
    needs_loss: bool,
    secure: ConfigRecord | None = None,
) -> list[Message]:
    """Compose the requests to train, in the order of ``members``.

    Args:
        grid: Flower's grid, of which the strategy sees only the nodes of ``members``.
        strategy: composes the requests; an adaptive strategy also stores ``arrays``.
        arrays: tensor name -> the round's weights, each of the model's shape and dtype.
        common: values of the ``config`` record that all requests share, from ``settings``.
        members: the sites that are asked to train, in name order.
        accepted_rounds: site -> last round in which its update was accepted; 0 for a site that is missing.
        config: configuration of the run.
        needs_loss: whether the strategy weighs by the loss of the received weights; else the sites report the running
            loss of their training.
        secure: record that begins a secure sum; None without secure aggregation.

    Returns:
        One message a member, which Flower keeps for ``round.deadline`` and ``GRACE`` seconds.
    """
    server_round = int(str(common[protocol.SERVER_ROUND]))
    composed = ConfigRecord(
        {
            **common,
            protocol.SETTINGS: config.train.model_dump_json(by_alias=True),
            protocol.LOSS_AT: "received" if needs_loss else "running",
        }
    )
    view = CohortView(grid, [m.node_id for m in members])
    by_node = {
        m.metadata.dst_node_id: m
        for m in strategy.configure_train(server_round, record(arrays), composed, view)
    }
    requests = []
    for member in members:
        content = by_node[member.node_id].content
        own = ConfigRecord(
            {
                **content.config_records[protocol.CONFIG],
                protocol.ACCEPTED_ROUND: accepted_rounds.get(member.site, 0),
            }
        )
        requests.append(
            message(
                _with({protocol.ARRAYS: content[protocol.ARRAYS], protocol.CONFIG: own}, secure),
                member,
                MessageType.TRAIN,
                server_round,
                config.round.deadline,
            )
        )
    return requests


def evaluate(
    arrays: NDArrays,
    common: Mapping[str, ConfigRecordValues],
    members: Sequence[Member],
    config: Config,
    secure: ConfigRecord | None = None,
    kind: str = protocol.EVALUATE,
) -> list[Message]:
    """Compose requests to evaluate the model, in the order of ``members``.

    Args:
        arrays: tensor name -> the model's weights.
        common: values of the ``config`` record, from ``settings``.
        members: the sites that are asked, in name order.
        config: configuration of the run.
        secure: record that begins a secure sum; None without secure aggregation.
        kind: message type.
    """
    content = _with(
        {protocol.ARRAYS: record(arrays), protocol.CONFIG: ConfigRecord({**common})}, secure
    )
    server_round, deadline = int(str(common[protocol.SERVER_ROUND])), config.round.deadline
    return [message(content, m, kind, server_round, deadline) for m in members]


def _with(records: Mapping[str, Any], secure: ConfigRecord | None) -> RecordDict:
    return RecordDict({**records, **({} if secure is None else {SECURE: secure})})


def message(
    content: RecordDict, member: Member, kind: str, server_round: int, deadline: float
) -> Message:
    """Compose a request to a member.

    Args:
        content: records of the message.
        member: its receiver.
        kind: message type.
        server_round: becomes the message's group id.
        deadline: in seconds; Flower keeps the message ``GRACE`` seconds longer.
    """
    return Message(
        content,
        dst_node_id=member.node_id,
        message_type=kind,
        group_id=str(server_round),
        ttl=deadline + GRACE,
    )
