import os
import stat
import threading
import time
from pathlib import Path

import pytest

from fedge.shared.files import mode_for_others, take_lock, write_atomically


def test_write_replaces_the_whole_file_and_leaves_no_temporary(tmp_path: Path):
    path = tmp_path / "f"
    path.write_bytes(b"a much longer content than the new one")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_stop_halfway_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    def stop() -> None:
        seen.append((tmp_path / ".f.tmp").read_bytes())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"newnew", halfway=stop)
    assert seen == [b"new"], "half of the bytes must be there when the fail point is reached"
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newnew")
    assert path.read_bytes() == b"newnew"


def test_a_lock_is_one_processs_and_is_given_back(tmp_path):
    path = tmp_path / "lock"
    began = time.monotonic()
    with take_lock(path, mode=0o640):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640 & ~mask()
        # Another description of the file is refused like another process.
        for timeout in (0.0, 0.1):
            with pytest.raises(BlockingIOError):
                take_lock(path, timeout=timeout)
    assert time.monotonic() - began >= 0.1
    take_lock(path).close()
    with pytest.raises(FileNotFoundError):
        take_lock(tmp_path / "nowhere" / "lock")


def test_a_lock_is_waited_for(tmp_path):
    held = take_lock(tmp_path / "lock")
    threading.Timer(0.1, held.close).start()
    take_lock(tmp_path / "lock", timeout=60.0).close()


@pytest.mark.parametrize(
    ("mode", "others"), [(0o600, 0), (0o400, 0), (0o640, 0o640), (0o604, 0o604), (0o611, 0o611)]
)
def test_a_file_that_others_may_use_is_told_by_its_mode(tmp_path, mode, others):
    path = tmp_path / "key"
    path.touch()
    path.chmod(mode)
    assert mode_for_others(path) == others


def mask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
