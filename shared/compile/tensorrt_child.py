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
    """Build what the folder asks for, and put it there.

    Args:
        folder: of ``build_in_child``.
        out: takes a line of JSON for each percent and phase, and one for the outcome.
    """

    def tell(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    told: tuple[str, int] | None = None

    def listen(phase: str, share: float) -> None:
        nonlocal told
        if told != (phase, int(100 * share)):
            told = (phase, int(100 * share))
            tell(phase=phase, share=share)

    asked = json.loads((folder / REQUEST).read_text())
    cache = folder / CACHE
    try:
        built = build(
            (folder / GRAPH).read_bytes(),
            runtime=asked["runtime"],
            capabilities=asked["capabilities"],
            sizes={name: (low, best, high) for name, (low, best, high) in asked["sizes"].items()},
            timing_cache=cache.read_bytes() if cache.exists() else None,
            listener=listen,
        )
    except ReleaseError as error:
        tell(code=error.code, message=error.message)
        return
    except ValueError as error:
        tell(code=None, message=str(error))
        return
    (folder / ENGINE).write_bytes(built.engine)
    if built.timing_cache is not None:
        cache.write_bytes(built.timing_cache)
    tell(
        version=built.version,
        capabilities=list(built.capabilities),
        timing_cache=built.timing_cache is not None,
    )


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    # Native libraries print where they like: the parent's channel is kept from them.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(Path(sys.argv[1]), channel)
