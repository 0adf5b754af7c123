"""Whole runs with a calibration: equal to a central one, under secure aggregation, with noise, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnxruntime
import pytest
from flwr.app import Message
from onnxruntime.quantization.calibrate import create_calibrator

from fedge.client.data.dataset import site_shares
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.listener import NullListener
from fedge.shared import protocol
from fedge.shared.bundle import onnx_session
from fedge.shared.bundle.manifest_artefacts import ONNX_FP16, ONNX_FP32, ONNX_INT8, ONNX_KINDS
from fedge.shared.compile import calibration, candidates, ranges
from fedge.shared.compile.activation_observer import observed
from fedge.shared.compile.calibration import Calibration
from fedge.shared.config.federation import Config
from fedge.shared.preprocessing import steps
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import tensors
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid
from fedge.simulations.terminal.summary import summary_table


def config(count: int = 2, **sections: Any) -> Config:
    own = {"run": {"rounds": 1}, "sites": {"count": count}, "data": {"partition": "iid"}}
    own["calibration"] = {"enabled": True, "examples": 65_536}
    return builders.config(**{**own, **sections})


def load(run: Path) -> Calibration:
    return calibration.load(run / "calibration.json")


def last_line(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    return found


def central_bins(run: Path, run_config: Config) -> dict[str, tuple[float, float]]:
    """The quantile of the same bins, over the training examples of all sites together."""
    task = get_task(run_config.task.name)
    shares = site_shares(run_config, task).values()
    x = np.concatenate([steps.apply(task.preprocessing, s.train_features) for s in shares])
    onnx = candidates.fp32(task, tensors.read(run / "model.safetensors"), x.shape[1:])
    names = candidates.tensors(onnx)
    both = onnx_session.run(observed(onnx, names), x, batch=1, optimised=False, threads=1)
    counts = ranges.histogram(both.reshape(len(x), 2, -1).transpose(0, 2, 1).astype(np.float64))
    section = run_config.calibration
    ends = ranges.from_histograms(counts.astype(float), section.bound, quantile=section.quantile)
    return {name: (float(low), float(high)) for name, (low, high) in zip(names, ends, strict=True)}


def central(run: Path, run_config: Config, folder: Path) -> dict[str, tuple[float, float]]:
    """What ONNX Runtime's own calibrator finds over the training examples of all sites together."""
    task = get_task(run_config.task.name)
    shares = site_shares(run_config, task).values()
    x = np.concatenate([steps.apply(task.preprocessing, s.train_features) for s in shares])
    onnx = candidates.fp32(task, tensors.read(run / "model.safetensors"), x.shape[1:])
    (folder / "model.onnx").write_bytes(onnx)
    # Else it writes the results to its own log.
    onnxruntime.set_default_logger_severity(4)
    calibrator = create_calibrator(
        folder / "model.onnx", augmented_model_path=str(folder / "augmented.onnx")
    )
    rows = iter(x)

    class Reader:
        def get_next(self) -> dict[str, Any] | None:
            row = next(rows, None)
            return None if row is None else {"input": row[None]}

    calibrator.collect_data(Reader())
    found = calibrator.compute_data()
    return {
        name: tuple(float(v.item()) for v in found[name].range_value)
        for name in candidates.tensors(onnx)
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(config(), tmp_path_factory.mktemp("plain") / "run").path


@pytest.mark.slow
def test_merged_ranges_are_exactly_those_of_a_central_calibration(
    plain: Path, tmp_path: Path
) -> None:
    found = load(plain)
    assert found.ranges == central(plain, config(), tmp_path)
    assert (found.mode, found.sites) == ("exact", ("site-1", "site-2"))
    assert found.examples == sum(last_line(plain)["examples"].values())
    assert (found.reason, found.absent, found.clipped) == ("", (), ())
    assert found.model_sha256 == last_line(plain)["model_sha256"]


def test_each_candidate_is_scored_on_the_held_out_examples(plain: Path) -> None:
    found, line = load(plain), last_line(plain)
    assert set(found.candidates) == set(ONNX_KINDS)
    fp32 = found.candidates[ONNX_FP32]
    assert fp32.sha256 == found.graph_sha256
    assert fp32.metrics == pytest.approx(line["metrics"]["pooled"], rel=1e-5)
    for kind, counted in found.candidates.items():
        assert (counted.sites, counted.num_examples) == (2, fp32.num_examples)
        assert counted.metrics["loss"] == pytest.approx(fp32.metrics["loss"], rel=0.02), kind
        assert counted.reference == fp32.metrics
    reported = line["calibration"]
    assert (reported["mode"], reported["sites"], reported["ranges"]) == ("exact", 2, True)
    assert reported["candidates"] == sorted(ONNX_KINDS)
    metrics = json.loads((plain / "metrics.json").read_text())
    assert "calibrated over 2 sites" in summary_table(metrics, [line])


class Interrupts(NullListener):
    """As if killed after the last commit, before any site is asked about the model."""

    def round(self, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_ended_before_it_was_calibrated_goes_on_there(
    plain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate(config(), run, listener=Interrupts())
    assert not (run / "calibration.json").exists()
    assert not (run / "model.safetensors").exists()
    simulate(config(), run, resume=True)
    assert replace(load(run), run="") == replace(load(plain), run="")
    assert (run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    # A finished run's file is made again from the journal.
    written = (run / "calibration.json").read_bytes()
    (run / "calibration.json").unlink()
    simulate(config(), run, resume=True)
    assert (run / "calibration.json").read_bytes() == written


class Altered(InProcessGrid):
    """A grid on which requests are altered: ``alter(site, kind, config record)``."""

    def __init__(self, alter: Callable[[str, str, Any], None], *more: Any) -> None:
        super().__init__(*more)
        self.alter, self.sites = alter, dict(more[0])

    def _answer(self, message_id: str, message: Message) -> Message:
        site, kind = self.sites[message.metadata.dst_node_id], message.metadata.message_type
        before = message.content[protocol.CONFIG].copy()
        self.alter(site, kind, message.content[protocol.CONFIG])
        reply = super()._answer(message_id, message)
        # Sites share a request's content.
        message.content[protocol.CONFIG] = before
        return reply


def altered(alter: Callable[[str, str, Any], None]) -> Any:
    return lambda sites, app, number: Altered(alter, sites, app, number)


@pytest.mark.slow
def test_sites_that_speak_of_other_bytes_are_left_out_by_number(tmp_path: Path) -> None:
    kinds: list[str] = []

    def alter(site: str, kind: str, record: Any) -> None:
        kinds.append(kind)
        if kind == protocol.CALIBRATE and site == "site-2":
            record[protocol.GRAPH] = "0" * 64
        if kind == protocol.QUALIFY and site == "site-3":
            at = record[protocol.CANDIDATES].index(ONNX_INT8)
            record[protocol.CANDIDATE_DIGESTS][at] = "0" * 64
        if kind == protocol.QUALIFY and site == "site-1":
            record[protocol.CANDIDATES] = ["onnx-int2"] * len(record[protocol.CANDIDATES])

    run_config = config(3, calibration={"enabled": True, "bound": 2.0})
    run = simulate(run_config, tmp_path / "run", grid=altered(alter)).path
    found = load(run)
    assert found.sites == found.clipped == ("site-1", "site-3")
    assert found.ranges is not None
    assert max(high for _, high in found.ranges.values()) == 2.0
    reported = {(a.site, a.of): (a.code, a.reason) for a in found.absent}
    assert reported.keys() == {
        ("site-2", "ranges"),
        ("site-3", ONNX_INT8),
        ("site-1", "candidates"),
    }
    assert "FE-429" in reported["site-2", "ranges"][1]
    assert reported["site-3", ONNX_INT8][0] == 413
    assert "FE-414" in reported["site-1", "candidates"][1]
    assert {k: c.sites for k, c in found.candidates.items()} == {
        kind: 1 if kind == ONNX_INT8 else 2 for kind in ONNX_KINDS
    }
    # One site's INT8 graph is beside that site's fp32 graph, and not beside both sites'.
    fp32, int8 = found.candidates[ONNX_FP32], found.candidates[ONNX_INT8]
    assert fp32.reference == fp32.metrics == found.candidates[ONNX_FP16].reference
    assert int8.reference["loss"] != fp32.metrics["loss"]
    assert int8.metrics["loss"] == pytest.approx(int8.reference["loss"], rel=0.05)
    assert kinds.count(protocol.CALIBRATE) == kinds.count(protocol.QUALIFY) == 3


@pytest.mark.slow
def test_without_ranges_the_run_finishes_and_says_why(tmp_path: Path) -> None:
    def alter(site: str, kind: str, record: Any) -> None:
        if kind == protocol.CALIBRATE:
            record[protocol.GRAPH] = "0" * 64

    run = simulate(config(), tmp_path / "run", grid=altered(alter)).path
    found = load(run)
    assert found.ranges is None
    assert "no ranges: no site's count" in found.reason
    assert set(found.candidates) == {ONNX_FP32, ONNX_FP16}
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert "not calibrated" in summary_table(
        json.loads((run / "metrics.json").read_text()), [last_line(run)]
    )


MASKS = {"enabled": True, "min-sites": 3}


@pytest.mark.slow
def test_a_quantile_under_secure_aggregation_is_that_of_a_central_calibration_over_the_same_bins(
    tmp_path: Path,
) -> None:
    own = {"enabled": True, "examples": 65_536, "quantile": 0.97}
    run_config = config(3, calibration=own, **{"secure-aggregation": MASKS})
    run = simulate(run_config, tmp_path / "run").path
    found = load(run)
    assert found.ranges == central_bins(run, run_config)
    widest = central_bins(run, config(3))
    tighter = [name for name, ends in found.ranges.items() if ends != widest[name]]
    assert tighter
    assert all(
        widest[n][0] <= found.ranges[n][0] <= found.ranges[n][1] <= widest[n][1] for n in tighter
    )


@pytest.mark.slow
def test_under_secure_aggregation_no_range_is_tighter_and_none_more_than_a_bin_wider(
    tmp_path: Path,
) -> None:
    run_config = config(3, **{"secure-aggregation": MASKS})
    run = simulate(run_config, tmp_path / "run").path
    found = load(run)
    true = central(run, run_config, tmp_path)
    assert (found.mode, found.examples) == ("histogram", 1347)
    assert found.ranges is not None
    assert found.ranges.keys() == true.keys()
    assert found.ranges == central_bins(run, run_config)
    for name, (low, high) in found.ranges.items():
        for reported, true_end in ((-low, -true[name][0]), (high, true[name][1])):
            assert reported >= max(true_end, 0.0)
            assert (
                reported <= max(true_end, 2.0**-14) * 2**0.5 * (1 + 1e-12)
                or true_end <= 0 == reported
            )
    assert {k: c.sites for k, c in found.candidates.items()} == dict.fromkeys(ONNX_KINDS, 3)
    pooled = last_line(run)["metrics"]["pooled"]
    assert found.candidates[ONNX_FP32].metrics == pytest.approx(pooled, rel=1e-5)
    for counted in found.candidates.values():
        assert counted.reference == found.candidates[ONNX_FP32].metrics


@pytest.mark.slow
def test_with_noise_ranges_and_scores_are_charged_as_releases_of_their_own(tmp_path: Path) -> None:
    section = {
        "mechanism": "example",
        "noise-multiplier": 1.0,
        "metrics": "noised",
        "metrics-noise-multiplier": 1.0,
    }
    run = simulate(config(privacy=section), tmp_path / "run").path
    found, line = load(run), last_line(run)
    assert (found.mode, found.examples) == ("noised", None)
    assert found.ranges is not None
    assert found.ranges["input"] == (0.0, 1.0)
    for site in ("site-1", "site-2"):
        ledger = Ledger(RunDirectory(run).sites / site / FILE)
        charges = [entry.charge for entry in ledger.entries()]
        assert [c.purpose for c in charges] == ["train", "evaluate", "calibrate", "qualify"]
        spent = epsilon([c.release for c in charges], 1e-5)
        # What the last round's line says is with these two.
        assert line["privacy"][site]["server"] == pytest.approx(spent, abs=1e-6)
        assert line["privacy_ledgers"][site] == ledger.digest("default")
        assert [c.release for c in charges[1:]] == [Release(1.0)] * 3
    fp32 = found.candidates[ONNX_FP32]
    # Two counters of each of four candidates: of two sites the root of 2 * 8.
    assert fp32.noise["accuracy"] == pytest.approx(4 / fp32.counters["examples"], rel=0.1)
    assert "loss" not in fp32.metrics
    assert all(counted.reference == {} for counted in found.candidates.values())


@pytest.mark.slow
def test_noise_of_few_whole_sites_leaves_no_ranges_and_the_reason_is_reported(
    tmp_path: Path,
) -> None:
    section = {
        "mechanism": "distributed",
        "noise-multiplier": 1.0,
        "metrics": "noised",
        "metrics-noise-multiplier": 1.0,
    }
    run_config = config(3, privacy=section, **{"secure-aggregation": MASKS})
    run = simulate(run_config, tmp_path / "run").path
    found, line = load(run), last_line(run)
    assert found.ranges is None
    assert "sites to stand above the noise, got none" in found.reason
    assert set(found.candidates) == {ONNX_FP32, ONNX_FP16}
    # Noise leaves nothing of a share of three sites.
    assert found.candidates[ONNX_FP32].metrics == {}
    reported = line["masked_epsilon"]
    assert (reported["updates"], reported["evaluations"]) == (1, 3)
    spent = epsilon([Release(1.0, steps=4)], 1e-5)
    assert reported["consumers"] == pytest.approx(spent)
    entries = Ledger(RunDirectory(run).sites / "site-1" / FILE).entries()
    assert [e.charge.purpose for e in entries] == ["train", "evaluate", "calibrate", "qualify"]


def test_a_run_without_the_section_asks_nothing_and_has_the_same_model(
    plain: Path, tmp_path: Path
) -> None:
    kinds: set[str] = set()

    def note(site: str, kind: str, record: Any) -> None:
        kinds.add(kind)
        assert protocol.CALIBRATION not in record

    run_config = config(calibration={"enabled": False})
    run = simulate(run_config, tmp_path / "run", grid=altered(note)).path
    assert kinds == {protocol.REGISTER, protocol.TRAIN, protocol.EVALUATE}
    assert not (run / "calibration.json").exists()
    assert "calibration" not in last_line(run)
    assert (run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    keys = ("metrics", "bytes", "examples")
    assert {k: last_line(run)[k] for k in keys} == {k: last_line(plain)[k] for k in keys}
