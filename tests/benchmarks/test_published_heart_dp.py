"""fed-heart-dp: the noise is enough for every hospital, and each pass mark can be missed."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.shared.config import Config
from fedge.shared.privacy.accounting import Release, calibrate, epsilon

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = (
    "published",
    "published_heart_dp",
    "published_mnist_dp",
    "published_pooled",
    "published_private",
)
HOSPITALS = ("cleveland", "hungary", "switzerland", "va")
ROWS = (199, 172, 30, 85)
STEPS = 1500


@pytest.fixture(scope="module")
def published():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    for name in LOADED:
        sys.modules.pop(name, None)
    yield importlib.import_module("published")
    for name in LOADED:
        sys.modules.pop(name, None)
    sys.path[:] = before


@pytest.fixture(scope="module")
def heart(published):
    return published.published_heart_dp


@pytest.fixture(scope="module")
def private(published):
    return sys.modules["published_private"]


def measured(heart, private, shifts=None, spread=0.0, over=1.0):
    """Runs at the published means; every second seed lies ``spread`` above, the others below."""
    found = {}
    for label, claim in heart.CLAIMS.items():
        account = private.Account(
            claim.epsilon * over, "PLD", 15, STEPS, 4 / 30, 13.0, 2 * claim.epsilon, 1e-5
        )
        found[label] = []
        for i in range(len(claim.seeds)):
            mean = claim.published + (shifts or {}).get(label, 0.0) + spread * (-1) ** i
            accuracy = dict.fromkeys(HOSPITALS, mean)
            accounts = dict.fromkeys(HOSPITALS, account)
            found[label].append(private.Run(accuracy, [accuracy], accounts))
    return found


def test_only_privacy_is_added_to_fed_heart(published, heart, tmp_path):
    base = published.configuration(published.FED_HEART["FedAvg"], 7, tmp_path)
    found = heart.private(base, 13.0)
    assert found.privacy.mechanism == "example"
    assert (found.privacy.noise_multiplier, found.privacy.clipping_bound) == (13.0, 1.1)
    assert (found.privacy.metrics, found.privacy.statistics) == ("unprotected", "unprotected")
    assert found.model_copy(update={"privacy": base.privacy}) == base
    assert (found.train.learning_rate, found.train.batch_size) == (0.001, 4)
    assert found.run.rounds * found.train.local_steps == STEPS


def test_the_table_is_the_published_one(heart):
    found = {label: (c.epsilon, c.delta, c.published) for label, c in heart.CLAIMS.items()}
    assert list(found.values()) == [
        (1.0, 1e-3, 0.7015),
        (1.0, 1e-4, 0.6853),
        (0.1, 1e-4, 0.6056),
    ]
    assert [len(set(c.seeds)) for c in heart.CLAIMS.values()] == [5, 20, 20]


@pytest.mark.parametrize(
    "label",
    [
        "epsilon 1, delta 1e-3",
        pytest.param("epsilon 1, delta 1e-4", marks=pytest.mark.slow),
        pytest.param("epsilon .1, delta 1e-4", marks=pytest.mark.slow),
    ],
)
def test_every_hospital_stays_within_epsilon_and_the_smallest_just_so(heart, label):
    claim = heart.CLAIMS[label]
    noise = heart.noise_for(claim, ROWS, 4, STEPS)
    spent = [epsilon([Release(noise, 4 / rows, STEPS)], claim.delta) for rows in ROWS]
    assert max(spent) == spent[2] <= claim.epsilon
    assert spent[2] > 0.99 * claim.epsilon


def test_noise_for_the_largest_hospital_or_for_15_epochs_would_not_do(heart):
    claim = heart.CLAIMS[heart.MARKED]
    largest = heart.noise_for(claim, ROWS[:1], 4, STEPS)
    assert epsilon([Release(largest, 4 / 30, STEPS)], claim.delta) > 5
    # What FLamby asks Opacus for: the smallest hospital's loader has 8 batches.
    flamby = calibrate(claim.epsilon, claim.delta, 1 / 8, 15 * 8)
    assert epsilon([Release(flamby, 1 / 8, STEPS)], claim.delta) == pytest.approx(4.56, abs=0.01)


def test_the_published_values_pass(heart, private):
    result = heart.judge(measured(heart, private))
    assert result["passed"]
    assert "MISSED" not in heart.table(result) and heart.table(result).endswith("\npassed")
    assert result["marks"]["fall"]["difference"] == pytest.approx(0.0797)


@pytest.mark.parametrize("shift", [-0.06, 0.06])
def test_a_mean_off_the_level_is_missed(heart, private, shift):
    result = heart.judge(measured(heart, private, {heart.MARKED: shift}))
    assert [name for name, mark in result["marks"].items() if not mark["passed"]] == ["level"]
    assert not result["passed"]
    assert heart.table(result).count("MISSED") == 1


def test_a_mean_that_does_not_fall_is_missed(heart, private):
    result = heart.judge(measured(heart, private, {heart.FALL[1]: 0.08}))
    assert [name for name, mark in result["marks"].items() if not mark["passed"]] == ["fall"]
    assert heart.table(result).count("MISSED") == 1


def test_one_run_of_one_hospital_above_epsilon_is_missed(heart, private):
    runs = measured(heart, private)
    last = runs[heart.FALL[1]][-1]
    more = replace(last.accounts["va"], epsilon=0.1001)
    runs[heart.FALL[1]][-1] = replace(last, accounts=last.accounts | {"va": more})
    result = heart.judge(runs)
    assert [name for name, mark in result["marks"].items() if not mark["passed"]] == ["epsilon"]
    assert not result["rows"][heart.FALL[1]]["within"]
    text = heart.table(result)
    assert "va           accuracy 0.6056  epsilon 0.1001" in text and text.count("MISSED") == 1


def test_the_fall_is_of_pairs(heart, private):
    # Both rows swing alike from seed to seed, so that their difference does not.
    result = heart.judge(measured(heart, private, spread=0.1))
    fall = result["marks"]["fall"]
    assert fall["standard_error"] == pytest.approx(0, abs=1e-12)
    row = result["rows"][heart.FALL[0]]["mean"]
    assert row["sd"] == pytest.approx(0.1)
    assert row["standard_error"] == pytest.approx(0.1 / math.sqrt(19))
    assert list(fall["per_seed"]) == [str(seed) for seed in range(42, 62)]


@pytest.mark.parametrize("missing", [1, 2])
def test_seeds_without_a_run_are_refused(heart, private, missing):
    runs = measured(heart, private)
    del runs[heart.MARKED][-missing:]
    with pytest.raises(ValueError, match="zip"):
        heart.judge(runs)


def test_a_step_of_a_real_run_is_charged_within_epsilon(published, heart, data_folder):
    def base(seed):
        config = published.configuration(published.FED_HEART["FedAvg"], seed, data_folder / "heart")
        values = config.model_dump(by_alias=True)
        values["run"] |= {"rounds": 1, "evaluate-every": 1}
        values["train"]["local-steps"] = 1
        return Config.model_validate(values)

    claim = heart.Claim(1.0, 1e-3, (42,), 0.7)
    told = []
    runs = heart.fed_heart_dp(base, told.append, {"one": claim})
    (found,) = runs["one"]
    assert tuple(found.accounts) == HOSPITALS
    rates = {h: 4 / rows for h, rows in zip(HOSPITALS, ROWS, strict=True)}
    assert {h: a.sampling_rate for h, a in found.accounts.items()} == rates
    assert all(a.steps == 1 and a.epsilon <= 1.0 for a in found.accounts.values())
    assert found.accounts["switzerland"].epsilon > 0.99
    assert len(told) == 1 and told[0].startswith("one, noise multiplier ")


@pytest.mark.parametrize(("over", "status"), [(1.0, 0), (1.1, 1)])
def test_the_command_writes_the_table_and_tells_what_is_missed(
    published, heart, private, over, status, monkeypatch, tmp_path, capsys
):
    runs = measured(heart, private, over=over)
    monkeypatch.setattr(heart, "fed_heart_dp", lambda base, report: runs)
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    assert published.main(["fed-heart-dp", "--data", str(tmp_path)]) == status
    assert ("MISSED" in capsys.readouterr().out) is bool(status)
    assert (tmp_path / "published-fed-heart-dp.json").is_file()


def test_a_missing_folder_is_one_line_and_exit_1(published, tmp_path, capsys):
    assert published.main(["fed-heart-dp", "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("FE-301 ")
