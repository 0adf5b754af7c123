"""Fail points kill where the environment names them, and nowhere else."""

import os
import signal
import subprocess
import sys

import pytest

from fedge.shared import failpoints

_CHILD = """
from fedge.shared.failpoints import COORDINATOR, reach
for server_round in (1, 2, 3):
    for point in COORDINATOR:
        print(server_round, point, flush=True)
        reach(point, server_round)
"""


def _child(wish: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != failpoints.VARIABLE}
    if wish is not None:
        environment[failpoints.VARIABLE] = wish
    return subprocess.run(
        [sys.executable, "-c", _CHILD], env=environment, capture_output=True, text=True, timeout=300
    )


def test_unset_nothing_happens():
    done = _child(None)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3 * len(failpoints.COORDINATOR)


@pytest.mark.parametrize("point", ["mid-checkpoint", "before-export"])
def test_the_process_is_killed_at_the_named_point_of_the_named_round(point: str):
    done = _child(f"{point}:2")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.splitlines()[-1] == f"2 {point}"


@pytest.mark.parametrize(
    "wish", ["mid-checkpoint:4", "no-such-point:2", "mid-checkpoint", ":2", ""]
)
def test_another_wish_kills_nobody(wish: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(failpoints.VARIABLE, wish)
    for server_round in (1, 2, 3):
        for point in failpoints.COORDINATOR:
            failpoints.reach(point, server_round)


def test_there_are_eight_points_with_names_of_their_own():
    assert len(set(failpoints.COORDINATOR)) == 8
