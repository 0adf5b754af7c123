"""The manifest of a bundle: what the artefacts are, what goes in and out, and where it comes from.

A manifest is read only after its hash was found in a signed statement. It is checked all the same:
a release may be made by another version of fedge, and a device must refuse what it does not know
rather than guess.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedge.shared import preprocess
from fedge.shared.errors import BundleError
from fedge.shared.preprocess import OneHot, Reshape, Scale, Standardise, Step
from fedge.shared.schema import InputSchema, OutputSchema
from fedge.shared.signing import canonical_json, parse_canonical

FORMAT: Final = "fedge.manifest/1"
PART: Final = "manifest.json"
ONNX_FP32: Final = "onnx-fp32"

#: Names within the ONNX graph; the batch is its only open dimension.
GRAPH_INPUT: Final = "input"
GRAPH_OUTPUT: Final = "logits"
GRAPH_BATCH: Final = "batch"

#: Bounds of what a manifest may ask a device to hold.
MAX_DIMENSIONS: Final = 8
MAX_VALUES: Final = 2**24
MAX_LABELS: Final = 100_000
MAX_ARTEFACTS: Final = 64
MAX_TEXT: Final = 256

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,6})?Z")


@dataclass(frozen=True)
class Artefact:
    """One file of the bundle.

    Attributes:
        name: of the archive's member, for example ``"model.onnx"``.
        kind: what a runtime needs to know to open it; ``"onnx-fp32"`` is the only one so far.
        sha256: of its bytes, in hexadecimal.
        bytes: its size.
        opset: version of ONNX's default operator set.
    """

    name: str
    kind: str
    sha256: str
    bytes: int
    opset: int


@dataclass(frozen=True)
class Parity:
    """How far the exported model is from the trained one, over random inputs."""

    max_abs_difference: float
    tolerance: float
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Latency:
    """Time of one inference where the release was made, in milliseconds."""

    p50_ms: float
    p99_ms: float
    batch: int
    threads: int
    device: str


@dataclass(frozen=True)
class Manifest:
    """All that a device is told about a model.

    Attributes:
        task, run, strategy, rounds, sites: where the model was learnt; ``rounds`` that made it,
            ``sites`` by name.
        created: when the run finished, UTC, so that a release of the same run is the same bytes.
        fedge: version that made the release.
        config_sha256: of the run's resolved configuration file.
        model_sha256: of the run's ``model.safetensors``.
        artefacts: in the order of the archive.
        input, output, preprocessing: from the raw example to the label.
        metrics: of the last round: ``"pooled"`` and ``"site_mean"``, each metric by its name.
        parity, latency: as measured at the release; ``latency`` is None where it was not measured.
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
            "artefacts": [dict(vars(artefact)) for artefact in self.artefacts],
            "input": self.input.to_json(),
            "output": self.output.to_json(),
            "preprocessing": [step.to_json() for step in self.preprocessing],
            "metrics": {kind: dict(values) for kind, values in self.metrics.items()},
            "parity": {**vars(self.parity), "batch_sizes": list(self.parity.batch_sizes)},
            "latency": dict(vars(self.latency)) if self.latency else None,
        }

    def to_bytes(self) -> bytes:
        """The manifest as it lies in the bundle: canonical JSON."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read and check a manifest.

        Raises:
            BundleError: 702, not canonical JSON; 706, the manifest asks for what is not known or
                not possible here.
        """
        value = parse_canonical(data, PART)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise _refused(f"format must be {FORMAT!r}")
        _check_values(value)
        try:
            manifest = _from_json(value)
            again = manifest.to_json()
        except BundleError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise _refused(f"does not parse ({type(error).__name__}: {error})") from None
        # Equal once more when written again: no key left over, no number given as text.
        for key in sorted(value.keys() | again.keys()):
            if key not in again or not _same(value[key], again[key]):
                raise _refused(f"{key}: holds what this version does not know")
        manifest.check()
        return manifest

    def check(self) -> None:
        """Refuse what no device could run.

        Raises:
            BundleError: 706, with the key at fault.
        """
        for key, text in (
            ("config_sha256", self.config_sha256),
            ("model_sha256", self.model_sha256),
        ):
            _require(_SHA256.fullmatch(text) is not None, key, "must be a SHA-256 in hexadecimal")
        _require(
            _TIME.fullmatch(self.created) is not None,
            "created",
            "must be a UTC time such as 2026-01-31T12:00:00Z",
        )
        _require(0 <= self.rounds <= 10**9, "rounds", f"must be 0 to 10^9, got {self.rounds}")
        names = [artefact.name for artefact in self.artefacts]
        _require(
            1 <= len(names) <= MAX_ARTEFACTS,
            "artefacts",
            f"must be 1 to {MAX_ARTEFACTS}, got {len(names)}",
        )
        _require(len(set(names)) == len(names), "artefacts", "must have different names")
        for artefact in self.artefacts:
            where = f"artefacts: {artefact.name}"
            reserved = artefact.name in (PART, "statement.dsse.json")
            _require(
                _NAME.fullmatch(artefact.name) is not None and not reserved,
                where,
                "must be a plain file name",
            )
            _require(
                _SHA256.fullmatch(artefact.sha256) is not None, where, "sha256 must be hexadecimal"
            )
            _require(
                0 < artefact.bytes < 2**33, where, f"bytes must be 1 to 8 GiB, got {artefact.bytes}"
            )
            _require(
                1 <= artefact.opset <= 1000, where, f"opset must be 1 to 1000, got {artefact.opset}"
            )
            _require(
                artefact.kind == ONNX_FP32,
                where,
                f"kind must be {ONNX_FP32!r}, got {artefact.kind!r}",
            )
        _check_output(self.output)
        network_shape(self.input, self.preprocessing)
        _require(
            set(self.metrics) <= {"pooled", "site_mean"},
            "metrics",
            "must hold pooled and site_mean only",
        )
        sizes = self.parity.batch_sizes
        _require(
            all(1 <= size <= 2**20 for size in sizes), "parity", "batch sizes must be 1 to 2^20"
        )

    @property
    def site_statistics(self) -> bool:
        """Whether the model standardises by statistics that each site keeps to itself."""
        return any(isinstance(step, Standardise) and not step.mean for step in self.preprocessing)


