"""What the pages say is what the product does: shell blocks run, links lead somewhere, generated pages are current."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [
        body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language
    ]


WITH_SHELL = [page for page in PAGES if blocks(page, "bash")]


def generated() -> dict[str, object]:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PAGES


@pytest.mark.parametrize(
    "name", ["errors.md", "configuration.md", "command-line.md", "site-files.md"]
)
def test_generated_pages_are_current(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == generated()[name](), "run .venv/bin/python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_page_is_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "index.md":
            assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in index


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page):
    """A block without a language would be neither run nor known not to be."""
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(BLOCK.findall(text))
    assert {kind for kind, _ in BLOCK.findall(text)} <= {
        "bash",
        "console",
        "text",
        "python",
        "toml",
        "json",
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_collusion_is_bounded_by_min_sites_and_not_by_a_round(page):
    """As the policy's own check is: which sites are in a round, the server chooses."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert not re.search(r"thirds? of (the sites of )?(a|the) round", text)


def test_error_numbers_in_the_pages_exist():
    from fedge.shared.error_catalogue import CATALOGUE

    for page in PAGES:
        for code in re.findall(r"FE-(\d+)", page.read_text(encoding="utf-8")):
            assert int(code) in CATALOGUE, f"{name_of(page)}: FE-{code}"


def script(page: Path) -> str:
    return "set -euo pipefail\n" + "\n".join(blocks(page, "bash"))


@pytest.fixture
def shell(tmp_path, edge_env):
    """Runs a script as a reader of the pages would, in a folder with the examples and both environments."""
    commands = tmp_path / "bin"
    commands.mkdir()
    here = Path(sys.executable).parent
    for name, target in (
        ("fedge", here / "fedge"),
        ("python", here / "python"),
        ("fedge-edge", edge_env / "fedge-edge"),
    ):
        # Not a link: Python finds its environment by the path that it was started with.
        (commands / name).write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        (commands / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "examples").symlink_to(ROOT / "examples")
    (work / ".venv-edge").symlink_to(edge_env.parent)

    def run(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", text],
            cwd=work,
            env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=900,
        )

    run.work = work
    return run


@pytest.mark.soak
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("page", [p for p in WITH_SHELL if p.name != "add-a-task.md"], ids=name_of)
def test_the_shell_blocks_of_a_page_run(shell, page):
    done = shell(script(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_block_that_fails_is_noticed(shell):
    assert (
        shell("set -euo pipefail\nfedge config check nowhere.toml | cat\necho reached").returncode
        == 1
    )


@pytest.mark.soak
@pytest.mark.timeout(1000)
def test_the_task_of_the_page_can_be_added(shell):
    page = ROOT / "docs" / "how-to" / "add-a-task.md"
    source = shell.work / "wine"
    source.mkdir()
    (source / "wine.py").write_text("\n".join(blocks(page, "python")))
    (source / "pyproject.toml").write_text("\n".join(blocks(page, "toml")))
    installed = shell.work / "installed"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
    ]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", installed, source],
        check=True,
        capture_output=True,
        timeout=300,
    )
    done = shell(script(page), PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "three cultivars of wine" in done.stdout
    assert (shell.work / "runs" / "wine" / "model.safetensors").is_file()
    metrics = json.loads((shell.work / "runs" / "wine" / "metrics.json").read_text())
    assert metrics["final"]["pooled"]["accuracy"] >= 0.9
