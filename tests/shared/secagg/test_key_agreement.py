"""Keys: the numbers of RFC 7748 and 5869, one key for one purpose, and frozen ones of our own."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from fedge.shared.secagg import key_agreement
from fedge.shared.secagg.key_agreement import Pair

T = hashlib.sha256(b"T").digest()
OTHER_T = hashlib.sha256(b"another").digest()
SECRET = bytes(range(32))

#: RFC 7748, 6.1.
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
AGREED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")

P = 2**255 - 19
#: u of every point of small order (D. J. Bernstein, cr.yp.to/ecdh.html, "validate").
SMALL_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, 2.2 and 2.3, on HMAC alone."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    block = found = b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([i]), "sha256")
        found += block
    return found[:length]


def test_agreement_follows_rfc_7748() -> None:
    alice, bob = Pair.from_private(ALICE), Pair.from_private(BOB)
    assert (alice.public, bob.public) == (ALICE_PUBLIC, BOB_PUBLIC)
    assert key_agreement.shared(alice, BOB_PUBLIC) == AGREED
    assert key_agreement.shared(bob, ALICE_PUBLIC) == AGREED


@pytest.mark.parametrize(
    ("scalar", "u", "result"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
        (
            "09" + "00" * 31,
            "09" + "00" * 31,
            "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079",
        ),
    ],
)
def test_single_multiplications_follow_rfc_7748(scalar: str, u: str, result: str) -> None:
    """Section 5.2, the two vectors and the first step of the iterated one."""
    pair = Pair.from_private(bytes.fromhex(scalar))
    assert key_agreement.shared(pair, bytes.fromhex(u)).hex() == result


@pytest.mark.parametrize("u", SMALL_ORDER)
def test_a_point_of_small_order_is_refused(u: int) -> None:
    """A peer that sends one would fix the result whatever the private key is."""
    for top in (0, 2**255):
        with pytest.raises(ValueError, match="public key: must not be a point of small order"):
            key_agreement.shared(Pair.from_private(ALICE), (u + top).to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_other_lengths_are_refused(length: int) -> None:
    wrong = bytes(length)
    pair = Pair.from_private(ALICE)
    for call in (
        lambda: Pair.from_private(wrong),
        lambda: key_agreement.shared(pair, wrong),
        lambda: key_agreement.share_encryption_key(wrong, T, "a", "b"),
        lambda: key_agreement.share_encryption_key(SECRET, wrong, "a", "b"),
        lambda: key_agreement.mask_key(wrong, T, "a", "b"),
        lambda: key_agreement.mask_key(SECRET, wrong, "a", "b"),
        lambda: key_agreement.self_mask_key(wrong, T),
        lambda: key_agreement.self_mask_key(SECRET, wrong),
    ):
        with pytest.raises(ValueError, match=f"must be 32 bytes, got {length}"):
            call()


def test_a_new_pair_comes_back_from_its_private_half_and_does_not_show_it() -> None:
    pair, other = Pair.generate(), Pair.generate()
    again = Pair.from_private(pair.private_bytes())
    assert again.public == pair.public != other.public
    assert key_agreement.shared(pair, other.public) == key_agreement.shared(other, pair.public)
    assert key_agreement.shared(again, other.public) == key_agreement.shared(pair, other.public)
    assert "private" not in repr(pair)
    assert pair.private_bytes().hex() not in repr(pair)


@pytest.mark.parametrize(
    ("secret", "salt", "info", "okm"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_derivation_follows_rfc_5869(secret: bytes, salt: bytes, info: bytes, okm: str) -> None:
    """Appendix A, cases 1 to 3: the library's and the one above, with which our keys are compared."""
    length = len(okm) // 2
    assert HKDF(SHA256(), length, salt, info).derive(secret).hex() == okm
    assert hkdf(secret, salt, info, length).hex() == okm


def test_each_key_is_the_derivation_that_the_docstring_says() -> None:
    def info(purpose: str, *sites: str) -> bytes:
        parts = [f"fedge secure aggregation 1: {purpose}".encode(), *(s.encode() for s in sites)]
        return b"".join(len(p).to_bytes(4, "big") + p for p in parts)

    box = key_agreement.share_encryption_key(SECRET, T, "a", "b")
    mask = key_agreement.mask_key(SECRET, T, "b", "a")
    own = key_agreement.self_mask_key(SECRET, T)
    assert box == hkdf(SECRET, T, info("box", "a", "b"), 32)
    assert mask == hkdf(SECRET, T, info("pair mask", "a", "b"), 32)
    assert own == hkdf(SECRET, T, info("self mask"), 32)
    # Frozen: two releases must agree on them.
    assert box.hex() == "22723aaac9e698da145030ebeae976b5df244ef3a7d84266a95e5baeb76641c9"
    assert mask.hex() == "396bfb26aa67f396328ef224a1a1b0e4473e2c54f1549671bfc375b20ec37537"
    assert own.hex() == "af76786f3c0e7fedb0539d0cc80bcbc2a05dc6ad5ce326fb181a93f7170d596f"


def test_no_two_purposes_rounds_directions_or_pairs_share_a_key() -> None:
    sites = ("a", "b", "ab", "", "a\0", "é")
    keys = []
    for t in (T, OTHER_T):
        for secret in (SECRET, bytes(32)):
            keys.append(key_agreement.self_mask_key(secret, t))
            for a in sites:
                keys += [key_agreement.share_encryption_key(secret, t, a, b) for b in sites]
                keys += [key_agreement.mask_key(secret, t, a, b) for b in sites if a < b]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_a_pair_s_key_is_free_of_order_and_needs_two() -> None:
    assert key_agreement.mask_key(SECRET, T, "x", "y") == key_agreement.mask_key(
        SECRET, T, "y", "x"
    )
    with pytest.raises(ValueError, match="sites: must be two, got x twice"):
        key_agreement.mask_key(SECRET, T, "x", "x")


@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_framing_is_unambiguous(one: list[bytes], other: list[bytes]) -> None:
    assert (key_agreement.framed(*one) == key_agreement.framed(*other)) == (one == other)


def test_framing_where_joining_would_be_ambiguous() -> None:
    assert key_agreement.framed(b"ab", b"c") != key_agreement.framed(b"a", b"bc")
    assert key_agreement.framed(b"ab", b"") != key_agreement.framed(b"ab")
    assert key_agreement.framed(b"ab", b"c") == b"\0\0\0\x02ab\0\0\0\x01c"
