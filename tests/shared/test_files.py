from pathlib import Path

import pytest

from fedge.shared.files import write_atomically


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
