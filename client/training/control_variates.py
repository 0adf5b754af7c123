"""SCAFFOLD's control variate of a site: the only state that a site keeps between rounds.

One file a round, because the server may repeat a round or refuse its update: training starts from
the state of the last round whose update the server accepted.
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
    """Control variates of one run, one file a round.

    Args:
        folder: of this site and this run alone; created when first written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, accepted_round: int, expected: Mapping[str, Spec]) -> NDArrays:
        """The control variate after a round whose update the server accepted; zeros for round 0.

        Args:
            accepted_round: that round.
            expected: shape and dtype of each tensor.

        Raises:
            SiteError: 413, it is missing, or is of another model.
            RunError: 504, its file is damaged.
        """
        if accepted_round == 0:
            return {name: np.zeros(spec.shape, spec.dtype) for name, spec in expected.items()}
        path = self._path(accepted_round)
        if not path.is_file():
            raise SiteError(413, f"control/{path.name}: must exist, got nothing; was it deleted?")
        control = read(path)
        if specs(control) != dict(expected):
            raise SiteError(413, f"control/{path.name}: must hold this model's tensors, got others")
        return {name: control[name] for name in expected}

    def save(self, server_round: int, accepted_round: int, control: NDArrays) -> None:
        """Write the control variate after ``server_round``, then delete those that are no longer needed.

        These are the rounds before the last accepted one, and those after it that were refused.

        Args:
            server_round: the round just trained.
            accepted_round: the last round whose update the server accepted, 0 for none.
            control: tensor by parameter name.
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
