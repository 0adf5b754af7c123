"""`fedge audit` end to end, at a small size: what it prints, writes, returns and refuses."""

import json

import pytest

from fedge.shared.cli.command import guarded
from fedge.shared.cli.main import parser_of
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.simulations.audit import canaries
from fedge.simulations.commands import audit

CANARIES = canaries.audit
SMALL = canaries.Sizes(canaries=200, guesses=80, parameters=5_000)
PRIVATE = {"privacy.mechanism": "example", "privacy.noise-multiplier": "2"}
DISTRIBUTED = {**PRIVATE, "privacy.mechanism": "distributed", "secure-aggregation.enabled": "true"}
CENTRAL = {**PRIVATE, "privacy.mechanism": "central", "privacy.sampling-rate": "0.5"}
CORRELATED = {**PRIVATE, "privacy.mechanism": "central-mf", "privacy.min-separation": "4"}
LOCAL = {**PRIVATE, "privacy.mechanism": "local"}
LITTLE = {"privacy.noise-multiplier": "0.01"}
TABLE = {"privacy.statistics": "unprotected"}


def keyed(config, task, sizes, _, *more, **named):
    return CANARIES(config, task, sizes, Entropy(key=bytes(range(32))), *more, **named)


@pytest.fixture
def fedge(tmp_path, capsys, monkeypatch):
    """Audits a task; gives status, output, error."""
    monkeypatch.chdir(tmp_path)
    # Coins and noise are the system's; here they are the same each time, as rarely one is caught that is honest, or
    # one is not that cuts.
    monkeypatch.setattr(canaries, "audit", keyed)
    (tmp_path / "config.toml").write_text('[task]\nname = "breast-cancer"\n')

    def run(keys, *options):
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        arguments = parser_of("audit", audit.COMMAND).parse_args(["config.toml", *sets, *options])
        status = guarded("fedge audit", lambda: audit.run(arguments, SMALL))
        return status, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("keys", [PRIVATE, DISTRIBUTED, CENTRAL, CORRELATED, LOCAL])
def test_honest_noise_ends_well_and_cut_noise_is_caught(fedge, tmp_path, keys):
    status, out, err = fedge({**keys, **TABLE}, "--out", "a")
    assert status == 0
    assert "verdict        not contradicted" in out
    assert out.endswith("\na/audit.html\n")
    assert "one update ..." in err
    # Far less than a quarter: so few canaries are guessed less surely.
    status, out, _ = fedge({**keys, **TABLE}, "--noise-factor", "0.05", "--out", "b")
    assert status == 1
    assert "verdict        CAUGHT" in out
    found = json.loads((tmp_path / "b" / "audit.json").read_text())
    assert found["lower_bound"] > found["claim"]
    errors = found["inversion"]["max_error"]
    assert errors["plain"] < 1e-5
    assert errors[keys["privacy.mechanism"]] > 0.1
    assert "CAUGHT" in (tmp_path / "b" / "audit.html").read_text()


def test_without_a_mechanism_nothing_protects_and_nothing_was_claimed(fedge, tmp_path):
    status, out, _ = fedge({}, "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["verdict"], found["claim"]) == ("unprotected", None)
    assert json.loads((tmp_path / "runs" / "audit" / "audit.json").read_text()) == found


def test_the_next_free_folder_is_taken(fedge, tmp_path):
    for _ in range(2):
        assert fedge({})[0] == 0
    assert (tmp_path / "runs" / "audit-2" / "audit.html").exists()


@pytest.mark.parametrize(
    ("keys", "options", "status", "expected"),
    [
        ({}, ["--noise-factor", "0.25"], 2, "FE-102 --noise-factor: must be 1 with privacy.mechanism off, got 0.25"),
        (PRIVATE, ["--noise-factor", "2"], 2, "FE-102 --noise-factor: must be 0.01 to 1, got 2"),
        (
            {"privacy.mechanism": "example", "privacy.epsilon": "1.0"},
            [],
            2,
            "FE-102 privacy.noise-multiplier: must be set for an audit, got epsilon",
        ),
        (PRIVATE, ["--noise-factor", "nan"], 2, "FE-102 --noise-factor: must be 0.01 to 1, got nan"),
        (PRIVATE, [], 1, "FE-211 privacy.statistics: must be unprotected for breast-cancer"),
        ({**DISTRIBUTED, **TABLE, **LITTLE}, [], 1, "FE-211 privacy: noise of one site: must be"),
        ({**LOCAL, **TABLE, "privacy.noise-multiplier": "0.001"}, [], 1, "FE-211 privacy: noise: must be"),
        ({}, ["--out", "config.toml/x"], 1, "FE-107 config.toml/x: must be writable, got Not a directory"),
    ],
)  # fmt: skip
def test_what_is_refused(fedge, keys, options, status, expected):
    found, out, err = fedge(keys, *options)
    assert (found, out) == (status, "")
    assert err.splitlines()[-1].startswith(expected)
