"""Flower's own SecAgg+ with both sides in one process: real client mods, and a server that may deviate.

The clients are Flower's ``ClientApp`` with its ``secaggplus_mod``, unchanged. The honest server's steps are written
here, call Flower's primitives, and take what they send as arguments, so that an attack is an honest round with one
argument changed. flower_faults.py puts the same clients under Flower's own server workflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from fedge.simulations import flower_patches

Vector = list[np.ndarray]
Keys = dict[int, list[bytes]]
#: (owner, kind) to shares; kind "b" opens the owner's self-mask, "s" its pairwise masks.
Pool = dict[tuple[int, str], list[bytes]]
Boxes = dict[tuple[int, int], bytes]

#: Flower's defaults.
CLIP: Final = 8.0
LEVELS: Final = 1 << 22
MODULUS: Final = 1 << 32
MAX_WEIGHT: Final = 1000.0
STEP: Final = 2 * CLIP / LEVELS

SHAPES: Final = ((7, 3), (4,))
VICTIM: Final = 3

Verdict = Literal["succeeds", "refused", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """What one attack came to.

    Args:
        name: of the attack.
        verdict: "succeeds", "refused", or "not applicable" where Flower has no such notion.
        what_happened: what was seen, in words and numbers.
    """

    name: str
    verdict: Verdict
    what_happened: str


class Refused(Exception):
    """A client raised; "Type: text" of what it raised."""


class Site:
    """One client: Flower's ClientApp and mod, its state, and a fit that returns a known update.

    Args:
        node: Flower's node id.
        update: float64 arrays of ``SHAPES``.
        examples: the weight, at most ``MAX_WEIGHT``.
    """

    def __init__(self, node: int, update: Vector, examples: int) -> None:
        self.node, self.update, self.examples = node, update, examples
        self._context = Context(1, node, {}, RecordDict(), {})
        self._app = ClientApp(mods=[secaggplus_mod])
        self._app.train()(self._fit)

    @property
    def weighted(self) -> Vector:
        """What the mod masks: the update times its weight, as Flower rounds it."""
        ratio = round(self.examples / MAX_WEIGHT * LEVELS) / LEVELS
        return [part * ratio for part in self.update]

    def answer(self, message: Message) -> Message:
        """Work on a message as the client app would after transport.

        Raises:
            Refused: the client raised, whatever it was.
        """
        delivered = copy(message)
        delivered.content = deepcopy(message.content)
        try:
            return self._app(delivered, self._context)
        except Exception as error:
            name, text = type(error).__name__, str(error)
            raise Refused(f"{name}: {text}" if text else f"{name} without a text") from error

    def _fit(self, message: Message, context: Context) -> Message:
        result = FitRes(
            Status(Code.OK, ""), ndarrays_to_parameters(self.update), self.examples, {"loss": 0.25}
        )
        return Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)


def make_sites(seed: int, count: int = 6) -> dict[int, Site]:
    """Sites 1..count whose updates are uniform in (-1, 1) from ``seed``, with 110, 120, ... examples.

    Flower rounds with NumPy's global generator, so that is seeded too.
    """
    flower_patches.identify(1, 0)
    np.random.seed(seed)
    random = np.random.default_rng(seed)
    return {
        node: Site(node, [random.uniform(-1, 1, shape) for shape in SHAPES], 100 + 10 * node)
        for node in range(1, count + 1)
    }


@dataclass
class Server:
    """The server's half, stage by stage; each stage's arguments say what to send instead of the honest thing.

    Args:
        sites: the clients it talks to.
        threshold: shares that reconstruct a secret, sent to the clients.
        shares: shares of each secret, one a key list entry.
        round: number sent with every message.
    """

    sites: Mapping[int, Site]
    threshold: int = 4
    shares: int = 0
    round: int = 1
    keys: Keys = field(default_factory=dict)

    def ask(self, node: int, stage: str, **config: Any) -> ConfigRecord:
        """One message of the protocol and the client's reply; ``Refused`` where the client raises."""
        record = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(config | {Key.STAGE: stage})})
        message = Message(
            record, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(self.round)
        )
        return self.sites[node].answer(message).content.config_records[RECORD_KEY_CONFIGS]

    def setup(self) -> Keys:
        """Stage 0: the parameters to all; their two public keys each, in PEM."""
        sent = {
            Key.SAMPLE_NUMBER: len(self.sites),
            Key.SHARE_NUMBER: self.shares or len(self.sites),
            Key.THRESHOLD: self.threshold,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: LEVELS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
        replies = {node: self.ask(node, Stage.SETUP, **sent) for node in self.sites}
        self.keys = {n: [r[Key.PUBLIC_KEY_1], r[Key.PUBLIC_KEY_2]] for n, r in replies.items()}
        return self.keys

    def share_keys(self, lists: Mapping[int, Keys] | None = None) -> Boxes:
        """Stage 1: a key list to each client (by default the true one to all); its boxes by (from, to)."""
        boxes: Boxes = {}
        for node in self.sites:
            keys = lists[node] if lists else self.keys
            reply = self.ask(node, Stage.SHARE_KEYS, **{str(n): k for n, k in keys.items()})
            to = reply[Key.DESTINATION_LIST]
            boxes |= {(node, d): b for d, b in zip(to, reply[Key.CIPHERTEXT_LIST], strict=True)}
        return boxes

    def collect(self, boxes: Boxes) -> dict[int, Vector]:
        """Stage 2: the boxes to whom they are for; each client's masked vector, int64."""
        return {node: self.collect_from(node, boxes) for node in self.sites}

    def collect_from(self, node: int, boxes: Boxes) -> Vector:
        """Stage 2 with one client."""
        mine = {src: box for (src, dst), box in boxes.items() if dst == node}
        sent = {Key.SOURCE_LIST: list(mine), Key.CIPHERTEXT_LIST: list(mine.values())}
        reply = self.ask(node, Stage.COLLECT_MASKED_VECTORS, **sent)
        return [bytes_to_ndarray(part) for part in reply[Key.MASKED_PARAMETERS]]

    def unmask_from(self, node: int, active: list[int], dead: list[int], pool: Pool) -> None:
        """Stage 3 with one client; its shares go into ``pool``."""
        sent = {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead}
        reply = self.ask(node, Stage.UNMASK, **sent)
        kinds = "b" * len(active) + "s" * len(dead)
        for owner, kind, share in zip(
            reply[Key.NODE_ID_LIST], kinds, reply[Key.SHARE_LIST], strict=True
        ):
            pool.setdefault((owner, kind), []).append(share)

    def unmask(self, active: Iterable[int], dead: Iterable[int] = ()) -> Pool:
        """Stage 3: the same two lists to all active clients; the shares they hand out."""
        active, dead = list(active), list(dead)
        pool: Pool = {}
        for node in active:
            self.unmask_from(node, active, dead, pool)
        return pool


def until_masked(server: Server) -> tuple[Keys, dict[int, Vector]]:
    """The honest stages 0 to 2: the public keys and the masked vectors."""
    keys = server.setup()
    return keys, server.collect(server.share_keys())


def subtract_self_mask(vector: Vector, seed: bytes) -> Vector:
    """A masked vector, or a sum of such, less one client's self-mask."""
    return parameters_subtraction(
        vector, pseudo_rand_gen(seed, MODULUS, get_parameters_shape(vector))
    )


def subtract_pair_masks(vector: Vector, node: int, secret: bytes, peers: Keys) -> Vector:
    """One client's masked vector less the masks that it shares with ``peers``, from its private key in PEM."""
    for peer, (public, _) in peers.items():
        shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public))
        mask = pseudo_rand_gen(shared, MODULUS, get_parameters_shape(vector))
        take = parameters_subtraction if node > peer else parameters_addition
        vector = take(vector, mask)
    return vector


