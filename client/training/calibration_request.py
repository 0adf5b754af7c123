"""What a server asks about the final model, read with suspicion: digests and numbers, and never a graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from flwr.app import ConfigRecord, RecordDict
from pydantic import ValidationError

from fedge.client import requests
from fedge.client.requests import Terms
from fedge.client.training import graph_runs
from fedge.shared import protocol
from fedge.shared.compile.candidates import CANDIDATES, Ranges
from fedge.shared.compile.ranges import EDGES
from fedge.shared.config.sections import CalibrationSection
from fedge.shared.errors import SiteError
from fedge.shared.secagg import messages
from fedge.shared.wire.tensors import NDArrays

_REFUSED: Final = 414
_RECORDS: Final = frozenset((protocol.CONFIG, protocol.ARRAYS, messages.SECURE))
_MAX_SECTION: Final = 1000
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CalibrationRequest:
    """A request about the final model.

    Attributes:
        request: itself.
        config: of it.
        terms: of it.
        received: its weights.
        section: the run's.
        graph: SHA-256 (hex) of the fp32 graph that it is about.
    """

    request: RecordDict
    config: ConfigRecord
    terms: Terms
    received: NDArrays
    section: CalibrationSection
    graph: str

    @classmethod
    def of(
        cls, request: RecordDict, task: str, terms: Terms, received: NDArrays
    ) -> CalibrationRequest:
        """Read what both kinds of request have in common.

        Raises:
            SiteError: 414.
        """
        config = requests.config_of(request, task)
        if unknown := sorted(set(request) - _RECORDS):
            raise requests.refuse("records", f"of {', '.join(sorted(_RECORDS))}", unknown[0])
        graph = config.get(protocol.GRAPH)
        if not isinstance(graph, str) or not _DIGEST.fullmatch(graph):
            raise requests.refuse(protocol.GRAPH, "SHA-256 in hexadecimal", graph)
        return cls(request, config, terms, received, _section_of(config), graph)

    @property
    def running(self) -> graph_runs.Terms:
        """How graphs are run."""
        longest = min(self.section.deadline, graph_runs.MAX_DEADLINE)
        return graph_runs.Terms(longest, self.terms.threads)

    def candidates(self) -> dict[str, str]:
        """Kinds of graphs, each with the SHA-256 (hex) that it must have.

        Raises:
            SiteError: 414, a kind is not known or there twice, or a digest is none.
        """
        kinds = self.config.get(protocol.CANDIDATES)
        digests = self.config.get(protocol.CANDIDATE_DIGESTS)
        known = CANDIDATES
        if not isinstance(kinds, list) or not 1 <= len(kinds) <= len(known):
            got = len(kinds) if isinstance(kinds, list) else kinds
            raise requests.refuse(protocol.CANDIDATES, f"1 to {len(known)} kinds", got)
        if len(set(kinds)) != len(kinds) or not set(kinds) <= set(known):
            wanted = f"different ones of {', '.join(known)}"
            raise requests.refuse(protocol.CANDIDATES, wanted, kinds)
        told = [str(d) for d in digests] if isinstance(digests, list) else []
        if len(told) != len(kinds) or not all(_DIGEST.fullmatch(d) for d in told):
            wanted = f"{len(kinds)} of SHA-256 in hexadecimal"
            raise requests.refuse(protocol.CANDIDATE_DIGESTS, wanted, digests)
        return dict(zip(map(str, kinds), told, strict=True))

    def ranges(self, tensors: tuple[str, ...]) -> Ranges | None:
        """The merged range of each tensor; None where the request holds none.

        Raises:
            SiteError: 414, they are not one a tensor, not finite, or go downwards.
        """
        keys = (protocol.RANGE_LOW, protocol.RANGE_HIGH)
        if not any(key in self.config for key in keys):
            return None
        low, high = (requests.floats(self.config, key, len(tensors)) for key in keys)
        most = EDGES[-1]
        for pair in zip(low, high, strict=True):
            if not -most <= pair[0] <= pair[1] <= most:
                wanted = f"at most {protocol.RANGE_HIGH}, both within {most:g}"
                raise requests.refuse(protocol.RANGE_LOW, wanted, pair)
        return dict(zip(tensors, zip(low, high, strict=True), strict=True))


def _section_of(config: ConfigRecord) -> CalibrationSection:
    text = config.get(protocol.CALIBRATION)
    if not isinstance(text, str) or len(text) > _MAX_SECTION:
        raise requests.refuse(protocol.CALIBRATION, "a section as JSON", type(text).__name__)
    try:
        return CalibrationSection.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (protocol.CALIBRATION, *first["loc"]))
        raise SiteError(_REFUSED, f"{where}: {first['msg'][:200]}") from None
