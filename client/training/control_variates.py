"""SCAFFOLD's control variate of a site: the only thing that a site remembers between rounds.

A file a round, because the server may do a round again or refuse its update: training starts from
the state of the last round that the server counted, never from one that it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedge.shared.errors import SiteError
from fedge.shared.files import write_atomically
from fedge.shared.wire.tensors import NDArrays, Spec, encode, read, specs

SUFFIX = ".safetensors"


class ControlStore:
    """Control variates of one run, in ``folder``, a file a round.

    Args:
        folder: of this site and this run alone; made when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, accepted_round: int, expected: Mapping[str, Spec]) -> NDArrays:
        """The variate after a round that the server counted; zeros for round 0.

        Raises:
            SiteError: 413, there is none, or it is of another model.
            RunError: 504, its file is damaged.
        """
        if accepted_round == 0:
            return {name: np.zeros(spec.shape, spec.dtype) for name, spec in expected.items()}
        path = self._path(accepted_round)
        if not path.is_file():
            raise SiteError(413, f"control/{path.name}: must exist, got nothing; was it deleted?")
        found = read(path)
        if specs(found) != dict(expected):
            raise SiteError(413, f"control/{path.name}: must hold this model's tensors, got others")
        return {name: found[name] for name in expected}

    def save(self, server_round: int, accepted_round: int, control: NDArrays) -> None:
        """Keep the variate after ``server_round``, then delete those that nobody can ask for again.

        These are the rounds before the last counted one, and those after it that were refused.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(server_round), encode(control))
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.stem.isdigit() and (
                int(path.stem) < accepted_round or accepted_round < int(path.stem) < server_round
            ):
                path.unlink(missing_ok=True)

    def _path(self, server_round: int) -> Path:
        return self.folder / f"{server_round:06d}{SUFFIX}"
