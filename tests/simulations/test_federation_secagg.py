"""`fedge up` with secure aggregation and calibration: real processes, a coordinator killed between its exchanges.

The sites have then revealed the shares that unmask the kept sum of the ranges; no site has been asked for scores.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from fedge.client.settings import policy
from fedge.shared.bundle.manifest_artefacts import ONNX_KINDS
from fedge.shared.compile import calibration
from fedge.shared.daemon import home as homes

pytestmark = [pytest.mark.realtime, pytest.mark.timeout(1800)]

PURPOSES = ("train", "evaluate", "calibrate", "qualify")
CONFIG = """
[task]
name = "digits"
[run]
rounds = 1
[sites]
count = 3
[train]
local-steps = 20
batch-size = 32
[round]
deadline = 600
[secure-aggregation]
enabled = true
min-sites = 3
clipping-bound = 200.0
weight-cap = 1000
[calibration]
enabled = true
examples = 64
"""


def answered(out: Path) -> list[dict[str, int]]:
    """The last round of each purpose that each site has answered for good."""
    return [json.loads(path.read_text()) for path in (out / "sites").glob("*/secagg/*.json")]


def test_a_killed_coordinator_unmasks_the_kept_sum(chaos: ModuleType, tmp_path: Path) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG)
    simulated = chaos.reference(config, tmp_path / "simulated")
    with chaos.federation(config, out) as live:
        live.wait(
            lambda: [a.get("calibrate") for a in answered(out)] == [1, 1, 1], 300, "the ranges"
        )
        # The shares are on their way: scores are asked for when they have come.
        os.kill(homes.status(live.home("server"))["runs"]["run"]["coordinator"], signal.SIGKILL)
        assert not any("qualify" in a for a in answered(out))
        assert live.process.wait(chaos.WAIT_FACTOR * 300) == 0, live.tail()
        log_text = live.text("server", "coordinator")
        # Unless this test was slower than the shares.
        assert "kept sums are" in log_text or "goes on with the ranges" in log_text
        for i in range(1, 4):
            log = live.text(f"site-{i}", "worker")
            # No site has begun a sum again, let alone trained: the coordinator continued where it was.
            for purpose in PURPOSES:
                assert log.count(f"{purpose}, attempt 1: takes part") == 1
            assert "attempt 2" not in log
    assert chaos.sha256(out) == simulated
    (record,) = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert (record["outcome"], record["secure"]["attempts"]) == ("committed", 1)
    assert len(json.loads((out / "run.json").read_text())["flower_runs"]) == 2
    assert answered(out) == [dict.fromkeys(PURPOSES, 1)] * 3
    assert not list((out / "secagg").glob("*.safetensors"))
    for place in (out / "sites").iterdir():
        # In clear such a site reports neither ranges nor scores (FE-418).
        assert policy.read(place).secure_aggregation.required
    # All but the run's name: ranges, counters and digest of every graph, the participants, and that no site is missing.
    found, other = (
        replace(calibration.load(run / calibration.FILE), run="")
        for run in (out, tmp_path / "simulated")
    )
    assert found == other
    assert (found.mode, len(found.sites), found.absent, found.reason) == ("histogram", 3, (), "")
    assert {kind: c.sites for kind, c in found.candidates.items()} == dict.fromkeys(ONNX_KINDS, 3)
