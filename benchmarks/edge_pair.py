"""Latency of ours beside that of ONNX Runtime and an echo, by one client that takes them in turn.

    python edge_pair.py FOLDER SECONDS OURS_PORT ECHO_PORT

What a client pays for our server is held against what it would pay with the model in its own process and an echo of the
same bytes: one after the other, in the same thread, as long as ours takes and as often interrupted. Medians of loops
that run for themselves are lower than that sum: a network that runs without a pause finds its caches and its processor
warm, and one that waits for a request does not, whichever process runs it. FOLDER holds what edge_model.py wrote.
Prints one JSON object, the milliseconds of each call by contender.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import edge_client
import edge_servers
from edge_servers import BARE, ECHO, OURS
from flower_side import free_port, stop, wait_open

#: One after the other in one thread.
BOTH: Final = "echo, then bare onnxruntime"
#: Calls of one contender before the next one's turn, and those at its beginning that are not counted.
TURN, SETTLE = 12, 2
#: Seconds: until a server listens, and what the client may take beyond the time it sends.
OPEN_WITHIN, SLACK = 60.0, 90.0


def measure(folder: Path, seconds: float) -> dict[str, float]:
    """Start both servers and let the client take turns; p50 in ms by contender.

    Raises:
        RuntimeError, TimeoutError, OSError: a server or the client failed.
    """
    servers: list[subprocess.Popen[bytes]] = []
    log = folder / "pair.log"
    try:
        ports = []
        for name in (OURS, ECHO):
            (contender,) = (c for c in edge_servers.CONTENDERS if c.name == name)
            ports.append(str(free_port()))
            servers.append(edge_servers.start(contender, folder, int(ports[-1]), log))
            wait_open(f"127.0.0.1:{ports[-1]}", servers[-1], OPEN_WITHIN)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), str(folder), str(seconds), *ports],
            env=edge_servers.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds + SLACK,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"pair: must end within {seconds + SLACK:g} s") from None
    finally:
        for server in servers:
            stop(server)
    if done.returncode:
        raise RuntimeError(f"pair: {(done.stderr.strip().splitlines() or ['no word'])[-1][:500]}")
    return {name: statistics.median(ms) for name, ms in json.loads(done.stdout).items()}


def turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Call each in turn, ``TURN`` times at once, for a time; milliseconds of each call but a turn's first ones."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter
    end = clock() + seconds
    while clock() < end:
        for name, call in calls.items():
            for number in range(TURN):
                begun = clock()
                call()
                if number >= SETTLE:
                    taken[name].append(1e3 * (clock() - begun))
    return taken


def main() -> None:
    """Run the client."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    ours, read = edge_client.kserve(int(sys.argv[3]), folder)
    echo, _ = edge_client.kserve(int(sys.argv[4]), folder)
    bare, _ = edge_client.inprocess(0, folder)

    def both() -> None:
        echo()
        bare()

    edge_client.check(read(edge_client.first_answer(ours)), folder)
    edge_client.first_answer(echo)
    calls = {BARE: bare, ECHO: echo, BOTH: both, OURS: ours}
    turns(calls, edge_client.WARM_UP)
    gc.collect()
    gc.disable()
    print(
        json.dumps({name: [round(m, 4) for m in ms] for name, ms in turns(calls, seconds).items()})
    )


if __name__ == "__main__":
    main()
