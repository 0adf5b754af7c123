"""A sweep's runs: what each is of, what is kept when it is continued, and where its epsilons are from."""

from __future__ import annotations

import json
import tomllib

import pytest

from fedge.client.settings.privacy_policy import simulated
from fedge.server.runs.directory import RunDirectory, state_of
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.simulations import sweep

DELTA = 1e-5


def tree(mechanism="example", privacy=None, **sections):
    found = {
        "task": {"name": "digits"},
        "run": {"rounds": 2, "seed": 7},
        "sites": {"count": 4},
        "data": {"partition": "iid"},
        "train": {"local-steps": 1, "batch-size": 16},
        "privacy": {"mechanism": mechanism, **(privacy or {})},
        **sections,
    }
    if mechanism == "distributed":
        found |= {"secure-aggregation": {"enabled": True, "min-sites": 4}}
    return found


def no_progress(part, done, total):
    pass


def run(tree_, folder, multipliers=(1.0, 4.0), seeds=1, progress=no_progress):
    return sweep.run(sweep.jobs(tree_, multipliers, seeds), folder, DELTA, progress)


def test_the_jobs_are_one_without_noise_and_each_multiplier_with_each_seed():
    source = tree(privacy={"noise-multiplier": 9.0, "metrics": "noised", "metrics-noise-multiplier": 3.0})  # fmt: skip
    found = sweep.jobs(source, [0.5, 1.0], 2)
    assert [job.name for job in found] == [
        "baseline", "noise-0.5-seed-7", "noise-0.5-seed-8", "noise-1-seed-7", "noise-1-seed-8",
    ]  # fmt: skip
    assert found[0].config.privacy.mechanism == "off"
    assert found[0].config.run.seed == 7
    for job in found[1:]:
        assert job.config.privacy.mechanism == "example"
        assert job.config.privacy.noise_multiplier == job.noise_multiplier
        assert job.config.privacy.metrics == "unprotected"
        assert job.config.run.seed == int(job.name[-1])
    assert source["privacy"]["noise-multiplier"] == 9.0


def test_a_multiplier_that_the_configuration_refuses_is_reported_before_anything_runs():
    source = tree("central", {"clipping-quantile": 0.5, "count-noise-multiplier": 1.0})
    sweep.jobs(source, [0.5, 1.0], 1)
    with pytest.raises(ConfigError, match="count-noise-multiplier must be above half") as caught:
        sweep.jobs(source, [0.5, 4.0], 1)
    assert caught.value.code == 201


def test_the_base_is_the_configuration_less_the_noise_and_gives_the_same_jobs():
    found = sweep.jobs(tree(), [0.5, 1.0], 2)
    base = tomllib.loads(sweep.base_of(found[1].config))
    assert "noise-multiplier" not in base["privacy"]
    assert base["run"]["seed"] == 7
    assert sweep.jobs(base, [0.5, 1.0], 2) == found


@pytest.mark.slow
def test_epsilon_is_the_runs_own_and_falls_with_the_noise(tmp_path):
    found = sweep.to_json(run(tree(), tmp_path), DELTA)
    low, high = found["points"]
    assert low["epsilon"]["consumers"] > 2 * high["epsilon"]["consumers"] > 0
    assert (found["delta"], found["unit"], found["metric"]) == (DELTA, "example", "accuracy")
    assert simulated().delta == DELTA
    for point in found["points"]:
        (trial,) = point["runs"]
        folder = tmp_path / "runs" / trial["run"]
        last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
        for adversary in ("consumers", "server"):
            largest = max(site[adversary] for site in last["privacy"].values())
            assert (
                point["epsilon"][adversary] == trial["epsilon"][adversary] == pytest.approx(largest)
            )
        rate = 16 / min(last["examples"].values())
        assert largest == pytest.approx(
            epsilon([Release(point["noise_multiplier"], rate, 2)], DELTA)
        )
        final = json.loads((folder / "metrics.json").read_text())
        assert trial["value"] == final["final"]["pooled"]["accuracy"]
        assert trial["id"] == final["run"]
    base = RunDirectory(tmp_path / "runs" / "baseline")
    assert found["baseline"]["value"] is not None
    assert not list(base.sites.glob(f"*/{FILE}"))


@pytest.mark.slow
def test_another_delta_gives_another_epsilon_of_the_same_runs(tmp_path):
    jobs = sweep.jobs(tree(run={"rounds": 1}), [1.0], 1)
    (_, strict), (_, loose) = (sweep.run(jobs, tmp_path, d, no_progress) for d in (1e-8, 1e-3))
    assert strict.id == loose.id
    assert strict.epsilon[0] > 1.5 * loose.epsilon[0] > 0


