import csv
import io
import json
import sqlite3
from contextlib import closing

import pytest

from fedge.shared.cli.command import Parser, guarded
from fedge.shared.commands import privacy_ledger
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

DELTA = 1e-5
PLENTY = Budget(1e6, DELTA)


@pytest.fixture
def show(tmp_path, capsys):
    """Runs the command on a home as `fedge privacy` does; gives status, output, error."""

    def work(words):
        parser = Parser(prog="fedge privacy")
        privacy_ledger.add(parser.add_subparsers(dest="action", required=True))
        arguments = parser.parse_args(["ledger", "--home", str(tmp_path), *words])
        assert arguments.action == "ledger"
        return privacy_ledger.run(arguments)

    def run(*words):
        status = guarded("fedge privacy", lambda: work(words))
        return status, *capsys.readouterr()

    run.home = tmp_path
    return run


@pytest.fixture
def ledger(show):
    return Ledger.create(show.home / FILE)


def charge(
    number,
    *,
    study="heart",
    run="r-1",
    unit="site",
    release=None,
    mechanism="distributed",
    purpose="train",
):
    made = Charge(
        study=study,
        unit=unit,
        run_id=run,
        server_round=number,
        purpose=purpose,
        attempt=0,
        mechanism=mechanism,
        release=release or Release(4.0),
        delta=DELTA,
        digest=f"{number:064x}",
    )
    return made, PLENTY


def good(report):
    status, out, err = report
    assert (status, err) == (0, "")
    return out


def bad(report, status, label):
    assert report[:2] == (status, "")
    assert report[2].count("\n") == 1
    assert report[2].startswith(f"{label} ")
    assert " Remedy: " in report[2]
    return report[2]


@pytest.fixture
def two_runs(ledger):
    """Three rounds of a run with noise multiplier 4, then two of another with 5, and one of another study."""
    for number in (1, 2, 3):
        ledger.charge(*charge(number))
    ledger.charge(*charge(1, study="lung", release=Release(4.0, 0.5)))
    for number in (1, 2):
        ledger.charge(*charge(number, run="r-2", release=Release(5.0), mechanism="local"))
    return ledger


def test_a_study_is_shown_with_its_budget_and_a_line_for_each_run(show, two_runs):
    lines = good(show("--study", "heart", "--epsilon", "4")).splitlines()
    after_first = epsilon.epsilon([Release(4.0, steps=3)], DELTA)
    after_both = epsilon.epsilon([Release(4.0, steps=3), Release(5.0, steps=2)], DELTA)
    assert lines[0] == "study heart, unit site, delta 1e-05"
    full = round(after_both / 4 * privacy_ledger.BAR_WIDTH)
    bar = "█" * full + "░" * (privacy_ledger.BAR_WIDTH - full)
    for line, reader in zip(lines[1:3], ("consumers", "server"), strict=True):
        assert line.startswith(f"  {reader:9}  {bar}  epsilon {after_both:.4f} of 4 (")
    assert lines[3] == ""
    assert lines[4].split() == [
        "run", "purpose", "rounds", "mechanism", "noise", "sampling", "charges", "consumers", "server",
    ]  # fmt: skip
    first, second = f"{after_first:.4f}", f"{after_both:.4f}"
    assert lines[5].split() == ["r-1", "train", "1–3", "distributed", "4", "1", "3", first, first]
    assert lines[6].split() == ["r-2", "train", "1–2", "local", "5", "1", "2", second, second]
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines[4:7]}) == 1
    assert lines[7:] == ["", f"chain of 6 charges: head {two_runs.verify()}, verified"]


def test_all_studies_are_shown_and_both_readers(show, two_runs):
    text = good(show())
    assert "█" not in text
    assert text.index("study heart") < text.index("study lung")
    spent = two_runs.spent("lung", "site", DELTA)
    assert spent.consumers < spent.server
    assert f"consumers  epsilon {spent.consumers:.4f}\n" in text
    assert f"server     epsilon {spent.server:.4f}\n" in text


@pytest.mark.parametrize(("budget", "full"), [("0.5", 30), ("0.9264", 29), ("0.94", 29)])
def test_only_a_budget_that_is_spent_looks_so(show, ledger, budget, full):
    ledger.charge(*charge(1))  # epsilon 0.92634
    line = good(show("--epsilon", budget)).splitlines()[1]
    assert line.count("█") == full


def test_json_holds_the_same_in_full(show, two_runs):
    report = json.loads(good(show("--json", "--epsilon", "4")))
    assert (report["charges"], report["verified"]) == (6, True)
    assert report["head"] == two_runs.verify()
    heart, lung = report["studies"]
    assert (heart["study"], heart["unit"], heart["charges"], heart["budget"]) == (
        "heart", "site", 5, 4.0,
    )  # fmt: skip
    assert [study["digest"] for study in (heart, lung)] == [
        two_runs.digest("heart"),
        two_runs.digest("lung"),
    ]
    assert heart["epsilon_consumers"] == two_runs.spent("heart", "site", DELTA).consumers
    assert [row["run_id"] for row in heart["runs"]] == ["r-1", "r-2"]
    assert (heart["runs"][0]["first_round"], heart["runs"][0]["last_round"]) == (1, 3)


def test_csv_has_a_line_a_run_and_no_formula(show, two_runs):
    two_runs.charge(*charge(7, study="=1+1", run="@x"))
    table = list(csv.DictReader(io.StringIO(good(show("--csv")))))
    assert [(row["study"], row["run_id"]) for row in table] == [
        ("'=1+1", "'@x"), ("heart", "r-1"), ("heart", "r-2"), ("lung", "r-1"),
    ]  # fmt: skip
    assert float(table[1]["epsilon_server"]) == two_runs.entries("heart")[2].epsilon_server
    assert (table[1]["first_round"], table[1]["last_round"], table[1]["charges"]) == ("1", "3", "3")


