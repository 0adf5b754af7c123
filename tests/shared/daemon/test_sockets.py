import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from fedge.shared.daemon import sockets
from fedge.shared.errors import DeployError


def refused(call, *args, **more):
    with pytest.raises(DeployError) as caught:
        call(*args, **more)
    assert caught.value.code == 904
    return caught.value.message


def hello(listener, path):
    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"hello")

    thread = threading.Thread(target=answer)
    thread.start()
    with sockets.connect(path, 5.0) as connection:
        found = connection.recv(5)
    thread.join()
    return found


@pytest.fixture
def deep(tmp_path):
    folder = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 8)
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder)) > 200
    return folder


def test_paths_may_be_longer_than_the_kernels(deep):
    path = deep / "worker.sock"
    with sockets.listen(path) as listener:
        assert hello(listener, path) == b"hello"
    assert [found.name for found in deep.iterdir()] == ["worker.sock"]


def test_descriptors_are_closed(deep):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with sockets.listen(deep / "s") as listener:
            assert hello(listener, deep / "s") == b"hello"
        with pytest.raises(ConnectionRefusedError):
            sockets.connect(deep / "s", 1.0)
        refused(sockets.listen, deep / "missing" / "s")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_the_owner_may_connect_unless_said(tmp_path):
    path = tmp_path / "s"
    with sockets.listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sockets.listen(path, mode=0o660, group=os.getgid()):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())


def test_what_a_dead_process_left_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "s"
    sockets.listen(path).close()
    with sockets.listen(path) as listener:
        assert hello(listener, path) == b"hello"
    path.unlink()
    path.write_text("mine")
    assert "got a file of that name" in refused(sockets.listen, path)
    assert path.read_text() == "mine"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    refused(sockets.listen, path)


def test_a_name_beyond_the_kernels_room_is_refused(tmp_path):
    refused(sockets.listen, tmp_path / ("x" * 65))


def test_nobody_there_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        sockets.connect(tmp_path / "s", 1.0)
    with pytest.raises(FileNotFoundError):
        sockets.connect(tmp_path / "missing" / "s", 1.0)


def test_the_listener_is_not_passed_on(tmp_path):
    with sockets.listen(tmp_path / "s") as listener:
        assert not os.get_inheritable(listener.fileno())
        assert listener.family == socket.AF_UNIX
