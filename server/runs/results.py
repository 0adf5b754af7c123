"""The beginning and the end of a run on disk: its id, its results, its report."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedge.server.report.page.render import write as write_report
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.journal import Journal, RunRow
from fedge.shared.config.federation import Config
from fedge.shared.errors import FedgeError, RunError
from fedge.shared.files import write_atomically
from fedge.shared.wire.tensors import NDArrays, encode

_log = logging.getLogger(__name__)


def now() -> str:
    """The time in UTC, to the second, as the journal writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def begin(journal: Journal, directory: RunDirectory) -> RunRow:
    """The journal's run; recorded with a new id where there is none."""
    if journal.run() is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d")
        journal.begin_run(
            f"r-{stamp}-{secrets.token_hex(6)}", directory.config.read_text(encoding="utf-8"), now()
        )
    return begun(journal)


def begun(journal: Journal) -> RunRow:
    """The journal's run.

    Raises:
        RunError: 504, it holds none.
    """
    row = journal.run()
    if row is None:
        raise RunError(504, "journal.db: must hold the run, got nothing")
    return row


def write_run(
    directory: RunDirectory,
    journal: Journal,
    config: Config,
    counted: Mapping[str, int],
    finished: str | None = None,
    model_sha256: str | None = None,
) -> None:
    """Write run.json: the run's identity, its sites and its progress.

    Args:
        directory: of the run.
        journal: of the run.
        config: of the run.
        counted: number of rounds in which each site's update counted, by site.
        finished: time of its end in UTC; None while it runs.
        model_sha256: of model.safetensors, once it is written.
    """
    row, last = begun(journal), journal.last()
    # Where the sites do not report their sizes the journal has 0, under secure aggregation, or 1.
    in_clear = not config.secure_aggregation.enabled
    sizes_known = in_clear and not config.privacy.hides_sites
    held_out_known = in_clear and config.privacy.tells_counts
    directory.write_json(
        directory.run,
        {
            "run": row.id,
            "state": "running" if finished is None else "finished",
            "task": config.task.name,
            "strategy": config.strategy.name,
            "rounds": config.run.rounds,
            "rounds_done": 0 if last is None else last.number,
            "sites": {
                s: {
                    "train_examples": a if sizes_known else None,
                    "test_examples": b if held_out_known else None,
                    "rounds": counted.get(s, 0),
                }
                for s, (a, b) in journal.sites().items()
            },
            "preprocessing": row.preprocessing or [],
            "flower_runs": journal.flower_runs(),
            "started": row.started,
            "finished": finished,
            "model_sha256": model_sha256,
            "fedge": version("fedge"),
            "flower": version("flwr"),
        },
    )


def rounds_counted(lines: list[dict[str, Any]]) -> Counter[str]:
    """The number of rounds in which each site's update counted."""
    return Counter(
        site for line in lines if line["outcome"] == "committed" for site in line["trained"]
    )


def results(run_id: str, config: Config, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of metrics.json: the last evaluation, and totals over all rounds.

    Args:
        run_id: fedge's id of the run.
        config: of the run.
        lines: of rounds.jsonl.
    """
    evaluated = [line for line in lines if "per_site" in line["metrics"]]
    final: dict[str, Any] = {"round": 0, "per_site": {}, "site_mean": {}, "pooled": {}}
    if evaluated:
        last = evaluated[-1]
        final = {
            "round": last["round"],
            **{k: last["metrics"][k] for k in ("per_site", "site_mean", "pooled")},
            **{k: last["metrics"][k] for k in ("noise",) if k in last["metrics"]},
        }
    return {
        "run": run_id,
        "task": config.task.name,
        "strategy": config.strategy.name,
        "rounds": len(lines),
        "final": final,
        "bytes": {way: sum(line["bytes"][way] for line in lines) for way in ("sent", "received")},
        "seconds": round(sum(line["seconds"] for line in lines), 4),
    }


def complete(directory: RunDirectory, journal: Journal, config: Config, arrays: NDArrays) -> None:
    """Write the model, the metrics and the report, then declare the run finished.

    Every file is replaced as a whole, and the declaration comes last: a kill in between repeats this function.

    Args:
        directory: of the run.
        journal: of the run.
        config: of the run.
        arrays: the final model.

    Raises:
        RunError: 503, no round has made a model.
    """
    lines = journal.lines()
    counted = rounds_counted(lines)
    # With noise of the server's a committed round may consist of noise alone.
    if not any(line["outcome"] == "committed" for line in lines):
        raise RunError(
            503, "run: must make a model in at least one round, got none; see rounds.jsonl"
        )
    data = encode(arrays)
    write_atomically(directory.model, data)
    row = begun(journal)
    directory.write_lines(lines)
    directory.write_json(directory.metrics, results(row.id, config, lines))
    if (calibrated := journal.calibration()) is not None:
        write_atomically(directory.calibration, calibrated.encode())
    finished = now()
    write_run(directory, journal, config, counted, finished, hashlib.sha256(data).hexdigest())
    write_report(directory.path)
    journal.finish(finished)


def stop(directory: RunDirectory, error: FedgeError) -> None:
    """Write stopped.json, which marks a run that must not be continued automatically, unlike one that was killed.

    It is called while an error is being reported, so its own failure is only logged.

    Args:
        directory: of the run.
        error: why the run must not be continued.
    """
    if not directory.config.is_file():
        return
    try:
        directory.write_json(
            directory.stopped, {"code": error.label, "message": error.message, "when": now()}
        )
    except OSError:
        _log.exception("stopped.json cannot be written")
    report_so_far(directory)


def report_so_far(directory: RunDirectory) -> None:
    """Write the report of a run that stops early, if it has come as far as a run.json.

    It is called while an error is being reported, so its own failure is only logged.
    """
    if not directory.run.is_file():
        return
    try:
        write_report(directory.path)
    except (FedgeError, OSError):
        _log.exception("the report of the stopped run cannot be written")


def restore(directory: RunDirectory) -> None:
    """Compare a finished run's files with its journal, and write again those that can be derived from it.

    Raises:
        RunError: 504, the model is missing or is not the one that the last round made.
    """
    journal = Journal(directory.journal)
    try:
        row, lines, calibrated = begun(journal), journal.lines(), journal.calibration()
    finally:
        journal.close()
    weights = directory.model.read_bytes() if directory.model.is_file() else b""
    if hashlib.sha256(weights).hexdigest() != lines[-1]["model_sha256"]:
        raise RunError(
            504, f"{directory.model.name}: must be what the last round made, got another"
        )
    rounds = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    if not _holds(directory.rounds, rounds):
        directory.write_lines(lines)
    metrics = results(row.id, directory.load_config(), lines)
    if not _holds(directory.metrics, json.dumps(metrics, indent=2, allow_nan=False) + "\n"):
        directory.write_json(directory.metrics, metrics)
    if calibrated is not None and not _holds(directory.calibration, calibrated):
        write_atomically(directory.calibration, calibrated.encode())
    if not directory.report.is_file():
        write_report(directory.path)


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()
