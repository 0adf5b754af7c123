"""A round of Flower's own SecAgg+ made ready: what others send to the side that flower_secagg.py times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    ndarray_to_bytes,
    ndarrays_to_parameters,
)
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_mod
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from fedge.simulations import flower_patches

#: Flower's defaults.
CLIP: Final = 8.0
LEVELS: Final = 1 << 22
MODULUS: Final = 1 << 32
MAX_WEIGHT: Final = 1000.0
#: Every client's.
EXAMPLES: Final = 250

#: Bytes of the two secrets that Flower shares: a seed, and a P-384 key in PEM.
_SECRETS: Final = (32, 306)

Shares = dict[int, dict[int, bytes]]


def threshold_of(degree: int) -> int:
    """Shares that reconstruct a secret of which a client and its neighbours hold one each: floor(2N/3) + 1."""
    return 2 * (degree + 1) // 3 + 1


def neighbours(node: int, n: int, degree: int) -> set[int]:
    """A client and its neighbours on the ring 1..n; all clients when ``degree`` is n - 1."""
    if degree >= n - 1:
        return set(range(1, n + 1))
    half = degree // 2
    return {(node - 1 + offset) % n + 1 for offset in range(-half, half + 1)}


@dataclass
class ClientWork:
    """Inputs of client 1 for a round.

    Args:
        peers: its neighbours' private keys for encrypting shares, by node id.
        keys: their two public keys in PEM, for masks and for encrypting shares.
        update: the client's update of one float32 array, as its training returns it.
    """

    peers: dict[int, Any]
    keys: dict[str, list[bytes]]
    update: Parameters

    def listed(self, own: list[bytes]) -> ConfigRecord:
        """The key list that the client gets."""
        return ConfigRecord({**self.keys, "1": own})

    def encrypted_shares(self, public: bytes) -> ConfigRecord:
        """An encrypted share from every neighbour to the client: of each of two secrets as long as Flower's."""
        ciphertexts = []
        for node, private in self.peers.items():
            b, s = (create_shares(os.urandom(size), 2, 2)[0] for size in _SECRETS)
            key = generate_shared_key(private, bytes_to_public_key(public))
            ciphertexts.append(encrypt(key, share_keys_plaintext_concat(node, 1, b, s)))
        return ConfigRecord({Key.SOURCE_LIST: list(self.peers), Key.CIPHERTEXT_LIST: ciphertexts})


def prepare_client(degree: int, d: int, seed: int) -> ClientWork:
    """The neighbours' keys, and an update of ``d`` parameters uniform in (-1, 1)."""
    pairs = {node: (generate_key_pairs(), generate_key_pairs()) for node in range(2, degree + 2)}
    update = np.random.default_rng(seed).uniform(-1, 1, d).astype(np.float32)
    return ClientWork(
        {node: encryption[0] for node, (_, encryption) in pairs.items()},
        {str(node): [public_key_to_bytes(pair[1]) for pair in two] for node, two in pairs.items()},
        ndarrays_to_parameters([update]),
    )


@dataclass
class ServerWork:
    """A round at the server when the encrypted shares are out: replies ready, Flower's own state filled.

    Args:
        grid: gives the uploads, then the shares.
        state: of Flower's workflow.
        mean: of the updates that were uploaded, float64 ``[d]``.
    """

    grid: Canned
    state: WorkflowState
    mean: np.ndarray[Any, np.dtype[np.float64]]


