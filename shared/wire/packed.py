"""Packs a message's content into one record, for fewer requests over the network.

Flower transfers every record and every Array of a message as a separate object, each a request over each hop and each
a write of the SuperLink's database: a model of twelve tensors costs some 27 requests, packed it costs three to five.
Small contents are sent as one value of a ConfigRecord; larger ones as one Array, which Flower divides into chunks. The
bytes are those of ``fedge.shared.wire.frames``. Both ends accept the plain form too, which is what a simulation uses.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.shared.wire import frames
from fedge.shared.wire.frames import WireError

#: Name of the only record of a packed content, and of its only value.
NAME: Final = "fedge.packed"
STYPE: Final = "fedge.packed.v1"
#: Bytes up to which a content is sent as a value instead of an Array.
SMALL: Final = 2**20

_LENGTH: Final = 8


def is_packed(content: RecordDict) -> bool:
    """Whether a content claims to be packed."""
    return list(content) == [NAME]


def pack(content: RecordDict) -> RecordDict:
    """Pack a content into one record.

    Raises:
        WireError: it is beyond a limit of ``fedge.shared.wire.frames``.
    """
    data = b"".join(frames.encode_reply(content))[_LENGTH:]
    if len(data) <= SMALL:
        return RecordDict({NAME: ConfigRecord({NAME: data})})
    array = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    return RecordDict({NAME: ArrayRecord({NAME: array})})


def unpack(content: RecordDict) -> RecordDict:
    """Unpack a content; the bytes of its Arrays are not validated here.

    Raises:
        WireError: it is not in the form that ``pack`` gives.
    """
    record = content.get(NAME)
    data: object = None
    if isinstance(record, ConfigRecord):
        data = record.get(NAME)
    elif isinstance(record, ArrayRecord) and NAME in record:
        data = record[NAME].data
    if not isinstance(data, bytes):
        raise WireError("packed: must be one value of bytes or one array, got others")
    reply = frames.decode_reply(data)
    if isinstance(reply, int):
        raise WireError("packed: must be records, got a number")
    return reply
