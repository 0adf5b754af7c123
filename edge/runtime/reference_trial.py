"""Runs the fp32 graph of a bundle in a child process before a running server opens it.

The fp32 graph has no fallback: one that kills its process would kill the server, one that gives NaN would answer no
request. At the start of a server that is noticed at once; at a change of bundles the old model must keep serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedge.edge.backends.backend import CPU, Shapes
from fedge.edge.backends.candidates import Candidate
from fedge.edge.backends.graph_file import refuse_external_data
from fedge.edge.backends.trial import try_out
from fedge.edge.outputs import parity
from fedge.edge.runtime.choice import fp32_artefact
from fedge.shared.bundle.bundle import Bundle
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.steps import Step

#: Seconds that the graph has to load and to answer.
DEADLINE: Final = 10.0
_BATCHES: Final = (1, 2)


def rehearse(
    bundle: Bundle,
    shapes: Shapes,
    steps: Sequence[Step],
    threads: int,
    *,
    deadline: float | None = None,
) -> None:
    """Run the fp32 graph on generated inputs in a child process.

    Args:
        bundle: as verified.
        shapes: of its network.
        steps: its preprocessing, complete.
        threads: CPU threads of one inference.
        deadline: seconds, ``DEADLINE`` where None.

    Raises:
        BundleError: 706, there is no such graph, or its weights lie elsewhere; 708, it is no graph; 709, a logit is
            not finite; 710, it crashed, took too long or failed.
    """
    artefact = fp32_artefact(bundle)
    candidate = Candidate(artefact, CPU)
    data = bundle.artefacts[artefact.name]
    refuse_external_data(data, artefact.name)
    deadline = DEADLINE if deadline is None else deadline
    batches = parity.examples(bundle.manifest, steps, _BATCHES)
    tried = try_out(candidate, data, batches, shapes, threads=threads, deadline=deadline)
    if not all(np.isfinite(logits).all() for logits in tried.logits):
        raise BundleError(
            709,
            f"{candidate.name}: must give finite logits on made-up inputs, got NaN or infinity",
        )
