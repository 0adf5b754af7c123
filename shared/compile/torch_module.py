"""A torch module of one's own as a signed bundle: the compile half of fedge for those who do not federate."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from fedge.shared.bundle import generated_examples
from fedge.shared.bundle.bundle import Part, write_bundle
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP32,
    ONNX_KINDS,
    Artefact,
    Qualification,
)
from fedge.shared.bundle.manifest_checks import check_output, network_shape
from fedge.shared.bundle.onnx_session import run
from fedge.shared.compile import candidates, ranges, targets
from fedge.shared.compile.activation_observer import observed
from fedge.shared.compile.onnx_export import builder_versions, export_onnx, opset_of
from fedge.shared.compile.parity import parity
from fedge.shared.crypto.dsse import load_private
from fedge.shared.errors import BundleError, DataError, ReleaseError, brief
from fedge.shared.preprocessing import steps
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise, Step
from fedge.shared.wire import tensors

_TASK = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_UNPROVEN = Qualification(
    False, "was not executed when it was made: the device proves it at install"
)


def bundle_module(
    network: nn.Module,
    out: Path | str,
    *,
    task: str,
    input: InputSchema,
    output: OutputSchema,
    key: Path | str,
    preprocessing: Sequence[Step] = (),
    for_targets: str = targets.CPU_FP32,
    calibration: ArrayLike | None = None,
    metrics: Mapping[str, float] | None = None,
    serial: int | None = None,
    replace: bool = False,
) -> Part:
    """Export a trained network, prove the graph equal to it, and sign it as a bundle that `fedge-edge` runs.

    Beside the fp32 graph are the fp16 and INT8 graphs that the targets need. They were not executed: a device takes
    one, or an engine that it builds of it, after `fedge-edge install` has proved it there.

    Args:
        network: from ``(b, *shape)`` of float32 to logits ``(b, k)``; left as it is.
        out: the bundle.
        task: name of what it does, in lower case; a device can be told to take this one only.
        input: one raw example; the network is compared and timed on numbers within its range, which without features or
            ``low`` and ``high`` is that of the calibration examples, or [0, 1).
        output: what the logits mean.
        key: private key that signs, as `fedge keys new` makes it.
        preprocessing: from the raw example to the network's input, with their statistics.
        for_targets: as `fedge compile --targets` takes them.
        calibration: raw examples ``(n, *input.shape)`` of float32, over which INT8 takes the range of each activation;
            they do not leave this function.
        metrics: of the network, measured by the caller, to be shown with the bundle.
        serial: of the bundle; seconds from 1970 unless given, so that a device can refuse an older one.
        replace: whether an existing ``out`` may be replaced.

    Returns:
        Name, size and hash of the bundle's file.

    Raises:
        ReleaseError: 603, the graph is not the network; 605, 606, ``out`` exists or cannot be written; 607, the network
            cannot be exported, or gives other logits; 608, there is no such target; 609, a target needs calibration, or
            the examples do not fit; 611, a graph cannot be converted.
        BundleError: 705, it is larger than a device takes; 706, the schemas are impossible.
        DataError: 305, a step lacks its statistics, a metric is not finite, or the task's name cannot be one.
        UsageError: 106, the key cannot be read.
    """
    out, private = Path(out), load_private(Path(key))
    if os.path.lexists(out) and not replace:
        raise ReleaseError(605, f"{out}: must not exist yet")
    requested = targets.parse(for_targets)
    with _arguments_at_fault():
        shape = network_shape(input, preprocessing)
        check_output(output)
    if not _TASK.fullmatch(task):
        raise DataError(
            305,
            f"task: must be lower-case letters, digits and ._- , at most 64, got {task[:80]!r}",
            remedy="Give another name.",
        )
    if not all(math.isfinite(value) for value in (metrics or {}).values()):
        raise DataError(305, "metrics: must be finite, got NaN or infinity", remedy="Leave it out.")
    raw = None if calibration is None else _examples(input, calibration)
    if raw is not None and not input.features and input.low is None and raw.min() < raw.max():
        # An image of 0 to 255 without a step that scales it: of [0, 1) it would be black.
        input = dataclasses.replace(input, low=float(raw.min()), high=float(raw.max()))
    if any(isinstance(step, Standardise) and not step.mean for step in preprocessing):
        raise DataError(305, "preprocessing: must hold the mean and std of its columns, got none")

    def examples(batch: int, seed: int) -> NDArray[Any]:
        made = generated_examples.example(input, batch, preprocessing, seed=seed)
        return steps.apply(preprocessing, made)

    graph = export_onnx(network, shape)
    width = 1 if output.activation == "sigmoid" else len(output.labels)
    close = parity(network, graph, shape, examples=examples)
    given = run(graph, examples(2, 0), batch=2, optimised=False, threads=1).shape
    if given != (2, width):
        raise ReleaseError(
            607,
            f"network: must give logits (batch, {width}), got {list(given)}",
            remedy="Give output a label for each logit, or two with sigmoid for a network of one logit.",
        )
    calibrated = None if raw is None else _ranges(graph, preprocessing, raw)
    kinds = [ONNX_FP32]
    for target in requested:
        needed = target.kinds(calibrated=calibrated is not None)
        kinds += [kind for kind in needed if kind in ONNX_KINDS and kind not in kinds]
    if calibrated is None and set(kinds) & set(candidates.QUANTISED):
        raise ReleaseError(
            609,
            f"{for_targets}: must come with calibration examples, got none",
            remedy="Pass calibration=EXAMPLES, a few hundred raw ones; or leave INT8 out of the targets.",
        )
    opset = opset_of(graph)
    graphs = {kind: candidates.derived(kind, graph, calibrated) for kind in kinds}
    now = datetime.now(UTC)
    weights = {name: t.detach().cpu().numpy() for name, t in network.state_dict().items()}
    manifest = Manifest(
        task=task,
        run="none",
        strategy="none",
        rounds=0,
        sites=(),
        created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        fedge=version("fedge"),
        config_sha256="0" * 64,
        model_sha256=tensors.digest(weights),
        artefacts=tuple(
            Artefact(
                candidates.FILE_NAMES[kind],
                kind,
                hashlib.sha256(data).hexdigest(),
                len(data),
                opset,
                qualification=None if kind == ONNX_FP32 else _UNPROVEN,
            )
            for kind, data in graphs.items()
        ),
        input=input,
        output=output,
        preprocessing=tuple(preprocessing),
        metrics={"pooled": dict(metrics)} if metrics else {},
        parity=close,
        builders=builder_versions(),
        serial=int(now.timestamp()) if serial is None else serial,
    )
    contents: dict[str, bytes | Path] = {
        candidates.FILE_NAMES[kind]: graphs[kind] for kind in kinds
    }
    with _arguments_at_fault():
        return write_bundle(out, manifest, contents, private, replace=replace)


@contextlib.contextmanager
def _arguments_at_fault() -> Iterator[None]:
    """Give the errors of a manifest a remedy for who writes one; the usual one is for who reads it."""
    try:
        yield
    except BundleError as error:
        if error.code != 706:
            raise
        remedy = "Correct the argument that the message names."
        raise BundleError(706, error.message, remedy=remedy) from None


def _examples(schema: InputSchema, given: ArrayLike) -> NDArray[np.float32]:
    """Calibration examples as float32.

    Raises:
        ReleaseError: 609, they do not fit the schema, or are not finite.
    """
    remedy = "Give raw examples as the argument `input` describes one, a few hundred of them."
    try:
        raw = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        message = f"calibration: must be numbers ({brief(error)})"
        raise ReleaseError(609, message, remedy=remedy) from None
    if raw.ndim == 0 or raw.shape[1:] != schema.shape or not len(raw):
        expected = ", ".join(map(str, ("n", *schema.shape)))
        message = f"calibration: must be examples ({expected}), got {list(raw.shape)}"
        raise ReleaseError(609, message, remedy=remedy)
    if not np.isfinite(raw).all():
        message = "calibration: must be finite, got NaN or infinity"
        raise ReleaseError(609, message, remedy=remedy)
    return raw


def _ranges(
    graph: bytes, preprocessing: Sequence[Step], raw: NDArray[np.float32]
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each activation over examples.

    Raises:
        ReleaseError: 609, a value is not finite.
    """
    names = candidates.tensors(graph)
    x = steps.apply(preprocessing, raw)
    # One at a time and unoptimised, as fused operators hide their activations.
    extremes = run(observed(graph, names), x, batch=1, optimised=False, threads=1)
    by_tensor = extremes.reshape(len(x), 2, len(names)).transpose(0, 2, 1)
    try:
        values, _ = ranges.clipped(by_tensor, math.inf)
    except ValueError as error:
        remedy = "Leave out the examples over which the network overflows."
        raise ReleaseError(609, f"calibration: {error}", remedy=remedy) from None
    both = ranges.merged(list(values))
    return {name: (float(low), float(high)) for name, (low, high) in zip(names, both, strict=True)}
