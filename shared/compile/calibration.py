"""calibration.json: activation ranges of a run's final model, and what graphs made of it score at the sites."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from fedge.shared.bundle.manifest_artefacts import ONNX_KINDS, whole
from fedge.shared.compile.ranges import MAX_TENSORS
from fedge.shared.crypto.dsse import canonical_json
from fedge.shared.errors import RunError
from fedge.shared.files import read_bounded, reason

FILE: Final = "calibration.json"
FORMAT: Final = 1
MODES: Final = ("exact", "histogram", "noised")
MAX_BYTES: Final = 16 * 2**20
#: Of what was left out; beyond it only the first are told.
MAX_ABSENT: Final = 1000
#: To what ``Absent.of`` refers besides a candidate.
RANGES: Final = "ranges"
CANDIDATES: Final = "candidates"

_MAX_SITES: Final = 100_000
_MAX_NAME: Final = 1024
_MAX_REASON: Final = 1000
_MAX_FIGURES: Final = 256
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Counted:
    """What one candidate scored over the sites' held-out examples.

    Attributes:
        sha256: of the graph, which every site made by itself.
        sites: at how many it ran; None where noise or the sites' privacy leaves that unknown.
        num_examples: that were counted; noise may be in it, and where it hides whole sites each counts as one.
        counters: sums over the sites; multiples of a noised grid where there is noise.
        metrics: the task's, by name, those whose denominator is not zero and of which noise leaves something.
        noise: standard deviation of the noise on each metric, on those too of which it leaves nothing; empty without
            noise. That on the difference of two candidates is about 1.4 times as much.
        reference: metrics of the fp32 graph over the very same sites and examples; empty where it did not run at one
            of them, where masks leave that open, and with noise. Only with these may ``metrics`` be compared.
    """

    sha256: str
    sites: int | None
    num_examples: int
    counters: Mapping[str, float]
    metrics: Mapping[str, float]
    noise: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Absent:
    """A site whose figures are not in the sums.

    Attributes:
        site: its name.
        of: ``"ranges"``, ``"candidates"`` or the kind of one candidate.
        code: FE number of the reason.
        reason: in words.
    """

    site: str
    of: str
    code: int
    reason: str


@dataclass(frozen=True)
class Calibration:
    """What the sites said of a run's final model.

    Attributes:
        run: fedge's id.
        model_sha256: of the run's model.safetensors.
        graph_sha256: of the fp32 graph that server and sites made of it; None where the server could not.
        mode: ``"exact"``, minima and maxima; ``"histogram"``, the edges of bins; ``"noised"``, likewise with noise.
        sites: whose ranges are merged, sorted.
        examples: that they looked at; None where nobody knows.
        ranges: by tensor, smallest and largest activation; None where they were not had.
        reason: why there are no ranges, or no candidates; empty where there are both.
        candidates: by kind, what they scored.
        clipped: sites that clipped activations to the bound, where they say so.
        absent: who is not in it, and why.
    """

    run: str
    model_sha256: str
    graph_sha256: str | None
    mode: str
    sites: tuple[str, ...] = ()
    examples: int | None = None
    ranges: Mapping[str, tuple[float, float]] | None = None
    reason: str = ""
    candidates: Mapping[str, Counted] = field(default_factory=dict)
    clipped: tuple[str, ...] = ()
    absent: tuple[Absent, ...] = ()


_KEYS: Final = {"format", *(part.name for part in fields(Calibration))}


def dump(of: Calibration) -> bytes:
    """Canonical JSON: the same for the same figures."""
    plain = {**vars(of), "format": FORMAT}
    plain["absent"] = [
        {**vars(a), "code": f"FE-{a.code}", "reason": a.reason[:_MAX_REASON]}
        for a in of.absent[:MAX_ABSENT]
    ]
    plain["candidates"] = {kind: dict(vars(c)) for kind, c in of.candidates.items()}
    return canonical_json(plain)


def load(path: Path) -> Calibration:
    """Read what a run has written.

    Raises:
        RunError: 504, the file cannot be read, is too large, or holds something else.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        _refuse(f"cannot be read ({reason(error)})")
    return parse(data)


