"""Where things lie: folders and files that one can survey, rooms with floors, a test at the path of what it tests.

The lists of exceptions here and in tested_elsewhere.txt may only shrink.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("client", "edge", "server", "shared", "simulations")
SURVEYED = (*COMPONENTS, "benchmarks", "docs", "tests", "tools")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]["contracts"]

MAX_FILES, MAX_LINES, MAX_DEPTH = 15, 400, 3
#: Folders and files that are larger, and how large they may be.
LARGER_FOLDERS = {"benchmarks": 34, "tests/simulations": 23}
LONGER_FILES = {
    "tools/move_to_rooms.py": 816,  # goes with the next release
    "tests/client/deployment/test_daemon.py": 495,
    "tests/client/deployment/test_daemon_hostile_bundle.py": 628,
    "tests/client/training/test_calibration.py": 421,
    "tests/edge/test_cli.py": 461,
    "tests/server/admission/test_validation.py": 436,
    "tests/server/aggregation/test_central_noise.py": 478,
    "tests/server/deployment/test_reverse_proxy.py": 563,
    "tests/server/deployment/test_run_scheduler.py": 516,
    "tests/server/report/page/test_render.py": 609,
    "tests/shared/bundle/test_bundle.py": 446,
    "tests/shared/cli/test_main.py": 469,
    "tests/shared/privacy/ledger/test_ledger.py": 766,
    "tests/simulations/test_engine_poison.py": 401,
}
MOST_LONGER, MOST_LINES_OF_LONGER = 14, 7506
#: Product files without a test at their path, and the test that would fail where they are wrong.
ELSEWHERE = dict(
    line.split()
    for line in (ROOT / "tests" / "tested_elsewhere.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
MOST_ELSEWHERE = 116


def files(*folders: str) -> list[Path]:
    """Relative to the repository; what Python and the tests leave behind is not counted."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(p.relative_to(ROOT) for p in found if "__pycache__" not in p.parts)


def modules(*folders: str) -> list[Path]:
    return [path for path in files(*folders) if path.suffix == ".py"]


def beginnings(stem: str) -> list[str]:
    """``a_b_c``, ``a_b`` and ``a``."""
    parts = stem.split("_")
    return ["_".join(parts[:end]) for end in range(len(parts), 0, -1)]


def subject(test: Path) -> Path | None:
    """What a test file is of: the file of the longest beginning of its name, or its folder; None where it has none."""
    for stem in beginnings(test.stem.removeprefix("test_")):
        mirrored = test.relative_to("tests").parent / f"{stem}.py"
        for path in (mirrored, test.parent / f"{stem}.py"):
            if (ROOT / path).is_file():
                return path
        if stem == test.parent.name:
            return mirrored.parent
    return None


TESTS = [path for path in modules(*(f"tests/{c}" for c in COMPONENTS)) if path.stem[:5] == "test_"]
MIRRORED = {subject(test) for test in TESTS}


def test_no_folder_holds_more_than_one_can_survey():
    held = Counter(
        path.parent.as_posix()
        for path in files(*SURVEYED)
        if path.name not in ("__init__.py", "py.typed")
    )
    for folder, count in held.items():
        assert count <= LARGER_FOLDERS.get(folder, MAX_FILES), folder
    for folder, count in LARGER_FOLDERS.items():
        assert held[folder] == count, f"{folder}: has {held[folder]} files now, write that"


def test_no_file_is_longer_than_one_can_read():
    for path in modules(*SURVEYED):
        name, lines = path.as_posix(), len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert lines <= LONGER_FILES.get(name, MAX_LINES), name
        assert lines == LONGER_FILES.get(name, lines), f"{name}: has {lines} lines now, write that"
        assert name not in LONGER_FILES or lines > MAX_LINES, f"{name}: take it off the list"
    assert len(LONGER_FILES) <= MOST_LONGER and sum(LONGER_FILES.values()) <= MOST_LINES_OF_LONGER


