"""Boxes open for the right round, sender and receiver only, and name the sender otherwise."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedge.shared.errors import SiteError
from fedge.shared.secagg import share_encryption
from fedge.shared.secagg.key_agreement import framed

T = hashlib.sha256(b"T").digest()
KEY = bytes(range(32))
PLAIN = b"content"


@pytest.mark.parametrize(
    ("key", "nonce", "plain", "associated", "cipher", "tag"),
    [
        ("00" * 32, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
        (
            "00" * 32,
            "00" * 12,
            "00" * 16,
            "",
            "cea7403d4d606b6e074ec5d3baf39d18",
            "d0d1c8a799996bf0265b98b5d48ab919",
        ),
        (
            "5853c020946b35f2c58ec427152b840420c40029636adcbb027471378cfdde0f",
            "eec313dd07cc1b3e6b068a47",
            "ce7458e56aef9061cb0c42ec2315565e6168f5a6249ffd31610b6d17ab64935e",
            "1389b522c24a774181700553f0246bbabdd38d6f",
            "eadc3b8766a77ded1a58cb727eca2a9790496c298654cda78febf0da16b6903b",
            "3d49a5b32fde7eafcce90079217ffb57",
        ),
    ],
    ids=["specification-13", "specification-14", "NIST-gcmEncryptExtIV256-160-0"],
)
def test_the_cipher_gives_the_published_numbers(
    key: str, nonce: str, plain: str, associated: str, cipher: str, tag: str
) -> None:
    """Test cases 13 and 14 of the GCM specification (zero nonce), and one of NIST's CAVP with associated data."""
    found = AESGCM(bytes.fromhex(key)).encrypt(
        bytes.fromhex(nonce), bytes.fromhex(plain), bytes.fromhex(associated)
    )
    assert found.hex() == cipher + tag


def test_a_box_is_aes_256_gcm_under_a_zero_nonce() -> None:
    """The ciphertext does not depend on associated data: it is test case 14's; the tag does."""
    encrypted_share = share_encryption.encrypt_share(bytes(32), bytes(16), T, "a", "b")
    assert encrypted_share[:16].hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    associated = framed(T, b"a", b"b")
    assert encrypted_share == AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), associated)
    assert (
        share_encryption.encrypt_share(KEY, PLAIN, T, "a", "b").hex()
        == "6dd3dbaad042f7eb277434aeda3746bc59c83405cf1339"
    )


@pytest.mark.parametrize("plain", [b"", PLAIN, bytes(72), bytes(100_000)], ids=len)
def test_a_box_opens_and_is_a_tag_longer(plain: bytes) -> None:
    encrypted_share = share_encryption.encrypt_share(KEY, plain, T, "a", "b")
    assert len(encrypted_share) == len(plain) + share_encryption.TAG_BYTES
    assert share_encryption.decrypt_share(KEY, encrypted_share, T, "a", "b") == plain


@pytest.mark.parametrize(
    ("key", "transcript", "src", "dst"),
    [
        (bytes(32), T, "a", "b"),
        (KEY, bytes(32), "a", "b"),
        (KEY, T, "c", "b"),
        (KEY, T, "a", "c"),
        (KEY, T, "b", "a"),
        (KEY, T, "ab", ""),
        (KEY, T, "", "ab"),
    ],
)
def test_another_key_round_sender_or_receiver_does_not_open_it(
    key: bytes, transcript: bytes, src: str, dst: str
) -> None:
    encrypted_share = share_encryption.encrypt_share(KEY, PLAIN, T, "a", "b")
    with pytest.raises(SiteError, match=f"^FE-425 {src}: its encrypted share for {dst} must"):
        share_encryption.decrypt_share(key, encrypted_share, transcript, src, dst)


def test_a_flipped_bit_anywhere_is_found_and_the_sender_named() -> None:
    encrypted_share = share_encryption.encrypt_share(KEY, PLAIN, T, "hospital-4", "hospital-1")
    for bit in range(8 * len(encrypted_share)):
        altered = bytearray(encrypted_share)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SiteError) as caught:
            share_encryption.decrypt_share(KEY, bytes(altered), T, "hospital-4", "hospital-1")
        assert caught.value.code == 425
        assert caught.value.message.startswith("hospital-4: ")
        assert PLAIN.decode() not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 22, 24])
def test_a_box_of_another_length_does_not_open(length: int) -> None:
    encrypted_share = (share_encryption.encrypt_share(KEY, PLAIN, T, "a", "b") + b"\0")[:length]
    with pytest.raises(SiteError, match=rf"FE-425 a: .* \({length} bytes\)"):
        share_encryption.decrypt_share(KEY, encrypted_share, T, "a", "b")


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_other_lengths_of_key_and_transcript_are_refused(length: int) -> None:
    wrong = bytes(length)
    for key, transcript, what in ((wrong, T, "key"), (KEY, wrong, "transcript")):
        for call in (share_encryption.encrypt_share, share_encryption.decrypt_share):
            with pytest.raises(ValueError, match=f"{what}: must be 32 bytes, got {length}"):
                call(key, bytes(32), transcript, "a", "b")
