"""installed.json: results of `fedge-edge install` on this device.

The record is not signed. It can only choose among signed artefacts, and name engines that were built here by
their hash; so it is refused if another user than the current one or root could have written it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedge.edge.backends.backend import PLACES
from fedge.edge.backends.candidates import Candidate
from fedge.shared.bundle.bundle import Bundle, Limits
from fedge.shared.bundle.manifest_artefacts import ENGINE_KINDS, KINDS, Artefact, whole
from fedge.shared.bundle.manifest_checks import PART as MANIFEST
from fedge.shared.errors import BundleError
from fedge.shared.files import open_regular, read_bounded, read_exactly, reason

FILE: Final = "installed.json"
BUNDLE: Final = "model.fedge"
FORMAT: Final = "fedge.installed/1"
_LIMIT: Final = 2**20
_FOLDER: Final = re.compile(r"[0-9]{6}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FIGURES: Final = (
    "p50_ms",
    "p99_ms",
    "peak_rss_mb",
    "max_abs_difference",
    "tolerance",
    "agreement",
)


@dataclass(frozen=True)
class Entry:
    """Results of one artefact at one place.

    Attributes:
        artefact: of the bundle, without its qualification there; or an engine that was built here.
        place: where it ran, one of ``backend.PLACES``.
        built: whether it is an engine that was built here and lies beside the bundle.
        qualified: whether it may serve.
        reason: why it may, or not, in one line.
        p50_ms, p99_ms: of one run with one example.
        peak_rss_mb: memory of the process that timed it, in MB of 10^6 bytes.
        max_abs_difference, tolerance: of two logits, against the fp32 graph on the CPU; and what was allowed.
        agreement: share of the inputs that get the same label.
    """

    artefact: Artefact
    place: str
    built: bool
    qualified: bool
    reason: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    peak_rss_mb: float | None = None
    max_abs_difference: float | None = None
    tolerance: float | None = None
    agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON values; a figure that was not measured is null."""
        return {**vars(self), "artefact": replace(self.artefact, qualification=None).to_json()}

    @property
    def candidate(self) -> Candidate:
        """The candidate that the runtime opens."""
        return Candidate(self.artefact, self.place)


@dataclass(frozen=True)
class DeviceRecord:
    """An installation: its bundle, its device, and its artefacts in order of preference.

    Attributes:
        folder: where bundle and engines lie.
        bundle_sha256: of the bundle's file.
        manifest_sha256: of its manifest, which pins all else in it.
        cpu: name of the processor.
        gpu: name of the GPU; empty where there was none.
        versions: of the runtimes that were used.
        threads: CPU threads of one inference, as timed.
        entries: the fastest qualified one first, then the others, then those that did not qualify.
    """

    folder: Path
    bundle_sha256: str
    manifest_sha256: str
    cpu: str
    gpu: str
    versions: Mapping[str, str]
    threads: int
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            "format": FORMAT,
            "folder": self.folder.name,
            "bundle_sha256": self.bundle_sha256,
            "manifest_sha256": self.manifest_sha256,
            "cpu": self.cpu,
            "gpu": self.gpu,
            "versions": dict(self.versions),
            "threads": self.threads,
            "artefacts": [entry.to_json() for entry in self.entries],
        }

    def check(self, bundle: Bundle, cpu: str, versions: Mapping[str, str]) -> None:
        """Refuse the record of another bundle, device or runtime.

        Args:
            bundle: as verified.
            cpu: name of this device's processor.
            versions: of the runtimes that are installed now.

        Raises:
            BundleError: 711, it is of another bundle, another device or another runtime.
        """
        manifest = next(part.sha256 for part in bundle.parts if part.name == MANIFEST)
        if manifest != self.manifest_sha256:
            raise BundleError(711, f"{FILE}: must be of this bundle, got another one's")
        if cpu != self.cpu:
            raise BundleError(711, f"{FILE}: must be of this device, got that of {self.cpu}")
        for name, version in versions.items():
            if self.versions.get(name) != version:
                raise BundleError(
                    711,
                    f"{FILE}: must be made with {name} {version}, got {self.versions.get(name)}",
                )

    def content(self, entry: Entry, bundle: Bundle) -> bytes:
        """The bytes of an entry's artefact, verified against its hash.

        Args:
            entry: of this record.
            bundle: as verified; holds the artefacts that were not built here.

        Raises:
            BundleError: 711, the engine was changed or is missing, or the bundle has no such artefact.
        """
        artefact = entry.artefact
        if not entry.built:
            data = bundle.artefacts.get(artefact.name, b"")
        elif artefact.bytes > Limits().artefact:
            raise BundleError(711, f"{artefact.name}: is larger than allowed")
        else:
            try:
                data = read_bounded(self.folder / artefact.name, artefact.bytes)
            except OSError as error:
                raise BundleError(
                    711, f"{artefact.name}: cannot be read ({reason(error)})"
                ) from None
        if hashlib.sha256(data).hexdigest() != artefact.sha256:
            raise BundleError(711, f"{artefact.name}: its SHA-256 differs from the recorded one")
        return data


def read_record(directory: Path) -> DeviceRecord:
    """Read and check the record of an installation.

    Raises:
        BundleError: 711, there is none, others may write it, or it does not parse.
    """
    path = directory / FILE
    try:
        file, size = open_regular(path)
        with file:
            refuse_foreign(os.fstat(file.fileno()))
            data = read_exactly(file, min(size, _LIMIT) + 1)
        if len(data) > _LIMIT:
            raise ValueError(f"must hold at most {_LIMIT} bytes")
        value = json.loads(data)
        if value["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        return DeviceRecord(
            folder=directory / _matching(_FOLDER, value["folder"]),
            bundle_sha256=_matching(_SHA256, value["bundle_sha256"]),
            manifest_sha256=_matching(_SHA256, value["manifest_sha256"]),
            cpu=str(value["cpu"]),
            gpu=str(value["gpu"]),
            versions={str(k): str(v) for k, v in value["versions"].items()},
            threads=whole(value["threads"]),
            entries=tuple(_entry(item) for item in value["artefacts"]),
        )
    except OSError as error:
        raise BundleError(711, f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(711, f"{path}: does not parse ({error!r:.120})") from None


def refuse_foreign(status: os.stat_result) -> None:
    """Refuse a file or folder that another user than this one or root could have written.

    Raises:
        ValueError: with the rule that is broken.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError("must belong to this user or root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("must be writable by its owner only (chmod go-w)")


def _entry(value: Mapping[str, Any]) -> Entry:
    artefact = Artefact.from_json(value["artefact"])
    _matching(_NAME, artefact.name)
    _matching(_SHA256, artefact.sha256)
    built, qualified, place = value["built"], value["qualified"], value["place"]
    if not (type(built) is type(qualified) is bool):
        raise ValueError("built and qualified must be true or false")
    engine = artefact.kind in ENGINE_KINDS
    if place not in PLACES or artefact.kind not in KINDS or engine != bool(artefact.engine):
        raise ValueError(f"place {place!r:.40} or kind {artefact.kind!r:.40} is not known")
    figures = {k: None if value[k] is None else float(value[k]) for k in _FIGURES}
    return Entry(artefact, place, built, qualified, str(value["reason"]), **figures)


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise ValueError(f"must match {pattern.pattern}, got {text!r:.80}")
    return text
