"""The device's part of a demonstration: ``fedge-edge`` as a child process, in an environment of its own.

This process holds torch and Flower; the point is to show that the device does not. So everything here uses the
command line of a device, and the environment's packages are listed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import UsageError

#: Seconds that any one call on the device may take.
_DEADLINE = 120.0

_INVENTORY = """
import importlib.metadata as m, importlib.util as u, json
names = {d.metadata["Name"].lower() for d in m.distributions()} - {"pip", "setuptools", "wheel", "fedge"}
print(json.dumps({"packages": len(names), **{k: u.find_spec(k) is not None for k in ("torch", "flwr")}}))
"""


@dataclass(frozen=True)
class Device:
    """An environment with ``fedge[edge]`` in it.

    Attributes:
        folder: its ``bin`` folder, which holds ``fedge-edge`` and ``python``.
    """

    folder: Path

    def inventory(self) -> dict[str, Any]:
        """Number of packages besides fedge, and whether torch and flwr are among them."""
        inventory: dict[str, Any] = json.loads(
            _output([str(self.folder / "python"), "-c", _INVENTORY])
        )
        return inventory

    def verify(self, bundle: Path, trust: Path) -> dict[str, Any]:
        """Output of ``fedge-edge verify --json`` for a bundle, with the public key ``trust``."""
        return dict(json.loads(self._edge("verify", bundle, trust, "--json")))

    def bench(self, bundle: Path, trust: Path) -> dict[str, Any]:
        """Output of ``fedge-edge bench --json`` for a bundle, with the public key ``trust``."""
        return dict(json.loads(self._edge("bench", bundle, trust, "--json")))

    def predict(self, bundle: Path, trust: Path, examples: Path) -> tuple[NDArray[Any], float]:
        """Run ``fedge-edge predict``.

        Args:
            bundle: path of the bundle.
            trust: path of the public key that must have signed it.
            examples: a .npy file of n raw examples.

        Returns:
            Class indices ``(n,)`` of int64, and the elapsed seconds.
        """
        started = time.monotonic()
        text = self._edge("predict", bundle, trust, "--input", str(examples))
        seconds = time.monotonic() - started
        return np.asarray([json.loads(line)["index"] for line in text.splitlines()]), seconds

    def _edge(self, command: str, bundle: Path, trust: Path, *more: str) -> str:
        edge = str(self.folder / "fedge-edge")
        return _output([edge, command, str(bundle), "--trust", str(trust), *more])


def find(given: Path | None) -> Device:
    """The device's environment: the given one, else .venv-edge beside this one, else this one.

    Args:
        given: bin folder of an environment, or None.

    Raises:
        UsageError: 105, the folder given holds no ``fedge-edge``.
    """
    own = Path(sys.prefix)
    if given is not None:
        if not (given / "fedge-edge").is_file():
            raise UsageError(
                105, f"--edge: must be a bin folder with fedge-edge in it, got {given}"
            )
        return Device(given)
    for folder in (own.parent / ".venv-edge" / "bin", own / "bin"):
        if (folder / "fedge-edge").is_file():
            return Device(folder)
    raise UsageError(
        105, f"--edge: must be a bin folder with fedge-edge in it, got none beside {own}"
    )


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(106, f"{Path(command[0]).name}: must end within {_DEADLINE:g} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(106, f"{Path(command[0]).name}: must succeed, got {last}")
    return done.stdout