def network_shape(schema: InputSchema, steps: Sequence[Step]) -> tuple[int, ...]:
    """Shape of one example as the network takes it, found by walking through the steps.

    Raises:
        BundleError: 706, the schema is not possible, or a step does not fit what comes before it.
    """
    _check_input(schema)
    shape = schema.shape
    for number, step in enumerate(steps):
        where = f"preprocessing: step {number}"
        match step:
            case Scale(factor=factor):
                _require(math.isfinite(factor), where, "factor must be finite")
            case Standardise(mean=mean, std=std):
                _require(
                    len(shape) == 1, where, f"standardise needs columns, got shape {list(shape)}"
                )
                _require(
                    len(mean) == len(std) and len(mean) in (0, shape[0]),
                    where,
                    f"must hold {shape[0]} columns",
                )
                _require(all(s >= 0 for s in std), where, "std must not be negative")
            case OneHot(columns=columns):
                _require(len(shape) == 1, where, f"one-hot needs columns, got shape {list(shape)}")
                indices = [index for index, _ in columns]
                ascending = all(a < b for a, b in itertools.pairwise(indices))
                inside = all(0 <= index < shape[0] for index in indices)
                _require(
                    ascending and inside, where, "columns must be ascending and within the input"
                )
                for index, categories in columns:
                    distinct = 0 < len(set(categories)) == len(categories)
                    _require(distinct, where, f"column {index} must hold different categories")
                shape = (shape[0] - len(columns) + sum(len(c) - 1 for _, c in columns),)
            case Reshape(shape=new):
                _check_shape(new, where)
                _require(
                    math.prod(new) == math.prod(shape),
                    where,
                    f"cannot make {list(new)} of {list(shape)}",
                )
                shape = new
        _check_shape(shape, where)
    return shape


def _refused(message: str) -> BundleError:
    return BundleError(706, f"{PART}: {message}")


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise _refused(f"{where}: {message}")


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    possible = 1 <= len(shape) <= MAX_DIMENSIONS and all(1 <= n <= MAX_VALUES for n in shape)
    _require(
        possible and math.prod(shape) <= MAX_VALUES,
        where,
        f"shape {list(shape)[:9]} is not possible",
    )


