"""Which directories a command may use, and that no two commands use one at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest

from fedge.server.runs.directory import RunDirectory, prepare, state_of
from fedge.server.runs.journal import Commit, Journal
from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError, FedgeError

_HOLDER = """
import sys
from pathlib import Path
from fedge.server.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def config(**run: Any) -> Config:
    return builders.config("breast-cancer", run=run)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def held(out: Path) -> Iterator[Path]:
    """A prepared directory that another process holds."""
    prepare(out, config(), resume=False)
    command = [sys.executable, "-c", _HOLDER, str(out)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield out
        process.communicate("", timeout=120)


def refusal(path: Path, settings: Config, *, resume: bool) -> FedgeError:
    with pytest.raises(FedgeError) as refused:
        prepare(path, settings, resume=resume)
    return refused.value


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_directory_is_made_with_its_parents_and_holds_the_configuration(
    out: Path, resume: bool
):
    directory, finished = prepare(out, config(rounds=3), resume=resume)
    assert not finished
    assert directory.load_config() == config(rounds=3)
    assert sorted(p.name for p in out.iterdir()) == ["config.toml", "lock"]


def test_an_empty_directory_will_do(out: Path):
    out.mkdir(parents=True)
    (out / "lock").touch()
    assert not prepare(out, config(), resume=False)[1]


def test_206_a_directory_in_use_is_not_overwritten(out: Path):
    prepare(out, config(), resume=False)
    before = (out / "config.toml").read_bytes()
    error = refusal(out, config(rounds=3), resume=False)
    assert error.code == 206
    assert "config.toml" in error.message
    assert (out / "config.toml").read_bytes() == before


def test_resume_continues_with_the_same_configuration(out: Path):
    prepare(out, config(rounds=3), resume=False)
    directory, finished = prepare(out, config(rounds=3), resume=True)
    assert not finished
    assert directory.load_config() == config(rounds=3)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("run.rounds (2 then, 3 now)", {"run": {"rounds": 3}}),
        ("run.seed (42 then, 43 now)", {"run": {"seed": 43}}),
        ("train.learning-rate (0.05 then, 0.1 now)", {"train": {"learning-rate": 0.1}}),
        ("train.local-steps (3 then, 5 now)", {"train": {"local-steps": 5}}),
        (
            "train.local-epochs (None then, 2 now)",
            {"train": {"local-steps": None, "local-epochs": 2}},
        ),
        ("strategy.name (FedAvg then, Krum now)", {"strategy": {"name": "Krum"}}),
    ],
)
def test_207_another_configuration_is_named(out: Path, key: str, change: dict[str, Any]):
    begin(out)
    other = builders.config("breast-cancer", **change)
    error = refusal(out, other, resume=True)
    assert error.code == 207
    assert key in error.message


def begin(out: Path) -> None:
    """A run with one committed round."""
    directory, _ = prepare(out, config(), resume=False)
    journal = Journal(directory.journal)
    journal.begin_run("r-1", "", "then")
    journal.commit(Commit(1, "round-000001.safetensors", "0"), {"round": 1})
    journal.close()


def test_a_mistake_before_the_first_round_is_mended_by_resuming_with_another_configuration(
    out: Path,
):
    directory, _ = prepare(out, config(), resume=False)
    journal = Journal(directory.journal)
    journal.begin_run("r-1", "", "then")
    journal.commit(Commit(0, "round-000000.safetensors", "0"), {})
    journal.close()
    (out / "run.json").write_text("{}")
    directory, finished = prepare(out, config(rounds=3), resume=True)
    assert not finished
    assert directory.load_config() == config(rounds=3)
    assert not directory.journal.exists()


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_504_a_journal_that_is_gone_is_noticed(out: Path, how: str):
    begin(out)
    (out / "run.json").write_text("{}")
    (out / "journal.db").unlink()
    if how == "emptied":
        (out / "journal.db").write_bytes(b"")
    assert refusal(out, config(), resume=True).code == 504


@pytest.mark.slow
def test_208_another_process_holds_it(held: Path):
    assert refusal(held, config(), resume=True).code == 208
    with pytest.raises(ConfigError) as refused, RunDirectory(held).lock():
        pass
    assert refused.value.code == 208


