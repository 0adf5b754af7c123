import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from fedge.shared.cli import command as command_line
from fedge.shared.cli import main
from fedge.shared.cli.command import Command

FEDGE = Path(sys.executable).parent / "fedge"
ROOT = Path(__file__).resolve().parents[3]

# A second distribution with commands of its own, found as any installed one is.
PROBE = '''
import logging, os, sys, time
from fedge.shared.cli.command import Command
from fedge.shared.errors import RunError

def nothing(parser):
    pass

def option(parser):
    parser.add_argument("--times", type=int, required=True)

def raises(error):
    def run(arguments):
        raise error
    return Command("fails", "edge", nothing, run)

def missing(arguments):
    import nowhere_installed.part
    return 0

def missing_in_fedge(arguments):
    import fedge.shared.no_such_module
    return 0

def missing_in_installed(arguments):
    import json.no_such_part
    return 0

def environment(arguments):
    print(os.environ["FLWR_TELEMETRY_ENABLED"], os.environ["FLWR_DISABLE_UPDATE_CHECK"])
    return 0

def logs(arguments):
    for name in ("fedge.probe", "flwr"):
        for level in ("debug", "info", "warning"):
            getattr(logging.getLogger(name), level)("%s %s", name, level)
    print(sorted(vars(arguments)))
    return 0

def flower_logs(arguments):
    from flwr.common.logger import log
    log(logging.INFO, "flower speaks")
    log(logging.WARNING, "flower warns")
    return 0

def much(arguments):
    for number in range(10_000_000):
        print(number)
    return 0

def waits(arguments):
    print("ready", flush=True)
    time.sleep(60)
    return 0

def blocks(arguments):
    print("\u2588\u2591 4 %")
    return 0

def full_elsewhere(arguments):
    with open("/dev/full", "w") as file:
        file.write("x")
    return 0

def broken_pipe_elsewhere(arguments):
    read, write = os.pipe()
    os.close(read)
    os.write(write, b"x")
    return 0

def says_and_fails(arguments):
    print("so far")
    raise RunError(505, "runs/a: must be finished")

SAYS_AND_FAILS = Command("fails", "edge", nothing, says_and_fails)
FE = raises(RunError(505, "runs/a: must be finished,\\ngot round 3"))
CRASH = raises(ValueError("left\\nright"))
INTERRUPT = raises(KeyboardInterrupt())
MISSING = Command("needs a package", "edge", nothing, missing)
MISSING_IN_FEDGE = Command("needs fedge", "edge", nothing, missing_in_fedge)
MISSING_IN_INSTALLED = Command("needs json", "edge", nothing, missing_in_installed)
ENVIRONMENT = Command("shows", "edge", nothing, environment)
LOGS = Command("logs", "edge", nothing, logs)
FLOWER_LOGS = Command("logs", "edge", nothing, flower_logs)
STATUS = Command("returns", "edge", nothing, lambda arguments: 7)
OPTION = Command("takes", "edge", option, lambda arguments: arguments.times)
MUCH = Command("prints", "edge", nothing, much)
WAITS = Command("waits", "edge", nothing, waits)
BLOCKS = Command("draws", "edge", nothing, blocks)
FULL = Command("fills", "edge", nothing, full_elsewhere)
BROKEN_PIPE = Command("breaks", "edge", nothing, broken_pipe_elsewhere)
NO_COMMAND = 3
'''  # fmt: skip


def entry_points() -> str:
    names = [
        line.split(" =")[0] for line in PROBE.splitlines() if line[:1].isupper() and " = " in line
    ]
    lines = [f"probe-{name.lower().replace('_', '-')} = fedge_probe:{name}" for name in names]
    return "\n".join(
        ["[fedge.commands]", *lines, "probe-unloadable = fedge_probe_unloadable:COMMAND", ""]
    )


