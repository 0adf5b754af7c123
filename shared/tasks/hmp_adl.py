"""Activities of daily living: a wrist accelerometer on 16 volunteers, 14 activities, read from a .tar.gz.

Human Motion Primitives (Bruno, Mastrogiovanni, Sgorbissa, Vernazza and Zaccaria, ICRA 2013,
https://doi.org/10.1109/ICRA.2013.6630784; UCI Machine Learning Repository,
https://doi.org/10.24432/C5PC7J). A recording is a text file of three codes a line, x, y and z at
32 Hz, 0 to 63 for -1.5 g to 1.5 g; the task's examples are in g, so another sensor can serve as
well. Folders ``*_MODEL`` hold copies and pieces of the other recordings, so they are left out. A
recording is never divided between training and test.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedge.shared.errors import DataError
from fedge.shared.files import open_regular, read_exactly, reason
from fedge.shared.models.recurrent import RecurrentClassifier
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.task import Table, Task

FILE: Final = "hmp.tar.gz"
ACTIVITIES: Final = (
    "brush_teeth", "climb_stairs", "comb_hair", "descend_stairs", "drink_glass", "eat_meat",
    "eat_soup", "getup_bed", "liedown_bed", "pour_water", "sitdown_chair", "standup_chair",
    "use_telephone", "walk",
)  # fmt: skip
AXES: Final = 3
MAX_CODE: Final = 63
#: The sensor's range in either direction, in g.
RANGE: Final = 1.5
#: Samples of a window, 4 s, and from one window's start to the next's.
WINDOW: Final = 128
HOP: Final = 64
#: Of so many recordings of a volunteer's activity, in order of time, the second is a test.
RECORDINGS: Final = 4

MAX_ARCHIVE_BYTES: Final = 16 << 20
MAX_PLAIN_BYTES: Final = 64 << 20
MAX_MEMBERS: Final = 10_000
MAX_RECORDING_BYTES: Final = 1 << 20

_MODEL: Final = "_MODEL"
_PREFIX: Final = "Accelerometer-"
_NAME: Final = re.compile(
    _PREFIX + r"(\d{4}(?:-\d\d){5})-(" + "|".join(ACTIVITIES) + r")-([fm][1-9]\d?)\.txt"
)
#: A whole recording as the volunteers' files are written; others are read line by line.
_LINES: Final = re.compile(rb"(?:\d{1,2} \d{1,2} \d{1,2} ?(?:\r?\n|\Z))*")
_LINE: Final = re.compile(rb"\s*(\d{1,2})\s+(\d{1,2})\s+(\d{1,2})\s*")


class Recording(NamedTuple):
    """One recording: its volunteer, activity and start; samples ``(n, 3)`` of uint8."""

    volunteer: str
    activity: str
    time: str
    samples: NDArray[Any]


def load(path: Path | None = None) -> Table:
    """Read the archive ``path``, or the archive ``hmp.tar.gz`` in the folder ``path``.

    Windows are ``(n, 128, 3)`` in g; a site is a volunteer. A recording shorter than a window is
    left out.

    Raises:
        DataError: 301, the archive is missing; 302, it does not follow the format.
    """
    if path is None:
        raise DataError(301, f"data.path: must be {FILE} or its folder, got nothing")
    file = path / FILE if path.is_dir() else path
    groups: defaultdict[tuple[str, str], list[Recording]] = defaultdict(list)
    for recording in sorted(_recordings(file), key=lambda r: r[:3]):
        groups[recording.volunteer, recording.activity].append(recording)
    parts, labels, sites, tests = [], [], [], []
    for (volunteer, activity), recordings in groups.items():
        for place, recording in enumerate(recordings):
            recording_windows = windows(recording.samples)
            parts.append(recording_windows)
            labels.append(
                np.full(len(recording_windows), ACTIVITIES.index(activity), dtype=np.int64)
            )
            sites.append(np.full(len(recording_windows), volunteer))
            tests.append(np.full(len(recording_windows), place % RECORDINGS == 1))
    if not parts:
        raise DataError(
            302, f"{file.name}: must hold recordings of {WINDOW} samples or more, got none"
        )
    return Table(
        features=acceleration(np.concatenate(parts)),
        labels=np.concatenate(labels),
        sites=np.concatenate(sites),
        test=np.concatenate(tests),
    )


def acceleration(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Codes 0 to 63 in g, -1.5 to 1.5, by the rule of the data's manual."""
    return codes.astype(np.float32) * np.float32(2 * RANGE / MAX_CODE) - np.float32(RANGE)


