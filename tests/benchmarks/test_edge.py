import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = (
    "edge_client",
    "edge_load",
    "edge_model",
    "edge_pair",
    "edge_process",
    "edge_servers",
    "flower_side",
    "memory",
)


@pytest.fixture(scope="module")
def edge():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("edge_benchmark", FOLDER / "edge.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["edge_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("edge_benchmark", "session", *LOADED):
        sys.modules.pop(name, None)


def repetition(p50=1.0, rate=100.0, counts=("1", "4")):
    at = {"p50_ms": p50, "p99_ms": 2 * p50, "requests_s": rate, "requests": 500, "cpu_ms": p50}
    return {"clients": {c: dict(at) for c in counts}, "peak_rss_mib": 50.0, "processes": 1}


def rows_of(edge, ours=2.3, rate=500.0, theirs=(100.0, 200.0)):
    found = {
        edge.BARE: [repetition(1.0, counts=("1",))],
        edge.ECHO: [repetition(1.0, 900.0)],
        # Of three repetitions the median counts, whatever the slowest was.
        edge.OURS: [repetition(ours, rate), repetition(99.0, 1.0), repetition(0.1, 9999.0)],
        edge.MLSERVER[0]: [repetition(5.0, theirs[0])],
        edge.MLSERVER[1]: [repetition(6.0, theirs[1])],
        edge.MLSERVER[2]: [repetition(6.5, 160.0)],
        edge.LITSERVE: [repetition(7.0, 150.0)],
    }
    return {name: edge.medians(repetitions) for name, repetitions in found.items()}


def pair_of(edge, ours=1.15):
    return {edge.BARE: 0.4, edge.ECHO: 0.4, edge.BOTH: 1.0, edge.OURS: ours}


@pytest.mark.parametrize(
    ("changes", "p50", "rate"),
    [
        ({}, True, True),
        ({"pair": 1.16}, False, True),
        ({"rate": 499.0}, True, False),
        ({"theirs": (201.0, 200.0)}, True, False),
    ],
)
def test_each_goal_is_met_at_its_bound_and_missed_beyond(edge, changes, p50, rate):
    pair = pair_of(edge, changes.pop("pair", 1.15))
    goals = edge.judge(rows_of(edge, **changes), pair)
    assert (goals["p50"]["passed"], goals["rate"]["passed"]) == (p50, rate)
    assert goals["passed"] == (p50 and rate)
    assert edge.verdict(goals).count("MISSED") == (not p50) + (not rate)


def test_the_best_of_mlservers_rows_is_taken(edge):
    goals = edge.judge(rows_of(edge), pair_of(edge))
    assert goals["mlserver"] == edge.MLSERVER[1]
    assert list(goals["mlserver_ratios"].values()) == [5.0, 2.5, 3.125]
    assert f"(of {edge.MLSERVER[0]}: 5.00)" in edge.verdict(goals)
    assert goals["p50_apart"] == pytest.approx(1.15)
    assert "each in a loop of its own: 1.15" in edge.verdict(goals)
    other = edge.judge(rows_of(edge, theirs=(200.0, 90.0)), pair_of(edge))
    assert other["mlserver"] == edge.MLSERVER[0]


@pytest.mark.parametrize("place", range(5))
def test_a_goal_that_was_not_measured_is_missed(edge, place):
    rows, pair = rows_of(edge), pair_of(edge)
    if place == 4:
        pair = {}
        rows[edge.LITSERVE] = edge.medians([])
    else:
        rows[(edge.OURS, *edge.MLSERVER)[place]] = edge.medians([])
    goals = edge.judge(rows, pair)
    assert not goals["passed"]
    assert "not measured" in edge.verdict(goals)
    assert "FAILED" in edge.table(rows)


def test_the_table_has_a_line_for_each_number_of_clients(edge):
    lines = edge.table(rows_of(edge)).splitlines()
    assert len(lines) == 1 + 1 + 6 * 2
    assert lines[1].split() == [
        "bare",
        "onnxruntime",
        "1",
        "1.00",
        "2.00",
        "100",
        "1.00",
        "50",
        "1",
    ]


def test_quantiles_are_values_that_were_measured(edge):
    values = list(range(100, 0, -1))
    assert edge.edge_load.quantile(values, 0.5) == 50
    assert edge.edge_load.quantile(values, 0.99) == 99
    assert edge.edge_load.quantile([7.0], 0.99) == 7.0


@pytest.mark.parametrize(("ours", "status"), [(3.0, 0), (4.0, 1)])
def test_the_exit_status_and_the_file_agree(edge, ours, status, monkeypatch, tmp_path, capsys):
    found = {name: [repetition()] for name in (*edge.MLSERVER, edge.LITSERVE)}
    found |= {edge.BARE: [repetition(2.0, counts=("1",))], edge.ECHO: [repetition(1.0)]}
    found[edge.OURS] = [repetition(ours, 900.0)]
    monkeypatch.setattr(edge.edge_pair, "measure", lambda *_: pair_of(edge, ours / 3))
    monkeypatch.setattr(edge.edge_servers, "install", lambda _: None)
    monkeypatch.setattr(edge.edge_servers, "versions", lambda peer: {peer: "1"})
    monkeypatch.setattr(edge.edge_model, "write", lambda _: None)
    monkeypatch.setattr(edge.edge_load, "play", lambda *_: (found, ["one try failed"]))
    monkeypatch.setattr(edge, "RESULTS", tmp_path / "edge.json")
    assert edge.main([]) == status
    results = json.loads((tmp_path / "edge.json").read_text())
    assert results["passed"] is (status == 0)
    assert results["problems"] == ["one try failed"]
    assert results["versions"]["mlserver"] == {"mlserver": "1"}
    assert ("MISSED" in capsys.readouterr().out) is (status == 1)


def test_a_peer_that_cannot_be_installed_costs_its_rows_only(edge, monkeypatch, tmp_path, capsys):
    def install(peer):
        if peer == "mlserver":
            raise RuntimeError("pip: failed\nno matching distribution")

    measured = []

    def play(chosen, *_):
        measured.extend(c.name for c in chosen)
        return {c.name: [repetition()] for c in chosen}, []

    monkeypatch.setattr(edge.edge_servers, "install", install)
    monkeypatch.setattr(edge.edge_servers, "versions", lambda peer: {peer: "1"})
    monkeypatch.setattr(edge.edge_model, "write", lambda _: None)
    monkeypatch.setattr(edge.edge_load, "play", play)

    def fails(*_):
        raise RuntimeError("pair: no")

    monkeypatch.setattr(edge.edge_pair, "measure", fails)
    monkeypatch.setattr(edge, "RESULTS", tmp_path / "edge.json")
    assert edge.main([]) == 1
    assert not set(edge.MLSERVER) & set(measured)
    assert edge.LITSERVE in measured
    results = json.loads((tmp_path / "edge.json").read_text())
    assert "no matching distribution" in results["problems"][0]
    assert results["rows"][edge.MLSERVER[0]] == {}
    assert results["problems"][1:] == [f"turns, repetition {n}: pair: no" for n in (1, 2, 3)]
    assert results["goals"]["p50"]["ratio"] is None
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "must be positive"),
        (["--repetitions", "0"], "must be positive"),
        (["nobody"], "no contender"),
    ],
)
def test_arguments_that_measure_nothing_are_refused(edge, arguments, message, capsys):
    with pytest.raises(SystemExit):
        edge.main(arguments)
    assert message in capsys.readouterr().err


