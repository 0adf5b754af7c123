import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def deployment():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("deployment", FOLDER / "deployment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["deployment"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("deployment", "flower_side", "memory"):
        del sys.modules[name]


def sides(deployment, flower, ours):
    memory = {"idle": {"relay": 100.0, "worker": 250.0}, "peak": {"relay": 120.0}}
    # The first round is slow on both sides and must not count.
    return (
        deployment.Side([99.0, flower, flower, flower + 50], **memory),
        deployment.Side([50.0, ours, ours, ours + 50], **memory),
    )


@pytest.mark.parametrize(
    ("flower", "ours", "passed", "goal", "expected_text"),
    [
        (20.0, 4.0, True, True, "5.0 times as fast: the goal of 5 is reached"),
        (20.0, 5.0, True, False, "4.0 times as fast: the least of 3 is reached, the goal of 5 is"),
        (20.0, 10.0, False, False, "2.0 times as fast: the least of 3 is MISSED"),
    ],
)
def test_the_ratio_of_medians_decides(deployment, flower, ours, passed, goal, expected_text):
    result = deployment.judge(*sides(deployment, flower, ours), "training only")
    assert result["ratio"] == flower / ours
    assert (result["passed"], result["goal_reached"]) == (passed, goal)
    assert expected_text in deployment.table(result)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_flower_alone_is_no_verdict(deployment):
    flower, _ = sides(deployment, 20.0, 4.0)
    result = deployment.judge(flower, None, "training only")
    assert result["ratio"] is result["passed"] is None
    assert "times as fast" not in deployment.table(result)


def test_the_table_shows_a_sites_parts_separately(deployment):
    text = deployment.table(deployment.judge(*sides(deployment, 20.0, 4.0), "training only"))
    assert "fedge, one site idle, PSS in MiB: relay 100, worker 250" in text
    assert "350" in text


def test_times_of_a_file_that_is_being_written(deployment, tmp_path):
    path = tmp_path / "times"
    assert deployment.flower_side.read_times(path) == []
    path.write_text("0 10.000\n1 31.500\n2 5")
    assert deployment.flower_side.read_times(path) == [10.0, 31.5]


def test_rollup_is_read_by_field(deployment):
    text = "5581 ---p 00000000 00:00 0    [rollup]\nRss:     2048 kB\nPss:      1024 kB\n"
    assert deployment.memory.parse_rollup(text) == {"Rss": 2048, "Pss": 1024}


def test_memory_of_a_tree_counts_descendants_and_only_these(deployment):
    memory = deployment.memory
    # The shell stays as the parent: it has something to do after the child.
    script = f"{sys.executable} -c 'import time; print(1, flush=True); time.sleep(60)'; true"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE) as parent:
        try:
            parent.stdout.readline()
            pids = memory.tree([parent.pid])
            assert len(pids) == 2
            parts = memory.by_command([parent.pid])
            assert parts["sh"] > 0
            assert sum(parts.values()) > memory.pss(parent.pid) > 0
        finally:
            for pid in reversed(memory.tree([parent.pid])):
                subprocess.run(["kill", "-9", str(pid)], check=True)
    assert memory.pss(parent.pid) == 0.0


@pytest.mark.parametrize(("ours", "status"), [(4.0, 0), (10.0, 1)])
def test_the_exit_status_is_1_where_the_minimum_is_missed(
    deployment, ours, status, monkeypatch, tmp_path, capsys
):
    result = deployment.judge(*sides(deployment, 20.0, ours), "training only")
    monkeypatch.setattr(deployment, "measure", lambda *_: result)
    monkeypatch.setattr(deployment, "RESULTS", tmp_path)
    assert deployment.main(["--json"]) == status
    assert json.loads(capsys.readouterr().out) == result
    assert json.loads((tmp_path / "deployment.json").read_text()) == result


def test_the_first_round_alone_gives_no_median(deployment, capsys):
    with pytest.raises(SystemExit):
        deployment.main(["--rounds", "1"])
    assert "must be at least 2, got 1" in capsys.readouterr().err


def test_our_configuration_is_one_that_fedge_reads(deployment, tmp_path):
    from fedge.shared.config import reader

    path = tmp_path / "ours.toml"
    path.write_text(deployment.configuration(6, evaluate=False))
    config = reader.load(path)
    # Only the last round is evaluated, and that one is not counted.
    assert (config.run.rounds, config.run.evaluate_every) == (6, 6)
    assert config.round.min_sites == config.sites.count == deployment.SITES
