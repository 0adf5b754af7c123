"""Builds an engine in a child process, so that a crash or hang of the builder ends only the child.

Graph, timing cache and engine pass through files in a private temporary folder; the child writes a line of JSON for
each step and one for the outcome.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from fedge.shared.error_catalogue import CATALOGUE
from fedge.shared.errors import ReleaseError
from fedge.shared.files import read_bounded

CHILD: Final = "fedge.shared.compile.tensorrt_child"
GRAPH: Final = "graph.onnx"
CACHE: Final = "timing-cache"
ENGINE: Final = "model.engine"
REQUEST: Final = "request.json"
#: Timing for TensorRT on a small device takes minutes.
DEADLINE: Final = 1800.0
#: Largest engine or timing cache, in bytes; largest error output; longest line.
_MAX_BYTES: Final = 1536 * 2**20
_MAX_WORDS: Final = 64 * 2**10
_MAX_LINE: Final = 2**16


def build_in_child(
    onnx: bytes,
    *,
    runtime: str,
    capabilities: Sequence[int] = (),
    sizes: Mapping[str, Sizes] | None = None,
    timing_cache: bytes | None = None,
    listener: Listener | None = None,
    deadline: float = DEADLINE,
    command: Sequence[str] = (sys.executable, "-P", "-m", CHILD),
) -> Built:
    """Run ``tensorrt.build`` in a child process.

    Args:
        onnx: the graph.
        runtime: as for ``build``, like the next four.
        capabilities: GPUs that the engine is for.
        sizes: of the open axes.
        timing_cache: of an earlier build.
        listener: called in this thread with the phase and the share that is done.
        deadline: seconds until the child is ended.
        command: that starts the child; the folder is appended.

    Raises:
        ReleaseError: as ``build``; 611 too where the child crashes or takes too long.
        ValueError: as ``build``.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-engine-") as name:
        folder = Path(name)
        (folder / GRAPH).write_bytes(onnx)
        if timing_cache is not None:
            (folder / CACHE).write_bytes(timing_cache)
        request = {
            "runtime": runtime,
            "capabilities": list(capabilities),
            "sizes": dict(sizes or {}),
        }
        (folder / REQUEST).write_text(json.dumps(request))
        outcome: dict[str, Any] | None = None
        lines = _lines([*command, name], folder / "stderr", runtime, deadline)
        # Whatever the listener raises, the child ends before its folder does.
        with contextlib.closing(lines):
            for line in lines:
                if "phase" in line and listener is not None:
                    listener(str(line["phase"]), float(line["share"]))
                elif "phase" not in line:
                    outcome = line
        if outcome is None:
            raise ReleaseError(611, f"{runtime}: must give an engine, got no word from the builder")
        if "message" in outcome:
            _raise(outcome)
        cache = read_bounded(folder / CACHE, _MAX_BYTES) if outcome["timing_cache"] else None
        return Built(
            read_bounded(folder / ENGINE, _MAX_BYTES),
            cache,
            str(outcome["version"]),
            tuple(int(number) for number in outcome["capabilities"]),
        )


def _raise(outcome: Mapping[str, Any]) -> None:
    """Raise the error of the child's build."""
    code, message = outcome["code"], str(outcome["message"])
    if code in CATALOGUE:
        raise ReleaseError(code, message)
    raise ValueError(message)


def _lines(
    command: Sequence[str], errors: Path, runtime: str, deadline: float
) -> Generator[dict[str, Any], None, None]:
    """The child's lines as JSON objects, until it exits successfully.

    Raises:
        ReleaseError: 611, it ends otherwise, or not in time.
    """
    end = time.monotonic() + deadline
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        )
    try:
        assert child.stdout is not None  # noqa: S101 (asked for above)
        rest = b""
        while True:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ReleaseError(
                    611, f"{runtime}: must be built within {deadline:g} s, got no engine by then"
                )
            data = child.stdout.read1(_MAX_LINE)  # type: ignore[attr-defined]
            *complete, rest = (rest + data).split(b"\n")
            yield from (value for line in complete if (value := _object(line)) is not None)
            if len(rest) > _MAX_LINE:
                rest = b""
            if not data:
                break
        try:
            code = child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise ReleaseError(
                611, f"{runtime}: must end within {deadline:g} s, got no end"
            ) from None
        if code:
            raise ReleaseError(611, f"{runtime}: must build the graph, {_end(code, errors)}")
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _object(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None for anything else that a library prints."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _end(code: int, errors: Path) -> str:
    """Description of how a child ended."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its process ended by {name}"
    with errors.open("rb") as file:
        file.seek(max(0, errors.stat().st_size - _MAX_WORDS))
        lines = file.read(_MAX_WORDS).decode("utf-8", "replace").strip().splitlines() or ["no word"]
    return f"its process ended with {code} ({lines[-1][:200]})"


#: Smallest, best and largest size of an axis; the engine is chosen for the best, and refuses what is beyond.
Sizes: TypeAlias = tuple[int, int, int]
#: Called with the phase of a build, and the share that is done, from 0 to 1.
Listener: TypeAlias = Callable[[str, float], None]

BATCH: Final[Sizes] = (1, 8, 64)


@dataclass(frozen=True)
class Built:
    """A built engine.

    Attributes:
        engine: its bytes, which may differ from build to build.
        timing_cache: makes the next build on this device faster; None where the runtime has none.
        version: of the runtime.
        capabilities: GPUs that it is for, ascending.
    """

    engine: bytes
    timing_cache: bytes | None
    version: str
    capabilities: tuple[int, ...]


def around(example: Mapping[str, int]) -> dict[str, Sizes]:
    """Ranges of the open axes' sizes around those of an example: from half to four times as much."""
    return {name: (max(1, size // 2), size, 4 * size) for name, size in example.items()}