def recover(vector: Vector, node: int, seed: bytes, secret: bytes, keys: Keys) -> Vector:
    """One client's vector in the clear, from its own two secrets.

    Returns:
        [weight, arrays ...], integers below ``MODULUS``.
    """
    peers = {peer: pair for peer, pair in keys.items() if peer != node}
    vector = subtract_pair_masks(subtract_self_mask(vector, seed), node, secret, peers)
    return parameters_mod(vector, MODULUS)


def total(masked: Mapping[int, Vector], pool: Pool) -> Vector:
    """The sum of all masked vectors less all self-masks: an honest round without drops."""
    vectors = list(masked.values())
    added = vectors[0]
    for vector in vectors[1:]:
        added = parameters_addition(added, vector)
    for node in masked:
        added = subtract_self_mask(added, combine_shares(pool[node, "b"]))
    return parameters_mod(added, MODULUS)


def decode(vector: Vector, clients: int = 1) -> tuple[float, Vector]:
    """Examples and weighted update (their sums, for several clients) of an unmasked vector."""
    weight, arrays = factor_extract(vector)
    decoded = dequantize(arrays, CLIP, LEVELS)
    return weight * MAX_WEIGHT / LEVELS, [part - (clients - 1) * CLIP for part in decoded]


def steps_off(found: Vector, true: Vector) -> float:
    """The largest error of any coordinate, in quantisation steps."""
    return max(float(np.abs(a - b).max()) for a, b in zip(found, true, strict=True)) / STEP


def true_sum(sites: Iterable[Site]) -> Vector:
    """The weighted sum that an aggregation ought to find."""
    return [np.sum(parts, axis=0) for parts in zip(*(s.weighted for s in sites), strict=True)]


def honest_end(server: Server, masked: dict[int, Vector]) -> str:
    """Unmask as an honest server would: was the sum "right" or "wrong"?"""
    _, found = decode(total(masked, server.unmask(server.sites)), len(masked))
    error = steps_off(found, true_sum(server.sites.values()))
    return "right" if error <= len(masked) else "wrong"


def own_secrets(pool: Pool, node: int = VICTIM) -> tuple[bytes, bytes]:
    """A client's self-mask seed and its mask key, from shares of both kinds."""
    return combine_shares(pool[node, "b"]), combine_shares(pool[node, "s"])
