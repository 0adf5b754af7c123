"""Random bits for noise: AES-256 keystreams under keys from the operating system.

Anyone who can predict the noise can subtract it, so none of it comes from a generator that was made for simulations
(Mersenne Twister, PCG64: their state follows from their output). A key makes one stream, of up to ``STREAM_BYTES``, and
is then replaced. A forked process takes its own key; otherwise parent and child would make the same noise.

What this cannot do: a virtual machine that is cloned while it runs makes the same noise twice, and the key stays in
OpenSSL's memory until that is used again.
"""

from __future__ import annotations

import builtins
import os
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.crypto.keystream import KEY_BYTES, keystream

#: Bytes under one key. AES in counter mode never repeats a block: after n blocks of 128 bits that tells it from random
#: with an advantage of n^2 / 2^129, here 2^-77.
STREAM_BYTES: Final = 2**30

_WORD: Final = 8
#: Some ciphers want room for one block more than they write.
_BLOCK: Final = 16
_NOTHING: Final = bytes(128 * 1024)


class Entropy:
    """A stream of random bits; several threads may take from it.

    Args:
        key: 32 bytes that fix the first ``STREAM_BYTES``, for tests; the operating system's where not given.

    Raises:
        ValueError: the key is not 32 bytes.
    """

    def __init__(self, *, key: builtins.bytes | None = None) -> None:
        self._lock = threading.Lock()
        self._start(os.urandom(KEY_BYTES) if key is None else key)

    def uint64(self, size: int) -> NDArray[np.uint64]:
        """The next ``8 * size`` bytes as numbers, each of the 2^64 equally likely.

        Raises:
            ValueError: the size is negative.
        """
        words = _room(size, _WORD)
        self._fill(words.view(np.uint8)[: _WORD * size].data, words.view(np.uint8).data)
        return words[:size]

    def bytes(self, size: int) -> builtins.bytes:
        """The next ``size`` bytes.

        Raises:
            ValueError: the size is negative.
        """
        room = _room(size, 1)
        self._fill(room[:size].data, room.data)
        return room[:size].tobytes()

    def _fill(self, wanted: memoryview, room: memoryview) -> None:
        """Write the stream's next bytes; ``room`` is the same memory with a block more at its end."""
        done, size = 0, len(wanted)
        with self._lock:
            if os.getpid() != self._process:
                self._start(os.urandom(KEY_BYTES))
            while done < size:
                if not self._left:
                    self._start(os.urandom(KEY_BYTES))
                count = min(size - done, self._left, len(_NOTHING))
                self._update(memoryview(_NOTHING)[:count], room[done : done + count + _BLOCK])
                self._left -= count
                done += count

    def _start(self, key: builtins.bytes) -> None:
        self._update = keystream(key).update_into
        self._left = STREAM_BYTES
        self._process = os.getpid()


def _room(size: int, width: int) -> NDArray[np.uint64]:
    """Memory for so many values of 8 bytes or 1, and a block."""
    if size < 0:
        raise ValueError(f"size: must be 0 or more, got {size}")
    made: NDArray[np.uint64] = np.empty(size + _BLOCK // width, f"u{width}")
    return made
