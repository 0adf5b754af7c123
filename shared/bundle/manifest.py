"""The manifest of a bundle: what the artefacts are, what goes in and out, and where it comes from.

A manifest is read only after its hash was found in a signed statement. It is checked all the same:
a release may be made by another version of fedge, and a device must refuse unknown content
rather than guess.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedge.shared.bundle import manifest_privacy
from fedge.shared.bundle.manifest_artefacts import (
    ENGINE_KINDS,
    KINDS,
    ONNX_FP32,
    Artefact,
    Latency,
    latency_from_json,
    whole,
)
from fedge.shared.bundle.manifest_checks import (
    PART,
    check_output,
    check_values,
    network_shape,
    refused,
    require,
)
from fedge.shared.bundle.manifest_privacy import Privacy
from fedge.shared.crypto.dsse import canonical_json, parse_canonical
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing import steps
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise, Step

FORMAT: Final = "fedge.manifest/1"

#: Names within the ONNX graph; the batch is its only open dimension.
GRAPH_INPUT: Final = "input"
GRAPH_OUTPUT: Final = "logits"
GRAPH_BATCH: Final = "batch"

#: The most artefacts in one bundle.
MAX_ARTEFACTS: Final = 64

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,5}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z")


@dataclass(frozen=True)
class Parity:
    """Difference of the exported model from the trained one, over random inputs.

    Attributes:
        max_abs_difference: of two logits.
        tolerance: largest allowed difference, in the same unit.
        batch_sizes: that were tried.
    """

    max_abs_difference: float
    tolerance: float
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that a device knows about a model.

    Attributes:
        task, run, strategy, rounds, sites: how the model was trained; ``rounds`` is the number of committed
            rounds, ``sites`` are names.
        created: when the run finished, UTC, so that a release of the same run is the same bytes.
        fedge: version that made the release.
        config_sha256: of the run's resolved configuration file.
        model_sha256: of the run's ``model.safetensors``.
        artefacts: in the order of the archive.
        input, output, preprocessing: from the raw example to the label.
        metrics: of the last round: ``"pooled"`` and ``"site_mean"``, each metric by its name.
        parity, latency: as measured at the release; ``latency`` is None where it was not measured.
        privacy: None where the run had none; then its key is missing.
        serial: rises from one model of a task to the next, so that a device can refuse an older one; 0, without a key,
            in a bundle of an earlier fedge.
        builders: package -> version of what made and measured the graphs; an engine names its own. Empty, without a
            key, in a bundle of an earlier fedge.
    """

    task: str
    run: str
    strategy: str
    rounds: int
    sites: tuple[str, ...]
    created: str
    fedge: str
    config_sha256: str
    model_sha256: str
    artefacts: tuple[Artefact, ...]
    input: InputSchema
    output: OutputSchema
    preprocessing: tuple[Step, ...]
    metrics: Mapping[str, Mapping[str, float]]
    parity: Parity
    latency: Latency | None = None
    privacy: Privacy | None = None
    serial: int = 0
    builders: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {
            "format": FORMAT,
            "task": self.task,
            "run": self.run,
            "strategy": self.strategy,
            "rounds": self.rounds,
            "sites": list(self.sites),
            "created": self.created,
            "fedge": self.fedge,
            "config_sha256": self.config_sha256,
            "model_sha256": self.model_sha256,
            "artefacts": [artefact.to_json() for artefact in self.artefacts],
            "input": self.input.to_json(),
            "output": self.output.to_json(),
            "preprocessing": [step.to_json() for step in self.preprocessing],
            "metrics": {kind: dict(values) for kind, values in self.metrics.items()},
            "parity": {**vars(self.parity), "batch_sizes": list(self.parity.batch_sizes)},
            "latency": dict(vars(self.latency)) if self.latency else None,
            **({"privacy": self.privacy.to_json()} if self.privacy else {}),
            **({"serial": self.serial} if self.serial else {}),
            **({"builders": dict(self.builders)} if self.builders else {}),
        }

    def to_bytes(self) -> bytes:
        """The manifest as canonical JSON, its form in the bundle."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            BundleError: 702, not canonical JSON; 706, the manifest needs something unknown or
                impossible here.
        """
        value = parse_canonical(data, PART)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise refused(f"format must be {FORMAT!r}")
        check_values(value)
        try:
            manifest = _from_json(value)
            again = manifest.to_json()
        except BundleError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise refused(f"does not parse ({type(error).__name__}: {error})") from None
        # Equal once more when written again: no key left over, no number given as text.
        for key in sorted(value.keys() | again.keys()):
            if key not in again or not _same(value[key], again[key]):
                raise refused(f"{key}: holds what this version does not know")
        manifest.check()
        return manifest

    def check(self) -> None:
        """Refuse a manifest that no device could run.

        Raises:
            BundleError: 706, with the key at fault.
        """
        for key, text in (
            ("config_sha256", self.config_sha256),
            ("model_sha256", self.model_sha256),
        ):
            require(_SHA256.fullmatch(text) is not None, key, "must be a SHA-256 in hexadecimal")
        require(
            _TIME.fullmatch(self.created) is not None,
            "created",
            "must be a UTC time such as 2026-01-31T12:00:00Z",
        )
        require(0 <= self.serial < 2**63, "serial", f"must be 0 to 2^63 - 1, got {self.serial}")
        require(0 <= self.rounds <= 10**9, "rounds", f"must be 0 to 10^9, got {self.rounds}")
        names = [artefact.name for artefact in self.artefacts]
        require(
            1 <= len(names) <= MAX_ARTEFACTS,
            "artefacts",
            f"must be 1 to {MAX_ARTEFACTS}, got {len(names)}",
        )
        require(len(set(names)) == len(names), "artefacts", "must have different names")
        for artefact in self.artefacts:
            where = f"artefacts: {artefact.name}"
            reserved = artefact.name in (PART, "statement.dsse.json")
            require(
                _NAME.fullmatch(artefact.name) is not None and not reserved,
                where,
                "must be a plain file name",
            )
            require(
                _SHA256.fullmatch(artefact.sha256) is not None, where, "sha256 must be hexadecimal"
            )
            require(
                0 < artefact.bytes < 2**33, where, f"bytes must be 1 to 8 GiB, got {artefact.bytes}"
            )
            require(
                1 <= artefact.opset <= 1000, where, f"opset must be 1 to 1000, got {artefact.opset}"
            )
            require(
                artefact.kind in KINDS,
                where,
                f"kind must be one of {', '.join(KINDS)}, got {artefact.kind!r}",
            )
            _check_engine(artefact, where)
            _check_qualification(artefact, where)
        sources = [artefact.name for artefact in self.artefacts if artefact.kind == ONNX_FP32]
        require(len(sources) == 1, "artefacts", f"must hold one of kind {ONNX_FP32!r}")
        check_output(self.output)
        network_shape(self.input, self.preprocessing)
        require(
            set(self.metrics) <= {"pooled", "site_mean"},
            "metrics",
            "must hold pooled and site_mean only",
        )
        for site, digest in self.privacy.ledgers.items() if self.privacy else ():
            valid = site in self.sites and _SHA256.fullmatch(digest) is not None
            require(
                valid, "privacy", "ledgers must be SHA-256 in hexadecimal, of the model's sites"
            )
        sizes = self.parity.batch_sizes
        require(
            all(1 <= size <= 2**20 for size in sizes), "parity", "batch sizes must be 1 to 2^20"
        )

    @property
    def site_statistics(self) -> bool:
        """Whether the model standardises by statistics that stay at each site."""
        return any(isinstance(step, Standardise) and not step.mean for step in self.preprocessing)


