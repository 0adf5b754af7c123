"""Qualifies artefacts on this device: each in a child process, compared with the fp32 graph, and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fedge.edge.backends.backend import CPU, Array, Shapes
from fedge.edge.backends.candidates import Candidate
from fedge.edge.backends.trial import Timing, Trial, try_out
from fedge.edge.installation.record import Entry
from fedge.edge.outputs import parity
from fedge.shared.compile.tolerance import tolerance
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import OutputSchema

#: Seconds for one artefact: a GPU's first run may compile.
DEADLINE: Final = 120.0


@dataclass(frozen=True)
class Subject:
    """A candidate with its bytes.

    Attributes:
        candidate: the artefact and its place.
        data: its bytes; empty where it is refused.
        built: whether it is an engine that was built here.
    """

    candidate: Candidate
    data: bytes = b""
    built: bool = False


@dataclass(frozen=True)
class Terms:
    """What every artefact is tried with.

    Attributes:
        batches: ``(n, *input)`` of float32, one example first.
        shapes: of the network.
        output: what its logits mean.
        threads: CPU threads of one inference.
        timing: of the first batch.
    """

    batches: Sequence[Array]
    shapes: Shapes
    output: OutputSchema
    threads: int
    timing: Timing


def qualify(
    graph: Subject,
    subjects: Iterable[Subject],
    terms: Terms,
    progress: Callable[[str], None],
) -> tuple[Entry, ...]:
    """Try everything; what serves fastest comes first, what does not serve last.

    Args:
        graph: the fp32 graph on the CPU.
        subjects: all others.
        terms: what they are tried with.
        progress: is told what is being done.

    Raises:
        BundleError: 710, the fp32 graph does not run.
    """
    progress(f"trying {graph.candidate.name}")
    base = _tried(graph, terms)
    found = [(graph, _entry(graph, base, base, terms))]
    for subject in subjects:
        if subject.candidate.refused:
            found.append((subject, _left_out(subject, subject.candidate.refused)))
            continue
        progress(f"trying {subject.candidate.name}")
        found.append((subject, _qualified(subject, base, terms)))
    qualified = [subject for subject, entry in found if entry.qualified]
    if len(qualified) == 1:
        return ranked([entry for _, entry in found])
    # Once more: whatever else the device was doing may have slowed one of them down and not another.
    again = []
    for subject, entry in found:
        if subject in qualified:
            progress(f"timing {subject.candidate.name} again")
            entry = _faster(entry, _qualified(subject, base, terms))
        again.append(entry)
    return ranked(again)


def ranked(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """By median time; what is right but no faster than the fp32 graph on the CPU does not serve."""
    last = next(entry for entry in entries if entry.candidate.last_resort)
    fast = sorted(
        (e for e in entries if e.qualified and e is not last and _time(e) < _time(last)),
        key=_time,
    )
    told = [replace(e, reason=_place(n)) for n, e in enumerate([*fast, last])]
    slow = [
        replace(e, qualified=False, reason=f"right, but no faster than {last.candidate.name}")
        for e in entries
        if e.qualified and e is not last and e not in fast
    ]
    return (*told, *slow, *(e for e in entries if not e.qualified))


def _qualified(subject: Subject, base: Trial, terms: Terms) -> Entry:
    try:
        return _entry(subject, _tried(subject, terms), base, terms)
    except BundleError as error:
        return _left_out(subject, f"{error.label} {error.message}")


def _faster(first: Entry, second: Entry) -> Entry:
    """The faster of two trials; the one that failed, if one did."""
    if not second.qualified:
        return second
    return min(first, second, key=_time)


def _place(number: int) -> str:
    return "serves" if number == 0 else "stands by"


def _time(entry: Entry) -> float:
    return float("inf") if entry.p50_ms is None else entry.p50_ms


def _tried(subject: Subject, terms: Terms) -> Trial:
    return try_out(
        subject.candidate,
        subject.data,
        terms.batches,
        terms.shapes,
        threads=terms.threads,
        deadline=DEADLINE,
        timing=terms.timing,
    )


def _entry(subject: Subject, trial: Trial, base: Trial, terms: Terms) -> Entry:
    artefact, place = subject.candidate.artefact, subject.candidate.place
    name = subject.candidate.name
    found = parity.difference(trial.logits, base.logits, terms.output, name)
    reason = parity.obstacle(artefact.kind, found)
    return Entry(
        artefact=artefact,
        place=place,
        built=subject.built,
        qualified=not reason,
        reason=reason,
        p50_ms=trial.p50_ms,
        p99_ms=trial.p99_ms,
        peak_rss_mb=round(trial.peak_rss_mb, 1),
        max_abs_difference=found.max_abs_difference,
        tolerance=tolerance(artefact.kind, found.largest_logit),
        agreement=found.agreement,
    )


def _left_out(subject: Subject, reason: str) -> Entry:
    candidate = subject.candidate
    return Entry(candidate.artefact, candidate.place or CPU, subject.built, False, reason)
