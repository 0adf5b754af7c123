"""Canaries in rounds with the server's noise, and in updates that carry all of their noise themselves.

``central``: one round in which everybody is drawn, by the code of a real one. ``central-mf``: a whole run, as it is the
run that is promised to protect and a single round's noise is far more than that. Each canary has its turn first, so
that it has the most turns, and sends the same in all of them. With s what one of these adds to C x, and y what the
rounds gave out, the scores are of s^T C y / |s|^2, the weighted sum of the rounds that has the least noise: its
deviation is the noise multiplier.

``local``: each site's update goes out by itself. Two data sets of a site may be 2C apart, so the coin says whether a
canary or its negation is sent, and a guess is made from that site's release alone.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.server.aggregation.central_noise import CentralNoise
from fedge.server.aggregation.updates import Update
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.mechanisms import local, toeplitz
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.simulations.audit.canary_vectors import NAME, Canaries, Listener

#: Turns of a canary from which on it has fewer parameters, so that an audit of usual runs takes a minute or so; and
#: rounds with noise alone that take as long as one turn.
_LONG: Final = 3
_QUIET: Final = 8
#: Not fewer than these: with what canaries have in common, little noise would look like more.
_MIN_PARAMETERS: Final = 20_000


def parameters(section: PrivacySection, rounds: int, wanted: int) -> int:
    """How many coordinates a canary has: as many as wanted, but fewer where a long run is audited."""
    if section.mechanism != "central-mf":
        return wanted
    turns = max(-(-rounds // section.min_separation), -(-rounds // _QUIET), _LONG)
    return min(wanted, max(wanted * _LONG // turns, _MIN_PARAMETERS))


def central(
    canaries: Canaries,
    section: PrivacySection,
    rounds: int,
    factor: float,
    entropy: Entropy,
    listener: Listener,
) -> NDArray[np.float64]:
    """What the model's readers learn of the sum of updates, ``(size,)``, over all rounds as said above.

    Args:
        canaries: sites with an update.
        section: with a mechanism of the server's.
        rounds: of the audited run, 1 with ``central``.
        factor: what the noise multiplier is multiplied by.
        entropy: of the noise.
        listener: of the progress.
    """
    apart, bands = section.min_separation, None
    if section.mechanism == "central-mf":
        bands = section.bands or toeplitz.best_bands(rounds, -(-rounds // apart), apart)
    weights = _weights(rounds, apart, bands or 1)
    less = section.model_copy(
        update={
            "noise_multiplier": factor * (section.noise_multiplier or 0),
            "sampling_rate": 1.0,
            "bands": bands,
        }
    )
    still = canaries.still()
    server = CentralNoise(less, rounds, still, entropy=entropy)
    # Only the first of each round of turns is a canary; nobody else has an update.
    names = [f"site-{i:06d}" for i in range(canaries.inside.size * apart)]
    coming = {
        names[i * apart]: canaries.update(int(i), section.clipping_bound)
        for i in np.flatnonzero(canaries.inside)
    }
    found = np.zeros(canaries.size)
    for index in range(rounds):
        listener("rounds", index, rounds)
        asked = server.invite(index + 1, coming, names)
        updates = [Update(name, coming[name], 1, None) for name in asked]
        told = server.release(index + 1, updates, still, len(names)).result.mean[NAME]
        found += weights[index] * server.expected(len(names)) * told.astype(np.float64)
    return found


def _weights(rounds: int, apart: int, bands: int) -> NDArray[np.float64]:
    """What each round's release counts in C^T s / |s|^2, ``(rounds,)``; those of a canary's turns add up to 1."""
    coefficients = toeplitz.coefficients(rounds, bands)
    column = np.zeros(rounds)
    for start in range(0, rounds, apart):
        column[start : start + bands] += coefficients[: rounds - start]
    found = np.array([coefficients[: rounds - k] @ column[k : k + bands] for k in range(rounds)])
    return found / float(column @ column)


def local_scores(
    canaries: Canaries,
    section: PrivacySection,
    factor: float,
    entropy: Entropy,
    listener: Listener,
) -> NDArray[np.float64]:
    """A score for each site, ``(canaries,)``, from its own release: about 1 for its canary and 0 for the negation.

    Raises:
        ConfigError: 201, the noise does not fit its grid.
    """
    still, bound = canaries.still(), section.clipping_bound
    found = np.empty(canaries.inside.size)
    for index, inside in enumerate(canaries.inside):
        listener("sites", index, canaries.inside.size)
        trained = canaries.update(index, bound)
        if not inside:
            np.negative(trained[NAME], out=trained[NAME])
        try:
            sent = local.noised_weights(
                still, trained, bound, factor * (section.noise_multiplier or 0), entropy
            )
        except ValueError as error:
            raise ConfigError(201, f"privacy: {error}") from None
        along = float(canaries.unit(index) @ sent[NAME].astype(np.float64)) / bound
        found[index] = (along + 1) / 2
    return found