@pytest.fixture
def probe(tmp_path, monkeypatch):
    (tmp_path / "fedge_probe.py").write_text(PROBE)
    (tmp_path / "fedge_probe_unloadable.py").write_text("import nowhere_installed\n")
    info = tmp_path / "fedge_probe-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedge-probe\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(entry_points())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("FEDGE_DEBUG", raising=False)
    for name in main.FLOWER_ENVIRONMENT:
        monkeypatch.setenv(name, "to be removed")  # so that it is restored
        monkeypatch.delenv(name)
    yield tmp_path
    sys.modules.pop("fedge_probe", None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_status_is_what_the_command_returns(probe, capsys):
    assert run(capsys, "probe-status")[0] == 7
    assert run(capsys, "probe-option", "--times", "3")[0] == 3


def test_a_failure_is_one_line_without_a_trace(probe, capsys):
    status, out, err = run(capsys, "probe-fe")
    assert (status, out) == (1, "")
    assert err == (
        "FE-505 runs/a: must be finished, got round 3. "
        "Remedy: Finish it with `fedge simulate ... --resume`.\n"
    )


def test_any_other_failure_is_one_line_that_names_its_type(probe, capsys):
    status, _, err = run(capsys, "probe-crash")
    assert status == 1
    assert err.startswith("FE-104 fedge probe-crash: unexpected ValueError: left right. Remedy:")
    assert err.count("\n") == 1


def test_debug_shows_the_trace_before_the_line(probe, capsys, monkeypatch):
    monkeypatch.setenv("FEDGE_DEBUG", "1")
    for name, kind in (("probe-crash", "ValueError"), ("probe-fe", "RunError")):
        _, _, err = run(capsys, name)
        assert "Traceback" in err and kind in err
        assert err.splitlines()[-1].startswith("FE-")


def test_a_missing_package_names_the_extra(probe, capsys):
    status, _, err = run(capsys, "probe-missing")
    assert status == 1
    assert err.startswith(
        "FE-101 fedge probe-missing needs fedge with its extra `edge` (nowhere_installed is missing)."
    )
    assert "from where fedge came" in err, "it is on no index"


def test_a_command_that_does_not_load_for_want_of_a_package_names_the_extra(probe, capsys):
    status, _, err = run(capsys, "probe-unloadable")
    assert status == 1
    assert "FE-101 fedge probe-unloadable needs fedge with its extra `simulation`" in err


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("probe-missing-in-fedge", "fedge.shared.no_such_module"),
        ("probe-missing-in-installed", "json.no_such_part"),
    ],
)
def test_a_module_missing_from_what_is_installed_is_a_defect(probe, capsys, name, module):
    status, _, err = run(capsys, name)
    assert status == 1
    assert err.startswith(
        f"FE-104 fedge {name}: unexpected ModuleNotFoundError: No module named '{module}'"
    )
    assert "its extra" not in err


