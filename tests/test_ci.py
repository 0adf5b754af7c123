"""What CI's script lets pass: no skipped test, no failed one but a `realtime` one that passes alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PASSES = "import pytest\n\n\ndef test_passes():\n    assert True\n"
SKIPS = PASSES + "\n\ndef test_skips():\n    pytest.skip('no data here')\n"
FAILS = SKIPS + "\n\ndef test_fails():\n    assert False\n"
#: Fails where its file is there, and removes it.
LATE = """

@pytest.mark.realtime
@pytest.mark.parametrize("name", {names})
def test_late(name, pytestconfig):
    late = pytestconfig.rootpath / name
    if late.exists():
        late.unlink()
        pytest.fail("too late")
"""


def session(folder: Path, text: str, ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    tests = folder / "tests"
    tests.mkdir()
    shutil.copy(TESTS / "conftest.py", tests)
    (tests / "test_some.py").write_text(text)
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", folder, tests]
    return subprocess.run(
        [*pytest_, *options],
        cwd=folder,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "ci", "status"),
    [(SKIPS, "true", 1), (SKIPS, "", 0), (FAILS, "true", 1)],
)
def test_a_skip_fails_in_ci_only(tmp_path, text, ci, status):
    done = session(tmp_path, text, ci)
    assert done.returncode == status, done.stdout
    assert ("CI: 1 skipped, none may be" in done.stdout) == (text == SKIPS and ci == "true")


@pytest.mark.slow
def test_a_skip_fails_in_ci_over_several_processes(tmp_path):
    done = session(tmp_path, SKIPS, "true", "-n", "2")
    assert done.returncode == 1, done.stdout
    assert "CI: 1 skipped, none may be" in done.stdout


def ci_run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """CI's own script and Makefile, over a tree that has one file of tests, without the static checks."""
    for name in (
        ".ci/run",
        "Makefile",
        "pyproject.toml",
        "tests/conftest.py",
        "benchmarks/soak.py",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests" / "test_some.py").write_text(text)
    for name in (".venv", ".venv-edge"):
        (folder / name).mkdir()
        (folder / name / "bin").symlink_to(Path(sys.executable).parent)
        (folder / name / "pyvenv.cfg").write_bytes((Path(sys.prefix) / "pyvenv.cfg").read_bytes())
        (folder / name / "installed").touch()
    outer = ("MAKE", "PYTEST_", "CI")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    return subprocess.run(
        ["bash", ".ci/run"],
        cwd=folder,
        env=environment | {"STATIC": "", "WORKERS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_failing_test_is_final(tmp_path):
    done = ci_run(tmp_path, PASSES + "\n\ndef test_fails():\n    assert False\n")
    assert done.returncode != 0
    assert "1 failed, 1 passed" in done.stdout
    assert "runs again" not in done.stdout


@pytest.mark.slow
def test_a_realtime_test_that_passes_alone_is_named(tmp_path):
    (tmp_path / "one").touch()
    done = ci_run(tmp_path, PASSES + LATE.format(names=["one", "two"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == (
        "CI: failed once, passed alone: tests/test_some.py::test_late[one]"
    )


@pytest.mark.slow
def test_a_realtime_test_that_fails_twice_is_final(tmp_path):
    done = ci_run(
        tmp_path, PASSES + "\n\n@pytest.mark.realtime\ndef test_never():\n    assert False\n"
    )
    assert done.returncode != 0
    assert "runs again alone: tests/test_some.py::test_never" in done.stdout
    assert "passed alone" not in done.stdout


@pytest.mark.slow
def test_four_realtime_failures_are_final(tmp_path):
    names = ["one", "two", "three", "four"]
    for name in names:
        (tmp_path / name).touch()
    done = ci_run(tmp_path, PASSES + LATE.format(names=names))
    assert done.returncode != 0
    assert "runs again" not in done.stdout
