"""The move of a tree from before the rooms: files, imports and names change, what only looks like them does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BEFORE = {
    "server/__init__.py": "",
    "server/talk.py": 'class Talk:\n    """One."""\n\n\ndef ask() -> Talk:\n    """Ask."""\n    return Talk()\n',
    "server/results.py": "MAX = 3\n",
    "server/loop.py": (
        "from fedge.server import results, talk\nfrom fedge.server.talk import Talk, ask\n\n\n"
        "def play(updates: list[int], talks: dict[str, Talk]) -> object:\n"
        '    """See ``fedge.server.talk.ask`` and server/talk.py."""\n'
        '    own = {"talk": talk.ask(), "Talk": Talk}\n'
        "    talk_of = [talk for talk in talks.values()]\n"
        "    return own, ask(), updates, talk_of, results.MAX\n"
    ),
    "tests/server/test_talk.py": (
        "from pathlib import Path\n\nfrom fedge.server import talk\n\nROOT = Path(__file__).parents[2]\n"
        'CODE = "from fedge.server import talk"\n\n\n'
        'def test_it(monkeypatch):\n    monkeypatch.setattr(talk, "Talk", int)\n'
    ),
    "docs/page.md": "server/talk.py is `fedge.server.talk.Talk`, and a talk is a talk.\n",
    "pyproject.toml": (
        '[tool.setuptools]\npackages = [\n    "fedge.server",\n]\n\n[tool.setuptools.package-dir]\n'
        '"fedge.server" = "server"\n\n[tool.ruff]\nline-length = 100\n'
    ),
}


def test_a_tree_from_before_is_moved(tmp_path):
    for name, text in BEFORE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    script = [sys.executable, ROOT / "tools" / "move_to_rooms.py", "tree", tmp_path]
    subprocess.run(script, check=True, timeout=300)

    assert not (tmp_path / "server" / "talk.py").exists()
    moved = (tmp_path / "server/participants/member_exchange.py").read_text()
    assert "class MemberExchange:" in moved and "return MemberExchange()" in moved
    loop = (tmp_path / "server/training/round_loop.py").read_text()
    assert "from fedge.server.participants import member_exchange\n" in loop
    # A parameter is called as the module now is: the module takes another name, and so does not hide it.
    assert "from fedge.server.aggregation import updates as site_updates\n" in loop
    assert "from fedge.server.participants.member_exchange import MemberExchange, ask\n" in loop
    assert "``fedge.server.participants.member_exchange.ask``" in loop
    assert 'own = {"talk": member_exchange.ask(), "Talk": MemberExchange}' in loop
    assert "[talk for talk in talks.values()]" in loop
    assert "updates, talk_of, site_updates.MAX" in loop
    test = (tmp_path / "tests/server/participants/test_member_exchange.py").read_text()
    assert "parents[3]" in test
    assert '"from fedge.server.participants import member_exchange as talk"' in test
    assert 'monkeypatch.setattr(member_exchange, "MemberExchange", int)' in test
    page = (tmp_path / "docs/page.md").read_text()
    assert page == (
        "server/participants/member_exchange.py is `fedge.server.participants.member_exchange.MemberExchange`,"
        " and a talk is a talk.\n"
    )
    assert (
        '"fedge.server.participants" = "server/participants"\n'
        in (tmp_path / "pyproject.toml").read_text()
    )
