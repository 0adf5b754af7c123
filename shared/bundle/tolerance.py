"""Allowed difference of an artefact's logits from the fp32 graph's: one rule for release and device."""

from __future__ import annotations

from typing import Final

#: Allowed difference of two logits, whatever their size.
ABSOLUTE: Final = 1e-4
#: Relative to the largest logit, where more: half precision has 11 bits, eight bits 256 steps; fp32 may be off by the
#: order of its sums, as with noise in the weights.
RELATIVE: Final = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.25}


def tolerance(kind: str, largest_logit: float) -> float:
    """The largest allowed difference of two logits.

    Args:
        kind: of the artefact, one of ``manifest_artefacts.KINDS``.
        largest_logit: of the fp32 graph, its magnitude.
    """
    precision = next(part for part in kind.split("-") if part in RELATIVE)
    return max(ABSOLUTE, RELATIVE[precision] * largest_logit)
