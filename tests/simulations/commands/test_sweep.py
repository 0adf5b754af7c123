"""`fedge sweep` end to end, at a small size: what it prints, writes, returns, continues and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedge.shared.cli.command import guarded
from fedge.shared.cli.main import parser_of
from fedge.simulations.commands import sweep

DIGITS = Path(__file__).parents[3] / "examples" / "digits.toml"
TINY = {
    "sites.count": "4",
    "run.rounds": "1",
    "data.partition": "iid",
    "train.local-epochs": "1",
    # All of a site's examples in every step: there is no sampling, whose accounting takes seconds.
    "train.batch-size": "512",
}
PRIVATE = {**TINY, "privacy.mechanism": "example"}
TABLE = re.compile(r"^ +(none|[0-9.]+) +(–|[0-9.]+) +(–|[0-9.]+) +([0-9.]+) % +(\S+).*$", re.M)


@pytest.fixture
def fedge(tmp_path, capsys, monkeypatch):
    """Sweeps the digits; gives status, output, error."""
    monkeypatch.chdir(tmp_path)

    def run(keys, *options, noise="0.5,4", seeds="1"):
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        words = [str(DIGITS), *sets, "--noise-multiplier", noise, "--seeds", seeds, *options]
        arguments = parser_of("sweep", sweep.COMMAND).parse_args(words)
        status = guarded("fedge sweep", lambda: sweep.COMMAND.run(arguments))
        return status, *capsys.readouterr()

    return run


def progress(err):
    """The command's own lines; the first test that imports Flower has its log there too."""
    return [line for line in err.splitlines() if re.match(r"s: |baseline |noise-", line)]