def test_an_entry_point_that_is_no_command_is_a_defect(probe, capsys):
    status, _, err = run(capsys, "probe-no-command")
    assert status == 1
    assert "FE-104" in err and "TypeError" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulte"], "fedge: unknown command 'simulte'; the nearest known is 'simulate'"),
        (
            ["qqqq"],
            "fedge: unknown command 'qqqq'; known are audit, compile, config, demo, down, export",
        ),
        (["--nonsense"], "fedge: unrecognized arguments: --nonsense"),
        (["probe-option"], "fedge probe-option: the following arguments are required: --times"),
        (["probe-option", "--times", "x"], "argument --times: invalid int value: 'x'"),
        (["probe-option", "--tim", "3"], "required: --times"),  # no abbreviations
        (["probe-status", "--nonsense"], "fedge probe-status: unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(probe, capsys, arguments, said):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("FE-102 ") and said in err
    assert err.count("\n") == 1


def test_an_interrupt_is_one_line_and_status_130(probe, capsys):
    status, _, err = run(capsys, "probe-interrupt")
    assert status == 130
    assert err.startswith("FE-103 fedge probe-interrupt: interrupted. Remedy:")
    assert err.count("\n") == 1


def test_ctrl_c_in_a_real_process(probe):
    with subprocess.Popen(
        [FEDGE, "probe-waits"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.startswith("FE-103") and err.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_command_in_silence(probe, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        [FEDGE, "probe-much"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == command_line.STDOUT_CLOSED


def test_a_broken_pipe_that_is_not_stdout_is_reported(probe):
    done = subprocess.run([FEDGE, "probe-broken-pipe"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "unexpected BrokenPipeError" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["probe-much", "probe-blocks"])
def test_no_room_for_the_output_is_one_line(probe, name, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [FEDGE, name], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=120
        )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        f"FE-107 fedge {name}: cannot write its output (No space left on device)."
        " Remedy: Make room, or write elsewhere.\n"
    )


def test_no_room_elsewhere_keeps_what_was_said(probe, capsys):
    status, out, err = run(capsys, "probe-full")
    assert (status, out) == (1, "")
    assert err.startswith("FE-107 fedge probe-full: cannot write its output (No space left")


def test_a_failure_with_output_that_has_no_room_is_one_line(probe):
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [FEDGE, "probe-says-and-fails"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=120,
        )
    assert (done.returncode, done.stderr.decode().count("\n")) == (1, 1)
    assert done.stderr.startswith(b"FE-505 ")


def test_characters_that_the_output_does_not_have_are_escaped(probe):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [FEDGE, "probe-blocks"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2588\\u2591 4 %\n", "")


def test_flower_s_telemetry_and_update_check_are_off_unless_asked_for(probe, capsys, monkeypatch):
    assert run(capsys, "probe-environment")[1] == "0 1\n"
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert run(capsys, "probe-environment")[1] == "1 1\n"


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ([], [], ["fedge.probe warning", "flwr warning"]),
        (["-v"], [], ["fedge.probe info", "fedge.probe warning", "flwr warning"]),
        ([], ["--verbose"], ["fedge.probe info", "fedge.probe warning", "flwr warning"]),
        (
            ["-v"],
            ["-v"],
            [
                f"{n} {level}"
                for n in ("fedge.probe", "flwr")
                for level in ("debug", "info", "warning")
            ],
        ),
    ],
)
def test_the_log_goes_to_stderr_as_far_as_asked(probe, capsys, before, after, lines):
    _, out, err = run(capsys, *before, "probe-logs", *after)
    said = [line.split(": ", 1)[1] for line in err.splitlines()]
    assert [line for line in said if line in lines] == lines
    assert len(said) == len(lines)
    assert out == "[]\n"  # the command does not see --verbose


@pytest.mark.slow
def test_flower_warns_once_and_does_not_tell_of_every_step(probe):
    done = subprocess.run(
        [FEDGE, "-v", "probe-flower-logs"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["WARNING flwr: flower warns"]


def test_logging_is_as_it_was_afterwards(probe, capsys):
    import logging

    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    run(capsys, "-vv", "probe-crash")
    assert (root.level, list(root.handlers)) == before


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fedge {version('fedge')}\n", "")


def test_help_lists_every_command_even_one_that_does_not_load(probe, capsys):
    for arguments in ([], ["-h"], ["--help"]):
        status, out, err = run(capsys, *arguments)
        assert (status, err) == (0, "")
        listed = dict(
            line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  probe-")
        )
        assert listed["probe-status"] == "returns"
        assert listed["probe-unloadable"].startswith(
            "fedge probe-unloadable needs fedge with its extra `simulation`"
        )
        assert listed["probe-no-command"].startswith(
            "does not load: TypeError: entry point probe-no-command"
        )


def installed() -> list[str]:
    return list(main.commands())


@pytest.mark.parametrize("name", ["", *installed()])
def test_help_fits_a_screen(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, *([name] if name else []), "--help")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    # A command with many actions lists them all.
    assert len(lines) <= (28 if "ACTION" in lines[0] or not name else 24), out
    assert max(map(len, lines)) <= 80, out
    assert f"fedge {name}".strip() in lines[0]


@pytest.mark.parametrize("name", installed())
def test_every_command_has_a_summary_an_example_and_an_extra_that_exists(name):
    command = main.load(main.commands()[name])
    assert isinstance(command, Command)
    assert command.summary and not command.summary.endswith(".")
    assert f"fedge {name}" in command.epilog
    assert command.extra in {"edge", "train", "export", "simulation"}


def test_only_the_chosen_command_is_imported_and_help_imports_nothing_heavy():
    code = """
        import sys
        from fedge.shared.cli.main import main
        status = main({arguments})
        loaded = sorted(m for m in sys.modules if m.startswith("fedge.") and ".commands." in m)
        heavy = sorted({{"torch", "flwr", "numpy", "pydantic", "rich", "cryptography"}} & set(sys.modules))
        print(status, loaded, heavy, file=sys.stderr)
    """

    def loaded(arguments: list[str]) -> str:
        program = textwrap.dedent(code.format(arguments=arguments))
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
        )
        return done.stderr.strip()

    assert loaded(["config", "--help"]) == "0 ['fedge.shared.commands.config'] []"
    assert loaded(["--help"]).endswith(" []")


def test_config_schema_and_lists_are_json(capsys):
    status, out, _ = run(capsys, "config", "schema")
    assert status == 0 and json.loads(out)["title"] == "Config"
    status, out, _ = run(capsys, "config", "strategies", "--json")
    assert status == 0 and len(json.loads(out)) == 13
    status, out, _ = run(capsys, "config", "tasks", "--json")
    assert status == 0 and {"digits", "breast-cancer", "heart"} <= set(json.loads(out))
    status, text, _ = run(capsys, "config", "tasks")
    assert status == 0 and [line.split()[0] for line in text.splitlines()] == sorted(
        json.loads(out)
    )


def test_config_check_prints_the_resolved_file(capsys, tmp_path):
    example = str(ROOT / "examples" / "digits.toml")
    status, out, err = run(
        capsys, "config", "check", example, "--set", "run.rounds=3", "--set", "run.seed=7"
    )
    assert (status, err) == (0, "")
    assert "rounds = 3\nseed = 7\n" in out and "max-update-norm" in out
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(out)
    assert run(capsys, "config", "check", str(resolved)) == (0, out, "")


def test_config_check_prints_json(capsys):
    file = Path(__file__).resolve().parents[3] / "examples" / "digits.toml"
    assert main.main(["config", "check", str(file), "--set", "run.rounds=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["rounds"], found["train"]["batch-size"]) == (3, 32)


def test_config_check_refuses_in_one_line(capsys):
    status, out, err = run(
        capsys, "config", "check", str(ROOT / "examples" / "heart.toml"), "--set", "rounds=3"
    )
    assert (status, out) == (1, "")
    assert err.startswith("FE-202 rounds: must be a known key; the nearest is run.rounds. Remedy:")
