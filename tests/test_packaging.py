"""What is shipped: the package list, the wheel, the edge's dependencies, and who may import whom."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("client", "edge", "server", "shared", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: prometheus_client comes with the extra `serve`, and is imported where --metrics asks for it.
EDGE_MAY_USE = {"numpy", "onnxruntime", "cryptography", "grpc", "google", "prometheus_client"}

LISTING = """
from importlib.metadata import distributions
print(*(d.metadata["Name"].lower() for d in distributions()))
"""


def sources() -> list[Path]:
    """Every file of the five components, as Git would see them."""
    files = [path for name in COMPONENTS for path in (ROOT / name).rglob("*") if path.is_file()]
    return sorted(path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts)


def package_of(folder: Path) -> str:
    return ".".join(["fedge", *folder.parts])


def test_every_folder_with_python_is_in_the_package_list_and_in_its_place():
    folders = {path.parent for path in sources() if path.suffix == ".py"}
    assert {package_of(folder) for folder in folders} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )
    assert {package_of(folder): str(folder) for folder in folders} == PROJECT["tool"]["setuptools"][
        "package-dir"
    ]
    assert {folder.parts[0] for folder in folders} == set(COMPONENTS)


def test_every_package_is_a_package_and_every_component_is_typed():
    for folder in {path.parent for path in sources()}:
        assert (ROOT / folder / "__init__.py").is_file(), folder
    for component in COMPONENTS:
        assert (ROOT / component / "py.typed").is_file()
        link = ROOT / ".src" / "fedge" / component
        assert link.is_symlink() and link.resolve() == ROOT / component


def test_no_module_makes_fedge_itself_a_package():
    assert not (ROOT / ".src" / "fedge" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.slow
def test_every_file_is_in_the_wheel_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert shipped == {f"fedge/{path.as_posix()}" for path in sources()}
    assert licences


def test_the_edge_extra_is_what_a_device_can_carry():
    names = {
        re.split(r"[<>=~!\[; ]", line)[0]
        for line in PROJECT["project"]["optional-dependencies"]["edge"]
    }
    assert names == {"numpy", "onnxruntime", "cryptography", "grpcio", "protobuf"}
    assert PROJECT["project"]["dependencies"] == []


def test_constraints_are_public_versions_of_the_same_packages_for_each_python():
    files = sorted((ROOT / "constraints").iterdir())
    assert [file.name for file in files] == ["python3.11.txt", "python3.12.txt"]
    named = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        # No local version, no address, no option.
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in lines)
        named.append({line.partition("==")[0] for line in lines})
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {re.split(r"[<>=~!\[; ]", line)[0].replace("_", "-") for e in extras for line in e}
    # TensorRT comes from its vendor's index, and is installed on the machine with the GPU.
    assert wanted - {"fedge", "tensorrt"} <= named[0] & named[1]


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from fedge.shared import x` names the module x, or a name in fedge.shared.
            found.update(
                {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
            )
    return found


def file_of(module: str) -> Path | None:
    """The file of one of fedge's modules, None for any other name."""
    path = ROOT.joinpath(*module.split(".")[1:])
    candidates = (
        [path.with_suffix(".py"), path / "__init__.py"] if module.startswith("fedge.") else []
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def test_what_the_edge_reaches_uses_only_its_extra():
    todo = [path for path in (ROOT / "edge").rglob("*.py") if "__pycache__" not in path.parts]
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported(path):
            file = file_of(module)
            if file:
                component = file.relative_to(ROOT).parts[0]
                assert component in ("edge", "shared"), f"{path} imports {module}"
                todo.append(file)
            elif not module.startswith("fedge"):
                top = module.split(".")[0]
                assert top in EDGE_MAY_USE | sys.stdlib_module_names, f"{path} imports {module}"
    assert {"cli.py", "errors.py", "steps.py"} <= {path.name for path in seen}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root / ".src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree that a test may break."""
    root = tmp_path_factory.mktemp("tree")
    for name in COMPONENTS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".src", root / ".src", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.slow
def test_the_import_contracts_hold_over_every_module(tree):
    done = lint_imports(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    analysed = int(re.search(r"Analyzed (\d+) files", done.stdout)[1])
    assert analysed >= sum(path.suffix == ".py" for path in sources())
    assert "0 broken" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("edge/forbidden.py", "import torch", "The edge needs neither torch nor flwr"),
        (
            "edge/forbidden.py",
            "import fedge.shared.config.federation",
            "The edge needs neither torch nor flwr",
        ),  # pydantic
        ("edge/forbidden.py", "import fedge.server.app", "Components import shared only"),
        ("server/forbidden.py", "import fedge.client.app", "Components import shared only"),
        ("client/forbidden.py", "from fedge.server import app", "Components import shared only"),
        ("server/commands/forbidden.py", "import fedge.edge.cli", "Components import shared only"),
        (
            "shared/commands/forbidden.py",
            "import fedge.simulations.engine",
            "Components import shared only",
        ),
        (
            "shared/cli/command.py",
            "import fedge.server.app",
            "The command line's home imports no component",
        ),
        ("shared/cli/command.py", "import numpy", "The command line's home imports no component"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tree, file, line, broken):
    path = tree / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text((before or "") + f"\n{line}\n", encoding="utf-8")
    try:
        done = lint_imports(tree)
    finally:
        path.unlink() if before is None else path.write_text(before, encoding="utf-8")
    assert done.returncode == 1, done.stdout
    assert re.search(rf"{re.escape(broken)}.* BROKEN", done.stdout), done.stdout


@pytest.mark.slow
def test_types_are_checked_in_every_component(tree, tmp_path):
    """One wrong line in each, as a checker that follows no link finds nothing to complain of."""
    assert set(PROJECT["tool"]["mypy"]["packages"]) == {f"fedge.{name}" for name in COMPONENTS}
    assert PROJECT["tool"]["mypy"]["strict"] is True
    for component in COMPONENTS:
        (tree / component / "wrongly_typed.py").write_text('"""Wrong."""\n\nnumber: int = "text"\n')
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mypy",
                "--cache-dir",
                tmp_path,
            ]
            + [arg for name in COMPONENTS for arg in ("-p", f"fedge.{name}.wrongly_typed")],
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=800,
        )
    finally:
        for component in COMPONENTS:
            (tree / component / "wrongly_typed.py").unlink()
    for component in COMPONENTS:
        assert f"fedge/{component}/wrongly_typed.py:3: error" in done.stdout, (
            done.stdout + done.stderr
        )


