"""Writes an installation to a partial folder, then puts it in use in one step: readers find the old or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedge.edge.installation.folder import DIGITS, slots
from fedge.edge.installation.qualification import Subject
from fedge.edge.installation.record import BUNDLE, FILE, DeviceRecord, read_record
from fedge.shared.bundle.bundle import Limits
from fedge.shared.errors import BundleError, ConfigError, UsageError
from fedge.shared.files import flush_folder, open_regular, reason, take_lock

TIMINGS: Final = ".timing-cache"
_PARTIAL: Final = ".partial"
_LOCK: Final = ".lock"
#: What an installation that failed or was killed leaves in a folder that had none before.
_LEFT: Final = re.compile(
    r"\.lock|[0-9]{6}\.partial|\.?[a-z-]+\.timing-cache(\.tmp)?|\.installed\.json\.tmp"
)
_CHUNK: Final = 2**20


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Create the folder if it is missing, and lock it against other installations.

    Raises:
        ConfigError: 206, it holds something other than an installation; nothing was changed.
        UsageError: 107, it cannot be written, or another installation is under way.
    """
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
        if foreign := _foreign(directory):
            raise ConfigError(
                206,
                f"{directory}: must be new, empty or an earlier installation, got {foreign!r:.80} in it",
                remedy="Give a new folder to --into, or one that nothing else uses.",
            )
        lock = take_lock(directory / _LOCK, mode=0o644)
    except BlockingIOError:
        raise UsageError(107, f"{directory}: another installation is under way") from None
    except OSError as error:
        raise UsageError(107, f"{directory}: cannot be written ({reason(error)})") from None
    with lock:
        yield


def _foreign(directory: Path) -> str:
    """Name of a file that no installation has written; empty if there is none, or if the folder is an installation.

    A bundle in a numbered folder is an installation even if its record is damaged: installing again repairs that.
    """
    if any((folder / BUNDLE).is_file() for folder in slots(directory)) or _recorded(directory):
        return ""
    names = sorted(path.name for path in directory.iterdir())
    return next((name for name in names if not _LEFT.fullmatch(name)), "")


@contextmanager
def slot(directory: Path) -> Iterator[Path]:
    """A new partial folder beside the numbered ones; removed at the end of the block unless ``commit`` renames it."""
    for left in directory.glob("[0-9]" * DIGITS + _PARTIAL):
        shutil.rmtree(left, ignore_errors=True)
    last = slots(directory)
    number = 1 + (int(last[-1].name) if last else 0)
    partial = directory / f"{number:0{DIGITS}}{_PARTIAL}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_bundle(source: Path, folder: Path) -> str:
    """Copy a bundle into a slot and return its SHA-256.

    Raises:
        BundleError: 701, it cannot be read; 705, it is larger than allowed.
    """
    limit = Limits().total
    try:
        file, size = open_regular(source)
    except OSError as error:
        raise BundleError(701, f"{source}: cannot be read ({reason(error)})") from None
    digest, count = hashlib.sha256(), 0
    with file, (folder / BUNDLE).open("wb") as copy:
        while chunk := file.read(_CHUNK):
            count += len(chunk)
            if max(count, size) > limit:
                raise BundleError(705, f"archive: must be at most {limit} bytes")
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()


def commit(directory: Path, partial: Path, record: DeviceRecord, built: Iterable[Subject]) -> None:
    """Write the engines and the record, and put the slot in use; older ones but the previous one are removed.

    Args:
        directory: of the installation.
        partial: the slot, with the bundle in it.
        record: of what is installed; its folder is where ``partial`` will be.
        built: engines that were built here.
    """
    before = _recorded(directory)
    for subject in built:
        if subject.data:
            _write(partial / subject.candidate.artefact.name, subject.data)
    flush_folder(partial)
    partial.rename(record.folder)
    text = json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n"
    write_replacing(directory / FILE, text.encode())
    for folder in slots(directory):
        if folder not in (record.folder, before):
            shutil.rmtree(folder, ignore_errors=True)


def final(partial: Path) -> Path:
    """Path of a slot once it is committed."""
    return partial.with_name(partial.name.removesuffix(_PARTIAL))


def _recorded(directory: Path) -> Path | None:
    """The slot in use; None where no record says so."""
    with contextlib.suppress(BundleError):
        return read_record(directory).folder
    return None


def write_replacing(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may change, in one step: it holds ``data`` or its previous content."""
    aside = path.with_name(f".{path.name}.tmp")
    _write(aside, data)
    aside.replace(path)
    flush_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    """A file that its owner alone may change, whatever the umask says, as ``refuse_foreign`` requires."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
