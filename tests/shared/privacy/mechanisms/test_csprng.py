"""Random bits: the keystream of AES, one key a stream, none of it twice."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedge.shared.crypto.keystream import keystream
from fedge.shared.privacy.mechanisms import csprng
from fedge.shared.privacy.mechanisms.csprng import Entropy

KEY = bytes(range(32))


def test_it_is_the_keystream_of_the_key() -> None:
    expected = keystream(KEY).update(bytes(400_000))
    stream = Entropy(key=KEY)
    taken = stream.bytes(3) + stream.uint64(40_000).tobytes() + stream.bytes(0) + stream.bytes(5)
    assert taken == expected[: len(taken)]
    assert Entropy(key=KEY).uint64(50_000).tobytes() == expected


def test_without_a_key_each_stream_is_another() -> None:
    assert len({Entropy().bytes(16) for _ in range(50)}) == 50


def test_the_bits_are_even() -> None:
    words = Entropy(key=KEY).uint64(100_000)
    assert words.dtype == np.uint64
    ones = np.array([int(((words >> np.uint64(k)) & np.uint64(1)).sum()) for k in range(64)])
    assert abs(ones - 50_000).max() < 4.5 * np.sqrt(25_000)


def test_a_key_is_used_up_after_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csprng, "STREAM_BYTES", 1000)
    expected = keystream(KEY).update(bytes(2000))
    made = [Entropy(key=KEY).bytes(2000) for _ in range(2)]
    for one in made:
        assert one[:1000] == expected[:1000]
        assert one[1000:] not in (expected[:1000], expected[1000:])
    assert made[0][1000:] != made[1][1000:]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^key: must be 32 bytes, got 16$"):
        Entropy(key=bytes(16))
    with pytest.raises(TypeError):
        Entropy(KEY)  # type: ignore[misc]
    for take in (Entropy().bytes, Entropy().uint64):
        with pytest.raises(ValueError, match=r"^size: must be 0 or more, got -1$"):
            take(-1)


def test_it_cannot_be_copied_which_would_repeat_its_noise() -> None:
    with pytest.raises(TypeError):
        copy.deepcopy(Entropy())
    with pytest.raises(TypeError):
        pickle.dumps(Entropy())


def test_it_does_not_show_its_key() -> None:
    stream = Entropy(key=b"k" * 32)
    assert "kkkk" not in repr(stream) + repr(vars(stream))


def test_threads_share_a_stream_and_no_bytes_are_taken_twice() -> None:
    stream = Entropy(key=KEY)
    taken: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: taken.extend(stream.bytes(16) for _ in range(500)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = keystream(KEY).update(bytes(64_000))
    assert set(taken) == {expected[k : k + 16] for k in range(0, 64_000, 16)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_makes_other_noise() -> None:
    """The failing twin beside it: a bare keystream goes on the same in parent and child."""
    program = """
import os, sys
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.crypto.keystream import keystream
stream, twin = Entropy(), keystream(os.urandom(32))
stream.bytes(8)
child = os.fork()
if child:
    os.waitpid(child, 0)
os.write(1, (stream.bytes(16).hex() + " " + twin.update(bytes(16)).hex() + "\\n").encode())
if not child:
    os._exit(0)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300
    )
    (first, first_twin), (second, second_twin) = (
        line.split() for line in ended.stdout.split("\n")[:2]
    )
    assert first_twin == second_twin
    assert first != second


def test_no_noise_comes_from_a_generator_for_simulations() -> None:
    folder = Path(csprng.__file__).parent
    for name in ("csprng", "gaussian", "discrete_gaussian", "adaptive_clipping", "toeplitz"):
        text = (folder / f"{name}.py").read_text()
        assert not [word for word in ("import random", "np.random", "default_rng") if word in text]
