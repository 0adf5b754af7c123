"""What a site adds to a secure sum: clipped, weighted, counted, and never seen unmasked outside of the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.privacy.mechanisms import distributed
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.update_norm import finite_norm
from fedge.shared.secagg import exact_counters, fixed_point, masking, vector_layout
from fedge.shared.secagg.key_agreement import framed
from fedge.shared.secagg.vector_layout import Bounds, Layout
from fedge.shared.tasks.standardised_columns import Bound
from fedge.shared.wire.tensors import NDArrays


@dataclass(frozen=True)
class SiteNoise:
    """One site's part of the noise in a sum (``fedge.shared.privacy.mechanisms.distributed``).

    Attributes:
        clipping_bound: L2 norm of the update.
        noise_multiplier: of the whole noise.
        honest: sites whose noise is in every sum that is opened, at least.
        entropy: where it comes from.
    """

    clipping_bound: float
    noise_multiplier: float
    honest: int
    entropy: Entropy

    def encode(self, update: NDArray[Any], sites: int) -> NDArray[np.uint32]:
        """The update with noise, in the ring.

        Raises:
            SiteError: 414, the noise does not fit the grid or the ring.
        """
        try:
            stddev = distributed.stddev(self.noise_multiplier, update.size, self.honest, sites)
            return distributed.encode(update, self.clipping_bound, stddev, self.entropy)
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None


@dataclass(frozen=True)
class InputVector:
    """A site's part of one sum.

    Attributes:
        layout: of the vector.
        values: ``(layout.values,)`` floating point, clipped.
        weight: 0 to 1, by which the values are multiplied.
        counters: by name, as the layout has them, without ``saturated``.
        noise: that is added to the values, on its own grid.

    Raises:
        SiteError: 401, a counter is not finite or out of range.
    """

    layout: Layout
    values: NDArray[Any]
    weight: float
    counters: Mapping[str, float]
    noise: SiteNoise | None = None

    def __post_init__(self) -> None:
        # At once: a counter that failed only when the vector is made would be a site lost after the shares.
        self._counters(saturated=0)

    def encode(self, sites: int, rounding_key: bytes) -> NDArray[np.uint32]:
        """The vector, not masked yet: values in the ring 2^32, counters in 2^128.

        Args:
            sites: that add up.
            rounding_key: 32 bytes, of the stochastic rounding.

        Raises:
            SiteError: 401, a value is not finite.
        """
        vector = np.empty(self.layout.shape.length, np.uint32)
        saturated = 0
        if self.noise is not None:
            # New noise for each attempt: of two vectors with the same, the difference would be without.
            vector[: self.layout.values] = self.noise.encode(self.values, sites)
        elif self.layout.segments:
            encoded = fixed_point.encode(
                self.values,
                self.weight,
                self.layout.segments,
                sites,
                rounding_key,
                vector[: self.layout.values],
            )
            saturated = encoded.saturated
        masking.counters_in(vector, self.layout.shape.counters)[:] = self._counters(saturated)
        return vector

    def _counters(self, saturated: int) -> NDArray[np.uint64]:
        has_saturated = any(c.name == vector_layout.SATURATED for c in self.layout.counters)
        own = {vector_layout.SATURATED: saturated} if has_saturated else {}
        return exact_counters.encode_counters({**self.counters, **own}, self.layout.counters)


def training(
    layout: Layout,
    bounds: Bounds,
    received: NDArrays,
    trained: NDArrays | None,
    num_examples: int,
    loss: float,
    *,
    private: bool = False,
) -> InputVector:
    """The contribution of a training round.

    Args:
        layout: of the vector.
        bounds: of the run.
        received: the round's weights.
        trained: the site's, with SCAFFOLD's changes under ``control/``; None where it has no examples.
        num_examples: it trained on.
        loss: mean over them.
        private: every site that has examples weighs the same, and says neither their number nor the loss; an update
            that is not finite counts as zero.

    Raises:
        SiteError: 401, the update or the loss is not finite; 404, a tensor is missing, or of another shape or type.
    """
    if private and trained is not None:
        num_examples, loss = bounds.weight_cap, 0.0
    capped = min(num_examples, bounds.weight_cap)
    counters: dict[str, float] = {
        vector_layout.SITES: 1,
        vector_layout.EXAMPLES: capped,
        vector_layout.LOSS: capped * loss,
        vector_layout.CLIPPED: 0,
        vector_layout.CAPPED: int(num_examples > bounds.weight_cap),
    }
    if trained is None:
        return InputVector(layout, np.zeros(layout.values, np.float32), 0.0, counters)
    _require_tensors(layout, trained)
    flat = layout.flatten(trained)
    for t in layout.tensors:
        if not t.name.startswith(protocol.CONTROL_PREFIX):
            flat[t.start : t.start + t.size] -= received[t.name].reshape(-1)
    update = flat[: layout.segments[0].size]
    norm = float(np.sqrt(np.vdot(update, update).astype(np.float64)))
    if not np.isfinite(norm):
        norm = float(np.linalg.norm(update.astype(np.float64)))
    if private and not np.isfinite(norm):
        norm = finite_norm(update)
    # A finite norm is of finite values.
    if not np.isfinite(norm) or not np.isfinite(flat[update.size :]).all():
        raise SiteError(401, "update: must be finite, got NaN or infinity")
    if norm > bounds.clipping_bound:
        update *= bounds.clipping_bound / norm
        counters[vector_layout.CLIPPED] = 1
    return InputVector(layout, flat, capped / bounds.weight_cap, counters)


def noised(
    layout: Layout, noise: SiteNoise, received: NDArrays, trained: NDArrays | None
) -> InputVector:
    """The contribution of a training round with distributed noise: every site weighs the same, and counts as one.

    Args:
        layout: of the vector.
        noise: the site's.
        received: the round's weights.
        trained: the site's; None where it has no examples: then it adds its noise alone, and nobody can tell. So it
            does with weights that are not finite.

    Raises:
        SiteError: 404, a tensor is missing, or of another shape or type.
    """
    update = np.zeros(layout.values)
    if trained is not None:
        _require_tensors(layout, trained)
        update = layout.flatten(trained).astype(np.float64) - layout.flatten(received)
        update *= min(1.0, noise.clipping_bound / max(finite_norm(update), 1e-300))
    return InputVector(layout, update, 1.0, {vector_layout.SITES: 1}, noise)


def evaluation(layout: Layout, counters: Mapping[str, float]) -> InputVector:
    """The contribution of an evaluation: the task's counters over the site's test examples, with noise or without."""
    return _counted(layout, vector_layout.task_counters(counters))


def statistics(
    layout: Layout,
    found: Statistics | None,
    bounds: tuple[Bound, ...],
    *,
    hides_site: bool = False,
) -> InputVector:
    """The contribution of the sums over standardised columns, in units of each column's bound.

    Args:
        layout: of the vector.
        found: of the site's training examples; None counts nothing.
        bounds: of the columns.
        hides_site: the number of examples stays here: the site counts as one example, of its means.
    """
    counters: dict[str, float] = {c.name: 0 for c in layout.counters}
    if found is not None:
        share = max(found.count, 1) if hides_site else 1
        counters[vector_layout.EXAMPLES] = min(found.count, 1) if hides_site else found.count
        sums = zip(bounds, found.total, found.total_of_squares, strict=True)
        for column, (bound, total, squares) in enumerate(sums):
            counters[f"{protocol.FEATURE_TOTAL}-{column}"] = total / share / bound.unit
            counters[f"{protocol.FEATURE_TOTAL_OF_SQUARES}-{column}"] = (
                squares / share / bound.unit**2
            )
    return _counted(layout, counters)


def rounding_key(seed: int, purpose: str, server_round: int, site: str) -> bytes:
    """The key of a site's stochastic rounding: the same whenever the round is done again."""
    words = f"{seed} {purpose} {server_round}".encode()
    return hashlib.sha256(framed(b"fedge rounding", words, site.encode())).digest()


def _require_tensors(layout: Layout, trained: NDArrays) -> None:
    """Hold tensors against the layout, in which another shape of the same size would pass for the right one."""
    for t in layout.tensors:
        found = trained.get(t.name)
        if found is None or found.shape != t.shape or found.dtype.kind != "f":
            got = "none" if found is None else f"{found.dtype} of shape {found.shape}"
            raise SiteError(
                404, f"{t.name[:80]}: must be floating point of shape {t.shape}, got {got}"
            )


def _counted(layout: Layout, counters: Mapping[str, float]) -> InputVector:
    return InputVector(layout, np.zeros(0, np.float32), 1.0, {**counters, vector_layout.SITES: 1})
