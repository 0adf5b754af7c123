"""In CI a skipped test fails the session, in one process and over several."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PASSES = "def test_passes():\n    assert True\n"
SKIPS = PASSES + "import pytest\n\n\ndef test_skips():\n    pytest.skip('no data here')\n"
FAILS = SKIPS + "\n\ndef test_fails():\n    assert False\n"


def session(folder: Path, text: str, ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "test_some.py").write_text(text)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            os.devnull,
            "--rootdir",
            folder,
            folder,
            *options,
        ],
        cwd=folder,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("text", "ci", "status"),
    [(SKIPS, "true", 1), (SKIPS, "", 0), (PASSES, "true", 0), (FAILS, "true", 1)],
)
def test_a_skip_fails_in_ci_only(tmp_path, text, ci, status):
    done = session(tmp_path, text, ci)
    assert done.returncode == status, done.stdout
    assert ("CI: 1 skipped, none may be" in done.stdout) == (text == SKIPS and ci == "true")


def test_a_skip_fails_in_ci_over_several_processes(tmp_path):
    done = session(tmp_path, SKIPS, "true", "-n", "2")
    assert done.returncode == 1, done.stdout
    assert "CI: 1 skipped, none may be" in done.stdout