def _check_input(schema: InputSchema) -> None:
    _check_shape(schema.shape, "input")
    _require(schema.dtype == "float32", "input", f"dtype must be float32, got {schema.dtype!r}")
    if schema.features:
        names = [feature.name for feature in schema.features]
        _require(
            schema.shape == (len(names),),
            "input",
            f"must have one feature a column, got {len(names)}",
        )
        _require(len(set(names)) == len(names), "input", "must have different features")
        _require(
            all(name.strip() == name and name for name in names),
            "input",
            "must have named features",
        )


def _check_output(schema: OutputSchema) -> None:
    count = len(schema.labels)
    _require(2 <= count <= MAX_LABELS, "output", f"must have 2 to {MAX_LABELS} labels, got {count}")
    _require(len(set(schema.labels)) == count, "output", "must have different labels")
    _require(
        schema.activation == "softmax" or count == 2,
        "output",
        f"sigmoid needs two labels, got {count}",
    )
    _require(
        0 < schema.threshold < 1,
        "output",
        f"threshold must be between 0 and 1, got {schema.threshold}",
    )


def _check_values(value: Any, depth: int = 0) -> None:
    """Refuse text that could confuse a terminal, numbers out of range, and deep nesting."""
    if depth > MAX_DIMENSIONS:
        raise _refused("is nested too deeply")
    match value:
        case dict():
            for key, item in value.items():
                _check_values(key, depth + 1)
                _check_values(item, depth + 1)
        case list():
            for item in value:
                _check_values(item, depth + 1)
        case str():
            if len(value) > MAX_TEXT or not value.isprintable():
                raise _refused(
                    f"text must be printable and at most {MAX_TEXT} characters, got {value[:32]!r}"
                )
        case bool():
            raise _refused("must hold no true or false")
        case int() | float():
            if not -1e300 < value < 1e300:
                raise _refused("holds a number out of range")


def _same(value: Any, again: Any) -> bool:
    """Whether two JSON values mean the same; what only text can say, such as NaN, does not."""
    try:
        return canonical_json(_floats(value)) == canonical_json(_floats(again))
    except ValueError:
        return False


def _floats(value: Any) -> Any:
    """The same with every number as a float, as 0 and 0.0 mean the same."""
    match value:
        case dict():
            return {key: _floats(item) for key, item in value.items()}
        case list():
            return [_floats(item) for item in value]
        case int():
            return float(value)
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"must be a whole number, got {value!r:.40}")
    return value


def _from_json(value: dict[str, Any]) -> Manifest:
    parity, latency = value["parity"], value["latency"]
    for n in value["input"]["shape"]:
        _integer(n)
    return Manifest(
        task=str(value["task"]),
        run=str(value["run"]),
        strategy=str(value["strategy"]),
        rounds=_integer(value["rounds"]),
        sites=tuple(str(site) for site in value["sites"]),
        created=str(value["created"]),
        fedge=str(value["fedge"]),
        config_sha256=str(value["config_sha256"]),
        model_sha256=str(value["model_sha256"]),
        artefacts=tuple(
            Artefact(
                name=str(a["name"]),
                kind=str(a["kind"]),
                sha256=str(a["sha256"]),
                bytes=_integer(a["bytes"]),
                opset=_integer(a["opset"]),
            )
            for a in value["artefacts"]
        ),
        input=InputSchema.from_json(value["input"]),
        output=OutputSchema.from_json(value["output"]),
        preprocessing=preprocess.from_json(value["preprocessing"]),
        metrics={
            str(kind): {str(name): float(number) for name, number in values.items()}
            for kind, values in value["metrics"].items()
        },
        parity=Parity(
            max_abs_difference=float(parity["max_abs_difference"]),
            tolerance=float(parity["tolerance"]),
            batch_sizes=tuple(_integer(size) for size in parity["batch_sizes"]),
        ),
        latency=None
        if latency is None
        else Latency(
            p50_ms=float(latency["p50_ms"]),
            p99_ms=float(latency["p99_ms"]),
            batch=_integer(latency["batch"]),
            threads=_integer(latency["threads"]),
            device=str(latency["device"]),
        ),
    )
