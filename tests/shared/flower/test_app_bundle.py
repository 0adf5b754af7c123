"""The Flower bundle: no code in it, the same bytes on every build, and a typed error where it cannot be built."""

from __future__ import annotations

import hashlib
import io
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from fedge.shared.errors import DeployError
from fedge.shared.flower import app_bundle


@pytest.fixture(scope="module")
def built() -> bytes:
    return app_bundle.bundle()


@pytest.mark.slow
def test_it_holds_no_code(built: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(built)) as bundle:
        # .info is Flower's own; there is nothing else.
        assert sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"]
        text = bundle.read("pyproject.toml").decode()
    app = tomllib.loads(text)
    assert app["project"]["version"] == version("fedge")
    assert app["project"]["dependencies"] == []
    assert app["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "fedge.server.app:app",
        "clientapp": "fedge.client.app:app",
    }


@pytest.mark.slow
def test_whoever_builds_it_gets_the_same_number(built: bytes) -> None:
    # A second build, in another folder, by another process.
    assert app_bundle.sha256() == hashlib.sha256(built).hexdigest()


@pytest.mark.slow
def test_its_number_depends_on_what_it_points_at(built: bytes, tmp_path: Path) -> None:
    def another(folder: Path) -> str:
        path = folder / "pyproject.toml"
        path.write_text(path.read_text().replace("Points", "points"))
        return app_bundle._build(folder)

    assert app_bundle.sha256(another) != hashlib.sha256(built).hexdigest()


@pytest.mark.parametrize("names", [(), ("a.fab", "b.fab")])
def test_a_build_that_fails_is_named(names: tuple[str, ...]) -> None:
    def build(folder: Path) -> str:
        for name in names:
            (folder / name).touch()
        return "what  the\ncommand said"

    with pytest.raises(DeployError) as caught:
        app_bundle.bundle(build)
    assert caught.value.code == 915
    assert "what the command said" in caught.value.message


@pytest.mark.slow
def test_what_flower_refuses_is_named() -> None:
    def broken(folder: Path) -> str:
        (folder / "pyproject.toml").write_text("[project]\nname = 'relay'\n")
        return app_bundle._build(folder)

    with pytest.raises(DeployError) as caught:
        app_bundle.bundle(broken)
    assert caught.value.code == 915
    assert "flwr build: must give one bundle" in caught.value.message


@pytest.mark.slow
def test_the_server_runs_no_other_bundle_s_code(tmp_path: Path) -> None:
    content = app_bundle.bundle()
    app_bundle.require_ours(content)
    with_code = io.BytesIO(content)
    with zipfile.ZipFile(with_code, "a") as archive:
        archive.writestr("fedge/__init__.py", "raise SystemExit")
    for other in (b"", b"junk", content[:-30], with_code.getvalue()):
        with pytest.raises(DeployError) as caught:
            app_bundle.require_ours(other)
        assert caught.value.code == 915
