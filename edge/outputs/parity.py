"""Compares an artefact with the fp32 graph on generated inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.edge.outputs.labelling import decide
from fedge.shared.bundle.generated_examples import MAX_BATCH_VALUES, example
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.bundle.tolerance import tolerance
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.schema import OutputSchema
from fedge.shared.preprocessing.steps import Step

Array: TypeAlias = NDArray[Any]

BATCH_SIZES: Final = (1, 2, 7, 32)
#: Largest share of the inputs on which INT8 may contradict the fp32 graph: logits within its tolerance can still change
#: every label.
CONTRADICTED: Final = 0.1
#: The fp32 graph does not decide between two labels that are closer than this part of its largest logit.
_TIE: Final = 0.01


@dataclass(frozen=True)
class Difference:
    """Difference from the fp32 graph over all inputs.

    Attributes:
        max_abs_difference: of two logits.
        largest_logit: of the fp32 graph, its magnitude.
        agreement: share of the inputs that get the same label.
        contradicted: share of the inputs that get another label than the fp32 graph decides for; where that has
            nearly a tie, another label is no contradiction.
    """

    max_abs_difference: float
    largest_logit: float
    agreement: float
    contradicted: float = 0.0


def examples(
    manifest: Manifest, steps: Sequence[Step], sizes: Sequence[int], *, seed: int | None = None
) -> tuple[Array, ...]:
    """Preprocessed batches of the given sizes; those too large to hold are left out.

    Args:
        manifest: of the model.
        steps: its preprocessing, complete.
        sizes: number of examples in each batch.
        seed: of all of them; the size of each unless given.
    """
    max_size = MAX_BATCH_VALUES // math.prod(manifest.input.shape)
    return tuple(
        preprocessing.apply(
            steps, example(manifest.input, size, steps, seed=size if seed is None else seed)
        )
        for size in sizes
        if size <= max_size
    )


def difference(
    logits: Sequence[Array], reference: Sequence[Array], output: OutputSchema, name: str
) -> Difference:
    """Compare logits with those of the fp32 graph on the same inputs.

    Args:
        logits: ``(n, k)`` of each batch.
        reference: the same of the fp32 graph.
        output: meaning of the logits.
        name: of the artefact, for messages.

    Raises:
        BundleError: 709, a logit is not finite.
    """
    ours, theirs = (np.concatenate([np.asarray(b) for b in x]) for x in (logits, reference))
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise BundleError(709, f"{name}: must give finite logits, got NaN or infinity")
    labels, right = decide(ours, output).indices, decide(theirs, output).indices
    largest = float(np.max(np.abs(theirs)))
    clear = _margins(theirs, labels, right, output) > _TIE * largest
    return Difference(
        float(np.max(np.abs(ours - theirs))),
        largest,
        float(np.mean(labels == right)),
        float(np.mean((labels != right) & clear)),
    )


def _margins(logits: Array, labels: Array, right: Array, output: OutputSchema) -> Array:
    """Margin ``(n,)`` by which each row ``(k,)`` of logits prefers its label ``right`` to another."""
    if output.activation == "sigmoid":
        threshold = output.threshold
        border = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf
        return np.asarray(np.abs(logits[:, 0] - border))
    rows = np.arange(len(logits))
    return np.asarray(logits[rows, right] - logits[rows, labels])


def check(kind: str, diff: Difference, name: str) -> None:
    """Refuse an artefact that is further from the fp32 graph than its kind may be.

    Args:
        kind: of the artefact.
        diff: its difference from the fp32 graph.
        name: of the artefact, for messages.

    Raises:
        BundleError: 710.
    """
    if reason := obstacle(kind, diff):
        raise BundleError(710, f"{name}: {reason}")


def obstacle(kind: str, diff: Difference) -> str:
    """Why an artefact of this kind may not stand for the fp32 graph, in a few words; empty where it may."""
    allowed = tolerance(kind, diff.largest_logit)
    if diff.max_abs_difference > allowed:
        gap = diff.max_abs_difference
        return f"must be within {allowed:.3g} of the fp32 graph, got {gap:.3g}"
    if "int8" in kind and diff.contradicted > CONTRADICTED:
        required, got = 1 - CONTRADICTED, 1 - diff.contradicted
        return f"must agree with the fp32 graph's labels on {required:.0%} of the inputs, got {got:.0%}"
    return ""
