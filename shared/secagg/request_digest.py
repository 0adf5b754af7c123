"""The job: what a server asks of all sites alike, so that nobody is served another model than the others.

Eluding Secure Aggregation in Federated Learning via Model Inconsistency, CCS 2022, https://arxiv.org/abs/2111.07380, is
why weights are a part of it: sites that were sent different ones refuse each other's signatures.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.secagg import messages, parallel
from fedge.shared.secagg.key_agreement import framed

_LEAF_BYTES: Final = 2**20
#: A request's keys that differ from site to site or from try to try; the job is what is left.
_OWN: Final = (protocol.ACCEPTED_ROUND, protocol.COHORT, messages.ATTEMPT)


def digest(kind: str, content: RecordDict) -> bytes:
    """SHA-256 of all that a request asks of every site alike: settings and weights, but not the attempt.

    Args:
        kind: its message type.
        content: whose arrays have been checked.

    Raises:
        SiteError: 414, a value is not finite, or no number, text or bytes.
    """
    found = hashlib.sha256(kind.encode())
    for name in (protocol.CONFIG, messages.SECURE):
        record = content.get(name)
        values = dict(record) if isinstance(record, ConfigRecord) else {}
        for key in _OWN:
            values.pop(key, None)
        try:
            text = json.dumps(values, sort_keys=True, allow_nan=False, default=no_json)
        except ValueError:
            raise SiteError(414, f"{name}: must hold finite numbers, got NaN or infinity") from None
        found.update(framed(name.encode(), text.encode()))
    arrays = content.get(protocol.ARRAYS)
    if isinstance(arrays, ArrayRecord):
        for name in sorted(arrays):
            array = arrays[name]
            shape = repr(tuple(array.shape)).encode()
            found.update(framed(name.encode(), array.dtype.encode(), shape))
            found.update(len(array.data).to_bytes(8, "big"))
            found.update(b"".join(_leaves(array.data)))
    return found.digest()


def _leaves(data: bytes) -> list[bytes]:
    """SHA-256 of each MiB: a tree of two levels, which cores can share; its shape follows from the length."""
    view = memoryview(data)
    found = [b""] * -(-len(data) // _LEAF_BYTES)

    def work(some: range) -> None:
        for i in some:
            found[i] = hashlib.sha256(view[i * _LEAF_BYTES : (i + 1) * _LEAF_BYTES]).digest()

    parallel.each(len(found), work)
    return found


def no_json(value: Any) -> str:
    """Bytes as canonical text, for ``json.dumps``; nothing else of a ConfigRecord is foreign to JSON.

    Raises:
        SiteError: 414, it is of another type.
    """
    if isinstance(value, bytes):
        return f"bytes:{value.hex()}"
    raise SiteError(414, f"request: must hold numbers, text and bytes, got {type(value).__name__}")
