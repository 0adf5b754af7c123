from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from fedge.shared.cli import main
from fedge.shared.crypto.dsse import key_id, load_private, load_public

Capture = pytest.CaptureFixture[str]


def test_new_writes_a_pair_without_asking(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "release.key"
    assert main.main(["keys", "new", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["private"] == str(path)
    assert found["public"] == f"{path}.pub"
    assert found["key_id"] == key_id(load_public(Path(found["public"])))
    assert found["key_id"] == key_id(load_private(path).public_key())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_new_overwrites_nothing(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "release.key"
    assert main.main(["keys", "new", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    before = path.read_bytes()
    assert main.main(["keys", "new", str(path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("FE-601 ")
    assert path.read_bytes() == before


def test_show_prints_the_id_that_new_printed(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "signing.key"
    assert main.main(["keys", "new", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main.main(["keys", "show", f"{path}.pub", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "public": f"{path}.pub",
        "key_id": made["key_id"],
    }
    assert main.main(["keys", "show", f"{path}.pub"]) == 0
    assert f"key id   {made['key_id']}\n" in capsys.readouterr().out


def test_show_reads_no_private_key(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "signing.key"
    assert main.main(["keys", "new", str(path)]) == 0
    capsys.readouterr()
    for name in (str(path), str(tmp_path / "nowhere.pub")):
        assert main.main(["keys", "show", name]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("FE-707 ")
        assert "PRIVATE" not in err


def test_help_fits_a_screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for argv in (
        ["keys", "--help"],
        ["keys", "new", "--help"],
        ["keys", "show", "--help"],
        ["release", "--help"],
    ):
        assert main.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "example:" in lines