def test_rooms_lie_two_folders_deep_at_most():
    assert max(len(path.parent.parts) for path in modules(*COMPONENTS)) <= MAX_DEPTH


def test_every_room_has_a_floor():
    listed = {
        f"{container}.{name.strip()}" if container else name.strip()
        for contract in CONTRACTS
        if contract["type"] == "layers"
        for container in contract.get("containers", [""])
        for layer in contract["layers"]
        for name in layer.split("|")
    }
    for path in modules(*COMPONENTS):
        parts = ["fedge", *path.with_suffix("").parts]
        if parts[-1] != "__init__":
            above = {".".join(parts[:end]) for end in range(3, len(parts) + 1)}
            assert above & listed, f"{path}: name its room in a contract of pyproject.toml"


def imported(path: Path) -> set[str]:
    """Files of fedge that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    found = {name.removeprefix("fedge.").replace(".", "/") + ".py" for name in names}
    return {name for name in found if (ROOT / name).is_file()} - {path.as_posix()}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The names on a circle and on the way to one; empty where there is none."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_files_and_no_folders_import_each_other_in_a_circle():
    by_file = {path.as_posix(): imported(path) for path in modules(*COMPONENTS)}
    assert circle(by_file) == []
    by_room: dict[str, set[str]] = {}
    for name, targets in by_file.items():
        own = by_room.setdefault(room(name), set())
        own |= {room(target) for target in targets} - {room(name)}
    assert circle(by_room) == []


def room(name: str) -> str:
    """The folder of a file; a component's own files are rooms by themselves."""
    folder = str(Path(name).parent)
    return name if folder in COMPONENTS else folder


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("test", TESTS, ids=str)
def test_every_test_lies_at_the_path_of_what_it_tests(test):
    assert subject(test) is not None, f"{test}: no file or folder of that name at that place"


def test_every_file_is_tested_at_its_path_or_as_the_list_says():
    for path in modules(*COMPONENTS):
        if path.name != "__init__.py" and path not in MIRRORED:
            assert path.as_posix() in ELSEWHERE, f"{path}: has no test"


def test_the_list_of_what_is_tested_elsewhere_only_shrinks():
    assert len(ELSEWHERE) <= MOST_ELSEWHERE
    for name, test in ELSEWHERE.items():
        assert (ROOT / name).is_file() and (ROOT / test).is_file(), f"{name} {test}"
        assert Path(name) not in MIRRORED, f"{name}: has a test at its path, take it off the list"


def test_the_place_of_a_test_is_read_as_people_would():
    assert subject(Path("tests/server/secagg/test_protocol_steps_lies.py")) == Path(
        "server/secagg/protocol_steps.py"
    )
    assert subject(Path("tests/shared/models/test_models_images.py")) == Path("shared/models")
    assert subject(Path("tests/simulations/test_forked.py")) == Path("tests/simulations/forked.py")
    assert subject(Path("tests/server/test_talk.py")) is None


def rows(page: str, heading: str) -> list[str]:
    """The lines of a page's tables below a heading, down to the next."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| ") and "`" in line]


def test_the_map_names_every_room():
    mapped: set[str] = set()
    component = ""
    for row in rows("docs/explanation/architecture.md", "The map"):
        names = re.findall(r"`([^`]+)`", row.split("|")[1])
        if names[0].rstrip("/") in COMPONENTS:
            component = names[0]
        else:
            mapped |= {f"{component}{name}".rstrip("/") for name in names}
    there = {
        "/".join(path.parts[:2]) for path in modules(*COMPONENTS) if path.name != "__init__.py"
    }
    assert mapped == there - {
        "edge/__main__.py",
        "simulations/flower_patches.py",
        "simulations/sweep_page.py",
    }


def test_contributing_sends_nobody_to_a_file_that_is_not_there():
    seen = 0
    for row in rows("CONTRIBUTING.md", "I want to change how"):
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", row):
            path = ROOT / name if "/" in name else folder / name
            folder = path.parent
            assert path.exists(), f"{row}: {name}"
            seen += 1
    assert seen > 30
