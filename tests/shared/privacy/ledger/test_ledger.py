"""The ledger: nothing overspends it, nothing resets it, and what was altered is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
from builders import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.errors import DeployError, SiteError
from fedge.shared.failpoints import VARIABLE
from fedge.shared.privacy.accounting import epsilon as accounting
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger import ledger
from fedge.shared.privacy.ledger.ledger import FAIL_POINTS, FILE, Ledger

DELTA = 1e-5
PLENTY = Budget(1e6, DELTA)
ALONE = Release(4.0)  # sampling rate 1: accounted for in closed form

_CHILD = """
import sys
from pathlib import Path
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.ledger.ledger import Ledger
path, epsilon, attempts, wait = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if wait:
    print("ready", flush=True)
    sys.stdin.readline()
made = 0
for i in range(attempts):
    charge = Charge("heart", "site", f"r-{sys.argv[5]}", i, "train", 0, "distributed", Release(4.0), 1e-5, "ab" * 32)
    try:
        Ledger(path).charge(charge, Budget(epsilon, 1e-5))
        made += 1
    except SiteError as error:
        assert error.code == 427, error
print(made, flush=True)
"""


def charge(number=1, release=ALONE, **changes):
    made = Charge(
        study="heart",
        unit="site",
        run_id="r-1",
        server_round=number,
        purpose="train",
        attempt=0,
        mechanism="distributed",
        release=release,
        delta=DELTA,
        digest=f"{number:064x}",
    )
    return replace(made, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE


@pytest.fixture
def filled(path):
    """A ledger of five charges of two studies."""
    book = Ledger.create(path)
    for number in range(1, 6):
        book.charge(charge(number, study="heart" if number % 2 else "lung"), PLENTY)
    return path


def edit(path, *statements):
    """What anybody with SQLite at hand can do to the file."""
    with closing(sqlite3.connect(path)) as db, db:
        for sql, *values in statements:
            db.execute(sql, values)


def marker(path):
    return path.with_name(f"{FILE}.made")


def rows(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT id, record, hash FROM charge ORDER BY id").fetchall()


# ---- charging


def test_a_fresh_ledger_is_its_owners_alone_and_has_spent_nothing(path):
    book = Ledger.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == [FILE, FILE + ".made"]
    assert book.spent("heart", "site", DELTA) == ledger.Spent(0.0, 0.0, 0, DELTA)
    assert (book.entries(), book.studies()) == ([], [])
    assert book.digest("heart") == book.verify()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_charge_is_reckoned_for_both_readers_and_kept_as_it_was(path):
    book = Ledger.create(path)
    sampled = Release(1.0, 0.1, 100)
    spent = book.charge(charge(1, sampled), PLENTY)
    # 7.0466 is privacy.md's; without sampling the same releases are one Gaussian of multiplier 0.1.
    assert spent.consumers == pytest.approx(7.0466, abs=1e-3)
    assert spent.server == accounting.epsilon([Release(1.0, 1.0, 100)], DELTA)
    again = charge(1, ALONE, purpose="statistics", attempt=3, mechanism="local", unit="example")
    book.charge(again, PLENTY)
    first, second = Ledger(path).entries()
    assert (first.id, first.charge) == (1, charge(1, sampled))
    assert (first.epsilon_consumers, first.epsilon_server) == (spent.consumers, spent.server)
    assert first.epsilon_delta == DELTA
    assert first.time.endswith("+00:00")
    assert (second.id, second.charge) == (2, again)


def test_the_published_numbers_come_out_of_single_charges(path):
    book = Ledger.create(path)
    for study, noise_multiplier, steps, epsilon in (
        ("a", 5.0, 100, 9.99726),
        ("b", 1.0, 1, 4.37718),
        ("c", 4.0, 1, 0.92634),
    ):
        made = book.charge(charge(1, Release(noise_multiplier, 1.0, steps), study=study), PLENTY)
        assert made.consumers == made.server == pytest.approx(epsilon, abs=1e-5)


def test_fresh_noise_for_the_same_round_is_charged_again(path):
    book = Ledger.create(path)
    once = book.charge(charge(), PLENTY)
    twice = book.charge(charge(), PLENTY)
    assert (once.charges, twice.charges) == (1, 2)
    assert twice.consumers == accounting.epsilon([replace(ALONE, steps=2)], DELTA) > once.consumers


def test_studies_do_not_mix_and_units_do(path):
    book = Ledger.create(path)
    one = book.charge(charge(), PLENTY)
    assert book.charge(charge(2, study="lung"), PLENTY) == one
    assert book.spent("heart", "site", DELTA) == one
    # What hides a whole site hides its examples, with half the noise: one of them moves an update by twice the bound.
    spent = book.spent("heart", "example", DELTA)
    assert spent.consumers == accounting.epsilon([Release(2.0)], DELTA)
    two = book.charge(charge(3, unit="example"), PLENTY)
    assert (two.consumers, two.charges) == (accounting.epsilon([Release(2.0), ALONE], DELTA), 2)
    assert book.spent("heart", "site", DELTA).consumers == math.inf
    with pytest.raises(SiteError, match="bound nothing for the site") as refused:
        book.charge(charge(4), PLENTY)
    assert refused.value.code == 427
    assert book.spent("lung", "example", DELTA).charges == 1
    assert book.studies() == ["heart", "lung"]
    assert [entry.id for entry in book.entries("heart")] == [1, 3]
    # A study's digest is fixed by its own last charge, not by what others do later.
    assert book.digest("lung") == book.entries()[1].hash
    assert book.digest("heart") == book.verify()


def test_asking_what_would_be_spent_writes_nothing(filled):
    book = Ledger(filled)
    before = book.verify()
    would = book.would_spend(charge(9), DELTA)
    assert book.verify() == before
    assert book.charge(charge(9), PLENTY) == would


# ---- the hard stop


@pytest.mark.parametrize("release", [ALONE, Release(2.0, 0.25)])
def test_the_budget_is_exact_to_the_last_charge(path, release):
    book = Ledger.create(path)
    budget = Budget(accounting.epsilon([replace(release, steps=3)], DELTA), DELTA, "consumers")
    for number in range(1, 4):
        spent = book.charge(charge(number, release), budget)
    assert spent.consumers == budget.epsilon
    head = book.verify()
    message = refused(427, book.charge, charge(4, release), budget)
    assert "round 4 of r-1" in message
    assert (book.verify(), len(book.entries())) == (head, 3)
    # The failing twin: the next smaller budget does not hold the third.
    short = Budget(math.nextafter(budget.epsilon, 0), DELTA, "consumers")
    assert book.would_spend(charge(4, release, study="x"), DELTA).charges == 1
    for number in range(1, 3):
        book.charge(charge(number, release, study="x"), short)
    refused(427, book.charge, charge(3, release, study="x"), short)


def test_after_a_refusal_a_smaller_charge_still_fits(path):
    book = Ledger.create(path)
    budget = Budget(1.0, DELTA)
    book.charge(charge(1), budget)
    refused(427, book.charge, charge(2), budget)
    spent = book.charge(charge(2, Release(40.0)), budget)
    assert (spent.charges, spent.consumers <= 1.0) == (2, True)


def test_the_budget_says_whose_epsilon_counts(path):
    book = Ledger.create(path)
    sampled = charge(1, Release(1.0, 0.01))
    would = book.would_spend(sampled, DELTA)
    assert would.consumers < 1.0 < would.server
    assert "the server" in refused(427, book.charge, sampled, Budget(1.0, DELTA, "server"))
    assert book.charge(sampled, Budget(1.0, DELTA, "consumers")) == would


def test_no_budget_holds_a_release_without_noise(path):
    book = Ledger.create(path)
    refused(427, book.charge, charge(1, Release(0.0)), Budget(sys.float_info.max, DELTA))
    assert book.entries() == []


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([Release(6.0), Release(9.0, 1.0, 3), Release(2.0, 0.25)]),
            st.sampled_from(["heart", "lung"]),
        ),
        max_size=6,
    ),
    st.sampled_from([0.5, 1.0, 1.6]),
)
def test_spent_is_what_accounting_says_of_the_accepted(tmp_path_factory, wished, epsilon):
    book = Ledger.create(tmp_path_factory.mktemp("home") / FILE)
    accepted = {"heart": [], "lung": []}
    for number, (release, study) in enumerate(wished):
        try:
            book.charge(charge(number, release, study=study), Budget(epsilon, DELTA, "consumers"))
            accepted[study].append(release)
        except SiteError as error:
            assert error.code == 427
            assert accounting.epsilon([*accepted[study], release], DELTA) > epsilon - 1e-9
    for study, releases in accepted.items():
        spent = book.spent(study, "site", DELTA)
        unamplified = accounting.unamplified(releases)
        assert spent.consumers == pytest.approx(accounting.epsilon(releases, DELTA), abs=1e-9)
        assert spent.server == pytest.approx(accounting.epsilon(unamplified, DELTA), abs=1e-9)
        assert spent.consumers <= epsilon
        assert spent.charges == len(releases)


# ---- crashes and company


def child(path, epsilon, attempts, *, wait="", name="1", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(path), str(epsilon), str(attempts), wait, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(("point", "left"), [(FAIL_POINTS[0], 2), (FAIL_POINTS[1], 3)])
def test_killed_after_the_commit_the_charge_stays_and_before_it_there_is_none(path, point, left):
    Ledger.create(path)
    with child(path, 100.0, 5, **{VARIABLE: f"{point}:2"}) as process:
        assert process.communicate(timeout=300)[0] == ""
    assert process.returncode == -signal.SIGKILL
    book = Ledger(path)
    assert [entry.charge.server_round for entry in book.entries()] == list(range(left))
    behind = int(marker(path).read_text().split()[1])
    assert behind == 2  # after the commit, the marker lacks one; nothing of that charge was sent
    assert book.charge(charge(9), PLENTY).charges == left + 1
    assert marker(path).read_text().split()[1:] == [str(left + 1), book.verify()]


def test_two_processes_at_once_never_exceed_the_budget(path):
    book = Ledger.create(path)
    epsilon = accounting.epsilon([replace(ALONE, steps=9)], DELTA)
    with (
        child(path, epsilon, 12, wait="y", name="1") as one,
        child(path, epsilon, 12, wait="y", name="2") as two,
    ):
        for process in (one, two):
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            process.stdin.write("go\n")
            process.stdin.flush()
        made = [int(process.communicate(timeout=300)[0]) for process in (one, two)]
    assert sum(made) == 9 == len(book.entries())
    assert book.spent("heart", "site", DELTA).consumers == epsilon


def test_threads_of_a_process_share_a_ledger(path):
    book = Ledger.create(path)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda number: book.charge(charge(number), PLENTY), range(12)))
    assert sorted(spent.charges for spent in actual) == list(range(1, 13))
    book.verify()


def test_who_cannot_get_the_lock_charges_nothing(filled, monkeypatch):
    monkeypatch.setattr(ledger, "_BUSY_SECONDS", 0.05)
    book = Ledger(filled)
    with closing(sqlite3.connect(filled, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "locked" in refused(428, book.charge, charge(9), PLENTY)
        assert len(book.entries()) == 5
        other.execute("ROLLBACK")
    assert len(book.entries()) == 5
    book.charge(charge(9), PLENTY)


# ---- what was altered


def _renumbered(path):
    """A copy of charge 2 put after it, and all later ones moved up by one."""
    text = rows(path)[1][1]
    edit(
        path,
        ("UPDATE charge SET id = -id - 1 WHERE id > 2",),
        ("UPDATE charge SET id = -id WHERE id < 0",),
        ("INSERT INTO charge VALUES (3, ?, ?)", text, "0" * 64),
        ("UPDATE meta SET charges = charges + 1",),
    )


def _appended(path, *, counted):
    """A charge with the right link at the end; the head is left as it was."""
    _, text, last = rows(path)[-1]
    link = hashlib.sha256(bytes.fromhex(last) + text.encode()).hexdigest()
    edit(path, ("INSERT INTO charge VALUES (6, ?, ?)", text, link))
    if counted:
        edit(path, ("UPDATE meta SET charges = 6",))


def _quieter(path):
    noise, less = '"noise_multiplier":4.0', '"noise_multiplier":9.0'
    edit(path, ("UPDATE charge SET record = replace(record, ?, ?) WHERE id = 3", noise, less))
    assert less in rows(path)[2][1]


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        pytest.param(_quieter, "charge 3: .* altered", id="noise multiplier"),
        pytest.param(
            lambda path: edit(path, ("UPDATE charge SET hash = ? WHERE id = 2", "1" * 64)),
            "charge 2: .* altered",
            id="hash",
        ),
        pytest.param(
            lambda path: edit(path, ("DELETE FROM charge WHERE id = 5",)),
            "charge 5: .* removed",
            id="last removed",
        ),
        pytest.param(
            lambda path: edit(
                path, ("DELETE FROM charge WHERE id = 5",), ("UPDATE meta SET charges = 4",)
            ),
            "charge 4: .* after it were removed",
            id="last removed and counted",
        ),
        pytest.param(
            lambda path: edit(path, ("DELETE FROM charge WHERE id = 3",)),
            "charge 3: .* removed",
            id="middle removed",
        ),
        pytest.param(
            lambda path: edit(path, ("DELETE FROM charge",)),
            "charge 1: .* removed",
            id="all removed",
        ),
        pytest.param(
            lambda path: edit(
                path,
                ("DELETE FROM charge WHERE id = 3",),
                ("UPDATE charge SET id = id - 1 WHERE id > 3",),
                ("UPDATE meta SET charges = 4",),
            ),
            "charge 3: .* altered",
            id="middle removed and the rest renumbered",
        ),
        pytest.param(_renumbered, "charge 3: .* inserted", id="inserted"),
        pytest.param(
            lambda path: _appended(path, counted=False), "charge 6: .* inserted", id="appended"
        ),
        pytest.param(
            lambda path: _appended(path, counted=True), "charge 6: .* replaced", id="counted"
        ),
        pytest.param(
            lambda path: edit(path, ("UPDATE meta SET charges = 6",)),
            "charge 6: .* removed",
            id="count",
        ),
        pytest.param(
            lambda path: edit(path, ("DELETE FROM meta",)), "one row about itself", id="no head"
        ),
        pytest.param(
            lambda path: edit(
                path,
                ("CREATE TRIGGER t AFTER INSERT ON charge BEGIN DELETE FROM charge; END",),
            ),
            "two tables only",
            id="trigger",
        ),
    ],
)
def test_what_was_altered_is_named_and_nothing_more_is_charged(filled, alter, named):
    book = Ledger(filled)
    alter(filled)
    left = rows(filled)
    message = refused(428, book.verify)
    assert re.search(named, message), message
    for work in (
        lambda: Ledger(filled),
        lambda: book.charge(charge(9), PLENTY),
        lambda: book.spent("heart", "site", DELTA),
        lambda: book.would_spend(charge(9), DELTA),
        lambda: book.digest("heart"),
        book.entries,
        book.studies,
    ):
        assert refused(428, work) == message
    assert rows(filled) == left


def test_a_flipped_byte_is_noticed_wherever_it_counts(filled):
    whole = filled.read_bytes()
    expected = Ledger(filled).entries()
    text = rows(filled)[2][1].encode()
    inside = whole.index(text)
    checked = [inside, inside + len(text) // 2, inside + len(text) - 2]
    for at in [*range(0, 100, 3), *range(100, len(whole), 331), *checked]:
        flipped = bytearray(whole)
        flipped[at] ^= 0x20
        filled.write_bytes(flipped)
        try:
            actual = Ledger(filled).entries()
        except SiteError as error:
            assert error.code == 428
        else:  # a byte that nothing depends on
            assert actual == expected
            assert at not in checked
        for leftover in filled.parent.glob(f"{FILE}-*"):
            leftover.unlink()


def test_only_a_digest_that_has_left_the_site_shows_a_ledger_that_was_made_anew(filled):
    # The module says so: this is what its chain does not promise.
    published = Ledger(filled).digest("heart")
    with closing(sqlite3.connect(filled)) as db:
        (name,) = db.execute("SELECT ledger FROM meta").fetchone()
    head = hashlib.sha256(canonical_json({"ledger": name})).hexdigest()
    for number, text, _ in rows(filled):
        record = canonical_json({**json.loads(text), "noise_multiplier": 99.0})
        head = hashlib.sha256(bytes.fromhex(head) + record).hexdigest()
        sql = "UPDATE charge SET record = ?, hash = ? WHERE id = ?"
        edit(filled, (sql, record.decode(), head, number))
    edit(filled, ("UPDATE meta SET head = ?", head))
    # Who forgets the marker is noticed.
    assert "got another one" in refused(428, Ledger, filled)
    marker(filled).write_text(f"{name} 5 {head}\n")
    book = Ledger(filled)
    assert book.spent("heart", "site", DELTA).consumers < 0.1
    assert book.digest("heart") != published


# ---- an older copy


def _copied(path):
    """A backup as use-differential-privacy.md makes it, of a ledger that is in use."""
    copy = path.with_name("copy.sqlite")
    with closing(sqlite3.connect(path)) as db, closing(sqlite3.connect(copy)) as into:
        db.backup(into)
    return copy


def _since(release, study="heart"):
    return lambda entries: [(charge(0, release, run_id="restored", study=study), DELTA)]


@pytest.fixture
def older(filled):
    """A ledger of five charges in place of the one of seven."""
    copy = _copied(filled)
    book = Ledger(filled)
    for number in (6, 7):
        book.charge(charge(number), PLENTY)
    head = book.verify()
    copy.replace(filled)
    return filled, head


def test_an_older_copy_is_refused_by_its_marker(older):
    path, head = older
    message = refused(428, Ledger, path)
    assert f"must hold charge 7 with hash {head}, got an older copy with 5 charges" in message
    assert len(rows(path)) == 5
    # The failing twin: with a marker of the name only, as an earlier fedge wrote it, nothing tells.
    name = marker(path).read_text().split()[0]
    marker(path).write_text(f"{name}\n")
    assert len(Ledger(path).entries()) == 5


def test_a_marker_of_an_earlier_fedge_is_upgraded_by_the_next_charge(filled):
    name = marker(filled).read_text().split()[0]
    marker(filled).write_text(f"{name}\n")
    book = Ledger(filled)
    assert marker(filled).read_text() == f"{name}\n"
    book.charge(charge(6), PLENTY)
    assert marker(filled).read_text() == f"{name} 6 {book.verify()}\n"


def test_a_ledger_one_ahead_of_its_marker_was_killed_between_and_goes_on(filled):
    book = Ledger(filled)
    before = marker(filled).read_bytes()
    book.charge(charge(6), PLENTY)
    marker(filled).write_bytes(before)
    assert len(Ledger(filled).entries()) == 6
    assert marker(filled).read_bytes() == before, "readers write nothing"
    refused(427, book.charge, charge(7), Budget(0.1, DELTA))
    assert marker(filled).read_text().split()[1:] == ["6", book.verify()]


def test_a_copy_that_was_charged_elsewhere_is_refused(filled):
    copy = _copied(filled)
    Ledger(filled).charge(charge(6), PLENTY)
    kept = marker(filled).read_bytes()
    copy.replace(filled)
    Ledger.restore(filled, _since(ALONE))
    Ledger(filled).charge(charge(8), PLENTY)
    marker(filled).write_bytes(kept)
    assert "charged elsewhere" in refused(428, Ledger, filled)


def test_an_older_copy_is_taken_with_a_charge_for_what_was_sent_since(older):
    path, _ = older
    (added,) = Ledger.restore(path, _since(replace(ALONE, steps=2)))
    book = Ledger(path)
    assert book.entries()[-1] == added and added.id == 6
    assert added.charge.run_id == "restored"
    # Three of the copy's five are heart's; with the two that it lacks all is counted again.
    assert book.spent("heart", "site", DELTA).consumers == pytest.approx(
        accounting.epsilon([replace(ALONE, steps=5)], DELTA)
    )
    assert marker(path).read_text().split()[1:] == ["6", book.verify()]
    assert book.charge(charge(8), PLENTY).charges == 5


def test_without_a_charge_an_older_copy_stays_refused(older):
    path, _ = older
    before = marker(path).read_bytes()
    with pytest.raises(ValueError, match="at least 1 for what was sent since"):
        Ledger.restore(path, lambda entries: [])
    refused(428, Ledger, path)
    assert (len(rows(path)), marker(path).read_bytes()) == (5, before)


def test_no_budget_stops_what_was_sent_already(older):
    path, _ = older
    (added,) = Ledger.restore(path, _since(Release(0.0)))
    assert added.epsilon_consumers == math.inf
    refused(427, Ledger(path).charge, charge(9), PLENTY)


def test_a_copy_without_its_marker_is_refused_until_it_is_restored(filled):
    marker(filled).unlink()
    assert "privacy.sqlite.made" in refused(428, lambda: Ledger(filled).charge(charge(6), PLENTY))
    assert not marker(filled).exists()
    Ledger.restore(filled, _since(ALONE))
    assert Ledger(filled).charge(charge(7), PLENTY).charges == 5


@pytest.mark.parametrize("spoil", [_quieter, lambda path: path.unlink()])
def test_what_is_altered_or_gone_is_not_restored(older, spoil):
    path, _ = older
    spoil(path)
    refused(428, Ledger.restore, path, _since(ALONE))


def test_a_ledger_of_another_home_is_not_restored(filled, tmp_path):
    (tmp_path / "other").mkdir()
    other = Ledger.create(tmp_path / "other" / FILE)
    other.charge(charge(), PLENTY)
    filled.write_bytes((tmp_path / "other" / FILE).read_bytes())
    assert "another one" in refused(428, Ledger.restore, filled, _since(ALONE))


@pytest.mark.slow
def test_readers_beside_writers_never_take_the_ledger_for_an_older_copy(path):
    Ledger.create(path)
    with (
        child(path, 1e6, 25, wait="y", name="1") as one,
        child(path, 1e6, 25, wait="y", name="2") as two,
    ):
        for process in (one, two):
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
        seen = [0]
        while one.poll() is None or two.poll() is None:
            seen.append(len(Ledger(path).entries()))
        assert [int(process.stdout.read()) for process in (one, two)] == [25, 25]
    assert seen == sorted(seen)
    assert marker(path).read_text().split()[1:] == ["50", Ledger(path).verify()]


# ---- what is no ledger


def test_a_home_that_never_had_a_ledger_is_said_to_have_none(path):
    with pytest.raises(DeployError) as caught:
        Ledger(path)
    assert caught.value.code == 901
    assert list(path.parent.iterdir()) == []


def test_a_deleted_ledger_does_not_reset_the_budget(filled):
    book = Ledger(filled)
    filled.unlink()
    for work in (
        lambda: Ledger(filled),
        lambda: Ledger.create(filled),
        lambda: book.charge(charge(9), PLENTY),
        lambda: book.spent("heart", "site", DELTA),
    ):
        refused(428, work)
    assert not filled.exists()


def test_a_ledger_is_created_once(filled):
    before = filled.read_bytes()
    refused(428, Ledger.create, filled)
    marker(filled).unlink()
    refused(428, Ledger.create, filled)
    assert filled.read_bytes() == before


def test_a_ledger_whose_creation_was_cut_short_gets_its_marker_before_its_first_charge(path):
    book = Ledger.create(path)
    name = marker(path).read_text().split()[0]
    marker(path).unlink()
    book.charge(charge(), PLENTY)
    assert marker(path).read_text() == f"{name} 1 {book.verify()}\n"


def test_a_ledger_of_another_home_is_refused(filled, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Ledger.create(other / FILE)
    filled.write_bytes((other / FILE).read_bytes())
    assert "another one" in refused(428, Ledger, filled)


def _other_program(path):
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE charge (id INTEGER PRIMARY KEY)")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "another", id="empty"),
        pytest.param(lambda path: path.write_bytes(b"{}\n" * 999), "another", id="text"),
        pytest.param(lambda path: (path.unlink(), _other_program(path)), "another", id="foreign"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:5000]), "sound", id="cut short"
        ),
        pytest.param(
            lambda path: edit(path, ("PRAGMA user_version = 2",)), "newer fedge", id="newer"
        ),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "regular file", id="folder"),
        pytest.param(lambda path: (path.unlink(), os.mkfifo(path)), "regular file", id="pipe"),
        pytest.param(
            lambda path: path.symlink_to(path.rename(path.with_name("moved"))),
            "symbolic link",
            id="link",
        ),
        pytest.param(
            lambda path: marker(path).write_bytes(b"\xff"),
            "another one",
            id="marker",
        ),
    ],
)
def test_what_is_no_ledger_of_this_home_is_refused_and_left_as_it_is(filled, spoil, named):
    spoil(filled)
    before = filled.read_bytes() if filled.is_file() else None
    assert named in refused(428, Ledger, filled)
    refused(428, Ledger.create, filled)
    assert (filled.read_bytes() if filled.is_file() else None) == before


# ---- values


@pytest.mark.parametrize(
    "changes",
    [
        {"study": ""},
        {"study": "a\nb"},
        {"run_id": "r" * 129},
        {"mechanism": None},
        {"unit": "patient"},
        {"purpose": "test"},
        {"server_round": -1},
        {"server_round": True},
        {"attempt": 2**31},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"digest": "AB" * 32},
        {"digest": "ab" * 31},
        {"release": Release(1.0, 1.0, 10**9 + 1)},
    ],
)
def test_a_charge_is_held_against_its_ranges(changes):
    with pytest.raises(ValueError, match=": must be "):
        charge(**changes)


@pytest.mark.parametrize(
    "values", [(-1.0, DELTA), (math.inf, DELTA), (math.nan, DELTA), (1.0, 0.0), (1.0, DELTA, "all")]
)
def test_a_budget_is_held_against_its_ranges(values):
    with pytest.raises(ValueError, match=": must be "):
        Budget(*values)


def test_delta_is_checked_where_it_is_asked_for(filled):
    book = Ledger(filled)
    with pytest.raises(ValueError, match="delta: must be"):
        book.spent("heart", "site", 1.0)
    with pytest.raises(ValueError, match="delta: must be"):
        book.would_spend(charge(), 0.0)


def test_under_the_server_s_noise_nothing_bounds_what_the_server_learns(tmp_path):
    ledger = Ledger.create(tmp_path / FILE)
    central = charge(mechanism="central", release=Release(1.0, 0.1, 100), unit="site")
    with pytest.raises(SiteError) as refused:
        ledger.charge(central, Budget(1e6, 1e-5, "server"))
    assert refused.value.code == 427 and "without noise" in str(refused.value)
    assert ledger.entries() == []
    spent = ledger.charge(central, Budget(10, 1e-5, "consumers"))
    assert (round(spent.consumers, 4), spent.server) == (7.0466, math.inf)
    # What was spent before cannot be hidden again by noise of another mechanism.
    again = ledger.charge(charge(release=Release(1e3), unit="site"), Budget(10, 1e-5, "consumers"))
    assert again.server == math.inf
    assert ledger.spent(central.study, "example", 1e-5).server == math.inf
