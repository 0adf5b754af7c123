"""compile.json: the record of a compilation, with kept artefacts and those dropped with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.server.runs import trained_model
from fedge.shared.bundle.manifest_artefacts import Artefact, Qualification, whole
from fedge.shared.errors import ReleaseError, RunError

FILE: Final = "compile.json"
FORMAT: Final = "fedge.compile/1"
#: Largest artefact that is read again, in bytes; a bundle takes no larger one.
MAX_BYTES: Final = 1536 * 2**20


@dataclass(frozen=True)
class Dropped:
    """An artefact that was not kept.

    Attributes:
        name, kind: as it would have been called.
        reason: in one line.
        bytes: its size; 0 where it was never built.
        qualification: result of its qualification; None where it was not built.
        on_device: whether nothing is wrong with it, as the device builds it.
    """

    name: str
    kind: str
    reason: str
    bytes: int = 0
    qualification: Qualification | None = None
    on_device: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; ``on_device`` has a key where it is so."""
        plain = {k: v for k, v in vars(self).items() if k not in ("qualification", "on_device")}
        plain |= {"on_device": True} if self.on_device else {}
        return plain | (
            {"qualification": self.qualification.to_json()} if self.qualification else {}
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Dropped:
        """Read what ``to_json`` wrote."""
        qualification = value.get("qualification")
        return cls(
            str(value["name"]),
            str(value["kind"]),
            str(value["reason"]),
            whole(value["bytes"]),
            None if qualification is None else Qualification.from_json(qualification),
            value.get("on_device") is True,
        )


@dataclass(frozen=True)
class Compiled:
    """The record of one `fedge compile`.

    Attributes:
        task: name of the task.
        model_sha256: of the safetensors file that was compiled.
        targets: as requested.
        fedge: version that compiled.
        device: where the artefacts were qualified.
        kept: artefacts, the fp32 graph first.
        dropped: those that were requested and not kept.
        failed: targets without any artefact of their own, as building failed.
    """

    task: str
    model_sha256: str
    targets: tuple[str, ...]
    fedge: str
    device: str
    kept: tuple[Artefact, ...]
    dropped: tuple[Dropped, ...]
    failed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            "format": FORMAT,
            "task": self.task,
            "model_sha256": self.model_sha256,
            "targets": list(self.targets),
            "fedge": self.fedge,
            "device": self.device,
            "kept": [artefact.to_json() for artefact in self.kept],
            "dropped": [dropped.to_json() for dropped in self.dropped],
            "failed": list(self.failed),
        }


def load(folder: Path) -> Compiled:
    """Load the record from the output folder of `fedge compile`.

    Raises:
        ReleaseError: 610, there is none, or it does not parse.
    """
    try:
        value = trained_model.read_json(folder / FILE)
        if value["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        return Compiled(
            task=str(value["task"]),
            model_sha256=str(value["model_sha256"]),
            targets=tuple(str(target) for target in value["targets"]),
            fedge=str(value["fedge"]),
            device=str(value["device"]),
            kept=tuple(Artefact.from_json(a) for a in value["kept"]),
            dropped=tuple(Dropped.from_json(d) for d in value["dropped"]),
            failed=tuple(str(target) for target in value.get("failed", ())),
        )
    except RunError as error:
        raise ReleaseError(610, f"{folder}: {error.message}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(610, f"{folder / FILE}: does not parse ({error!r:.120})") from None


def content(folder: Path, artefact: Artefact) -> bytes:
    """Read a kept artefact and check its size and SHA-256 against the record.

    Raises:
        ReleaseError: 610, the file is missing, too large or not the recorded one.
    """
    path = folder / artefact.name
    try:
        if path.stat().st_size != artefact.bytes or artefact.bytes > MAX_BYTES:
            raise ReleaseError(610, f"{path}: must have {artefact.bytes} bytes, got others")
        data = path.read_bytes()
    except OSError as error:
        raise ReleaseError(610, f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != artefact.sha256:
        raise ReleaseError(610, f"{path}: must be what {FILE} lists, got another SHA-256")
    return data


def dump(compiled: Compiled) -> bytes:
    """The record as bytes of compile.json."""
    return (json.dumps(compiled.to_json(), indent=2, allow_nan=False) + "\n").encode()