@pytest.mark.slow
def test_the_lock_goes_with_its_process_even_if_it_is_killed(out: Path):
    prepare(out, config(), resume=False)
    command = [sys.executable, "-c", _HOLDER, str(out)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert refusal(out, config(), resume=True).code == 208
        process.kill()
    assert not prepare(out, config(), resume=True)[1]


@pytest.mark.slow
def test_one_process_may_lock_twice_and_holds_until_the_outer_end(out: Path):
    directory, _ = prepare(out, config(), resume=False)
    attempt = [sys.executable, "-c", _HOLDER, str(out)]
    with directory.lock():
        with RunDirectory(out / ".." / "first").lock():
            pass
        inside = subprocess.run(attempt, input="", text=True, capture_output=True, timeout=300)
    assert inside.returncode != 0
    assert "FE-208" in inside.stderr
    after = subprocess.run(attempt, input="", text=True, capture_output=True, timeout=300)
    assert after.returncode == 0


def test_209_a_foreign_directory_is_not_taken_over(out: Path):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("years of work")
    error = refusal(out, config(), resume=True)
    assert error.code == 209
    assert "thesis.tex" in error.message
    assert not (out / "config.toml").exists()
    assert refusal(out, config(), resume=False).code == 206


@pytest.mark.parametrize("resume", [False, True])
def test_209_a_file_is_no_directory(out: Path, resume: bool):
    out.parent.mkdir()
    out.write_text("a file")
    assert refusal(out, config(), resume=resume).code == 209
    assert out.read_text() == "a file"


def test_209_a_directory_without_a_configuration_has_none_to_load(out: Path):
    with pytest.raises(ConfigError) as refused:
        RunDirectory(out).load_config()
    assert refused.value.code == 209


def test_a_kill_before_the_configuration_was_complete_starts(out: Path):
    out.mkdir(parents=True)
    (out / ".config.toml.tmp").write_bytes(b"[ta")
    (out / "lock").touch()
    directory, finished = prepare(out, config(), resume=True)
    assert not finished
    assert directory.load_config() == config()
    assert not (out / ".config.toml.tmp").exists()


def test_a_kill_before_the_run_was_begun_starts(out: Path):
    directory, _ = prepare(out, config(), resume=False)
    Journal(directory.journal).close()
    assert prepare(out, config(), resume=True)[1] is False


def test_a_finished_run_is_told(out: Path):
    begin(out)
    journal = Journal(out / "journal.db")
    journal.finish("later")
    journal.close()
    assert prepare(out, config(), resume=True)[1] is True


def test_504_a_damaged_journal(out: Path):
    directory, _ = prepare(out, config(), resume=False)
    directory.journal.write_bytes(b"no journal" * 1000)
    assert refusal(out, config(), resume=True).code == 504


def test_json_and_lines_are_whole_and_without_nan(out: Path):
    directory, _ = prepare(out, config(), resume=False)
    directory.write_lines([{"round": 1}])
    directory.append_line({"round": 2})
    directory.append_line({"round": 3})
    lines = [json.loads(line) for line in directory.rounds.read_text().splitlines()]
    assert lines == [{"round": 1}, {"round": 2}, {"round": 3}]
    directory.write_lines([{"round": 1}])
    assert directory.rounds.read_text() == '{"round": 1}\n'
    directory.write_json(directory.metrics, {"a": [1, 2]})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            directory.write_json(directory.metrics, {"a": bad})
        with pytest.raises(ValueError, match="JSON"):
            directory.append_line({"a": bad})
    assert json.loads(directory.metrics.read_text()) == {"a": [1, 2]}
    assert directory.rounds.read_text() == '{"round": 1}\n'


def test_a_place_where_nothing_can_be_written_is_a_numbered_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refused:
        prepare(tmp_path / "file" / "run", config(), resume=False)
    assert refused.value.code == 210


def test_states_follow_the_run(out: Path):
    assert state_of(out) == "none"
    directory, _ = prepare(out, config(), resume=False)
    assert state_of(out) == "unfinished"
    directory.write_json(directory.stopped, {"code": "FE-502", "message": "x", "when": "now"})
    assert state_of(out) == "stopped"
    prepare(out, config(), resume=True)
    assert state_of(out) == "unfinished"
    journal = Journal(directory.journal)
    journal.begin_run("r-1", "", "then")
    directory.write_json(directory.run, {"state": "finished"})
    assert state_of(out) == "unfinished", "the journal has the last word"
    journal.finish("now")
    assert state_of(out) == "finished"
    journal.close()
    assert state_of(out) == "finished"


@pytest.mark.parametrize("name", ["run.json", "journal.db", "stopped.json", "config.toml"])
def test_states_of_damaged_files_do_not_raise(name: str, out: Path):
    directory, _ = prepare(out, config(), resume=False)
    directory.write_json(directory.run, {"state": "finished"})
    for content in (b"", b"\xff" * 5000, b"SQLite format 3\0" + b"\1" * 5000, b"[" * 50_000):
        (out / name).write_bytes(content)
        assert state_of(out) in ("unfinished", "stopped")
    (out / name).unlink()
    (out / name).mkdir()
    assert state_of(out) in ("none", "unfinished")
    assert state_of(out / name / "below") == "none"
