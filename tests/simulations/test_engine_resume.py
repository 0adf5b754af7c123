"""Kill -9 at eight named points, and Ctrl-C: resumed, the run ends with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedge.shared.failpoints import COORDINATOR

FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
CONFIG = """
[task]
name = "breast-cancer"
[run]
rounds = 4
[train]
local-steps = 3
batch-size = 16
[strategy]
name = "{strategy}"
"""


def _words(folder: Path, *more: str) -> list[str]:
    return ["simulate", str(folder / "config.toml"), "--out", str(folder / "run"), "--quiet", *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were not killed, one a strategy, each in a process that started from nothing."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for strategy in ("FedAdam", "Scaffold"):
        here = folder / strategy
        here.mkdir()
        (here / "config.toml").write_text(CONFIG.format(strategy=strategy))
        command = [*FEDGE, *_words(here)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return folder


# FedAdam remembers at the server; Scaffold at the sites as well, where a kill matters between training and commit.
CASES = [(p, "FedAdam") for p in COORDINATOR] + [
    (p, "Scaffold") for p in ("all-received", "after-commit")
]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "strategy"), CASES)
def test_killed_at_every_point(
    point: str,
    strategy: str,
    uninterrupted: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # One case by the path of users, from nothing; forks, which save seconds, for the others.
    fedge = request.getfixturevalue("fresh" if point == "mid-checkpoint" else "forked")
    reference = uninterrupted / strategy / "run"
    (tmp_path / "config.toml").write_text(CONFIG.format(strategy=strategy))
    server_round = 4 if point == "before-export" else 2
    killed = fedge(*_words(tmp_path), fail_point=f"{point}:{server_round}")
    assert killed.returncode == -signal.SIGKILL, f"{point} was not reached: {killed.stderr}"
    assert not (tmp_path / "run/model.safetensors").exists()

    committed = {"after-commit": 2, "before-export": 4}.get(point, 1)
    resumed = fedge(*_words(tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run/model.safetensors").read_bytes() == (
        reference / "model.safetensors"
    ).read_bytes()

    lines = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (reference / "rounds.jsonl").read_text().splitlines()]
    for mine, theirs in zip(lines, expected, strict=True):
        for key in ("round", "trained", "metrics", "examples", "bytes", "model_sha256"):
            assert mine[key] == theirs[key]
    assert committed <= len(lines)
    assert (tmp_path / "run/metrics.json").exists()
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        CONFIG.format(strategy="FedAdam").replace("rounds = 4", "rounds = 4000")
    )
    process = subprocess.Popen(
        [*FEDGE, *_words(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        rounds = tmp_path / "run/rounds.jsonl"
        while not (rounds.exists() and rounds.stat().st_size):
            if process.poll() is not None:
                pytest.fail(f"ended early: {process.stderr.read() if process.stderr else ''}")
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert len(stderr.strip().splitlines()) == 1
    assert "FE-103" in stderr
    assert "--resume" in stderr


@pytest.mark.slow
def test_resume_of_nothing_starts_and_of_a_finished_run_ends(tmp_path: Path, forked: Any) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(strategy="FedAdam"))
    started = forked(*_words(tmp_path, "--resume"))
    assert started.returncode == 0, started.stderr
    model = tmp_path / "run/model.safetensors"
    before = model.stat().st_mtime_ns
    assert forked(*_words(tmp_path, "--resume")).returncode == 0
    assert model.stat().st_mtime_ns == before
    refused = forked(*_words(tmp_path))
    assert refused.returncode == 1
    assert "FE-206" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    other = forked(*_words(tmp_path, "--resume", "--set", "run.seed=7"))
    assert other.returncode == 1
    assert "FE-207" in other.stderr
    assert "run.seed" in other.stderr
