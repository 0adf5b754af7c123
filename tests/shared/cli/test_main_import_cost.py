"""What a command refuses, it refuses at once: before torch, Flower or scipy is imported, seconds of processor time.

One interpreter forks for every case, so that each begins with nothing of these imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from fedge.edge import cli as edge_cli

pytestmark = pytest.mark.slow

#: Imported by no refusal.
HEAVY = ("flwr", "scipy", "torch")
DIGITS = str(Path(__file__).resolve().parents[3] / "examples" / "digits.toml")

#: Each line refused: an argument, a configuration, a path, or a key. ``@`` begins a file that the test makes.
REFUSED = f"""
fedge nosuch
fedge audit missing.toml
fedge audit @unknown.toml
fedge audit @unknown-task.toml
fedge audit {DIGITS} --noise-factor 7
fedge audit {DIGITS} --noise-factor 0.5
fedge compile nowhere --out out
fedge compile nowhere --targets nosuch --out out
fedge compile . --out out
fedge compile . --task digits --out out
fedge compile @text --out out
fedge compile @text --task nosuch --out out
fedge compile . --out @text
fedge compile . --out nowhere/out
fedge config check missing.toml
fedge config check @unknown.toml
fedge config check @unknown-task.toml
fedge demo --edge nowhere
fedge down --out nowhere
fedge export nowhere --out out.onnx
fedge export . --out out.onnx
fedge export . --task digits --out out.onnx
fedge export @text --out out.onnx
fedge export . --out @text
fedge export . --out nowhere/out.onnx
fedge keys new @text
fedge keys new nowhere/a.key
fedge keys show missing.pub
fedge keys show @text
fedge privacy epsilon --noise-multiplier -1 --delta 1e-5
fedge privacy epsilon --noise-multiplier 1 --delta 7
fedge privacy epsilon --noise-multiplier 1 --delta 1e-5 --sampling-rate 7
fedge privacy calibrate --epsilon -1 --delta 1e-5
fedge privacy calibrate --epsilon 1 --delta 1e-5 --steps 0
fedge privacy ledger --home nowhere
fedge privacy restore --home nowhere --noise-multiplier 1 --sampling-rate 0.1 --steps 1
fedge release nowhere --key missing.key --out out.fedge
fedge release nowhere --key @key --out out.fedge
fedge release . --key @key --out out.fedge
fedge release . --key @text --out out.fedge
fedge release . --key @key --out @text
fedge release . --key @key --out nowhere/out.fedge
fedge roster new @text --consortium c
fedge roster add missing.toml north --key missing.pub --expires 2027-11-30
fedge roster revoke missing.toml north
fedge roster sign missing.toml --key missing.key
fedge roster verify missing.json --trust missing.pub
fedge server admit north missing.pub --home nowhere
fedge server admit north missing.pub --home @server
fedge server expel north --home @server
fedge server init --home @server --address 127.0.0.1:9
fedge server init --home out --address nonsense
fedge server init --home @text/in --address 127.0.0.1:9
fedge server renew --home nowhere
fedge server resume run --home nowhere
fedge server resume run --home @server
fedge server runs --home nowhere
fedge server start --home nowhere
fedge server status --home nowhere
fedge server stop --home nowhere
fedge server stop run --home @server
fedge server submit {DIGITS} --home nowhere
fedge server submit missing.toml --home @server
fedge server submit @unknown.toml --home @server
fedge server submit @unknown-task.toml --home @server
fedge server submit {DIGITS} --home @server --set run.rounds=none
fedge server submit {DIGITS} --home @server --name /
fedge server units --out @text
fedge simulate missing.toml --out out
fedge simulate {DIGITS}
fedge simulate @unknown.toml --out out
fedge simulate @unknown-task.toml --out out
fedge simulate {DIGITS} --out out --set run.rounds=none
fedge simulate {DIGITS} --out .
fedge simulate {DIGITS} --out @text
fedge site init north --home @text/in --task digits --server 127.0.0.1:9 --ca @text
fedge site init north --home out --task nosuch --server 127.0.0.1:9 --ca missing.crt
fedge site init / --home out2 --task digits --server 127.0.0.1:9 --ca @text
fedge site init north --home out --task digits --server nonsense --ca missing.crt
fedge site init north --home out --task digits --server 127.0.0.1:9 --ca missing.crt
fedge site init north --home out --task digits --server 127.0.0.1:9 --ca @text --min-sites 3
fedge site start --home nowhere
fedge site status --home nowhere
fedge site stop --home nowhere
fedge site units --out @text
fedge sweep missing.toml --noise-multiplier 1
fedge sweep @unknown.toml --noise-multiplier 1
fedge sweep {DIGITS} --noise-multiplier 1
fedge sweep {DIGITS} --noise-multiplier none --set privacy.mechanism=example
fedge sweep {DIGITS} --noise-multiplier 1 --set privacy.mechanism=example --seeds 0
fedge sweep {DIGITS} --noise-multiplier 1 --set privacy.mechanism=example --delta 7
fedge sweep {DIGITS} --noise-multiplier 1 --set privacy.mechanism=nosuch
fedge up --config missing.toml --out out
fedge up --config @unknown.toml --out out
fedge up --config @unknown-task.toml --out out
fedge up --config {DIGITS} --out out --set run.rounds=none
fedge up --config {DIGITS} --out out --sites -1
fedge up --config {DIGITS} --out .
fedge up --config {DIGITS} --out @text
fedge-edge verify missing.fedge --trust missing.pub
fedge-edge verify @text --trust @key.pub
fedge-edge install missing.fedge --trust missing.pub --into out
fedge-edge install @text --trust @key.pub --into out
fedge-edge predict missing.fedge --trust missing.pub --input missing.npy
fedge-edge predict @text --trust @key.pub --input missing.npy
fedge-edge bench missing.fedge --trust missing.pub
fedge-edge bench @text --trust @key.pub
fedge-edge serve missing.fedge --trust missing.pub
fedge-edge serve @text --trust @key.pub
"""
CASES = REFUSED.strip().splitlines()

#: Reads cases from standard input, and writes a JSON line for each.
PROGRAM = """
import contextlib, importlib, io, json, os, sys
from fedge.edge import cli as edge
from fedge.shared.cli import command, main
from fedge.shared.config import reader
from fedge.shared.crypto import dsse
heavy = json.loads(sys.argv[1])
print(json.dumps(sorted(set(heavy) & set(sys.modules))), flush=True)
for line in sys.stdin:
    program, *arguments = json.loads(line)
    if os.fork() == 0:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = (main if program == "fedge" else edge).main(arguments)
        found = sorted(set(heavy) & set(sys.modules))
        print(json.dumps([status, found, said.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """Status, what was imported and what was said, of each case."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "text").write_text("nothing of use\n")
    (folder / "unknown.toml").write_text("[run]\nno-such-key = 1\n")
    (folder / "unknown-task.toml").write_text('[task]\nname = "nosuch"\n')
    made = [
        ["keys", "new", "key"],
        ["server", "init", "--home", "server", "--address", "127.0.0.1:9"],
    ]
    first = [["fedge", *arguments] for arguments in made]
    cases = first + [line.replace(" @", " ").split(" ") for line in CASES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(HEAVY)],
        input="".join(json.dumps(case) + "\n" for case in cases),
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, *told = [json.loads(line) for line in done.stdout.splitlines()]
    assert before == [], "the cases must begin without these"
    assert [status for status, _, _ in told[: len(made)]] == [0] * len(made), told[: len(made)]
    yield dict(zip(CASES, told[len(made) :], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_imports_neither_torch_nor_flower_nor_scipy(
    case: str, outcomes: dict[str, list[Any]]
) -> None:
    status, imported, said = outcomes[case]
    assert status in (1, 2), said
    assert said.startswith("FE-"), said
    assert "FE-104" not in said, "an unexpected failure is no refusal"
    assert imported == [], said


def test_every_command_has_a_case() -> None:
    tried = {tuple(line.split()[:2]) for line in CASES}
    known = {("fedge", entry.name) for entry in entry_points(group="fedge.commands")}
    known |= {("fedge-edge", name) for name in edge_cli.COMMANDS}
    assert known <= tried
