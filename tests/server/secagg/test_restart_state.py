"""What outlives the coordinator: numbers of attempts, and masked sums."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.server.secagg.restart_state import RecoveryStore
from fedge.shared.errors import RunError


@pytest.fixture
def ledger(tmp_path):
    return RecoveryStore(tmp_path)


@pytest.fixture
def groups(rig, tmp_path):
    """Sums that were about to be opened, as a real round leaves them."""
    made = rig(count=4)
    made.train()
    return made.ledger.kept("r-1", "train", 1)


def test_attempts_are_numbered_within_a_round_and_purpose(ledger):
    assert [ledger.next_attempt("train", 1) for _ in range(3)] == [1, 2, 3]
    assert ledger.next_attempt("evaluate", 1) == 1
    assert [ledger.attempts(p, 1) for p in ("train", "evaluate", "statistics")] == [3, 1, 0]
    assert ledger.attempts("train", 2) == 0
    assert ledger.next_attempt("train", 2) == 1


def test_a_redone_round_goes_on_counting_though_it_was_evaluated(ledger, tmp_path):
    """Sites refuse a number that they have seen."""
    ledger.next_attempt("train", 4)
    ledger.next_attempt("evaluate", 4)
    assert RecoveryStore(tmp_path).next_attempt("train", 4) == 2
    assert RecoveryStore(tmp_path).next_attempt("evaluate", 4) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"train": 3}', '{"train": ["a", 1]}', "[1, 2]"])
def test_a_damaged_record_stops_the_run(ledger, tmp_path, text):
    ledger.next_attempt("train", 1)
    (tmp_path / "secagg" / "attempts.json").write_text(text)
    with pytest.raises(RunError) as caught:
        ledger.next_attempt("train", 1)
    assert caught.value.code == 504


def test_kept_sums_come_back_as_they_were(ledger, groups):
    assert ledger.kept("r-1", "train", 1) == []
    ledger.keep(groups)
    (found,), (wanted,) = ledger.kept("r-1", "train", 1), groups
    assert found.t == wanted.t
    assert found.attempt == wanted.attempt
    assert found.survivors == wanted.survivors == sorted(wanted.survivors)
    assert found.signatures == {}
    ledger.keep_signatures(groups)
    (found,) = ledger.kept("r-1", "train", 1)
    assert found.signatures == wanted.signatures
    assert np.array_equal(found.total, wanted.total)
    assert found.unmask_values() == wanted.unmask_values()
    assert found.shares == {}, "shares are never written down"


@pytest.mark.parametrize(
    "asked", [("r-2", "train", 1), ("r-1", "evaluate", 1), ("r-1", "train", 2)]
)
def test_they_are_of_their_round_alone(ledger, groups, asked):
    ledger.keep(groups)
    assert ledger.kept(*asked) == []


def test_those_of_further_attempts_and_other_purposes_stand_beside_them(ledger, groups):
    ledger.keep(groups)
    (group,) = groups
    attempt = type(group.attempt)(**{**vars(group.attempt), "number": 2})
    ledger.keep([type(group)(**{**_fields(group), "attempt": attempt})])
    purpose = type(group.attempt)(**{**vars(group.attempt), "purpose": "evaluate"})
    ledger.keep([type(group)(**{**_fields(group), "attempt": purpose})])
    assert [g.attempt.number for g in ledger.kept("r-1", "train", 1)] == [1, 2]
    assert [g.attempt.purpose for g in ledger.kept("r-1", "evaluate", 1)] == ["evaluate"]
    number = ledger.next_attempt("train", 1)
    ledger.drop()
    assert ledger.kept("r-1", "train", 1) == ledger.kept("r-1", "evaluate", 1) == []
    assert ledger.next_attempt("train", 1) == number + 1, "numbers are not forgotten"


def _fields(group):
    return {name: getattr(group, name) for name in type(group).__dataclass_fields__}


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "no json", "other json", "deep"])
def test_a_damaged_one_is_not_opened(ledger, groups, tmp_path, caplog, how):
    ledger.keep(groups)
    folder = tmp_path / "secagg"
    (sums,), (told,) = folder.glob("*.safetensors"), folder.glob("train-*.json")
    data = sums.read_bytes()
    if how == "cut":
        sums.write_bytes(data[:-4])
    elif how == "changed":
        sums.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "missing":
        sums.unlink()
    elif how == "no json":
        told.write_text("{")
    elif how == "other json":
        told.write_text('{"groups": [3], "sha256": ""}')
    else:
        told.write_text("[" * 100_000)
    assert ledger.kept("r-1", "train", 1) == []
    assert "a kept sum cannot be read" in caplog.text


def test_nothing_on_the_disk_can_be_read_without_the_shares(rig):
    made = rig(count=4)
    opened = made.train().result
    (sums,) = (made.folder / "run" / "secagg").glob("*.safetensors")
    total = next(iter(made.ledger.kept("r-1", "train", 1))).total
    # Masked, it is nothing like what was opened: half of all values are beyond any honest sum's.
    assert np.median(np.abs(total.view(np.int32).astype(float))) > 2**27
    assert all(np.abs(m).max() < 10 for m in opened.mean.values())
    assert sums.stat().st_size < 4 * total.size + 200
