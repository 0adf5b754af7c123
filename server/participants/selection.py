"""Which sites take part in a round."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

from fedge.server.participants.members import Member
from fedge.shared.config.federation import Config


def cohort(
    members: Mapping[str, Member], config: Config, server_round: int, min_sites: int
) -> list[str]:
    """Sample the sites of a round, as a function of (seed, round) alone; required sites are always among them.

    Args:
        members: site -> member, to sample from.
        config: configuration of the run.
        server_round: from 1.
        min_sites: minimum size of the sample, where so many members are available.

    Returns:
        Names of the sites, sorted.
    """
    names = sorted(members)
    size = min(
        len(names),
        max(int(len(names) * config.round.fraction_train), config.round.min_sites, min_sites),
    )
    seed = hashlib.sha256(f"fedge cohort {config.run.seed} {server_round}".encode()).digest()
    sampled = random.Random(seed).sample(names, size)  # noqa: S311 - reproducible by intent, no secret
    return sorted(set(sampled) | (set(config.round.require_sites) & set(names)))