def test_a_point_is_the_mean_of_its_seeds_and_a_seed_that_failed_has_no_part_in_it():
    jobs = sweep.jobs(tree(), [1.0], 3)
    outcomes = [
        sweep.Outcome(jobs[0], "r", 0.9),
        sweep.Outcome(jobs[1], "a", 0.5, (2.0, 3.0)),
        sweep.Outcome(jobs[2], "b", 0.75, (2.5, 2.5)),
        sweep.Outcome(jobs[3], problem="FE-503 no"),
    ]
    found = sweep.to_json(outcomes, DELTA)
    (point,) = found["points"]
    assert (point["mean"], point["lowest"], point["highest"]) == (0.625, 0.5, 0.75)
    assert point["epsilon"] == {"consumers": 2.5, "server": 3.0}
    assert [r["problem"] for r in point["runs"]] == [None, None, "FE-503 no"]
    assert found["seeds"] == [7, 8, 9]


def test_what_nothing_bounds_is_null_and_no_number_that_json_lacks():
    jobs = sweep.jobs(tree("central"), [1.0, 2.0], 1)
    infinite = float("inf")
    outcomes = [
        sweep.Outcome(jobs[0], "r", 0.9),
        sweep.Outcome(jobs[1], "a", 0.5, (2.0, infinite)),
        sweep.Outcome(jobs[2], problem="FE-503 no"),
    ]
    found = sweep.to_json(outcomes, DELTA)
    assert found["points"][0]["epsilon"] == {"consumers": 2.0, "server": None}
    assert found["points"][1]["epsilon"] == {"consumers": None, "server": None}
    assert found["points"][1]["mean"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_an_interrupted_sweep_keeps_finished_runs_and_repeats_the_rest(tmp_path):
    def interrupt(part, done, total):
        if part.startswith("noise-4") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tree(), tmp_path, progress=interrupt)
    runs = tmp_path / "runs"
    assert [state_of(runs / n) for n in ("baseline", "noise-1-seed-7", "noise-4-seed-7")] == [
        "finished", "finished", "unfinished",
    ]  # fmt: skip
    ids = {
        n: json.loads((runs / n / "run.json").read_text())["run"] for n in ("baseline", "noise-1-seed-7")
    }  # fmt: skip
    half = json.loads((runs / "noise-4-seed-7" / "run.json").read_text())
    assert half["rounds_done"] == 1
    parts = []
    outcomes = run(tree(), tmp_path, progress=lambda part, done, total: parts.append(part))
    assert {o.job.name: o.id for o in outcomes[:2]} == ids
    assert dict.fromkeys(parts) == dict.fromkeys(
        ["baseline (1 of 3), kept", "noise-1-seed-7 (2 of 3), kept", "noise-4-seed-7 (3 of 3)"]
    )
    # A round that is done again may be charged again; a run that begins again has one charge a round in any case.
    assert outcomes[2].id != half["run"]
    for path in (runs / "noise-4-seed-7" / "sites").glob(f"*/{FILE}"):
        assert [e.charge.server_round for e in Ledger(path).entries()] == [1, 2]
    assert all(o.value is not None for o in outcomes)


@pytest.mark.slow
def test_a_run_that_fails_is_listed_and_the_others_go_on(tmp_path):
    # So little noise does not fit the grid of a secure sum.
    source = tree("distributed")
    outcomes = run(source, tmp_path, multipliers=(0.001, 1.0))
    baseline, failed, noised = outcomes
    assert failed.problem.startswith("FE-211 privacy: noise of one site")
    assert (failed.value, failed.epsilon) == (None, None)
    assert baseline.value is not None
    assert noised.value is not None
    # Under secure aggregation no site reports what it has spent; its ledger has it.
    lines = (tmp_path / "runs" / "noise-1-seed-7" / "rounds.jsonl").read_text()
    assert '"privacy":' not in lines
    assert noised.epsilon == pytest.approx((epsilon([Release(1.0, 1.0, 2)], DELTA),) * 2)
    found = sweep.to_json(outcomes, DELTA)
    sweep.attach_to_runs(outcomes, found, tmp_path)
    for name in ("baseline", "noise-1-seed-7"):
        folder = tmp_path / "runs" / name
        assert json.loads((folder / "sweep.json").read_text()) == found
        assert "Accuracy against epsilon" in (folder / "report.html").read_text()
    # Once the cause is fixed, only failed runs are repeated.
    again = run(source, tmp_path, multipliers=(1.0,))
    assert [o.id for o in again] == [baseline.id, noised.id]


@pytest.mark.slow
def test_a_finished_run_that_was_damaged_is_listed_and_not_believed(tmp_path):
    run(tree(run={"rounds": 1}), tmp_path, multipliers=(1.0,))
    model = tmp_path / "runs" / "noise-1-seed-42" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    _, found = run(tree(run={"rounds": 1}), tmp_path, multipliers=(1.0,))
    assert found.problem.startswith("FE-504 ")
