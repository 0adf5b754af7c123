"""What all tests share: the real data, the built wheel, and a device's environment."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("client", "edge", "server", "shared", "simulations")
#: Versions that these tests have passed with, as `make install` takes them.
CONSTRAINTS = ROOT / "constraints" / "python{}.{}.txt".format(*sys.version_info[:2])

# Two workers on two cores leave none for a second thread of BLAS or OpenMP, which waits by spinning: beside others, a
# dot product of 25,000 numbers took 5 ms of processor time, alone 5 us. Set before numpy and torch are imported.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# A worker that has had a gRPC server or client forks in later tests: gRPC's own preparations for that wait for ever
# in the child, which never uses it. Set before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A suite started by nohup or from a script's background inherits an ignored SIGINT, and so would every process that
# a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Generated cases are checked for what they do; two workers on two cores make times vary.
settings.register_profile("fedge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedge")


#: Files that take longest, begun early: no worker has to wait for another at the end.
LONGEST = (
    "tests/client/worker/test_process.py",
    "tests/shared/compile/test_onnx_export_families.py",
    "tests/test_packaging.py",
    "tests/shared/privacy/accounting/test_epsilon.py",
    "tests/shared/compile/test_onnx_export.py",
    "tests/server/release/test_compiler.py",
    "tests/simulations/test_engine_resume.py",
    "tests/simulations/test_engine_calibration_resume.py",
    "tests/simulations/test_engine_poison.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by ``LONGEST``, within a file nothing changes; no `realtime` test may be overlooked."""
    place = {ROOT / file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    for path in {item.path for item in items if item.get_closest_marker("realtime")}:
        if "mark.realtime" not in path.read_text(encoding="utf-8"):
            raise pytest.UsageError(
                f"{path}: must say mark.realtime, by which `make test` finds it"
            )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI everything that the tests need is there: a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped and exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"CI: {len(skipped)} skipped, none may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if exitstatus == pytest.ExitCode.TESTS_FAILED and not skipped:
        _name_failed(
            session, {r.nodeid for k in ("failed", "error") for r in reporter.stats.get(k, ())}
        )


def _name_failed(session: pytest.Session, failed: set[str]) -> None:
    """Write the names of failed tests for .ci/run, a line each, where all of them are ``realtime``."""
    again = {i.nodeid for i in session.items if i.get_closest_marker("realtime")}
    if failed and failed <= again:
        names = ROOT / ".pytest_cache" / "realtime-failed"
        names.parent.mkdir(exist_ok=True)
        names.write_text("".join(f"{name}\n" for name in sorted(failed)), encoding="utf-8")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a command sets in the environment of this process, or of Flower's log, ends with its test."""
    before = dict(os.environ)
    flower = logging.getLogger("flwr")
    level = flower.level
    yield
    # Flower itself sets DEBUG when it is imported first, which may have been in this test.
    flower.setLevel(level or (logging.DEBUG if flower.level else logging.NOTSET))
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of the real data sets: $FEDGE_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("FEDGE_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set FEDGE_DATA to the folder that holds heart/")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, as building writes into it."""
    return next(_once(tmp_path_factory, "wheel", _build_wheel).glob("*.whl"))


@pytest.fixture(scope="session")
def edge_env(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The bin folder of a fresh environment that holds ``fedge[edge]`` from the wheel, and no more."""

    def build(folder: Path) -> None:
        # With links into its own cache uv takes a second where pip unpacks for twenty.
        uv = [Path(sys.executable).with_name("uv"), "--quiet"]
        _run([*uv, "venv", "--python", sys.executable, folder], cwd=folder, timeout=300)
        install = [*uv, "pip", "install", "--python", folder / "bin" / "python"]
        # It reads pip's settings no more than pip reads its own.
        index = os.environ.get("PIP_INDEX_URL") or _said(
            "-m", "pip", "config", "get", "global.index-url"
        )
        if index:
            os.environ.setdefault("UV_DEFAULT_INDEX", index)
        _run([*install, "-c", CONSTRAINTS, f"{wheel}[edge]"], cwd=folder, timeout=600)

    return _once(tmp_path_factory, "edge-env", build) / "bin"


def _build_wheel(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    for name in COMPONENTS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "--no-deps", "--no-build-isolation", "-w", folder, source], cwd=folder, timeout=300)


def _once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Build a folder once a session, though several worker processes may ask for it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def _said(*arguments: str) -> str:
    """What this interpreter prints, nothing where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    return done.stdout.strip()


def _run(command: list[str | Path], cwd: Path, timeout: float) -> None:
    """Run a command, and say what it printed where it fails."""
    done = subprocess.run(command, cwd=cwd, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
