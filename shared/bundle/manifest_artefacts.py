"""A manifest's entry of each artefact: how to open it, whether it was executed, and its results.

Every artefact derives from one fp32 ONNX graph. Where it could be executed at the release, its record holds
how far it is from that graph and how fast it was; where it could not, as an engine without its GPU, it says so
and the device qualifies it before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

ONNX_FP32: Final = "onnx-fp32"
ONNX_FP16: Final = "onnx-fp16"
#: Unsigned activations, signed weights a channel: what CPUs multiply fast.
ONNX_INT8: Final = "onnx-int8"
#: Signed and symmetric throughout, biases as they are: what TensorRT parses.
ONNX_INT8_SYMMETRIC: Final = "onnx-int8-symmetric"
RTX_FP16: Final = "tensorrt-rtx-fp16"
RTX_INT8: Final = "tensorrt-rtx-int8"
TRT_FP16: Final = "tensorrt-fp16"
TRT_INT8: Final = "tensorrt-int8"

ONNX_KINDS: Final = (ONNX_FP32, ONNX_FP16, ONNX_INT8, ONNX_INT8_SYMMETRIC)
ENGINE_KINDS: Final = (RTX_FP16, RTX_INT8, TRT_FP16, TRT_INT8)
KINDS: Final = ONNX_KINDS + ENGINE_KINDS


@dataclass(frozen=True)
class Engine:
    """The runtime and GPUs that an engine was built for; it runs on no others.

    Attributes:
        runtime: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        version: of that runtime, as its wheel has it.
        capabilities: compute capabilities of the GPUs, such as 86 and 89, ascending.
    """

    runtime: str
    version: str
    capabilities: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**vars(self), "capabilities": list(self.capabilities)}


@dataclass(frozen=True)
class Latency:
    """Time of one inference where the release was made, in milliseconds.

    Attributes:
        p50_ms, p99_ms: of one run of the network.
        batch, threads: of the run.
        device: what it ran on.
    """

    p50_ms: float
    p99_ms: float
    batch: int
    threads: int
    device: str


@dataclass(frozen=True)
class Score:
    """The task's metric of one artefact, counted by the sites on their own held-out examples.

    Attributes:
        metric: its name.
        value: of this artefact.
        reference: of the fp32 graph on the same examples.
        num_examples: that were counted, as reported; may contain noise.
        higher_is_better, share: see ``fedge.shared.tasks.task.Metric``.
    """

    metric: str
    value: float
    reference: float
    num_examples: int
    higher_is_better: bool = True
    share: bool = True

    @property
    def lost(self) -> float:
        """By how much it is worse than the reference, in the metric's own unit; below 0 where it is better."""
        difference = self.reference - self.value
        return difference if self.higher_is_better else -difference

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; what is true of most metrics has no key, and had none before."""
        plain = dict(vars(self))
        for key in ("higher_is_better", "share"):
            if plain[key]:
                del plain[key]
        return plain

    def allowed(self, budget: float) -> float:
        """The most that it may lose: ``budget`` itself of a share, else that part of the reference."""
        return budget if self.share else budget * abs(self.reference)


@dataclass(frozen=True)
class Qualification:
    """Results of an artefact at the release.

    Attributes:
        executed: whether it was run there; False ships it unproven, to be qualified on the device.
        reason: why it was not, in one line; empty where it was.
        max_abs_difference: of two logits, against the fp32 graph on generated inputs; None where not executed.
        tolerance: largest allowed difference, in the same unit.
        agreement: share of the generated inputs with the same label as the fp32 graph's; None where not executed.
        contradicted: share with another label than one for which the fp32 graph clearly decides.
        peak_rss_mb: memory of the process that timed it, in MB of 10^6 bytes.
        latency: of one example; None where not measured.
        batched: the same of a batch of 32.
        relative_p50, batched_relative_p50: median time by that of the fp32 graph, of several runs in turns with it;
            None where it was not held against it.
        score: None where not measured.
    """

    executed: bool
    reason: str = ""
    max_abs_difference: float | None = None
    tolerance: float | None = None
    agreement: float | None = None
    peak_rss_mb: float | None = None
    latency: Latency | None = None
    score: Score | None = None
    batched: Latency | None = None
    relative_p50: float | None = None
    batched_relative_p50: float | None = None
    contradicted: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; what is None has no key."""
        plain = {key: value for key, value in vars(self).items() if value is not None}
        for key in ("latency", "batched"):
            if key in plain:
                plain[key] = dict(vars(plain[key]))
        if self.score is not None:
            plain["score"] = self.score.to_json()
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Qualification:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if type(value["executed"]) is not bool:
            raise ValueError("executed: must be true or false")
        latency, batched, score = (value.get(key) for key in ("latency", "batched", "score"))
        return cls(
            executed=value["executed"],
            reason=str(value["reason"]),
            max_abs_difference=_optional(value, "max_abs_difference"),
            tolerance=_optional(value, "tolerance"),
            agreement=_optional(value, "agreement"),
            peak_rss_mb=_optional(value, "peak_rss_mb"),
            latency=None if latency is None else latency_from_json(latency),
            score=None
            if score is None
            else Score(
                str(score["metric"]),
                float(score["value"]),
                float(score["reference"]),
                whole(score["num_examples"]),
                score.get("higher_is_better", True) is True,
                score.get("share", True) is True,
            ),
            batched=None if batched is None else latency_from_json(batched),
            relative_p50=_optional(value, "relative_p50"),
            batched_relative_p50=_optional(value, "batched_relative_p50"),
            contradicted=_optional(value, "contradicted"),
        )


@dataclass(frozen=True)
class Artefact:
    """One file of the bundle.

    Attributes:
        name: of the archive's member, for example ``"model.onnx"``.
        kind: format and precision, one of ``KINDS``.
        sha256: of its bytes, in hexadecimal.
        bytes: its size.
        opset: version of ONNX's default operator set, of the graph that an engine was built from too.
        engine: build record of an engine; None for a graph.
        qualification: None for the graph that all others are compared with.
    """

    name: str
    kind: str
    sha256: str
    bytes: int
    opset: int
    engine: Engine | None = None
    qualification: Qualification | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; what is None has no key."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "opset": self.opset,
            **({"engine": self.engine.to_json()} if self.engine else {}),
            **({"qualification": self.qualification.to_json()} if self.qualification else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Artefact:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        engine, qualification = value.get("engine"), value.get("qualification")
        return cls(
            name=str(value["name"]),
            kind=str(value["kind"]),
            sha256=str(value["sha256"]),
            bytes=whole(value["bytes"]),
            opset=whole(value["opset"]),
            engine=None
            if engine is None
            else Engine(
                str(engine["runtime"]),
                str(engine["version"]),
                tuple(whole(c) for c in engine["capabilities"]),
            ),
            qualification=None if qualification is None else Qualification.from_json(qualification),
        )


def latency_from_json(value: Mapping[str, Any]) -> Latency:
    """Read a latency of a manifest.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    return Latency(
        p50_ms=float(value["p50_ms"]),
        p99_ms=float(value["p99_ms"]),
        batch=whole(value["batch"]),
        threads=whole(value["threads"]),
        device=str(value["device"]),
    )


def whole(value: Any) -> int:
    """Check that a JSON value is a whole number, not a boolean or text.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int:
        raise ValueError(f"must be a whole number, got {value!r:.40}")
    return value


def _optional(value: Mapping[str, Any], key: str) -> float | None:
    return None if value.get(key) is None else float(value[key])
