"""Requests about the final model are untrusted input, validated here: digests and numbers, never a graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from flwr.app import ConfigRecord, RecordDict
from pydantic import ValidationError

from fedge.client import requests
from fedge.client.requests import Terms
from fedge.client.training import onnx_runs
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
        request: content of the message.
        config: its configuration record.
        terms: of the request.
        received: weights by name.
        section: the run's calibration section.
        graph: SHA-256 (hex) of the fp32 graph that it is about.
    """

    request: RecordDict
    config: ConfigRecord
    terms: Terms
    received: NDArrays
    section: CalibrationSection
    graph: str

    @classmethod
    def parse(
        cls, request: RecordDict, task: str, terms: Terms, received: NDArrays
    ) -> CalibrationRequest:
        """Read the parts that both kinds of request have in common.

        Args:
            request: content of the message.
            task: name of the site's task.
            terms: of the request.
            received: weights by name.

        Raises:
            SiteError: 414, a value is missing or not allowed.
        """
        config = requests.config_of(request, task)
        if unknown := sorted(set(request) - _RECORDS):
            raise requests.refuse("records", f"of {', '.join(sorted(_RECORDS))}", unknown[0])
        graph = config.get(protocol.GRAPH)
        if not isinstance(graph, str) or not _DIGEST.fullmatch(graph):
            raise requests.refuse(protocol.GRAPH, "SHA-256 in hexadecimal", graph)
        return cls(request, config, terms, received, _section_of(config), graph)

    @property
    def running(self) -> onnx_runs.Terms:
        """Deadline and threads of the graphs."""
        longest = min(self.section.deadline, onnx_runs.MAX_DEADLINE)
        return onnx_runs.Terms(longest, self.terms.threads)

    def candidates(self) -> dict[str, str]:
        """Kinds of candidate graphs, each with the SHA-256 (hex) that it must have.

        Raises:
            SiteError: 414, a kind is unknown or listed twice, or a digest is not SHA-256.
        """
        kinds = self.config.get(protocol.CANDIDATES)
        digests = self.config.get(protocol.CANDIDATE_DIGESTS)
        known = CANDIDATES
        if not isinstance(kinds, list) or not 1 <= len(kinds) <= len(known):
            got = len(kinds) if isinstance(kinds, list) else kinds
            raise requests.refuse(protocol.CANDIDATES, f"1 to {len(known)} kinds", got)
        if len(set(kinds)) != len(kinds) or not set(kinds) <= set(known):
            expected = f"different ones of {', '.join(known)}"
            raise requests.refuse(protocol.CANDIDATES, expected, kinds)
        listed = [str(d) for d in digests] if isinstance(digests, list) else []
        if len(listed) != len(kinds) or not all(_DIGEST.fullmatch(d) for d in listed):
            expected = f"{len(kinds)} of SHA-256 in hexadecimal"
            raise requests.refuse(protocol.CANDIDATE_DIGESTS, expected, digests)
        return dict(zip(map(str, kinds), listed, strict=True))

    def ranges(self, tensors: tuple[str, ...]) -> Ranges | None:
        """The merged range (low, high) of each tensor; None where the request holds none.

        Raises:
            SiteError: 414, there is not one a tensor, a bound is not finite, or low is above high.
        """
        keys = (protocol.RANGE_LOW, protocol.RANGE_HIGH)
        if not any(key in self.config for key in keys):
            return None
        low, high = (requests.floats(self.config, key, len(tensors)) for key in keys)
        limit = EDGES[-1]
        for pair in zip(low, high, strict=True):
            if not -limit <= pair[0] <= pair[1] <= limit:
                expected = f"at most {protocol.RANGE_HIGH}, both within {limit:g}"
                raise requests.refuse(protocol.RANGE_LOW, expected, pair)
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