@pytest.mark.slow
def test_a_device_s_environment_holds_what_the_edge_needs_and_no_more(edge_env):
    names = set(run(edge_env, edge_env, "python", "-c", LISTING).stdout.split())
    assert {"fedge", "numpy", "onnxruntime", "cryptography", "grpcio", "protobuf"} <= names
    assert not names & {
        "torch",
        "flwr",
        "pydantic",
        "rich",
        "typer",
        "onnx",
        "scikit-learn",
        "safetensors",
    }
    assert len(names - {"fedge"}) <= 12, names


def run(bin_folder: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bin_folder / command[0], *command[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_wheel_s_commands_run_in_a_device_s_environment(edge_env, tmp_path):
    done = run(edge_env, tmp_path, "fedge-edge", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in ("verify", "predict", "bench"))

    done = run(edge_env, tmp_path, "fedge", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in PROJECT["project"]["entry-points"]["fedge.commands"]:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    # The modules of all commands load with the standard library alone.
    assert "its extra" not in done.stdout and "does not load" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["simulate", "config.toml", "--out", "run"], "simulation"),
        (["config", "check", "config.toml"], "simulation"),
    ],
)
def test_a_command_without_its_extra_names_it(edge_env, tmp_path, command, extra):
    (tmp_path / "config.toml").write_text('[task]\nname = "digits"\n')
    done = run(edge_env, tmp_path, "fedge", *command)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"FE-101 fedge {command[0]} needs fedge with its extra `{extra}` ("
    )
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_device_can_make_keys(edge_env, tmp_path):
    done = run(edge_env, tmp_path, "fedge", "keys", "new", "device.key")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "device.key.pub").is_file()