def windows(samples: NDArray[Any]) -> NDArray[Any]:
    """Samples ``(n, 3)``, n 128 or more, to overlapping windows ``(w, 128, 3)``; a rest is left out."""
    views = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=0)
    return views[::HOP].transpose(0, 2, 1)


def _recordings(file: Path) -> Iterator[Recording]:
    """All recordings of a window's length or more, in the archive's order."""
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(_plain(file)), mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                if count > MAX_MEMBERS:
                    raise DataError(
                        302, f"{file.name}: must hold at most {MAX_MEMBERS} members, got more"
                    )
                folder, _, name = member.name.rpartition("/")
                if not name.startswith(_PREFIX) or folder.endswith(_MODEL):
                    continue
                where = f"{file.name}, {name[:100]}"
                match = _NAME.fullmatch(name)
                if match is None:
                    raise DataError(
                        302,
                        f"{where}: must be named {_PREFIX}[time]-[activity]-[volunteer].txt",
                    )
                if name in seen:
                    raise DataError(302, f"{where}: must be in the archive once, got it twice")
                seen.add(name)
                samples = _samples(_content(archive, member, where), where)
                if len(samples) >= WINDOW:
                    yield Recording(match[3], match[2], match[1], samples)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            302, f"{file.name}: must be a tar archive, got {type(error).__name__}"
        ) from None


def _plain(file: Path) -> bytes:
    """The archive, decompressed in memory; nothing is written to disk."""
    try:
        packed_stream, size = open_regular(file)
        with packed_stream:
            packed = read_exactly(packed_stream, min(size, MAX_ARCHIVE_BYTES + 1))
    except OSError as error:
        raise DataError(301, f"{file}: must be a readable file, got {reason(error)}") from None
    if len(packed) > MAX_ARCHIVE_BYTES:
        raise DataError(302, f"{file.name}: must be at most {MAX_ARCHIVE_BYTES} bytes, got more")
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            plain = stream.read(MAX_PLAIN_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            302, f"{file.name}: must be compressed by gzip, got {type(error).__name__}"
        ) from None
    if len(plain) > MAX_PLAIN_BYTES:
        raise DataError(
            302, f"{file.name}: must unpack to at most {MAX_PLAIN_BYTES} bytes, got more"
        )
    return plain


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    # A sparse file would unpack to more bytes than the archive has.
    if not member.isreg() or member.issparse():
        raise DataError(302, f"{where}: must be a plain file, got another kind")
    if member.size > MAX_RECORDING_BYTES:
        raise DataError(
            302, f"{where}: must be at most {MAX_RECORDING_BYTES} bytes, got {member.size}"
        )
    stream = archive.extractfile(member)
    data = stream.read() if stream else b""
    if len(data) != member.size:
        raise DataError(302, f"{where}: must hold {member.size} bytes, got {len(data)}")
    return data


def _samples(data: bytes, where: str) -> NDArray[np.uint8]:
    """Codes ``(n, 3)`` of a recording's lines."""
    if _LINES.fullmatch(data):
        codes = np.asarray(data.split(), dtype="S2").astype(np.uint8).reshape(-1, AXES)
        if not codes.size or codes.max() <= MAX_CODE:
            return codes
    rows = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        row = [int(code) for code in match.groups()] if match else []
        if not row or max(row) > MAX_CODE:
            raise DataError(
                302,
                f"{where} line {number}: must hold {AXES} codes 0 to {MAX_CODE},"
                f" got {line[:40].decode('ascii', 'replace')!r}",
            )
        rows.append(row)
    return np.asarray(rows, dtype=np.uint8).reshape(-1, AXES)


def network() -> nn.Module:
    """Two layers of LSTM over a window of three axes to 14 logits."""
    return RecurrentClassifier(features=AXES, classes=len(ACTIVITIES), hidden=32, layers=2)


TASK = Task(
    name="hmp-adl",
    summary=f"14 activities from a wrist accelerometer, 16 volunteers ({FILE} in data.path)",
    input=InputSchema(shape=(WINDOW, AXES)),
    output=OutputSchema(
        labels=tuple(a.replace("_", " ") for a in ACTIVITIES), activation="softmax"
    ),
    preprocessing=(),
    network=network,
    loss=softmax_loss,
    counters=softmax_counters,
    metrics=(ACCURACY, LOSS),
    load=load,
)
