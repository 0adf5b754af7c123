"""A run directory read into plain values for the report: bounded, finite, and lenient about missing data.

A run that is still going, or that was killed while a line was being written, reads like any other; what cannot
be read is named in ``notes`` rather than stopping the report.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedge.server.report.format import natural, plain
from fedge.server.report.json_values import mapping, number, numbers, sequence, text, whole
from fedge.server.report.records import Refusal, Round, Run, Site
from fedge.shared.errors import ConfigError

#: Largest size of rounds.jsonl and of any other file that is read, in bytes.
MAX_ROUNDS_BYTES: Final = 256 * 2**20
MAX_FILE_BYTES: Final = 16 * 2**20


def _epsilons(value: Any) -> dict[str, float]:
    """Epsilon that a site reports, by adversary; null stands for infinity, which only the server's may be."""
    unbounded = "server" in mapping(value) and value["server"] is None
    return numbers(value) | ({"server": math.inf} if unbounded else {})


def _total(parts: list[float | None]) -> float | None:
    measured = [p for p in parts if p is not None]
    return sum(measured) if measured else None


def _read(path: Path, limit: int, notes: list[str]) -> str:
    """The file's text, empty where it is missing; a file that is too large is named in ``notes``."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}).")
        return ""
    if len(data) > limit:
        notes.append(
            f"{path.name} is larger than {limit // 2**20} MiB; only its beginning was read."
        )
        data = data[:limit]
    return data.decode("utf-8", errors="replace")


def _read_json(path: Path, notes: list[str]) -> Mapping[str, Any]:
    content = _read(path, MAX_FILE_BYTES, notes)
    if not content:
        return {}
    try:
        return mapping(json.loads(content))
    except (ValueError, RecursionError):
        notes.append(f"{path.name} does not parse and is left out.")
        return {}


def _refusals(line: Mapping[str, Any], key: str, round_number: int) -> tuple[Refusal, ...]:
    refusals = []
    for item in map(mapping, sequence(line.get(key))):
        reason = text(item.get("reason"))
        if key == "dropped":
            metric = text(item.get("metric"))
            reason = f"{metric}: {reason}" if metric and reason else metric or reason
        refusals.append(
            Refusal(
                round=round_number,
                site=text(item.get("site")),
                code=text(item.get("code")),
                outcome="metric dropped"
                if key == "dropped"
                else text(item.get("outcome")) or "rejected",
                reason=reason,
            )
        )
    return tuple(refusals)


def parse_round(line: Mapping[str, Any]) -> Round | None:
    """A line of rounds.jsonl, or None where it names no round."""
    round_number = whole(line.get("round"))
    if round_number is None:
        return None
    metrics, moved = mapping(line.get("metrics")), mapping(line.get("bytes"))
    return Round(
        number=round_number,
        committed=line.get("outcome") == "committed",
        reason=text(line.get("reason")),
        invited=frozenset(s for s in sequence(line.get("invited")) if isinstance(s, str)),
        trained=frozenset(s for s in sequence(line.get("trained")) if isinstance(s, str)),
        rejected=_refusals(line, "rejected", round_number),
        dropped=_refusals(line, "dropped", round_number),
        examples={s: int(n) for s, n in numbers(line.get("examples")).items()},
        train=numbers(metrics.get("train")),
        per_site={s: numbers(v) for s, v in mapping(metrics.get("per_site")).items()},
        site_mean=numbers(metrics.get("site_mean")),
        pooled=numbers(metrics.get("pooled")),
        seconds=number(line.get("seconds")),
        sent=number(moved.get("sent")),
        received=number(moved.get("received")),
        secure=mapping(line.get("secure")),
        privacy={s: _epsilons(v) for s, v in mapping(line.get("privacy")).items()},
        central=mapping(line.get("central")),
        masked_epsilon=mapping(line.get("masked_epsilon")),
        noise=mapping(metrics.get("noise")),
    )


def _read_rounds(path: Path, notes: list[str]) -> tuple[Round, ...]:
    """Every round once, in order; the last line of a round counts, and a line that does not parse is skipped."""
    rounds: dict[int, Round] = {}
    lines = _read(path, MAX_ROUNDS_BYTES, notes).splitlines()
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            parsed = parse_round(mapping(json.loads(line)))
        except (ValueError, RecursionError):
            parsed = None
        if parsed is not None:
            rounds[parsed.number] = parsed
        elif index < len(lines) - 1:  # the last may still be in the writing
            notes.append(f"{path.name}, line {index + 1} does not parse and is left out.")
    return tuple(rounds[n] for n in sorted(rounds))


def _uses_secure_aggregation(config: str) -> bool:
    """Whether a configuration enables secure aggregation."""
    try:
        section = mapping(tomllib.loads(config).get("secure-aggregation"))
    except tomllib.TOMLDecodeError:
        return False
    return section.get("enabled") is True


def read(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: 209, there is no run.json that parses.
    """
    notes: list[str] = []
    head = _read_json(run_dir / "run.json", notes)
    if not head:
        raise ConfigError(209, f"{run_dir}: must hold a run.json, as `fedge simulate` writes it")
    rounds = _read_rounds(run_dir / "rounds.jsonl", notes)
    totals = _read_json(run_dir / "metrics.json", notes)
    stopped = _read_json(run_dir / "stopped.json", notes)
    final = mapping(totals.get("final"))
    if not final:  # a run that goes on: what was measured last
        last = next((r for r in reversed(rounds) if r.site_mean or r.pooled or r.per_site), None)
        if last is not None:
            final = {"round": last.number, "per_site": last.per_site, "site_mean": last.site_mean}
            final |= {"pooled": last.pooled, "noise": last.noise}
    config = _read(run_dir / "config.toml", MAX_FILE_BYTES, notes)
    masked = _uses_secure_aggregation(config) or any(r.secure for r in rounds)
    sites = {
        name: Site(
            *(whole(mapping(v).get(k)) for k in ("train_examples", "test_examples", "rounds"))
        )
        for name, v in mapping(head.get("sites")).items()
    }
    if masked:  # the zeros of run.json stand for what the server does not know
        sites = {name: Site(rounds=site.rounds) for name, site in sites.items()}
    for r in rounds:
        for name in (*r.invited, *r.trained, *r.per_site):
            sites.setdefault(name, Site())
    moved = mapping(totals.get("bytes"))
    done = max((r.number for r in rounds), default=0)
    seconds = number(totals.get("seconds"))
    sent, received = number(moved.get("sent")), number(moved.get("received"))
    return Run(
        name=text(head.get("run")) or run_dir.name,
        finished=head.get("state") == "finished",
        task=text(head.get("task")) or text(totals.get("task")) or "a task",
        strategy=text(head.get("strategy")) or text(totals.get("strategy")) or "a strategy",
        planned=max(whole(head.get("rounds")) or 0, done),
        sites={name: sites[name] for name in sorted(sites, key=natural)},
        started=text(head.get("started")),
        ended=text(head.get("finished")),
        model_sha256=text(head.get("model_sha256")),
        versions={
            name: text(head.get(name)) for name in ("fedge", "flower") if text(head.get(name))
        },
        preprocessing=tuple(sequence(head.get("preprocessing"))),
        rounds=rounds,
        final_round=whole(final.get("round")) or done,
        per_site={s: numbers(v) for s, v in mapping(final.get("per_site")).items()},
        site_mean=numbers(final.get("site_mean")),
        pooled=numbers(final.get("pooled")),
        seconds=seconds if seconds is not None else _total([r.seconds for r in rounds]),
        sent=sent if sent is not None else _total([r.sent for r in rounds]),
        received=received if received is not None else _total([r.received for r in rounds]),
        config=config,
        release=_read_json(run_dir / "release.json", notes),
        edge=_read_json(run_dir / "edge.json", notes),
        stopped=" ".join(x for x in (text(stopped.get(k)) for k in ("code", "message")) if x),
        masked=masked,
        seen=_read_json(run_dir / "seen.json", notes) if masked else {},
        sweep=_read_json(run_dir / "sweep.json", notes),
        noise=mapping(final.get("noise")),
        compiled=_read_json(run_dir / "compile.json", notes),
        # Last, when every file has been read.
        notes=tuple(plain(n) for n in notes),
    )
