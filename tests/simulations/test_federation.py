"""`fedge up`: the real processes, killed and not; the weights must be those of a simulation, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from fedge.shared.daemon import home as homes
from fedge.shared.daemon import process

pytestmark = [pytest.mark.realtime, pytest.mark.timeout(1800)]

FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def config(chaos: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    # Fewer steps than the benchmark has: enough to be caught at them.
    shorter = chaos.CONFIG.replace("local-steps = 400", "local-steps = 150")
    assert shorter != chaos.CONFIG
    path.write_text(shorter)
    return path


@pytest.fixture(scope="module")
def simulated(chaos: ModuleType, config: Path) -> str:
    return chaos.reference(config, config.parent / "simulated")


def _processes(out: Path) -> list[tuple[int, int]]:
    places = [out / "federation", out / "server", *(out / "sites").glob("*")]
    return [
        (pid, born)
        for place in places
        for _, pid, born in homes.processes(homes.status(place) or {})
    ]


def _none_left(before_kill: list[tuple[int, int]], out: Path, seconds: float = 300.0) -> None:
    """No process that was seen, and none that names the directory, is alive."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [pid for pid, born in before_kill if process.birth(pid) == born]
        left += [pid for pid in _naming(str(out)) if pid != os.getpid()]
        if not left:
            return
        time.sleep(0.1)
    listing = subprocess.run(
        ["ps", "-o", "pid,args", *map(str, left)], capture_output=True, text=True
    )
    pytest.fail(f"left over:\n{listing.stdout}")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def _flower_runs(out: Path) -> list[int]:
    return list(json.loads((out / "run.json").read_text())["flower_runs"])


def _naming(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_deployed_run_whose_coordinator_is_killed_is_the_simulated_one(
    chaos: ModuleType, tmp_path: Path
) -> None:
    config, out = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(chaos.CONFIG.replace("local-steps = 400", "local-steps = 20"))
    simulated = chaos.reference(config, tmp_path / "simulated")
    with chaos.federation(config, out, "mid-checkpoint:2") as live:
        live.wait(lambda: live.committed() >= 1, 300, "round 1")
        before_kill = _processes(out)
        # Each site has a daemon, a node and a worker of its own; the relay's processes know no torch.
        for site in ("site-1", "site-2", "site-3"):
            worker, daemon = live.pid(site, "worker"), live.pid(site, "daemon")
            assert "torch" in Path(f"/proc/{worker}/maps").read_text()
            # Not a new interpreter that imports torch for itself.
            assert _command(_parent(worker)).startswith(f"fedge imports --out {out}")
            for relay in (daemon, live.pid(site, "supernode"), live.pid(site, "superexec")):
                assert "libtorch" not in Path(f"/proc/{relay}/maps").read_text()
            assert (out / "sites" / site / "site.key").stat().st_mode & 0o777 == 0o600
        chaos.fallen(live, "coordinator")
        assert live.process.wait(chaos.WAIT_FACTOR * 200) == 0, live.tail()
    _none_left(before_kill, out)
    assert chaos.sha256(out) == simulated
    record = json.loads((out / "run.json").read_text())
    assert len(record["flower_runs"]) == 2
    other = json.loads((tmp_path / "simulated" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["sites"] == other["sites"]
    assert record["model_sha256"] == other["model_sha256"]
    assert (out / "report.html").is_file()
    assert "site mean" in live.tail()
    keys = {(out / "sites" / s / "site.key").read_bytes() for s in ("site-1", "site-2", "site-3")}
    assert len(keys) == 3


@pytest.mark.soak
def test_killed_in_every_round_it_goes_on_and_ends_with_the_same_bytes(
    chaos: ModuleType, config: Path, tmp_path: Path
) -> None:
    # Coordinator, SuperLink, client process, a whole site; benchmarks/chaos.py has all, each in a run of its own.
    longer = tmp_path / "longer.toml"
    longer.write_text(config.read_text().replace("rounds = 3", "rounds = 5"))
    out = tmp_path / "run"
    before_kill = {case.name: case for case in chaos.cases()}
    superlink = chaos.Case(
        "SuperLink, training", 0, moment=chaos.is_training, victims=chaos.one("superlink", "server")
    )
    with chaos.federation(longer, out, "mid-checkpoint:2") as live:
        chaos.fallen(live, "coordinator")
        cases = (superlink, before_kill["flwr-clientapp"], before_kill["site, training"])
        for number, case in enumerate(cases, start=3):
            chaos.strike(live, case, number)
        assert live.process.wait(chaos.WAIT_FACTOR * 200) == 0, live.tail()
    assert chaos.sha256(out) == chaos.reference(longer, tmp_path / "simulated")
    record = json.loads((out / "run.json").read_text())
    # The first coordinator's, and one for each fall of the coordinator or of the SuperLink below it.
    assert len(record["flower_runs"]) >= 2
    _none_left([], out)


@pytest.mark.soak
def test_a_killed_parent_leaves_nothing_the_run_goes_on_and_down_ends_it(
    chaos: ModuleType, config: Path, simulated: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with chaos.federation(config, out) as live:
        live.wait(lambda: live.committed() >= 1, 300, "round 1")
        before_kill = _processes(out)
        live.process.send_signal(signal.SIGKILL)
        live.process.wait(chaos.WAIT_FACTOR * 10)
        _none_left(before_kill, out)
    down = subprocess.run([*FEDGE, "down", "--out", str(out)], capture_output=True, text=True)
    assert down.returncode == 0, down.stderr
    with chaos.federation(config, out, "", "--resume") as live:
        live.wait(lambda: len(_flower_runs(out)) == 2, 300, "the run")
        second = subprocess.run(
            [*FEDGE, "up", "--config", str(config), "--out", str(out), "--resume"],
            capture_output=True,
            text=True,
        )
        assert "FE-902" in second.stderr
        live.wait(lambda: live.committed() >= 2, 300, "round 2")
        before_kill = _processes(out)
        down = subprocess.run([*FEDGE, "down", "--out", str(out)], capture_output=True, text=True)
        assert down.returncode == 0, down.stderr
        assert live.process.wait(chaos.WAIT_FACTOR * 30) == 130
        assert "FE-103" in live.tail()
        _none_left(before_kill, out)
    # What was deployed may be finished by simulation: it is the same run.
    done = subprocess.run(
        [*FEDGE, "simulate", str(config), "--out", str(out), "--resume", "--quiet"], timeout=300
    )
    assert done.returncode == 0
    assert chaos.sha256(out) == simulated


@pytest.mark.soak
def test_a_required_site_that_is_not_there_fails_loudly(
    chaos: ModuleType, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = ("--set", 'round.require-sites=["clinic-z"]', "--set", "run.rounds=1")
    with chaos.federation(config, out, "", *more) as live:
        assert live.process.wait(chaos.WAIT_FACTOR * 120) == 1
        assert "FE-502" in live.tail()
        assert "clinic-z" in live.tail()
    assert not (out / "model.safetensors").exists()
