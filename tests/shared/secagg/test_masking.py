"""Masks: the keystream of the standards, exact to the bit, cancelling in pairs; damage shows in the checksum."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedge.shared.crypto.keystream import keystream
from fedge.shared.secagg import masking, parallel

KEY = bytes(range(32))
OTHER = bytes(32)


def counter_mode(key: bytes, size: int, first: int = 2) -> bytes:
    """The keystream by the definition alone: each block number encrypted on its own."""
    blocks = b"".join((first + i).to_bytes(16, "big") for i in range(-(-size // 16)))
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)[:size]  # noqa: S305


def zeros(size: int) -> NDArray[np.uint32]:
    return np.zeros(size, np.uint32)


def test_counter_mode_follows_sp_800_38a() -> None:
    """F.5.5, CTR-AES256.Encrypt: the definition above and the library's CTR agree with NIST's numbers."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    first = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert Cipher(algorithms.AES(key), modes.CTR(first)).encryptor().update(plain) == cipher
    stream = counter_mode(key, 64, int.from_bytes(first, "big"))
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)) == cipher


def test_the_keystream_starts_as_gcm_s_test_case_14() -> None:
    """Key, nonce and plaintext of zeros in the GCM specification (McGrew, Viega), appendix B."""
    stream = keystream(bytes(32)).update(bytes(16))
    assert stream.hex() == "cea7403d4d606b6e074ec5d3baf39d18"


def test_the_keystream_is_counter_mode_from_block_2() -> None:
    size = 300_007
    made = keystream(KEY)
    pieces = b"".join(made.update(bytes(n)) for n in (1, 15, 31, 4096, size - 4143))
    assert pieces == counter_mode(KEY, size)
    assert pieces == Cipher(
        algorithms.AES(KEY), modes.CTR((2).to_bytes(16, "big"))
    ).encryptor().update(bytes(size))


def test_frozen_masks() -> None:
    """These may never change: a site and a server of two releases would unmask noise."""
    vector = np.arange(5, dtype=np.uint32)
    masking.add_masks(vector, [(KEY, 1), (OTHER, -1)])
    assert vector.tolist() == [2708804672, 1326959721, 1642355203, 2163423329, 2303910756]
    long = zeros(100_003)
    masking.add_masks(long, [(KEY, 1)])
    digest = hashlib.sha256(long.tobytes()).hexdigest()
    assert digest == "f2b338c92aa3436273fd148c57cfd228242fceac897e57e57773e9f33ac1bc2d"


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 32_767, 32_768, 32_769, 100_001])
@pytest.mark.parametrize("chunk", [16, 4096, masking.CHUNK_BYTES])
def test_masks_are_the_keystreams_added_modulo_2_32(size: int, chunk: int) -> None:
    if chunk == 16:
        size = min(size, 5000)
    start = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    masks = [(KEY, 1), (OTHER, -1), (b"x" * 32, 1)]
    expected = start.astype(np.uint64)
    for key, sign in masks:
        stream = np.frombuffer(counter_mode(key, 4 * size), "<u4").astype(np.uint64)
        expected = expected + stream if sign == 1 else expected + (2**32 - stream)
    vector = start.copy()
    masking.add_masks(vector, masks, chunk)
    np.testing.assert_array_equal(vector, (expected % 2**32).astype(np.uint32))