def parse(data: bytes) -> Calibration:
    """The reverse of ``dump``.

    Raises:
        RunError: 504, it is something else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        _refuse("must be JSON")
    if not isinstance(value, dict) or value.keys() != _KEYS or value["format"] != FORMAT:
        _refuse(f"must hold the keys of format {FORMAT}, got others")
    try:
        return _checked(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        _refuse(f"does not parse ({str(error)[:200]})")


def _checked(value: Mapping[str, Any]) -> Calibration:
    graph, mode, examples = value["graph_sha256"], value["mode"], value["examples"]
    if mode not in MODES:
        raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {mode!r:.40}")
    for kind in _bounded(value["candidates"], len(ONNX_KINDS)):
        if kind not in ONNX_KINDS:
            raise ValueError(f"candidates: must be of {', '.join(ONNX_KINDS)}, got {kind!r:.40}")
    if len(value["absent"]) > MAX_ABSENT:
        raise ValueError(f"absent: must hold at most {MAX_ABSENT} entries")
    return Calibration(
        run=_text(value["run"]),
        model_sha256=_digest(value["model_sha256"]),
        graph_sha256=None if graph is None else _digest(graph),
        mode=mode,
        sites=_names(value["sites"]),
        examples=None if examples is None else _count(examples),
        ranges=None if value["ranges"] is None else _ranges(value["ranges"]),
        reason=_text(value["reason"], _MAX_REASON),
        candidates={kind: _counted(told) for kind, told in value["candidates"].items()},
        clipped=_names(value["clipped"]),
        absent=tuple(
            Absent(
                _text(told["site"]),
                _text(told["of"]),
                int(_text(told["code"]).removeprefix("FE-")),
                _text(told["reason"], _MAX_REASON),
            )
            for told in value["absent"]
        ),
    )


def _counted(told: Mapping[str, Any]) -> Counted:
    return Counted(
        sha256=_digest(told["sha256"]),
        sites=None if told["sites"] is None else _count(told["sites"]),
        num_examples=_count(told["num_examples"]),
        counters=_figures(told["counters"]),
        metrics=_figures(told["metrics"]),
        noise=_figures(told["noise"]),
        reference=_figures(told["reference"]),
    )


def _ranges(told: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, (low, high) in _bounded(told, MAX_TENSORS).items():
        pair = _number(low), _number(high)
        if pair[0] > pair[1]:
            raise ValueError(f"ranges: must go from low to high, got {pair} of {name[:80]!r}")
        found[_text(name)] = pair
    return found


def _figures(told: Mapping[str, Any]) -> dict[str, float]:
    return {_text(name): _number(value) for name, value in _bounded(told, _MAX_FIGURES).items()}


def _bounded(told: Any, most: int) -> dict[str, Any]:
    if not isinstance(told, dict) or len(told) > most:
        raise ValueError(f"must be an object of at most {most} entries")
    return told


def _names(told: Any) -> tuple[str, ...]:
    if not isinstance(told, list) or len(told) > _MAX_SITES:
        raise ValueError(f"sites: must be a list of at most {_MAX_SITES}")
    return tuple(_text(name) for name in told)


def _text(value: Any, longest: int = _MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"must be text of at most {longest} characters, got {value!r:.40}")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"must be SHA-256 in hexadecimal, got {value!r:.40}")
    return value


def _count(value: Any) -> int:
    if whole(value) < 0:
        raise ValueError(f"must be 0 or more, got {value}")
    return int(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value!r:.40}")
    return float(value)


def _refuse(why: str) -> NoReturn:
    raise RunError(504, f"{FILE}: {why}")
