"""A fork of a warm process does what a fresh one does: the same words, files and status, nothing left of the last."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

#: As run directories name runs.
RUN = re.compile(r"r-\d{8}-[0-9a-f]{12}")
CONFIG = """
[task]
name = "breast-cancer"
[run]
rounds = 2
[train]
local-steps = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def _run(fedge: Any, config: Path, out: str, *more: str, **options: Any) -> Any:
    return fedge("simulate", config, "--out", config.parent / out, "--quiet", *more, **options)


def _files(folder: Path) -> set[str]:
    return {RUN.sub("run", p.relative_to(folder).as_posix()) for p in folder.rglob("*")}


@pytest.mark.soak
def test_it_says_and_leaves_what_a_fresh_process_does(
    config: Path, fresh: Any, forked: Any
) -> None:
    one, two = _run(fresh, config, "out-1"), _run(forked, config, "out-2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout == one.stdout.replace("out-1", "out-2")
    assert two.stderr == one.stderr
    first, second = config.parent / "out-1", config.parent / "out-2"
    assert _files(first) == _files(second)
    model = "model.safetensors"
    assert (first / model).read_bytes() == (second / model).read_bytes()
    for words in (["nothing"], ["simulate", "nowhere.toml", "--out", "x"]):
        a, b = fresh(*words), forked(*words)
        assert (a.returncode, a.stdout, a.stderr) == (b.returncode, b.stdout, b.stderr)


@pytest.mark.soak
def test_a_kill_is_seen_and_the_next_command_knows_nothing_of_it(config: Path, forked: Any) -> None:
    killed = _run(forked, config, "out", fail_point="after-dispatch:1")
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout == ""
    assert forked("--version").returncode == 0
    done = _run(forked, config, "out", "--resume")
    assert done.returncode == 0, done.stderr
    runs = json.loads((config.parent / "out" / "run.json").read_text())["flower_runs"]
    assert len(set(runs)) == 2, "each has random bits of its own"


@pytest.mark.soak
def test_the_environment_and_the_folder_are_the_callers(
    tmp_path: Path, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = forked("config", "check", "config.toml")
    assert "Traceback" not in wrong.stderr
    monkeypatch.setenv("FEDGE_DEBUG", "1")
    assert "Traceback" in forked("config", "check", "config.toml").stderr
    monkeypatch.delenv("FEDGE_DEBUG")
    assert forked("config", "check", "config.toml").stderr == wrong.stderr
    (tmp_path / "config.toml").write_text(CONFIG)
    assert forked("config", "check", "config.toml").returncode == 0


@pytest.mark.soak
def test_a_command_that_takes_too_long_is_killed(config: Path, forked: Any) -> None:
    assert forked("--version").returncode == 0
    children = _children(forked.process.pid)
    with pytest.raises(subprocess.TimeoutExpired):
        _run(forked, config, "out", "--set", "run.rounds=4000", seconds=0.5)
    assert _children(forked.process.pid) == children == []
    assert forked("--version").returncode == 0


def test_it_ends_with_who_asks_and_takes_its_command_along(
    config: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = request.getfixturevalue("forked").__class__(tmp_path, modules=())
    assert other.close() is None
    fork_request = {
        "argv": ["simulate", str(config), "--out", str(tmp_path / "out"), "--quiet"],
        "environment": dict(os.environ),
        "folder": str(tmp_path),
        "output": [str(tmp_path / "a"), str(tmp_path / "b")],
        "seconds": 60,
    }
    fork_request["argv"] += ["--set", "run.rounds=4000"]
    other._start()
    other._channel.sendall(json.dumps(fork_request).encode() + b"\n")
    until = time.monotonic() + 60
    while not (found := _children(other.process.pid)) or not (tmp_path / "b").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert other.close() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
