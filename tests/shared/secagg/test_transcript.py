"""What sites sign: every part counts, nothing has two readings, and lists are read with suspicion."""

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared import protocol
from fedge.shared.secagg import transcript
from fedge.shared.secagg.transcript import Attempt, KeyAdvertisement

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key()
ATTEMPT = Attempt(bytes(range(32)), "run-1", "train", 3, 1)
OTHERS = [
    replace(ATTEMPT, request_digest=bytes(32)),
    replace(ATTEMPT, run_id="run-2"),
    replace(ATTEMPT, purpose="evaluate"),
    replace(ATTEMPT, server_round=31),
    replace(ATTEMPT, number=2),
    # The same digits, cut elsewhere.
    replace(ATTEMPT, server_round=31, number=1),
    replace(ATTEMPT, server_round=3, number=11),
]


def bundle(site="north", attempt=ATTEMPT):
    return transcript.new_advertisement(attempt, site, bytes([1]) * 32, bytes([2]) * 32, PRIVATE)


def test_an_attempt_is_encoded_as_it_was_frozen():
    """Another encoding is another protocol: raise VERSION."""
    assert ATTEMPT.encode() == (
        b"\x00\x00\x00\x18fedge secure aggregation"
        b"\x00\x00\x00\x0b2 train 3 1"
        b"\x00\x00\x00\x05run-1"
        b"\x00\x00\x00\x20" + bytes(range(32))
    )


def test_the_transcript_is_the_frozen_one():
    bundles = [
        KeyAdvertisement(s, bytes([i]) * 32, bytes([i + 9]) * 32, bytes(64))
        for i, s in enumerate("abc")
    ]
    encoded = [
        b"\x01" + b.site.encode() + b.encryption_key + b.mask_key + b.signature for b in bundles
    ]
    framed = b"".join(
        len(p).to_bytes(4, "big") + p for p in (b"transcript", ATTEMPT.encode(), *encoded)
    )
    assert transcript.transcript(ATTEMPT, bundles) == hashlib.sha256(framed).digest()


def test_each_part_makes_another_transcript():
    bundles = [bundle("north"), bundle("south"), bundle("west")]
    first = transcript.transcript(ATTEMPT, bundles)
    found = {transcript.transcript(other, bundles) for other in OTHERS}
    changed = [
        replace(bundles[1], site="southern"),
        replace(bundles[1], encryption_key=bytes(32)),
        replace(bundles[1], mask_key=bytes(32)),
        replace(bundles[1], signature=bytes(64)),
    ]
    found |= {transcript.transcript(ATTEMPT, [bundles[0], c, bundles[2]]) for c in changed}
    found |= {
        transcript.transcript(ATTEMPT, b)
        for b in (bundles[:2], bundles[::-1], [*bundles, bundle("z")])
    }
    assert len(found) == len({o.encode() for o in OTHERS}) + 4 + 3
    assert first not in found
    assert first == transcript.transcript(replace(ATTEMPT), list(bundles))


def test_a_bundle_is_signed_for_its_site_keys_and_attempt():
    good = bundle()
    assert transcript.verifies(ATTEMPT, good, PUBLIC)
    assert not any(transcript.verifies(other, good, PUBLIC) for other in OTHERS)
    for part in ("encryption_key", "mask_key", "signature"):
        changed = bytearray(getattr(good, part))
        changed[7] ^= 1
        assert not transcript.verifies(ATTEMPT, replace(good, **{part: bytes(changed)}), PUBLIC)
    swapped = replace(good, encryption_key=good.mask_key, mask_key=good.encryption_key)
    assert not transcript.verifies(ATTEMPT, swapped, PUBLIC)
    assert not transcript.verifies(ATTEMPT, replace(good, site="south"), PUBLIC)
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    assert not transcript.verifies(ATTEMPT, good, other)


def test_statements_of_one_kind_are_none_of_another():
    t, half = bytes(range(32)), bytes(32)
    made = {
        transcript.share_statement(t, "a", half),
        transcript.share_statement(t, "b", half),
        transcript.share_statement(half, "a", half),
        transcript.commit_statement(t, half, half),
        transcript.commit_statement(t, t, half),
        transcript.commit_statement(t, half, t),
        transcript.masked_statement(t, "a", half, 1, 2),
        transcript.masked_statement(t, "a", half, 2, 1),
        transcript.masked_statement(t, "b", half, 1, 2),
        transcript.masked_statement(t, "a", t, 1, 2),
        ATTEMPT.encode(),
    }
    assert len(made) == 11
    assert not transcript.is_signed(
        PUBLIC, PRIVATE.sign(transcript.share_statement(t, "a", half)), ATTEMPT.encode()
    )


def test_a_set_of_sites_has_one_digest():
    assert transcript.digest_of(["b", "a"]) == transcript.digest_of(("a", "b"))
    assert transcript.digest_of(["ab"]) != transcript.digest_of(["a", "b"])
    assert transcript.digest_of([]) != transcript.digest_of([""])


def test_names_are_packed_and_unpacked():
    assert transcript.pack_sites(["south", "north"]) == b"north,south"
    assert transcript.unpack_sites(b"north,south") == ["north", "south"]
    assert transcript.unpack_sites(b"") == []


@pytest.mark.parametrize(
    "data",
    [
        b"south,north",
        b"north,north",
        b"north,",
        b",north",
        b"North",
        b"nor th",
        b"-north",
        b"n\xc3\xb6rth",
        b"\xff",
        b"../north",
        b"north\n",
        b"a" * 65,
        ",".join(f"s{i:06}" for i in range(2049)).encode(),
        bytes(2048 * 65 + 1),
    ],
)
def test_a_list_that_is_not_in_order_is_refused(data):
    with pytest.raises(ValueError, match=r"^must "):
        transcript.unpack_sites(data)


def test_the_largest_list_is_read():
    names = [f"s{i:06}" for i in range(protocol.MAX_SITES)]
    assert transcript.unpack_sites(transcript.pack_sites(names)) == names


def test_bundles_are_packed_and_unpacked():
    bundles = [bundle("north"), bundle("south-" + "x" * 58)]
    raw = b"".join(b.encode() for b in bundles)
    assert transcript.unpack_advertisements(raw) == bundles
    assert [len(b.encode()) for b in bundles] == [134, 193]
    assert transcript.unpack_advertisements(b"") == []


@pytest.mark.parametrize("cut", [1, 64, 128, 133])
def test_a_part_of_a_bundle_is_refused(cut):
    with pytest.raises(ValueError, match="must be whole bundles, got a part of one"):
        transcript.unpack_advertisements(bundle().encode()[:cut])


@pytest.mark.parametrize(
    "names", [("south", "north"), ("north", "north"), ("",), ("no,rth",), ("a" * 65,)]
)
def test_bundles_out_of_order_are_refused(names):
    with pytest.raises(ValueError, match=r"^must be "):
        transcript.unpack_advertisements(b"".join(bundle(n).encode() for n in names))


def test_bundles_without_end_are_refused():
    one = bytes([1]) + b"a" + bytes(128)
    with pytest.raises(ValueError, match="at most 2048 bundles"):
        transcript.unpack_advertisements(one * (protocol.MAX_SITES + 1))
