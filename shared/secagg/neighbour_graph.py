"""Who shares masks with whom: everybody up to 128 sites, above that a randomly permuted ring (Bell et al., CCS 2020).

In the ring each site has k neighbours, k/2 on either side, and so a uniformly random set of the others. There the claim
is the semi-honest one only: a server that chooses who takes part, or grinds transcripts, shapes the neighbourhoods.

With 10 % of the sites corrupt and 10 % lost, the probability that any site at all

- has t corrupt neighbours, who open its secrets: 0 for 200 and 300 sites (fewer than t are corrupt), 2^-203 for 1000;
- has 2t - (k + 1), with whom a server could open both its secrets: 0 for 200, 2^-39 for 300, 2^-36 for 1000;
- keeps fewer than t of its k + 1 holders, so that the round is void: 0 for 200, 2^-32 for 300, 2^-33 for 1000;
- lies beside k/2 sites in a row that are corrupt or lost, without which no part of the ring is cut off: 2^-80 for 200,
  2^-96 for 300, 2^-132 for 1000.

The second and third stay below 2^-31 for every number of sites above ``COMPLETE_UP_TO``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Final

from fedge.shared.crypto.keystream import keystream
from fedge.shared.secagg.key_agreement import TRANSCRIPT_BYTES

#: Sites up to which everybody is everybody's neighbour.
COMPLETE_UP_TO: Final = 128
#: Degrees up to so many sites; between the last two, and beyond, k grows with the logarithm of the number.
DEGREES: Final = ((200, 60), (300, 76), (1000, 114))

_PURPOSE: Final = b"fedge secure aggregation 1: graph"
_WORD_BYTES: Final = 8


def threshold(holders: int) -> int:
    """Shares that open a secret: more than two thirds of its holders.

    Twice as many are more than all holders and the colluding ones once more, while those are fewer than a third: a
    server on whose side they are never gets both of a site's secrets.

    Raises:
        ValueError: fewer than three holders.
    """
    if holders < 3:
        raise ValueError(f"holders: must be at least 3, got {holders}")
    return 2 * holders // 3 + 1


def degree_of(count: int) -> int:
    """Neighbours of each of ``count`` sites, by ``DEGREES``: even above ``COMPLETE_UP_TO``.

    Raises:
        ValueError: fewer than three sites.
    """
    if count < 3:
        raise ValueError(f"sites: must be at least 3, got {count}")
    if count <= COMPLETE_UP_TO:
        return count - 1
    for sites, degree in DEGREES[:-1]:
        if count <= sites:
            return degree
    (below, low), (above, high) = DEGREES[-2:]
    exact = low + (high - low) * math.log(count / below) / math.log(above / below)
    # In multiples of 6, k + 1 holders can lose the most; less a hair, or 114 itself would be rounded up.
    return 6 * math.ceil(exact / 6 - 1e-9)


def neighbours(transcript: bytes, count: int, degree: int | None = None) -> list[tuple[int, ...]]:
    """The neighbours of each of ``count`` sites, as sorted indices; symmetric, the same at every site.

    Args:
        transcript: T, 32 bytes; it permutes the ring.
        count: sites, numbered in the order that all agree on.
        degree: neighbours of each, instead of ``degree_of(count)``: even, or ``count - 1`` or more for the complete
            graph.

    Raises:
        ValueError: an argument is out of its range.
    """
    if len(transcript) != TRANSCRIPT_BYTES:
        raise ValueError(f"transcript: must be {TRANSCRIPT_BYTES} bytes, got {len(transcript)}")
    k = degree_of(count) if degree is None else degree
    if count < 3 or k < 2:
        raise ValueError(f"graph: must have 3 sites and degree 2 or more, got {count} and {k}")
    if k >= count - 1:
        return [tuple(j for j in range(count) if j != i) for i in range(count)]
    if k % 2:
        raise ValueError(f"degree: must be even in a ring, got {k}")
    ring = _permutation(transcript, count)
    found: list[tuple[int, ...]] = [()] * count
    for place, site in enumerate(ring):
        near = (ring[(place + d) % count] for d in range(-k // 2, k // 2 + 1) if d)
        found[site] = tuple(sorted(near))
    return found


def holders(graph: Sequence[tuple[int, ...]], site: int) -> tuple[int, ...]:
    """Who holds shares of a site's secrets: its neighbours and itself, sorted."""
    return tuple(sorted((*graph[site], site)))


def _permutation(transcript: bytes, count: int) -> list[int]:
    """Fisher and Yates's shuffle, drawn from AES-256-CTR under a key that T gives."""
    words = _words(hashlib.sha256(_PURPOSE + transcript).digest())
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        # Words beyond the last multiple are drawn again: a bare remainder would favour small ones.
        limit = 2**64 - 2**64 % (last + 1)
        word = next(w for w in words if w < limit)
        chosen = word % (last + 1)
        order[last], order[chosen] = order[chosen], order[last]
    return order


def _words(key: bytes) -> Iterator[int]:
    stream = keystream(key)
    while True:
        block = stream.update(bytes(4096))
        for start in range(0, len(block), _WORD_BYTES):
            yield int.from_bytes(block[start : start + _WORD_BYTES], "little")