def test_an_environment_that_is_complete_is_left_alone(edge, monkeypatch, tmp_path):
    monkeypatch.setattr(edge.edge_servers, "_run", lambda program, _: pytest.fail(program))
    (tmp_path / "litserve").mkdir()
    content = "\n".join(edge.edge_servers.requirements("litserve")) + "\n"
    (tmp_path / "litserve" / "installed").write_text(content)
    assert edge.edge_servers.install("litserve", tmp_path) == tmp_path / "litserve"


@pytest.mark.parametrize("left", [None, "litserve==0.0.1\n"])
def test_an_incomplete_environment_is_made_again(edge, left, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(edge.edge_servers, "_run", lambda program, command: ran.append(program))
    folder = tmp_path / "litserve"
    folder.mkdir()
    (folder / "half").touch()
    if left:
        (folder / "installed").write_text(left)
    # Without the venv that is not made here the mark cannot be written.
    with pytest.raises(FileNotFoundError):
        edge.edge_servers.install("litserve", tmp_path)
    assert ran == ["venv", "pip"]
    assert not (folder / "half").exists()


@pytest.mark.soak
def test_the_output_of_pip_is_reported(edge):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "./no-such-folder",
    ]
    with pytest.raises(RuntimeError, match="pip: failed\n(.|\n)*no-such-folder"):
        edge.edge_servers._run("pip", command)