def test_another_delta_is_reckoned_anew(show, two_runs):
    heart, _ = json.loads(good(show("--json", "--delta", "1e-7")))["studies"]
    releases = [Release(4.0, steps=3), Release(5.0, steps=2)]
    assert heart["delta"] == 1e-7
    assert heart["epsilon_consumers"] == pytest.approx(epsilon.epsilon(releases, 1e-7))
    first = heart["runs"][0]["epsilon_consumers"]
    assert first == pytest.approx(epsilon.epsilon(releases[:1], 1e-7))
    assert first > epsilon.epsilon(releases[:1], DELTA)


def test_the_unit_divides_a_study(show, two_runs):
    two_runs.charge(*charge(1, unit="example", release=Release(8.0)))
    assert [s["unit"] for s in json.loads(good(show("--json")))["studies"]] == [
        "example", "site", "site",
    ]  # fmt: skip
    (only,) = json.loads(good(show("--json", "--unit", "example")))["studies"]
    assert (only["charges"], only["runs"][0]["noise_multiplier"]) == (1, 8.0)


def test_the_newest_thirty_runs_are_shown_unless_all_are_asked_for(show, ledger):
    for number in range(33):
        ledger.charge(*charge(1, run=f"r-{number:02}"))
    ledger.charge(*charge(2, run="r-00"))  # an old run that goes on is a new one
    text = good(show())
    assert "… 3 older runs; --all shows all" in text
    lines = text.splitlines()
    assert lines[4].split()[0] == "run"
    assert [line.split()[0] for line in lines[6:-2]] == [f"r-{i:02}" for i in range(4, 33)] + [
        "r-00"
    ]
    assert "older" not in good(show("--all"))
    (study,) = json.loads(good(show("--json", "--all")))["studies"]
    assert (len(study["runs"]), study["runs_left_out"]) == (33, 0)


def test_a_run_whose_parameters_changed_says_so(show, ledger):
    ledger.charge(*charge(1))
    ledger.charge(*charge(2, release=Release(5.0)))
    line = good(show()).splitlines()[5].split()
    assert line[:7] == ["r-1", "train", "1–2", "distributed", "several", "1", "2"]


def test_training_and_noised_evaluation_have_a_row_each(show, ledger):
    noised = {"purpose": "evaluate", "mechanism": "noised-metrics", "release": Release(10.0)}
    for number in (1, 2, 3):
        ledger.charge(*charge(number))
        if number != 2:
            ledger.charge(*charge(number, **noised))
    ledger.charge(*charge(1, run="r-2"))
    lines = good(show()).splitlines()
    entries = ledger.entries("heart")
    # Round 3's evaluation comes after its training, and so does what is spent by then.
    trained, evaluated, newer = (f"{entries[i].epsilon_consumers:.4f}" for i in (3, 4, 5))
    assert [line.split() for line in lines[5:8]] == [
        ["r-1", "train", "1–3", "distributed", "4", "1", "3", trained, trained],
        ["r-1", "evaluate", "1–3", "noised-metrics", "10", "1", "2", evaluated, evaluated],
        ["r-2", "train", "1", "distributed", "4", "1", "1", newer, newer],
    ]
    assert "several" not in "".join(lines)
    (study,) = json.loads(good(show("--json")))["studies"]
    assert [row["purpose"] for row in study["runs"]] == ["train", "evaluate", "train"]
    table = list(csv.DictReader(io.StringIO(good(show("--csv")))))
    assert [row["purpose"] for row in table] == ["train", "evaluate", "train"]
    assert [row["charges"] for row in table] == ["3", "2", "1"]


@pytest.mark.slow
def test_runs_are_counted_whatever_their_rows(show, ledger):
    for number in range(32):
        for purpose in ("train", "evaluate"):
            ledger.charge(*charge(1, run=f"r-{number:02}", purpose=purpose))
    (study,) = json.loads(good(show("--json")))["studies"]
    assert (len(study["runs"]), study["runs_left_out"]) == (60, 2)


def test_long_names_are_cut(show, ledger):
    ledger.charge(*charge(1, run="r" * 100))
    assert "r" * 23 + "…" in good(show())


def test_a_ledger_that_was_never_charged(show, ledger):
    assert good(show()).splitlines() == ["nothing was charged", "", "chain of 0 charges: verified"]
    assert json.loads(good(show("--json")))["studies"] == []
    assert "none, as nothing was charged" in bad(show("--study", "heart"), 2, "FE-102")


def test_a_home_without_a_ledger_is_told(show):
    assert f"must hold {FILE}, got none" in bad(show(), 1, "FE-901")


def test_a_deleted_ledger_and_an_altered_one_are_told(show, two_runs):
    path = show.home / FILE
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE charge SET record = replace(record, '4.0', '9.0') WHERE id = 2")
    assert "charge 2" in bad(show(), 1, "FE-428")
    path.unlink()
    bad(show(), 1, "FE-428")


@pytest.mark.parametrize(
    "words",
    [
        ("--study", "hart"),
        ("--unit", "patient"),
        ("--delta", "0"),
        ("--delta", "1"),
        ("--delta", "nan"),
        ("--epsilon", "-1"),
        ("--epsilon", "inf"),
        ("--epsilon", "much"),
        ("--json", "--csv"),
    ],
)
def test_bad_values_are_usage_errors(show, two_runs, words):
    bad(show(*words), 2, "FE-102")