@pytest.mark.parametrize("values", [0, 1, 5, masking.PART - 1, masking.PART, masking.PART + 1])
def test_counters_have_a_keystream_of_their_own_and_carry(values: int) -> None:
    """That of the part after the values': used for both, the difference of two words would be without a mask."""
    counters = 3
    vector = np.full(values + 4 * counters, 2**32 - 1, np.uint32)
    masking.add_masks(vector, [(KEY, 1)], counters=counters)
    parts = -(-values // masking.PART)
    stream = keystream(KEY, parts).update(bytes(16 * counters))
    for i in range(counters):
        found = int.from_bytes(vector[values + 4 * i : values + 4 * i + 4].tobytes(), "little")
        mask = int.from_bytes(stream[16 * i : 16 * i + 16], "little")
        assert found == (2**128 - 1 + mask) % 2**128
    # No block of it masks a value too.
    own = b"".join(keystream(KEY, part).update(bytes(64)) for part in range(parts))
    assert stream[:16] not in own
    masking.add_masks(vector, [(KEY, -1)], counters=counters)
    assert (vector == 2**32 - 1).all()


def test_sums_of_counters_carry_over_all_their_words() -> None:
    counters = 2
    rng = np.random.default_rng(0)
    vectors = [rng.integers(0, 2**32, 3 + 4 * counters, dtype=np.uint32) for _ in range(9)]
    total = np.zeros_like(vectors[0])
    checksums = masking.add_vectors(total, vectors, counters=counters)
    assert checksums == [masking.checksum(v) for v in vectors]

    def number(vector: NDArray[np.uint32], i: int) -> int:
        return int.from_bytes(vector[3 + 4 * i : 7 + 4 * i].tobytes(), "little")

    for i in range(counters):
        assert number(total, i) == sum(number(v, i) for v in vectors) % 2**128
    before = total.copy()
    masking.add_vectors(total, [vectors[0]], counters=counters)
    masking.subtract_vector(total, vectors[0], counters=counters)
    np.testing.assert_array_equal(total, before)
    with pytest.raises(ValueError, match="counters: must fit"):
        masking.add_masks(total, [], counters=3)


def test_masks_cancel_in_pairs_and_come_off_again() -> None:
    sites = 5
    start = np.random.default_rng(0).integers(0, 2**32, (sites, 70_001), dtype=np.uint32)
    masked = start.copy()
    for i in range(sites):
        pairs = [
            (hashlib.sha256(bytes(sorted((i, j)))).digest(), 1 if i < j else -1)
            for j in range(sites)
            if i != j
        ]
        masking.add_masks(masked[i], pairs)
        assert (masked[i] == start[i]).mean() < 0.001
    np.testing.assert_array_equal(masked.sum(0, np.uint32), start.sum(0, np.uint32))
    again = start[0].copy()
    masking.add_masks(again, [(KEY, 1)])
    masking.add_masks(again, [(KEY, -1)])
    np.testing.assert_array_equal(again, start[0])


@pytest.mark.parametrize("content", [0, 1, 2**31 - 1, 2**32 - 1])
def test_a_masked_vector_looks_like_noise(content: int) -> None:
    """Chi-squared over the bytes at each place of the value, and the mean of the bits; a fixed key, so no chance."""
    vector = np.full(2**16, content, np.uint32)
    masking.add_masks(vector, [(KEY, 1)])
    for place in range(4):
        counts = np.bincount(vector.view(np.uint8)[place::4], minlength=256)
        chi = ((counts - 256.0) ** 2 / 256).sum()
        # 255 degrees of freedom: 0.01 % lie outside either end.
        assert 176 < chi < 347
    bits = np.unpackbits(vector.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / np.sqrt(bits.size)


def test_other_vectors_and_arguments_are_refused_and_left_alone() -> None:
    masks = [(KEY, 1)]
    grid = zeros(16).reshape(4, 4)
    for vector in (
        zeros(8).astype(np.int32),
        zeros(8).astype(np.uint64),
        zeros(8).astype(">u4"),
        np.zeros(8, np.float32),
        grid,
        zeros(8)[::2],
        np.uint32(1) + np.array(3, np.uint32),
    ):
        before = np.array(vector)
        for call in (
            lambda v=vector: masking.add_masks(v, masks),
            lambda v=vector: masking.checksum(v),
        ):
            with pytest.raises(ValueError, match=r"vector: must be one-dimensional"):
                call()
        np.testing.assert_array_equal(vector, before)
    frozen = zeros(8)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        masking.add_masks(frozen, masks)
    vector = zeros(8)
    for bad, message in (
        ([(KEY, 1), (b"short", 1)], "key: must be 32 bytes, got 5"),
        ([(KEY, 1), (KEY, 0)], "sign"),
        ([(KEY, 1), (KEY, 2)], "sign"),
    ):
        with pytest.raises(ValueError, match=message):
            masking.add_masks(vector, bad)
    for chunk in (0, -16, 24):
        with pytest.raises(ValueError, match="chunk: must be a multiple of 16"):
            masking.add_masks(vector, masks, chunk)
    assert not vector.any()


def test_a_vector_beyond_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 4 * masking.MAX_VALUES < 16 * 2**32
    monkeypatch.setattr(masking, "MAX_VALUES", 8)
    masking.add_masks(zeros(8), [(KEY, 1)])
    with pytest.raises(ValueError, match="vector: must be up to 8 values, got 9"):
        masking.add_masks(zeros(9), [(KEY, 1)])


def test_the_checksum_is_frozen() -> None:
    vector = zeros(100_003)
    masking.add_masks(vector, [(KEY, 1)])
    assert masking.checksum(vector) == 115176557266166830
    assert masking.checksum(vector[:0]) == 5985155243783304889
    assert len({masking.checksum(zeros(n)) for n in range(9)}) == 9


@given(st.integers(2, 3000), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_flips_and_swaps_show_in_the_checksum(size: int, chance: object) -> None:
    rng = np.random.default_rng(chance.randrange(2**32))  # type: ignore[attr-defined]
    vector = rng.integers(0, 2**32, size, dtype=np.uint32)
    before = masking.checksum(vector)
    assert 0 <= before < 2**64
    i, j = rng.choice(size, 2, replace=False)
    bit = np.uint32(1) << np.uint32(rng.integers(32))
    flipped, twice, swapped = vector.copy(), vector.copy(), vector.copy()
    flipped[i] ^= bit
    twice[[i, j]] ^= bit
    swapped[[i, j]] = vector[[j, i]]
    assert masking.checksum(flipped) != before
    assert masking.checksum(twice) != before
    assert vector[i] == vector[j] or masking.checksum(swapped) != before
    assert masking.checksum(np.roll(vector, 1)) != before
    assert masking.checksum(vector[:-1]) != before
    assert masking.checksum(vector.copy()) == before


@pytest.mark.parametrize("size", [0, 1, 4096, 131_071, 131_072, 300_001, masking.PART + 1])
def test_vectors_are_added_and_hashed_in_one_pass(size: int) -> None:
    rng = np.random.default_rng(size)
    total, *vectors = (rng.integers(0, 2**32, size, dtype=np.uint32) for _ in range(4))
    expected = total + vectors[0] + vectors[1] + vectors[2]
    for vector in vectors:
        vector.flags.writeable = False
    assert masking.add_vectors(total, vectors) == [masking.checksum(v) for v in vectors]
    np.testing.assert_array_equal(total, expected)
    assert masking.add_vectors(total, []) == []


@pytest.mark.parametrize("size", [masking.PART - 1, masking.PART, 3 * masking.PART + 5])
def test_any_number_of_threads_computes_the_same(size: int) -> None:
    found = []
    before = parallel.threads()
    for count in (1, 2, 5):
        parallel.use_threads(count)
        vector = masking.zeros(size)
        masking.add_masks(vector, [(KEY, 1), (OTHER, -1)])
        total = masking.zeros(size)
        found.append((vector.tobytes(), *masking.add_vectors(total, [vector, vector])))
    parallel.use_threads(before)
    assert found[0] == found[1] == found[2]


def test_each_part_has_a_keystream_of_its_own() -> None:
    vector = masking.zeros(2 * masking.PART + 3)
    masking.add_masks(vector, [(KEY, 1)])
    for part in range(3):
        made = vector[part * masking.PART : (part + 1) * masking.PART]
        nonce = part.to_bytes(12, "little")
        expected = AESGCM(KEY).encrypt(nonce, bytes(made.nbytes), None)[:-16]
        assert made.tobytes() == expected


@pytest.mark.parametrize("size", [0, 5, 2**18, 2**19, 10**6])
def test_new_vectors_are_zero_and_writeable(size: int) -> None:
    vector = masking.zeros(size)
    assert vector.shape == (size,)
    assert vector.dtype == np.uint32
    assert not vector.any()
    vector += 1


def test_other_vectors_are_not_added() -> None:
    total = zeros(8)
    for vector, message in (
        (zeros(9), "must be 8 values as the sum, got 9"),
        (zeros(8).astype(np.int32), "must be one-dimensional"),
        (zeros(16)[::2], "must be one-dimensional"),
    ):
        with pytest.raises(ValueError, match=message):
            masking.add_vectors(total, [zeros(8) + np.uint32(1), vector])
    assert not total.any()
    total.flags.writeable = False
    with pytest.raises(ValueError, match="sum: must be writeable"):
        masking.add_vectors(total, [zeros(8)])


def test_the_checksum_of_a_long_vector_tells_its_parts_apart() -> None:
    vector = masking.zeros(3 * masking.PART)
    vector[: masking.PART] = 7
    swapped = np.roll(vector, masking.PART)
    assert masking.checksum(vector) != masking.checksum(swapped)
    assert masking.checksum(vector) != masking.checksum(vector[: -masking.PART])