def prepare_server(n: int, degree: int, d: int, dropped: float, seed: int) -> ServerWork:
    """Uploads and shares of ``n`` clients of whom a fraction, spread evenly, drops before its upload.

    Masks between two clients that both upload cancel in the sum, so they are left out of the uploads.
    """
    flower_patches.identify(1, 0)
    np.random.seed(seed)
    random = np.random.default_rng(seed)
    nodes = range(1, n + 1)
    around = {node: neighbours(node, n, degree) for node in nodes}
    num_dropped = round(n * dropped)
    dead = {1 + i * n // num_dropped for i in range(num_dropped)}
    pairs = {node: generate_key_pairs() for node in nodes}
    seeds = {node: random.bytes(32) for node in nodes}
    # Only what will be asked for: a client's seed if it uploads, its mask key if it drops out.
    secrets = {a: private_key_to_bytes(pairs[a][0]) if a in dead else seeds[a] for a in nodes}

    uploads, mean = {}, np.zeros(d)
    for node in sorted(set(nodes) - dead):
        update = random.uniform(-1, 1, d)
        mean += update / (n - num_dropped)
        masks = [(1, seeds[node])]
        for other in sorted(around[node] & dead):
            shared = generate_shared_key(pairs[node][0], pairs[other][1])
            masks.append((1 if node > other else -1, shared))
        uploads[node] = _upload(update, masks)
    held = _shares(secrets, around, threshold_of(degree))
    replies = {node: _reply(held[node], dead) for node in uploads}
    grid = Canned([uploads, replies])
    state = WorkflowState(
        nid_to_proxies={node: GridClientProxy(node, grid, 1) for node in nodes},
        nid_to_fitins={node: RecordDict() for node in nodes},
        sampled_node_ids=set(nodes),
        active_node_ids=set(nodes),
        num_shares=degree + 1,
        threshold=threshold_of(degree),
        clipping_range=CLIP,
        quantization_range=LEVELS,
        mod_range=MODULUS,
        max_weight=MAX_WEIGHT,
        nid_to_neighbours=around,
        nid_to_publickeys={a: [public_key_to_bytes(pairs[a][1]), b""] for a in nodes},
        forward_srcs={node: [] for node in nodes},
        forward_ciphertexts={node: [] for node in nodes},
    )
    return ServerWork(grid, state, mean)


class Canned(Grid):
    """A grid that answers each batch of messages from replies made before.

    Args:
        batches: contents by node; a node that has none dropped.
    """

    def __init__(self, batches: list[dict[int, RecordDict]]) -> None:
        self._batches = batches

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> list[Message]:
        """The next batch."""
        ready = self._batches.pop(0)
        return [
            Message(ready[node], reply_to=message)
            if (node := message.metadata.dst_node_id) in ready
            else Message(Error(0, "lost"), reply_to=message)
            for message in messages
        ]

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    set_run = create_message = get_node_ids = push_messages = pull_messages = _unused
    run = property(_unused)


def _shares(secrets: Mapping[int, bytes], around: Mapping[int, set[int]], threshold: int) -> Shares:
    """By holder and owner, a share of each owner's secret to each of its neighbours."""
    held: Shares = {node: {} for node in secrets}
    for owner, secret in secrets.items():
        holders = sorted(around[owner])
        shares = create_shares(secret, threshold, len(holders))
        for holder, share in zip(holders, shares, strict=True):
            held[holder][owner] = share
    return held


def _reply(held: Mapping[int, bytes], dead: set[int]) -> RecordDict:
    """A client's reply to the unmask stage: the shares of those that live, then of the others."""
    order = [a for a in held if a not in dead] + [a for a in held if a in dead]
    config = ConfigRecord({Key.NODE_ID_LIST: order, Key.SHARE_LIST: [held[a] for a in order]})
    return RecordDict({RECORD_KEY_CONFIGS: config})


def _upload(update: np.ndarray[Any, Any], masks: Iterable[tuple[int, bytes]]) -> RecordDict:
    """A client's reply to the upload stage: the mod empties the arrays of the fit result, and adds the vector."""
    ratio = round(EXAMPLES / MAX_WEIGHT * LEVELS)
    vector = [np.array([ratio]), *quantize([update * (ratio / LEVELS)], CLIP, LEVELS)]
    for sign, key in masks:
        mask = pseudo_rand_gen(key, MODULUS, [part.shape for part in vector])
        vector = [v + sign * m for v, m in zip(vector, mask, strict=True)]
    sent = [ndarray_to_bytes(part) for part in parameters_mod(vector, MODULUS)]
    result = FitRes(Status(Code.OK, ""), Parameters([], "numpy.ndarray"), EXAMPLES, {})
    content = compat.fitres_to_recorddict(result, keep_input=True)
    for arrays in content.array_records.values():
        arrays.clear()
    content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord({Key.MASKED_PARAMETERS: sent})
    return content
