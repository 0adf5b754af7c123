import os
import sys
import time

from fedge.shared.daemon import logs, process
from fedge.shared.daemon.process import Program


def test_a_log_within_its_bound_is_left_alone(tmp_path):
    (tmp_path / "a.log").write_bytes(b"x" * 100)
    assert logs.bound(tmp_path, 100) == []
    assert (tmp_path / "a.log").read_bytes() == b"x" * 100


def test_a_log_that_is_too_large_is_moved_aside_and_its_end_is_kept(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"old" + b"x" * 97)
    logs.aside(log).write_bytes(b"of last year")
    assert logs.bound(tmp_path, 50) == [log]
    assert log.read_bytes() == b""
    assert logs.aside(log).read_bytes() == b"x" * 50


def test_a_process_goes_on_writing_at_the_new_end(tmp_path):
    log, go = tmp_path / "a.log", tmp_path / "go"
    code = (
        "import pathlib, time\nprint('a' * 200, flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\nprint('b', flush=True)"
    )
    pid = process.start(Program("writer", log, command=(sys.executable, "-c", code)))
    while not log.is_file() or log.stat().st_size < 200:
        time.sleep(0.02)
    assert logs.bound(tmp_path, 100) == [log]
    go.touch()
    assert os.waitpid(pid, 0)[1] == 0
    assert log.read_bytes() == b"b\n"
