"""The child process of ``build_in_child``: ``python -m fedge.shared.compile.tensorrt_child FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from fedge.shared.compile.tensorrt import build
from fedge.shared.compile.tensorrt_process import CACHE, ENGINE, GRAPH, REQUEST
from fedge.shared.daemon.process import die_with_parent
from fedge.shared.errors import ReleaseError


def main(folder: Path, out: TextIO) -> None:
    """Build the engine that the folder's request describes, and write it to the folder.

    Args:
        folder: of ``build_in_child``.
        out: gets a line of JSON for each percent and phase, and one for the outcome.
    """

    def report(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    last: tuple[str, int] | None = None

    def listen(phase: str, share: float) -> None:
        nonlocal last
        if last != (phase, int(100 * share)):
            last = (phase, int(100 * share))
            report(phase=phase, share=share)

    request = json.loads((folder / REQUEST).read_text())
    cache = folder / CACHE
    try:
        built = build(
            (folder / GRAPH).read_bytes(),
            runtime=request["runtime"],
            capabilities=request["capabilities"],
            sizes={name: (low, best, high) for name, (low, best, high) in request["sizes"].items()},
            timing_cache=cache.read_bytes() if cache.exists() else None,
            listener=listen,
        )
    except ReleaseError as error:
        report(code=error.code, message=error.message)
        return
    except ValueError as error:
        report(code=None, message=str(error))
        return
    (folder / ENGINE).write_bytes(built.engine)
    if built.timing_cache is not None:
        cache.write_bytes(built.timing_cache)
    report(
        version=built.version,
        capabilities=list(built.capabilities),
        timing_cache=built.timing_cache is not None,
    )


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    # Native libraries print to stdout: the parent's channel is kept separate.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(Path(sys.argv[1]), channel)
