"""`fedge privacy restore`: an older copy of the ledger is taken with a charge, and never without."""

import math

import pytest

from fedge.shared.cli import main
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

DELTA = 1e-6
UNSURE = ("--noise-multiplier", "4", "--sampling-rate", "1", "--steps", "3")
SINCE = (*UNSURE, "--own-noise")


def charge(number, study, unit="site"):
    values = ("r-1", number, "train", 0, "distributed", Release(4.0), DELTA, f"{number:064x}")
    return Charge(study, unit, *values)


def book(home, *studies):
    ledger = Ledger.create(home / FILE)
    for number, study in enumerate(studies):
        ledger.charge(charge(number, study), Budget(1e6, DELTA))
    return ledger


@pytest.fixture
def older(tmp_path):
    """The home of a site with a ledger of two charges in place of the one of three."""
    ledger = book(tmp_path, "heart", "lung")
    copy = (tmp_path / FILE).read_bytes()
    ledger.charge(charge(9, "heart"), Budget(1e6, DELTA))
    (tmp_path / FILE).write_bytes(copy)
    return tmp_path


@pytest.fixture
def restore(capsys):
    def run(home, *words):
        status = main.main(["privacy", "restore", "--home", str(home), *words])
        return status, *capsys.readouterr()

    return run


def test_every_study_of_the_copy_is_charged_and_what_is_spent_printed(older, restore, capsys):
    assert main.main(["privacy", "ledger", "--home", str(older)]) == 1
    message = capsys.readouterr().err
    assert "got an older copy with 2 charges" in message and "fedge privacy restore" in message
    status, out, err = restore(older, *SINCE)
    assert (status, err) == (0, "")
    after = epsilon.epsilon([Release(4.0, 1.0, 4)], DELTA)
    assert out.splitlines() == [
        f"charge {number}: study {study}, unit site: epsilon is now {after:.4f} against the consumers, "
        f"{after:.4f} against the server, at delta 1e-06"
        for number, study in ((3, "heart"), (4, "lung"))
    ]
    assert [entry.charge.mechanism for entry in Ledger(older / FILE).entries()[2:]] == [
        "restored",
        "restored",
    ]
    assert main.main(["privacy", "ledger", "--home", str(older)]) == 0


def test_what_may_have_gone_to_the_server_without_noise_bounds_nothing_against_it(older, restore):
    """The copy does not say under which mechanism the lost charges were made."""
    status, out, _ = restore(older, *UNSURE)
    after = epsilon.epsilon([Release(4.0, 1.0, 4)], DELTA)
    assert status == 0
    assert (
        out.count(f"epsilon is now {after:.4f} against the consumers, inf against the server") == 2
    )
    spent = Ledger(older / FILE).spent("heart", "site", DELTA)
    assert spent.server == math.inf and spent.consumers == pytest.approx(after)
    # And it stays so, whatever is charged after it.
    later = charge(12, "heart")
    assert Ledger(older / FILE).charge(later, Budget(1e6, DELTA, "consumers")) is not None
    assert Ledger(older / FILE).spent("heart", "site", DELTA).server == math.inf


def test_one_study_alone_where_its_owner_says_so(older, restore):
    assert restore(older, *SINCE, "--study", "lung")[0] == 0
    ledger = Ledger(older / FILE)
    assert ledger.spent("heart", "site", DELTA).charges == 1
    # Once the copy is taken another study may be charged too, with a unit where it is new.
    assert restore(older, *SINCE, "--study", "skin", "--unit", "example")[0] == 0
    assert ledger.entries()[-1].charge.unit == "example"


@pytest.mark.parametrize("left_out", ["--noise-multiplier", "--sampling-rate", "--steps"])
def test_without_a_whole_charge_it_refuses(older, restore, left_out):
    at = SINCE.index(left_out)
    status, out, err = restore(older, *SINCE[:at], *SINCE[at + 2 :])
    assert (status, out) == (2, "") and left_out in err
    with pytest.raises(Exception, match="FE-428"):
        Ledger(older / FILE)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--noise-multiplier", "-1"), "--noise-multiplier: must be 0 or more"),
        (("--sampling-rate", "0"), "--sampling-rate: must be above 0"),
        (("--steps", "0"), "--steps: must be"),
        (("--steps", str(10**9 + 1)), "--steps: must be"),
        (("--study", "skin"), "--unit: must be given"),
    ],
)
def test_what_is_out_of_range_leaves_the_copy_refused(older, restore, words, named):
    status, out, err = restore(older, *SINCE, *words)
    assert (status, out) == (2, "") and named in err
    with pytest.raises(Exception, match="FE-428"):
        Ledger(older / FILE)


def test_who_does_not_know_the_noise_says_none(older, restore):
    status, out, _ = restore(older, *SINCE, "--noise-multiplier", "0", "--study", "heart")
    assert status == 0 and "epsilon is now inf against the consumers" in out
    assert Ledger(older / FILE).spent("heart", "site", DELTA).consumers == math.inf


def test_an_empty_copy_leaves_the_study_open(tmp_path, restore):
    book(tmp_path)
    status, _, err = restore(tmp_path, *SINCE)
    assert status == 2 and "--study: must be given" in err


def test_a_home_without_a_ledger_is_said_to_have_none(tmp_path, restore):
    status, _, err = restore(tmp_path, *SINCE)
    assert status == 1 and err.startswith("FE-901 ")
    assert list(tmp_path.iterdir()) == []