def _same(value: Any, again: Any) -> bool:
    """Whether two JSON values mean the same; what only text can say, such as NaN, does not."""
    try:
        return canonical_json(_floats(value)) == canonical_json(_floats(again))
    except ValueError:
        return False


def _floats(value: Any) -> Any:
    """A JSON value with every number as a float, as 0 and 0.0 mean the same."""
    match value:
        case dict():
            return {key: _floats(item) for key, item in value.items()}
        case list():
            return [_floats(item) for item in value]
        case bool():
            return value
        case int():
            return float(value)
    return value


def _check_engine(artefact: Artefact, where: str) -> None:
    """Compare an engine's record with its kind."""
    engine = artefact.engine
    require(
        (engine is not None) == (artefact.kind in ENGINE_KINDS),
        where,
        "engine must be of an engine",
    )
    if engine is None:
        return
    matches = engine.runtime == artefact.kind.rpartition("-")[0]
    require(matches, where, f"runtime must be that of kind {artefact.kind!r}")
    require(_VERSION.fullmatch(engine.version) is not None, where, "version must be numbers")
    capabilities = engine.capabilities
    ascending = all(a < b for a, b in itertools.pairwise(capabilities))
    require(
        bool(capabilities) and ascending and all(10 <= c <= 999 for c in capabilities),
        where,
        "capabilities must be ascending numbers such as 86 and 89",
    )


def _check_qualification(artefact: Artefact, where: str) -> None:
    """Check that the figures of an artefact are possible."""
    q = artefact.qualification
    if q is None:
        return
    require(q.executed != bool(q.reason), where, "reason must be given where it was not executed")
    counted = q.max_abs_difference is not None and q.tolerance is not None
    require(q.executed == counted, where, "parity must be given where it was executed")
    low = [q.max_abs_difference, q.tolerance, q.peak_rss_mb]
    require(all(v is None or v >= 0 for v in low), where, "figures must not be negative")
    shares = (q.agreement, q.contradicted)
    require(all(v is None or 0 <= v <= 1 for v in shares), where, "agreement must be 0 to 1")


def _from_json(value: dict[str, Any]) -> Manifest:
    parity, latency = value["parity"], value["latency"]
    for n in value["input"]["shape"]:
        whole(n)
    return Manifest(
        task=str(value["task"]),
        run=str(value["run"]),
        strategy=str(value["strategy"]),
        rounds=whole(value["rounds"]),
        sites=tuple(str(site) for site in value["sites"]),
        created=str(value["created"]),
        fedge=str(value["fedge"]),
        config_sha256=str(value["config_sha256"]),
        model_sha256=str(value["model_sha256"]),
        artefacts=tuple(Artefact.from_json(a) for a in value["artefacts"]),
        input=InputSchema.from_json(value["input"]),
        output=OutputSchema.from_json(value["output"]),
        preprocessing=steps.from_json(value["preprocessing"]),
        metrics={
            str(kind): {str(name): float(number) for name, number in values.items()}
            for kind, values in value["metrics"].items()
        },
        parity=Parity(
            max_abs_difference=float(parity["max_abs_difference"]),
            tolerance=float(parity["tolerance"]),
            batch_sizes=tuple(whole(size) for size in parity["batch_sizes"]),
        ),
        latency=None if latency is None else latency_from_json(latency),
        privacy=manifest_privacy.from_json(value["privacy"]) if "privacy" in value else None,
        serial=whole(value.get("serial", 0)),
        builders={str(name): str(of) for name, of in value.get("builders", {}).items()},
    )
