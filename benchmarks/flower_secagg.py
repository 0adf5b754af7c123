"""Times Flower's own SecAgg+ of a round for one client and for the server: its own stage code, in one process.

The client's four stages are the functions that ``secaggplus_mod`` calls; the server's two are the methods of
``SecAggPlusWorkflow`` that add the uploads and remove the masks, under a grid that holds the replies ready. What peers
send is made outside of the timed part (flower_secagg_peers.py), and so is transport: a deployment adds to both.
The graph is complete where ``degree`` is n - 1, otherwise a ring in which each client's neighbours are the
``degree`` / 2 on either side. Each secret takes floor(2 (degree + 1) / 3) + 1 shares.

Used by secure_aggregation.py; by itself, ``python benchmarks/flower_secagg.py`` prints one run of each setting.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.compat.common.recorddict_compat import arrayrecord_to_parameters
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from flower_secagg_peers import (
    CLIP,
    EXAMPLES,
    LEVELS,
    MAX_WEIGHT,
    MODULUS,
    ServerWork,
    prepare_client,
    prepare_server,
    threshold_of,
)

#: Clients, neighbours of each, parameters, fraction that drops before its upload.
SETTINGS = (
    (10, 9, 10**6, 0.0),
    (10, 9, 10**6, 0.3),
    (10, 9, 10**7, 0.0),
    (10, 9, 10**7, 0.3),
    (50, 49, 10**5, 0.0),
    (100, 30, 10**5, 0.0),
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """One timed piece of work.

    Args:
        seconds: wall clock, all parts together.
        upload_bytes: of the masked vector as it travels; 0 for the server.
        parts: seconds by stage.
    """

    seconds: float
    upload_bytes: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)


def client_once(n: int, degree: int, d: int, seed: int = 0) -> Timing:
    """Time all work of one client in a round without drops, training excluded.

    Two key pairs; a key agreement, an encryption and two shares for each neighbour; then its neighbours' shares
    decrypted, its update read from bytes, weighted, quantised and masked, the vector serialised; the shares of all
    seeds.

    Args:
        n: clients in the round.
        degree: neighbours of each client.
        d: parameters.
        seed: of the update and the rounding; keys are new each time.
    """
    work = prepare_client(degree, d, seed)
    np.random.seed(seed)
    clock = _Clock()
    me = SecAggPlusState()
    me.nid = 1
    announced = ConfigRecord(
        {
            Key.SAMPLE_NUMBER: n,
            Key.SHARE_NUMBER: degree + 1,
            Key.THRESHOLD: threshold_of(degree),
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: LEVELS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
    )
    clock.time("setup", lambda: _setup(me, announced))
    listed = work.listed([me.pk1, me.pk2])
    clock.time("share", lambda: _share_keys(me, listed))
    encrypted_shares = work.encrypted_shares(me.pk2)
    reply: Mapping[str, Any] = clock.time(
        "mask", lambda: _collect_masked_vectors(me, encrypted_shares, EXAMPLES, work.update)
    )
    lists = ConfigRecord(
        {Key.ACTIVE_NODE_ID_LIST: [1, *work.peers], Key.DEAD_NODE_ID_LIST: list[int]()}
    )
    clock.time("unmask", lambda: _unmask(me, lists))
    return clock.timing(sum(len(part) for part in reply[Key.MASKED_PARAMETERS]))


def server_once(n: int, degree: int, d: int, dropped: float = 0.0, seed: int = 0) -> Timing:
    """Time the server's work on the uploads and the shares, up to the mean as parameters.

    Args:
        n: clients in the round.
        degree: neighbours of each client.
        d: parameters.
        dropped: fraction of the clients that drop between the encrypted shares and the upload.
        seed: of the updates; keys are new each time.

    Raises:
        RuntimeError: Flower's workflow ended without a sum, or with a wrong one.
    """
    return server_run(prepare_server(n, degree, d, dropped, seed))


def server_run(work: ServerWork) -> Timing:
    """As ``server_once``, for a prepared round; a round can be run once."""
    records = RecordDict()
    records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    records[MAIN_PARAMS_RECORD] = ArrayRecord()
    context = LegacyContext(Context(1, 0, {}, records, {}), None, _Keep())
    flow = SecAggPlusWorkflow(work.state.num_shares, work.state.threshold)
    clock = _Clock()
    done = clock.time(
        "add", lambda: flow.collect_masked_vectors_stage(work.grid, context, work.state)
    ) and clock.time("unmask", lambda: flow.unmask_stage(work.grid, context, work.state))
    if not done:
        raise RuntimeError("Flower's workflow: must find a sum, got none")
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    (mean,) = parameters_to_ndarrays(arrayrecord_to_parameters(record, keep_input=True))
    step = 2 * CLIP / LEVELS * MAX_WEIGHT / EXAMPLES
    if not np.abs(mean - work.mean).max() <= step:
        raise RuntimeError(f"Flower's workflow: must find the mean to {step:.1e}, got another")
    return clock.timing()


class _Keep(FedAvg):
    """A strategy that takes the mean as it comes; FedAvg would average n copies of it."""

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:  # noqa: ARG002
        return results[0][1].parameters, {}


class _Clock:
    """Seconds of each part, garbage collected before it."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        gc.collect()
        started = time.perf_counter()
        result = work()
        self._parts[part] = time.perf_counter() - started
        return result

    def timing(self, upload_bytes: int = 0) -> Timing:
        return Timing(sum(self._parts.values()), upload_bytes, self._parts)


def main() -> None:
    """Print one run of each setting, or of those with the given number of clients."""
    parser = argparse.ArgumentParser(description="Flower's own SecAgg+, one run of each setting.")
    parser.add_argument("--clients", type=int, help="only settings with so many clients")
    only = parser.parse_args().clients
    logging.getLogger("flwr").setLevel(logging.ERROR)
    print("| N | degree | d | dropped | client s | server s | bytes a parameter | load |")
    print("|---|---|---|---|---|---|---|---|")
    for n, degree, d, dropped in SETTINGS:
        if only in (None, n):
            client = client_once(n, degree, d)
            server = server_once(n, degree, d, dropped)
            cells = (
                *(n, degree, f"{d:.0e}", f"{dropped:.0%}"),
                *(f"{client.seconds:.3f}", f"{server.seconds:.2f}"),
                *(f"{client.upload_bytes / d:.4f}", f"{os.getloadavg()[0]:.1f}"),
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
