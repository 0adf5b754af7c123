"""Two faults under Flower's own SecAgg+: a NaN in an update, and clients that drop under its own server workflow."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    parameters_to_arrayrecord,
)
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid

from .flower_parties import (
    CLIP,
    MAX_WEIGHT,
    SHAPES,
    STEP,
    VICTIM,
    Outcome,
    Refused,
    Server,
    Site,
    decode,
    make_sites,
    steps_off,
    total,
    true_sum,
    until_masked,
)


def nan_update(seed: int) -> Outcome:
    """One coordinate of the victim's update is NaN."""
    server = Server(make_sites(seed))
    server.sites[VICTIM].update[0][2, 1] = np.nan
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _, masked = until_masked(server)
    said = ", ".join(str(warning.message) for warning in warned)
    found = decode(total(masked, server.unmask(server.sites)), len(masked))[1]
    others = true_sum(s for n, s in server.sites.items() if n != VICTIM)
    added = found[0][2, 1] - others[0][2, 1]
    return Outcome(
        "nan-update",
        "succeeds" if abs(added) > CLIP else "refused",
        f"no client raised (NumPy warned: {said or 'nothing'}); the victim's share of that coordinate "
        f"became {added:.3f} in the weighted sum, where {CLIP:g} is the largest that the clip allows",
    )


def dropout_before_upload(seed: int) -> Outcome:
    """Six clients under Flower's own workflow, threshold 4; one or two drop at each stage up to the upload."""
    said, survived = [], []
    for stage, lost in (
        (Stage.SETUP, [VICTIM]),
        (Stage.SHARE_KEYS, [VICTIM]),
        (Stage.COLLECT_MASKED_VECTORS, [VICTIM]),
        (Stage.COLLECT_MASKED_VECTORS, [VICTIM, 5]),
        (Stage.UNMASK, [VICTIM]),
    ):
        done, text = workflow_round(seed, [(node, stage) for node in lost])
        survived.append(done)
        said.append(f"{len(lost)} at {stage}: {text}")
    return Outcome(
        "dropout-before-upload", "refused" if all(survived) else "succeeds", "; ".join(said)
    )


def workflow_round(seed: int, lost: Iterable[tuple[int, str]]) -> tuple[bool, str]:
    """One round of Flower's SecAggPlusWorkflow with FedAvg over six clients, threshold 4.

    Args:
        seed: of the updates.
        lost: (node, stage) at which a client drops for good.

    Returns:
        Whether the model became the mean of those who uploaded; what happened, in words.
    """
    sites = make_sites(seed)
    random.seed(seed)
    lost = list(lost)
    grid = Loopback(sites, lost)
    manager = SimpleClientManager()
    for node in sites:
        manager.register(GridClientProxy(node, grid, 1))
    start = [np.full(shape, 77.0) for shape in SHAPES]
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    state[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(ndarrays_to_parameters(start), True)
    strategy = FedAvg(min_fit_clients=6, min_available_clients=6)
    context = LegacyContext(Context(1, 0, {}, state, {}), None, strategy, manager)
    try:
        SecAggPlusWorkflow(6, 4)(grid, context)
    except Exception as error:  # what Flower's server would die of
        return False, f"the workflow raised {type(error).__name__}: {error}"
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    assert isinstance(record, ArrayRecord)
    found = parameters_to_ndarrays(arrayrecord_to_parameters(record, True))
    raised = sorted(set(grid.raised.values()))
    also = f" ({len(grid.raised)} clients raised {', '.join(raised)})" if raised else ""
    if np.array_equal(found[0], start[0]):
        return False, f"the round ended without a sum{also}"
    early = {node for node, stage in lost if stage != Stage.UNMASK}
    kept = [site for node, site in sites.items() if node not in early]
    weight = sum(site.examples for site in kept) / MAX_WEIGHT
    error = steps_off(found, [part / weight for part in true_sum(kept)]) * weight
    if error <= len(kept):
        return True, f"the mean of the {len(kept)} uploads was right{also}"
    return False, f"the mean was wrong by {error * STEP / weight:.0f}, silently{also}"


class Loopback(Grid):
    """Flower's Grid to sites of this process, for its own server workflow.

    Args:
        sites: the clients.
        lost: (node, stage) pairs at which a client drops: from there on it answers nothing but an error.
    """

    def __init__(self, sites: Mapping[int, Site], lost: Iterable[tuple[int, str]] = ()) -> None:
        self._sites, self._lost, self._gone = sites, set(lost), set[int]()
        #: What the clients raised, by node.
        self.raised: dict[int, str] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """One reply a message; an exception becomes Flower's error reply."""
        return [self._deliver(message) for message in messages]

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        if (node, stage) in self._lost:
            self._gone.add(node)
        if node in self._gone:
            return Message(Error(code=0, reason="lost"), reply_to=message)
        try:
            return self._sites[node].answer(message)
        except Refused as error:  # as Flower's runtime does
            self.raised[node] = str(error)
            return Message(Error(code=2, reason=str(error)), reply_to=message)

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self._sites)

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    set_run = create_message = push_messages = pull_messages = _unused
    run = property(_unused)
