"""calibration.json: activation ranges of a run's final model, and metrics of its graphs at the sites."""

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
#: Most entries of ``absent``; beyond it only the first are kept.
MAX_ABSENT: Final = 1000
#: Values of ``Absent.of`` besides the kinds of candidates.
RANGES: Final = "ranges"
CANDIDATES: Final = "candidates"

_MAX_SITES: Final = 100_000
_MAX_NAME: Final = 1024
_MAX_REASON: Final = 1000
_MAX_FIGURES: Final = 256
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Counted:
    """Metrics of one candidate over the sites' held-out examples.

    Attributes:
        sha256: of the graph, which every site built by itself.
        sites: number of sites at which it ran; None where noise or the sites' privacy leaves that unknown.
        num_examples: that were counted; may contain noise, and each site counts as one where sites are the unit.
        counters: sums over the sites; multiples of a noised grid where there is noise.
        metrics: the task's, by name, those whose denominator is not zero and that are above the noise floor.
        noise: standard deviation of the noise on each metric, also on those below the noise floor; empty without
            noise. That on the difference of two candidates is about 1.4 times as much.
        reference: metrics of the fp32 graph over the very same sites and examples; empty where it did not run at one
            of them, where secure aggregation hides that, and with noise. Only with these may ``metrics`` be compared.
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
    """Activation ranges and candidates' metrics that the sites reported for a run's final model.

    Attributes:
        run: fedge's id.
        model_sha256: of the run's model.safetensors.
        graph_sha256: of the fp32 graph that server and sites exported; None where the server could not.
        mode: ``"exact"``, minima and maxima; ``"histogram"``, the edges of bins; ``"noised"``, those with noise.
        sites: whose ranges are merged, sorted.
        examples: number of their examples; None where it is unknown.
        ranges: by tensor, smallest and largest activation; None where there are none.
        reason: why there are no ranges, or no candidates; empty where there are both.
        candidates: by kind, their metrics.
        clipped: sites that reported clipping activations to the bound.
        absent: sites whose figures are missing, with the reason.
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


def dump(calibration: Calibration) -> bytes:
    """Serialise as canonical JSON: equal calibrations give equal bytes."""
    plain = {**vars(calibration), "format": FORMAT}
    plain["absent"] = [
        {**vars(a), "code": f"FE-{a.code}", "reason": a.reason[:_MAX_REASON]}
        for a in calibration.absent[:MAX_ABSENT]
    ]
    plain["candidates"] = {kind: dict(vars(c)) for kind, c in calibration.candidates.items()}
    return canonical_json(plain)


def load(path: Path) -> Calibration:
    """Read the calibration.json of a run.

    Raises:
        RunError: 504, the file cannot be read, is too large, or holds something else.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        _refuse(f"cannot be read ({reason(error)})")
    return parse(data)


def parse(data: bytes) -> Calibration:
    """Read what ``dump`` wrote.

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
        candidates={kind: _counted(entry) for kind, entry in value["candidates"].items()},
        clipped=_names(value["clipped"]),
        absent=tuple(
            Absent(
                _text(entry["site"]),
                _text(entry["of"]),
                int(_text(entry["code"]).removeprefix("FE-")),
                _text(entry["reason"], _MAX_REASON),
            )
            for entry in value["absent"]
        ),
    )


def _counted(entry: Mapping[str, Any]) -> Counted:
    return Counted(
        sha256=_digest(entry["sha256"]),
        sites=None if entry["sites"] is None else _count(entry["sites"]),
        num_examples=_count(entry["num_examples"]),
        counters=_figures(entry["counters"]),
        metrics=_figures(entry["metrics"]),
        noise=_figures(entry["noise"]),
        reference=_figures(entry["reference"]),
    )


def _ranges(ranges: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    checked = {}
    for name, (low, high) in _bounded(ranges, MAX_TENSORS).items():
        pair = _number(low), _number(high)
        if pair[0] > pair[1]:
            raise ValueError(f"ranges: must go from low to high, got {pair} of {name[:80]!r}")
        checked[_text(name)] = pair
    return checked


def _figures(figures: Mapping[str, Any]) -> dict[str, float]:
    return {_text(name): _number(value) for name, value in _bounded(figures, _MAX_FIGURES).items()}


def _bounded(value: Any, max_entries: int) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > max_entries:
        raise ValueError(f"must be an object of at most {max_entries} entries")
    return value


def _names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) > _MAX_SITES:
        raise ValueError(f"sites: must be a list of at most {_MAX_SITES}")
    return tuple(_text(name) for name in names)


def _text(value: Any, max_length: int = _MAX_NAME) -> str:
    if not isinstance(value, str) or len(value) > max_length:
        raise ValueError(f"must be text of at most {max_length} characters, got {value!r:.40}")
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
