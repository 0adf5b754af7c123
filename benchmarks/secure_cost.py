"""Cost of a round of secure aggregation by the number of sites and of parameters: seconds, bytes, and the plots.

    python benchmarks/secure_cost.py [--quick | --draw]

times one client and the server as fedge_secagg.py does, on all cores, with the protocol's own graph: complete up to
128 sites, a ring above. Writes benchmarks/results/secure_cost.json and the two pictures in docs/images. ``--draw``
only draws what was measured; ``--quick`` prints a small run and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fedge_secagg
import loglog
import secure_aggregation

from fedge.shared.secagg import neighbour_graph

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "secure_cost.json"
IMAGES = ROOT.parent / "docs" / "images"
SITES: Final = (3, 10, 30, 100, 128, 200, 300)
PARAMETERS: Final = (10**4, 10**5, 10**6, 10**7)
#: Share of the sites that drop out before the upload in the server's second figure.
DROPPED: Final = 0.1
#: A figure is the median of so many runs at most, fewer once they took so many seconds.
RUNS: Final = 5
ENOUGH: Final = 1.0
SMALL: Final = {10**4: "10⁴", 10**5: "10⁵", 10**6: "10⁶", 10**7: "10⁷"}


def measure(
    sites: Iterable[int], parameters: Sequence[int], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each number of sites and parameters, large vectors last."""
    rows: list[dict[str, Any]] = []
    counts = tuple(sites)
    for d in parameters:
        for n in counts:
            started = time.perf_counter()
            clients = _runs(lambda seed, n=n, d=d: fedge_secagg.client_once(n, None, d, seed))
            servers = _runs(lambda seed, n=n, d=d: fedge_secagg.server_once(n, None, d, 0.0, seed))
            dropped = round(n * DROPPED)
            some = (
                _runs(lambda seed, n=n, d=d: fedge_secagg.server_once(n, None, d, DROPPED, seed))
                if dropped
                else []
            )
            rows.append(
                {
                    "n": n,
                    "degree": neighbour_graph.degree_of(n),
                    "d": d,
                    "client_seconds": _median(clients),
                    "server_seconds": _median(servers),
                    "lost": dropped,
                    "server_lost_seconds": _median(some) if some else None,
                    "upload_bytes": clients[0].upload_bytes,
                    "other_bytes": clients[0].other_bytes,
                    "runs": [len(clients), len(servers), len(some)],
                }
            )
            took = time.perf_counter() - started
            report(f"{line(rows[-1])}  ({took:.0f} s)")
    return rows


def _runs(once: Callable[[int], fedge_secagg.Timing]) -> list[fedge_secagg.Timing]:
    timings: list[fedge_secagg.Timing] = []
    started = time.perf_counter()
    while len(timings) < RUNS and (not timings or time.perf_counter() - started < ENOUGH):
        timings.append(once(len(timings)))
    return timings


def _median(timings: Sequence[fedge_secagg.Timing]) -> float:
    return statistics.median(t.seconds for t in timings)


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    seconds = row["server_lost_seconds"]
    return (
        f"N {row['n']:3d}  k {row['degree']:3d}  d {row['d']:.0e}  client {row['client_seconds']:.4f} s  "
        f"server {row['server_seconds']:.4f} s, {f'{seconds:.4f} s' if seconds else '-'} with {row['lost']} lost  "
        f"upload {row['upload_bytes']} B, all else {row['other_bytes']} B"
    )


def pictures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The plots as SVG, by file name."""

    def curves(value: Callable[[Mapping[str, Any]], float | None], dashed: bool) -> list[Any]:
        found = []
        for i, d in enumerate(sorted({row["d"] for row in rows})):
            points = [(row["n"], y) for row in rows if row["d"] == d and (y := value(row))]
            name = f"{SMALL.get(d, f'{d:g}')} parameters"
            found.append(loglog.Curve("" if dashed else name, points, i, dashed))
        return found

    client = loglog.Panel(
        "One client", "seconds", curves(lambda r: float(r["client_seconds"]), False)
    )
    server = loglog.Panel(
        "The server (dashed: every tenth site lost)",
        "seconds",
        curves(lambda r: float(r["server_seconds"]), False)
        + curves(lambda r: r["server_lost_seconds"], True),
    )
    traffic = loglog.Panel(
        "One client, both ways (dashed: all but the vector)",
        "bytes",
        curves(lambda r: float(r["upload_bytes"] + r["other_bytes"]), False)
        + curves(lambda r: float(r["other_bytes"]) if r["d"] == rows[0]["d"] else None, True),
    )
    return {
        "secure-aggregation-seconds.svg": loglog.draw(
            "Seconds of a client and of the server against the number of sites", [client, server]
        ),
        "secure-aggregation-bytes.svg": loglog.draw(
            "Bytes of a client against the number of sites", [traffic]
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a small run; writes nothing")
    which.add_argument("--draw", action="store_true", help="draw what was measured before")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        rows = json.loads(RESULTS.read_text())["rows"]
    else:
        gc.freeze()
        elsewhere = secure_aggregation.Elsewhere()
        sites, parameters = ((3, 10), (10**3, 10**4)) if arguments.quick else (SITES, PARAMETERS)
        rows = measure(sites, parameters, lambda text: print(text, flush=True))
        if arguments.quick:
            return 0
        result = {
            "table": "cost of secure aggregation",
            "rows": rows,
            "machine": secure_aggregation.machine(elsewhere),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    for name, picture in pictures(rows).items():
        (IMAGES / name).write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
