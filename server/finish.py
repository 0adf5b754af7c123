"""The beginning and the end of a run on disk: its id, its results, its report."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import flwr

from fedge.server import report
from fedge.server.journal import Journal, RunRow
from fedge.server.run_directory import RunDirectory
from fedge.shared.arrays import NDArrays, encode
from fedge.shared.config import Config
from fedge.shared.durable import write_atomically
from fedge.shared.errors import RunError


def now() -> str:
    """The time in UTC, to the second, as the journal writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def begin(journal: Journal, directory: RunDirectory) -> RunRow:
    """The journal's run, made with a new id where there is none."""
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
    finished: str | None = None,
    model_sha256: str | None = None,
) -> None:
    """Write run.json: what the run is, who takes part, how far it has come."""
    row, last = begun(journal), journal.last()
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
                s: {"train_examples": a, "test_examples": b}
                for s, (a, b) in journal.sites().items()
            },
            "preprocessing": row.preprocessing or [],
            "flower_runs": journal.flower_runs(),
            "started": row.started,
            "finished": finished,
            "model_sha256": model_sha256,
            "fedge": version("fedge"),
            "flower": flwr.__version__,
        },
    )


def results(run_id: str, config: Config, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """metrics.json: the last evaluation, and totals over all rounds."""
    evaluated = [line for line in lines if "per_site" in line["metrics"]]
    final: dict[str, Any] = {"round": 0, "per_site": {}, "site_mean": {}, "pooled": {}}
    if evaluated:
        last = evaluated[-1]
        final = {
            "round": last["round"],
            **{k: last["metrics"][k] for k in ("per_site", "site_mean", "pooled")},
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
    """
    data = encode(arrays)
    write_atomically(directory.model, data)
    row = begun(journal)
    lines = journal.lines()
    directory.write_lines(lines)
    directory.write_json(directory.metrics, results(row.id, config, lines))
    finished = now()
    write_run(directory, journal, config, finished, hashlib.sha256(data).hexdigest())
    report.write(directory.path)
    journal.finish(finished)
