"""`fedge up` under masks: real processes, and a coordinator that is killed when the sum is about to be opened."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fedge.client import policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[task]
name = "digits"
[run]
rounds = 2
evaluate-every = 2
[sites]
count = 3
[train]
local-steps = 20
batch-size = 32
[round]
deadline = 120
[secure-aggregation]
enabled = true
min-sites = 3
clipping-bound = 200.0
weight-cap = 1000
"""


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["chaos"]


def test_a_coordinator_that_is_killed_opens_the_kept_sum(chaos: ModuleType, tmp_path: Path) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG)
    simulated = chaos.reference(config, tmp_path / "simulated")
    with chaos.federation(config, out, "before-unmask:1") as live:
        assert live.process.wait(400) == 0, live.tail()
        said = live.text("server", "coordinator")
        assert "kept sums are opened" in said
        for i in range(1, 4):
            log = live.text(f"site-{i}", "worker")
            # Nobody has begun a round again, let alone trained: the coordinator asked on where it was.
            assert log.count("train, attempt 1: takes part") == 2
            assert "train, attempt 2" not in log
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() == simulated
    told = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in told] == ["committed", "committed"]
    assert [line["secure"]["attempts"] for line in told] == [1, 1]
    assert len(json.loads((out / "run.json").read_text())["flower_runs"]) == 2
    for place in (out / "sites").iterdir():
        assert policy.read(place).secure_aggregation.required
        (answered,) = (place / "secagg").glob("*.json")
        assert json.loads(answered.read_text()) == {"evaluate": 2, "train": 2}
