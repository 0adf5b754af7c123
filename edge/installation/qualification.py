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
from fedge.shared.bundle.tolerance import tolerance
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
    """Inputs and limits of every trial.

    Attributes:
        batches: ``(n, *input)`` of float32, one example first.
        shapes: of the network.
        output: meaning of its logits.
        threads: CPU threads of one inference.
        timing: limits for timing the first batch.
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
    """Try every artefact and rank the results: the fastest first, unqualified ones last.

    Args:
        graph: the fp32 graph on the CPU.
        subjects: all others.
        terms: inputs and limits of the trials.
        progress: called with a line of text for each step.

    Raises:
        BundleError: 710, the fp32 graph does not run.
    """
    progress(f"trying {graph.candidate.name}")
    base = _tried(graph, terms)
    results = [(graph, _entry(graph, base, base, terms))]
    for subject in subjects:
        if subject.candidate.refused:
            results.append((subject, _left_out(subject, subject.candidate.refused)))
            continue
        progress(f"trying {subject.candidate.name}")
        results.append((subject, _qualified(subject, base, terms)))
    qualified = [subject for subject, entry in results if entry.qualified]
    if len(qualified) == 1:
        return ranked([entry for _, entry in results])
    # Timed twice: other load on the device may have slowed down only one of them.
    again = []
    for subject, entry in results:
        if subject in qualified:
            progress(f"timing {subject.candidate.name} again")
            entry = _faster(entry, _qualified(subject, base, terms))
        again.append(entry)
    return ranked(again)


def ranked(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Rank by median time; a correct artefact that is no faster than the fp32 graph on the CPU is not qualified."""
    last = next(entry for entry in entries if entry.candidate.last_resort)
    fast = sorted(
        (e for e in entries if e.qualified and e is not last and _time(e) < _time(last)),
        key=_time,
    )
    serving = [replace(e, reason=_place(n)) for n, e in enumerate([*fast, last])]
    slow = [
        replace(e, qualified=False, reason=f"right, but no faster than {last.candidate.name}")
        for e in entries
        if e.qualified and e is not last and e not in fast
    ]
    return (*serving, *slow, *(e for e in entries if not e.qualified))


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
    diff = parity.difference(trial.logits, base.logits, terms.output, name)
    reason = parity.obstacle(artefact.kind, diff)
    return Entry(
        artefact=artefact,
        place=place,
        built=subject.built,
        qualified=not reason,
        reason=reason,
        p50_ms=trial.p50_ms,
        p99_ms=trial.p99_ms,
        peak_rss_mb=round(trial.peak_rss_mb, 1),
        max_abs_difference=diff.max_abs_difference,
        tolerance=tolerance(artefact.kind, diff.largest_logit),
        agreement=diff.agreement,
    )


def _left_out(subject: Subject, reason: str) -> Entry:
    candidate = subject.candidate
    return Entry(candidate.artefact, candidate.place or CPU, subject.built, False, reason)