def strict(text):
    """JSON without NaN and Infinity, which Python would read."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_a_sweep_prints_writes_and_puts_itself_beside_its_runs(fedge, tmp_path):
    status, out, err = fedge(PRIVATE, "--out", "s")
    assert status == 0
    assert progress(err) == [
        "s: 3 runs; if interrupted, go on with --out s",
        "baseline (1 of 3) ...",
        "noise-0.5-seed-42 (2 of 3) ...",
        "noise-4-seed-42 (3 of 3) ...",
    ]
    assert max(map(len, out.splitlines())) <= 80
    assert "digits, example, 1 round, 1 seed" in out
    assert "epsilon of one run, for one training example, delta 1e-05" in out
    assert "Figures of a sweep are exact" in out
    assert out.endswith("\ns/sweep.html\n")
    base, little, much = TABLE.findall(out)
    assert (base[0], base[1], base[2]) == ("none", "–", "–")
    assert (little[0], much[0]) == ("0.5", "4")
    assert float(little[1]) == float(little[2]) > float(much[1]) == float(much[2]) > 0
    found = strict((tmp_path / "s" / "sweep.json").read_text())
    assert f"{found['points'][0]['epsilon']['consumers']:.4f}" == little[1]
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "on data that is the researcher&#x27;s own" in page
    for name in ("baseline", "noise-0.5-seed-42", "noise-4-seed-42"):
        folder = tmp_path / "s" / "runs" / name
        assert strict((folder / "sweep.json").read_text()) == found
        report = (folder / "report.html").read_text()
        # The very same curve, and in a run's report its own ring.
        (drawn,) = set(re.findall(r'<g class="mean"><title>Both.*?</g>', page.split("narrow")[-2]))
        assert drawn in report
        assert ("The orange ring is this run" in report) == (name != "baseline")


@pytest.mark.slow
def test_again_nothing_runs_twice_and_what_is_added_runs(fedge, tmp_path):
    _, out, _ = fedge(PRIVATE, "--out", "s", "--json")
    first = strict(out)
    status, out, err = fedge(PRIVATE, "--out", "s", "--json")
    assert status == 0
    assert strict(out) == first
    assert sum("kept" in line for line in progress(err)) == 3
    # As a sweep that was interrupted before its last run left it.
    left = tmp_path / "s" / "runs" / "noise-4-seed-42"
    (left / "journal.db").unlink()
    (left / "run.json").unlink()
    _, out, err = fedge(PRIVATE, "--out", "s", "--json", noise="0.5,4,8")
    more = strict(out)
    assert (more["baseline"], more["points"][0]) == (first["baseline"], first["points"][0])
    assert more["points"][1]["runs"][0]["id"] != first["points"][1]["runs"][0]["id"]
    assert [p["noise_multiplier"] for p in more["points"]] == [0.5, 4, 8]
    assert [line for line in progress(err) if "kept" not in line] == [
        "s: 4 runs; if interrupted, go on with --out s",
        "noise-4-seed-42 (3 of 4) ...",
        "noise-8-seed-42 (4 of 4) ...",
    ]


def test_a_folder_of_another_sweep_or_of_something_else_is_left_alone(fedge, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    status, out, err = fedge(PRIVATE, "--out", "other")
    assert (status, out) == (1, "")
    assert err.startswith("FE-107 other: must be empty or hold a sweep, got thesis.txt.")
    sweep_of = tmp_path / "s"
    sweep_of.mkdir()
    (sweep_of / "config.toml").write_text('[task]\nname = "heart"\n')
    (sweep_of / "runs" / "baseline").mkdir(parents=True)
    status, _, err = fedge(PRIVATE, "--out", "s")
    assert status == 1
    assert err.startswith(
        "FE-107 s: must hold a sweep of the same configuration, got 'name = \"heart\"' then"
    )
    assert (sweep_of / "runs" / "baseline").is_dir()
    assert not (sweep_of / "sweep.json").exists()


def test_another_process_in_the_folder_is_reported(fedge, tmp_path):
    import subprocess
    import sys

    (tmp_path / "s").mkdir()
    code = (
        "import fcntl, sys; f = open('s/lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        " print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        status, _, err = fedge(PRIVATE, "--out", "s")
        holder.communicate(b"")
    assert status == 1
    assert err.startswith("FE-208 ")


@pytest.mark.slow
def test_a_run_that_fails_has_its_number_in_all_that_is_written(fedge, tmp_path):
    keys = {
        **PRIVATE,
        "privacy.mechanism": "distributed",
        "secure-aggregation.enabled": "true",
        "secure-aggregation.min-sites": "4",
        "run.rounds": "1",
        "round.max-skipped": "1",
    }
    status, out, _ = fedge(keys, "--out", "s", noise="0.001,1")
    assert status == 1
    assert "noise-0.001-seed-42: FE-211 " in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    rows = TABLE.findall(out)
    assert [row[0] for row in rows] == ["none", "1"]
    found = strict((tmp_path / "s" / "sweep.json").read_text())
    assert found["points"][0]["runs"][0]["problem"].startswith("FE-211 ")
    assert found["points"][0]["mean"] is None
    assert "1 run without a figure" in (tmp_path / "s" / "sweep.html").read_text()


def test_the_next_free_folder_is_taken(fedge, tmp_path, monkeypatch):
    monkeypatch.setattr("fedge.simulations.engine.simulate", _refuse)
    for _ in range(2):
        status, _, _ = fedge(PRIVATE)
        assert status == 1
    assert (tmp_path / "runs" / "sweep-2" / "sweep.html").exists()


def _refuse(*_, **__):
    from fedge.shared.errors import RunError

    raise RunError(503, "nothing runs here")


@pytest.mark.parametrize(
    ("keys", "options", "noise", "status", "expected"),
    [
        (TINY, [], "1", 2, "FE-102 privacy.mechanism: must be one that adds noise, got off; add --set privacy.mec"),
        (PRIVATE, [], "", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, [], "1,x", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, [], "1,1.0", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, [], "0,1", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, [], "nan", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, [], "1e5", 2, "FE-102 --noise-multiplier: must be up to 100 numbers above 0"),
        (PRIVATE, ["--seeds", "0"], "1", 2, "FE-102 --seeds: must be 1 to 100, got 0"),
        (PRIVATE, ["--delta", "1"], "1", 2, "FE-102 --delta: must be 1e-10 to below 1, got 1"),
        (PRIVATE, ["--delta", "nan"], "1", 2, "FE-102 --delta: must be 1e-10 to below 1, got nan"),
        ({**PRIVATE, "privacy.mechanism": "magic"}, [], "1", 1, "FE-201 privacy.mechanism: must be"),
        ({**PRIVATE, "privacy": "3"}, [], "1", 1, "FE-201 privacy: must be"),
        ({**PRIVATE, "strategy.name": "QFedAvg"}, [], "1", 1, "FE-201 strategy.name: must not weigh"),
        ({**PRIVATE, "task.name": "breast-cancer"}, [], "1", 1, "FE-211 privacy.statistics: must be unprotected"),
        (PRIVATE, ["--out", "/dev/null/x"], "1", 1, "FE-107 /dev/null/x: must be writable, got Not a directory"),
    ],
)  # fmt: skip
def test_what_is_refused(fedge, tmp_path, keys, options, noise, status, expected):
    found, out, err = fedge(keys, *options, noise=noise)
    assert (found, out) == (status, "")
    assert err.splitlines()[-1].startswith(expected)
    assert not list(tmp_path.iterdir())
