"""Records of a run, a round and a site, as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Site:
    """A registered site; None for what run.json does not hold.

    Attributes:
        train_examples, test_examples: as registered.
        rounds: number of rounds in which its update counted.
    """

    train_examples: int | None = None
    test_examples: int | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Refusal:
    """A reply that did not count, or a metric that was dropped (then ``outcome`` is ``metric dropped``)."""

    round: int
    site: str
    code: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of rounds.jsonl. Metrics are finite; those that were not measured are missing.

    Attributes:
        secure: the line's record of a secure sum, unparsed.
        privacy: epsilon that each site reports as spent, by adversary; infinite where nothing bounds what the server
            learns.
        central: the line's record of noise that the server added, unparsed.
        masked_epsilon: epsilon of distributed noise under secure aggregation, unparsed.
        noise: standard deviations of the noise on the metrics, unparsed.
    """

    number: int
    committed: bool
    reason: str
    invited: frozenset[str]
    trained: frozenset[str]
    rejected: tuple[Refusal, ...]
    dropped: tuple[Refusal, ...]
    examples: Mapping[str, int]
    train: Mapping[str, float]
    per_site: Mapping[str, Mapping[str, float]]
    site_mean: Mapping[str, float]
    pooled: Mapping[str, float]
    seconds: float | None
    sent: float | None
    received: float | None
    secure: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)
    masked_epsilon: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """All that the report shows of a run.

    Attributes:
        masked: whether the run used secure aggregation, so that the server saw sums alone.
        seen: samples of masked and unmasked values that the server keeps for the report, unparsed.
        sweep: the sweep that the run belongs to, unparsed.
        noise: standard deviations of the noise on the last evaluation, unparsed.
        compiled: the record of `fedge compile`, unparsed.
    """

    name: str
    finished: bool
    task: str
    strategy: str
    planned: int
    sites: Mapping[str, Site]
    started: str
    ended: str
    model_sha256: str
    versions: Mapping[str, str]
    preprocessing: tuple[Any, ...]
    rounds: tuple[Round, ...]
    final_round: int
    per_site: Mapping[str, Mapping[str, float]]
    site_mean: Mapping[str, float]
    pooled: Mapping[str, float]
    seconds: float | None
    sent: float | None
    received: float | None
    config: str
    release: Mapping[str, Any]
    edge: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    stopped: str = ""
    masked: bool = False
    seen: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    compiled: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """``finished``, ``stopped`` by an error, or ``running``."""
        if self.finished:
            return "finished"
        return "stopped" if self.stopped else "running"

    @property
    def lead(self) -> str:
        """The metric that the report leads with: accuracy where the task has it, loss as the last resort."""
        names = [name for r in self.rounds for name in (*r.site_mean, *r.pooled)]
        names = [*self.site_mean, *self.pooled, *names]
        for preferred in ("accuracy", "balanced-accuracy", "auc", "auroc"):
            if preferred in names:
                return preferred
        return next((name for name in names if name != "loss"), "loss" if names else "accuracy")
