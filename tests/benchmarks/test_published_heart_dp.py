"""fed-heart-dp: each hospital's own noise is just enough, and each pass mark can be missed."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.client.privacy.noise_calibration import noise_within
from fedge.shared.config.federation import Config
from fedge.shared.privacy.accounting.epsilon import Release, calibrate, epsilon

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = (
    "published",
    "published_heart_dp",
    "published_heart_rows",
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


@pytest.mark.parametrize("marked", [False, True])
def test_only_privacy_is_added_to_fed_heart_and_the_marked_row_has_its_own_step_size(
    published, heart, tmp_path, marked
):
    base = published.configuration(published.FED_HEART["FedAvg"], 7, tmp_path)
    claim = heart.CLAIMS[heart.MARKED if marked else heart.REPEATED]
    found = heart.private(base, claim)
    assert found.privacy.mechanism == "example"
    assert (found.privacy.epsilon, found.privacy.delta) == (1.0, 1e-3)
    assert (found.privacy.noise_multiplier, found.privacy.clipping_bound) == (None, 1.1)
    assert (found.privacy.metrics, found.privacy.statistics) == ("unprotected", "unprotected")
    train = base.train.model_copy(update={"learning_rate": claim.learning_rate})
    assert found.model_copy(update={"privacy": base.privacy}) == base.model_copy(
        update={"train": train}
    )
    assert (found.train.learning_rate == 0.001) is not marked
    assert found.train.batch_size == 4
    assert found.run.rounds * found.train.local_steps == STEPS


def test_the_table_is_the_published_one_and_a_row_at_our_step_size(heart):
    found = [(c.epsilon, c.delta, c.published, c.learning_rate) for c in heart.CLAIMS.values()]
    assert found == [
        (1.0, 1e-3, 0.7015, 0.001),
        (1.0, 1e-4, 0.6853, 0.001),
        (0.1, 1e-4, 0.6056, 0.001),
        (1.0, 1e-3, 0.7015, heart.LEARNING_RATE),
    ]
    assert [len(set(c.seeds)) for c in heart.CLAIMS.values()] == [5, 20, 20, 20]


def test_the_step_size_is_the_best_of_the_search(heart):
    assert set(heart.RATES) == {0.003, 0.01, 0.03}
    assert all(heart.RATES[heart.LEARNING_RATE] >= mean for mean in heart.RATES.values())


def test_the_search_runs_each_rate_on_its_seeds_under_the_marked_guarantee(heart, monkeypatch):
    def fed_heart_dp(base, report, claims):
        assert {(c.epsilon, c.delta, c.seeds) for c in claims.values()} == {(1.0, 1e-3, (100, 101))}
        return {
            label: [heart.Run(dict.fromkeys(HOSPITALS, c.learning_rate), [], {})] * 2
            for label, c in claims.items()
        }

    monkeypatch.setattr(heart, "fed_heart_dp", fed_heart_dp)
    found = heart.search(None, print, (100, 101))
    assert found == pytest.approx({rate: rate for rate in heart.RATES})


@pytest.mark.parametrize("seed", [42, 61])
def test_the_search_refuses_a_seed_of_the_table(heart, seed):
    with pytest.raises(ValueError, match=f"^seeds: must not be in the table, got {seed}$"):
        heart.search(None, print, (100, seed))


@pytest.mark.parametrize(
    "label",
    [
        pytest.param("epsilon 1, delta 1e-3", marks=pytest.mark.slow),
        pytest.param("epsilon 1, delta 1e-4", marks=pytest.mark.soak),
        pytest.param("epsilon .1, delta 1e-4", marks=pytest.mark.soak),
    ],
)
def test_every_hospital_stays_within_epsilon_and_just_so(published, heart, label, tmp_path):
    base = published.configuration(published.FED_HEART["FedAvg"], 7, tmp_path)
    config = heart.private(base, heart.CLAIMS[label])
    privacy = config.privacy
    for rows in ROWS:
        noise = noise_within(
            privacy.epsilon,
            privacy.delta,
            privacy.clipping_bound,
            config.train,
            rows,
            config.run.rounds,
        )
        spent = epsilon([Release(noise.noise_multiplier, 4 / rows, STEPS)], privacy.delta)
        assert 0.99 * privacy.epsilon < spent <= privacy.epsilon


def test_noise_for_the_largest_hospital_would_not_do_for_the_smallest(heart):
    claim = heart.CLAIMS[heart.MARKED]
    largest = calibrate(claim.epsilon, claim.delta, 4 / ROWS[0], STEPS)
    assert epsilon([Release(largest, 4 / 30, STEPS)], claim.delta) > 5


@pytest.mark.soak
@pytest.mark.parametrize(("batches", "spent"), [(50, 1.50), (8, 4.56)])
def test_noise_for_15_epochs_would_not_do(heart, batches, spent):
    # What FLamby asks Opacus for; the largest and the smallest hospital's loaders have so many batches.
    claim = heart.CLAIMS[heart.REPEATED]
    noise = calibrate(claim.epsilon, claim.delta, 1 / batches, 15 * batches)
    found = epsilon([Release(noise, 1 / batches, STEPS)], claim.delta)
    assert found == pytest.approx(spent, abs=0.01)


def over_once(heart, private, label, spent):
    """Runs at the published means, of which the last of a row has one hospital at another epsilon."""
    runs = measured(heart, private)
    last = runs[label][-1]
    more = replace(last.accounts["va"], epsilon=spent)
    runs[label][-1] = replace(last, accounts=last.accounts | {"va": more})
    return runs


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


def test_a_level_reached_above_epsilon_is_missed(heart, private):
    result = heart.judge(over_once(heart, private, heart.MARKED, 1.001))
    assert abs(result["marks"]["level"]["mean"] - heart.LEVEL) <= heart.TOLERANCE
    missed = [name for name, mark in result["marks"].items() if not mark["passed"]]
    assert missed == ["level", "epsilon"]


@pytest.mark.parametrize(("shift", "within"), [(-0.06, False), (0.0, True)])
def test_the_published_settings_are_reported_without_a_mark(heart, private, shift, within):
    result = heart.judge(measured(heart, private, {heart.REPEATED: shift}))
    assert result["passed"]
    reported = result["published_settings"]
    assert reported["mean"] == pytest.approx(0.7015 + shift)
    assert reported["within_tolerance"] is within
    text = heart.table(result)
    assert (f"{reported['mean']:.4f}, {'within' if within else 'outside'} 0.7 +- 0.05. ") in text
    assert "1.5 to 4.6 by this accountant" in text and "MISSED" not in text


def test_the_table_says_how_the_step_size_was_chosen(heart, private):
    result = heart.judge(measured(heart, private))
    found = result["search"]
    assert found["learning_rate"] == heart.LEARNING_RATE
    assert result["rows"][heart.MARKED]["learning_rate"] == heart.LEARNING_RATE
    rows = result["rows"].values()
    assert not set(found["seeds"]) & {int(seed) for row in rows for seed in row["per_seed"]}
    assert "chosen on seeds that are not in the table" in heart.table(result)
    assert "the choice of the step size" in result["not_covered"]


def test_one_run_of_one_hospital_above_epsilon_is_missed(heart, private):
    result = heart.judge(over_once(heart, private, heart.FALL[1], 0.1001))
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


@pytest.mark.soak
def test_a_step_of_a_real_run_is_charged_within_epsilon(published, heart, data_folder):
    def base(seed):
        config = published.configuration(published.FED_HEART["FedAvg"], seed, data_folder / "heart")
        values = config.model_dump(by_alias=True)
        values["run"] |= {"rounds": 1, "evaluate-every": 1}
        values["train"]["local-steps"] = 1
        return Config.model_validate(values)

    claim = heart.Claim(1.0, 1e-3, (42,), 0.7)
    reported = []
    runs = heart.fed_heart_dp(base, reported.append, {"one": claim})
    (found,) = runs["one"]
    assert tuple(found.accounts) == HOSPITALS
    rates = {h: 4 / rows for h, rows in zip(HOSPITALS, ROWS, strict=True)}
    assert {h: a.sampling_rate for h, a in found.accounts.items()} == rates
    assert all(a.steps == 1 and a.epsilon <= 1.0 for a in found.accounts.values())
    assert all(a.epsilon > 0.99 for a in found.accounts.values())
    # Who samples at a higher rate takes more noise.
    noise = {h: a.noise_multiplier for h, a in found.accounts.items()}
    assert sorted(noise, key=noise.get) == ["cleveland", "hungary", "va", "switzerland"]
    assert len(reported) == 1 and reported[0].startswith("one, seed 42: ")


@pytest.mark.parametrize(("over", "status"), [(1.0, 0), (1.1, 1)])
def test_the_command_writes_the_table_and_reports_missed_marks(
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
