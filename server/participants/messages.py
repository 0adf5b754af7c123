"""What the server asks of a site, as Flower messages."""

from __future__ import annotations

import hashlib
import random
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
from fedge.server.transport.grids import CohortView
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing.steps import Standardise, Step
from fedge.shared.secagg.messages import PROTOCOL, SECURE
from fedge.shared.secagg.transcript import VERSION
from fedge.shared.wire.tensors import NDArrays


@cache
def own_version() -> str:
    """This fedge's version, which every request carries."""
    return version("fedge")


def cohort(
    members: Mapping[str, Member], config: Config, server_round: int, least: int
) -> list[str]:
    """The sites of a round, drawn by (seed, round) alone; required sites are always among them."""
    names = sorted(members)
    size = min(
        len(names),
        max(int(len(names) * config.round.fraction_train), config.round.min_sites, least),
    )
    seed = hashlib.sha256(f"fedge cohort {config.run.seed} {server_round}".encode()).digest()
    drawn = random.Random(seed).sample(names, size)  # noqa: S311 - reproducible by intent, no secret
    return sorted(set(drawn) | (set(config.round.require_sites) & set(names)))


def address(run_id: str, server_round: int, task: str, asked: int) -> dict[str, ConfigRecordValues]:
    """What every request holds in ``config``, a probe included; ``asked`` nodes are in the exchange."""
    return {
        protocol.RUN_ID: run_id,
        protocol.SERVER_ROUND: server_round,
        protocol.TASK: task,
        protocol.VERSION: own_version(),
        protocol.COHORT: asked,
    }


def probe(run_id: str, server_round: int, task: str, asked: int) -> RecordDict:
    """The content of a probe."""
    return RecordDict({protocol.CONFIG: ConfigRecord(address(run_id, server_round, task, asked))})


def register(run_id: str, config: Config, nodes: Sequence[int], deadline: float) -> list[Message]:
    """Requests to register, a node each."""
    content: dict[str, ConfigRecordValues] = {
        **address(run_id, 0, config.task.name, len(nodes)),
        protocol.STANDARDISE: config.data.standardise,
    }
    if config.privacy.mechanism != "off":
        # By it a site knows how much it may say of itself.
        content[protocol.PRIVACY] = config.privacy.model_dump_json(by_alias=True)
    # Where sums are masked a site says nothing of its sizes, and this asks for nothing.
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
    config: Config, run_id: str, server_round: int, steps: Sequence[Step], asked: int
) -> dict[str, ConfigRecordValues]:
    """What every request to train or evaluate holds in ``config``; ``asked`` sites are invited."""
    values: dict[str, ConfigRecordValues] = {
        **address(run_id, server_round, config.task.name, asked),
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
    accepted: Mapping[str, int],
    config: Config,
    *,
    needs_loss: bool,
    secure: ConfigRecord | None = None,
) -> list[Message]:
    """Training requests in site-name order, as the strategy composes them, each with its site's accepted round.

    ``secure`` is the record that begins a secure sum.
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
                protocol.ACCEPTED_ROUND: accepted.get(member.site, 0),
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
    """Requests for figures in site-name order; ``secure`` is the record that begins a secure sum."""
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
    """A request to a member, which Flower keeps a while longer than the deadline in seconds."""
    return Message(
        content,
        dst_node_id=member.node_id,
        message_type=kind,
        group_id=str(server_round),
        ttl=deadline + GRACE,
    )
