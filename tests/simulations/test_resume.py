"""Kill -9 at eight named points, and Ctrl-C: resumed, the run ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.shared.failpoints import COORDINATOR, VARIABLE

FEDGE = [sys.executable, "-c", "import sys; from fedge.shared.cli import main; sys.exit(main())"]
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


def _command(folder: Path, name: str, *more: str) -> list[str]:
    return [
        *FEDGE,
        "simulate",
        str(folder / "config.toml"),
        "--out",
        str(folder / name),
        "--quiet",
        *more,
    ]


def _run(command: list[str], fail_point: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: fail_point}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody killed, one a strategy."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for strategy in ("FedAdam", "Scaffold"):
        here = folder / strategy
        here.mkdir()
        (here / "config.toml").write_text(CONFIG.format(strategy=strategy))
        done = _run(_command(here, "run"))
        assert done.returncode == 0, done.stderr
    return folder


# FedAdam remembers at the server; Scaffold at the sites as well, where a kill matters between training and commit.
CASES = [(p, "FedAdam") for p in COORDINATOR] + [
    (p, "Scaffold") for p in ("all-received", "after-commit")
]


@pytest.mark.parametrize(
    ("point", "strategy"),
    [pytest.param(*c, marks=[] if c[0] == "mid-checkpoint" else pytest.mark.slow) for c in CASES],
)
def test_killed_at_every_point(
    point: str, strategy: str, uninterrupted: Path, tmp_path: Path
) -> None:
    reference = uninterrupted / strategy / "run"
    (tmp_path / "config.toml").write_text(CONFIG.format(strategy=strategy))
    server_round = 4 if point == "before-export" else 2
    killed = _run(_command(tmp_path, "run"), f"{point}:{server_round}")
    assert killed.returncode == -signal.SIGKILL, f"{point} was not reached: {killed.stderr}"
    assert not (tmp_path / "run/model.safetensors").exists()

    committed = {"after-commit": 2, "before-export": 4}.get(point, 1)
    resumed = _run(_command(tmp_path, "run", "--resume"))
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


def test_ctrl_c_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        CONFIG.format(strategy="FedAdam").replace("rounds = 4", "rounds = 4000")
    )
    process = subprocess.Popen(
        _command(tmp_path, "run"),
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
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 130
    assert len(stderr.strip().splitlines()) == 1
    assert "FE-103" in stderr
    assert "--resume" in stderr


def test_resume_of_nothing_starts_and_of_a_finished_run_ends(
    uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(strategy="FedAdam"))
    started = _run(_command(tmp_path, "run", "--resume"))
    assert started.returncode == 0, started.stderr
    model = tmp_path / "run/model.safetensors"
    before = model.stat().st_mtime_ns
    assert _run(_command(tmp_path, "run", "--resume")).returncode == 0
    assert model.stat().st_mtime_ns == before
    refused = _run(_command(tmp_path, "run"))
    assert refused.returncode == 1
    assert "FE-206" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    other = _run(_command(tmp_path, "run", "--resume", "--set", "run.seed=7"))
    assert other.returncode == 1
    assert "FE-207" in other.stderr
    assert "run.seed" in other.stderr