@pytest.mark.soak
def test_memory_and_time_are_the_processs_own(edge):
    code = "import sys; x = bytearray(64 << 20); del x; sum(range(5_000_000)); print(1, flush=True); sys.stdin.read()"
    ballast = bytearray(b"1" * (256 << 20))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        # The peak is remembered after the memory was given back; the parent's, larger, does not count.
        assert 64 < edge.edge_process.peak_rss(child.pid) < 200
        assert edge.edge_process.cpu_seconds(child.pid) > 0
        child.stdin.close()
    del ballast
    assert edge.edge_process.peak_rss(child.pid) == edge.edge_process.cpu_seconds(child.pid) == 0.0


@pytest.fixture(scope="module")
def folder(edge, tmp_path_factory):
    path = tmp_path_factory.mktemp("edge")
    edge.edge_model.write(path)
    return path


def named(edge, name):
    return next(c for c in edge.CONTENDERS if c.name == name)


@pytest.mark.soak
def test_bare_and_echo_are_measured(edge, folder):
    chosen = [named(edge, edge.BARE), replace(named(edge, edge.ECHO), clients=(1, 2))]
    found, problems = edge.edge_load.play(chosen, folder, 1, 0.3)
    assert problems == []
    bare, echo = (edge.medians(found[name]) for name in (edge.BARE, edge.ECHO))
    assert list(bare["clients"]) == ["1"]
    assert list(echo["clients"]) == ["1", "2"]
    for at in (*bare["clients"].values(), *echo["clients"].values()):
        assert 0 < at["p50_ms"] <= at["p99_ms"]
        assert at["requests"] > 1
    # Of the bare row the process that works is the client.
    assert bare["clients"]["1"]["cpu_ms"] == bare["clients"]["1"]["client_cpu_ms"] > 0
    assert bare["peak_rss_mib"] > 20
    assert echo["peak_rss_mib"] > 10


@pytest.mark.soak
def test_a_server_that_answers_wrongly_or_not_at_all_is_a_problem(edge, folder, tmp_path, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    answer = bytearray((folder / "response.bin").read_bytes())
    answer[-1] ^= 0x40
    (tmp_path / "response.bin").write_bytes(answer)

    def dies(*_):
        return [sys.executable, "-c", "raise SystemExit('no licence')"]

    echo = replace(named(edge, edge.ECHO), clients=(1,))
    chosen = [replace(echo, name="wrong"), replace(echo, name="dead", command=dies)]
    # What fails in the first repetition is not waited for in the others.
    found, problems = edge.edge_load.play(chosen, tmp_path, 3, 0.2)
    assert found == {"wrong": [], "dead": []}
    assert len(problems) == 2 * edge.edge_load.TRIES
    assert "logits: must be" in problems[0]
    assert "no licence" in problems[-1]


@pytest.mark.soak
def test_one_client_takes_turns(edge, folder):
    found = edge.edge_pair.measure(folder, 1.0)
    assert list(found) == [edge.BARE, edge.ECHO, edge.BOTH, edge.OURS]
    assert min(found.values()) > 0


def test_turns_leave_out_where_they_begin(edge):
    calls = {"a": 0, "b": 0}

    def call(name):
        calls[name] += 1

    taken = edge.edge_pair.turns({"a": lambda: call("a"), "b": lambda: call("b")}, 0.01)
    turn, settle = edge.edge_pair.TURN, edge.edge_pair.SETTLE
    for name, count in calls.items():
        assert count % turn == 0
        assert len(taken[name]) == count // turn * (turn - settle)
