"""Serving ResNet-8 on one thread: ours beside bare ONNX Runtime, a gRPC echo, MLServer and LitServe.

All run the same fp32 ONNX graph (3x64x64 float32 in, a request of 48 KB; 10 logits out) on the CPU with one ONNX
Runtime thread, without TLS, on loopback, and never wait to fill a batch. Those that speak KServe v2 over gRPC get
the very same bytes from the same client; LitServe gets JSON over HTTP with the tensor in base64. Clients are processes;
nothing is pinned; every server runs alone, one after the other, in each repetition. Peers' environments are made below
.bench the first time (a few minutes, from pip's configured index) and kept.

Beside that one client takes turns between ours and what it would do without us: send the same bytes to the echo, then
run the model itself (edge_pair.py).

Prints a table, writes benchmarks/results/edge.json, exits 1 where a goal is missed or could not be measured: p50 of
ours at most 1.15 times that of the echo and the bare run one after the other, by that client; with four clients at
least 2.5 times as many requests a second as the best of MLServer's rows.

    python benchmarks/edge.py                      all, about five minutes; wants a machine with nothing else to do
    python benchmarks/edge.py fedge echo bare      those whose name contains one of these words; no verdict, no file
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import edge_load
import edge_model
import edge_pair
import edge_process
import edge_servers
from edge_pair import BOTH
from edge_servers import BARE, CONTENDERS, ECHO, LITSERVE, MLSERVER, OURS

RESULTS: Final = Path(__file__).resolve().parent / "results" / "edge.json"
P50_GOAL, RATE_GOAL = 1.15, 2.5


def medians(repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a contender: the median of each figure over its repetitions; empty where there is none."""
    if not repetitions:
        return {}
    return {
        "clients": {
            count: {
                name: statistics.median(one["clients"][count][name] for one in repetitions)
                for name in repetitions[0]["clients"][count]
            }
            for count in repetitions[0]["clients"]
        },
        "peak_rss_mib": statistics.median(one["peak_rss_mib"] for one in repetitions),
        "processes": max(one["processes"] for one in repetitions),
        "repetitions": len(repetitions),
    }


def judge(rows: dict[str, dict[str, Any]], pair: dict[str, float]) -> dict[str, Any]:
    """Hold the figures against the goals.

    Args:
        rows: by contender, as ``medians``.
        pair: p50 by contender of the client that takes turns; empty where it failed.

    Returns:
        ``p50`` and ``rate``: ``ratio`` (None where a row is missing), ``goal``, ``passed``; ``p50_apart``: ours to the
        sum of the two rows of the table; ``mlserver``: the row that was taken, ``mlserver_ratios``: the rate's ratio
        to each; ``passed``: both goals.
    """

    def of(name: str, clients: str, figure: str) -> float | None:
        at = rows.get(name, {}).get("clients", {}).get(clients)
        return at[figure] if at else None

    bare, echo, ours = (of(name, "1", "p50_ms") for name in (BARE, ECHO, OURS))
    apart = ours / (bare + echo) if ours and bare and echo else None
    p50 = pair[OURS] / pair[BOTH] if pair else None
    rate = of(OURS, "4", "requests_s")
    theirs = {name: of(name, "4", "requests_s") for name in MLSERVER}
    ratios = {name: rate / other if rate and other else None for name, other in theirs.items()}
    best = max(theirs, key=lambda name: theirs[name] or 0.0)
    # All of its rows: the best one may be the one that failed.
    ratio = ratios[best] if None not in ratios.values() else None
    goals = {
        "p50": {"ratio": p50, "goal": P50_GOAL, "passed": p50 is not None and p50 <= P50_GOAL},
        "rate": {
            "ratio": ratio,
            "goal": RATE_GOAL,
            "passed": ratio is not None and ratio >= RATE_GOAL,
        },
    }
    passed = all(goal["passed"] for goal in goals.values())
    context = {"p50_apart": apart, "mlserver": best, "mlserver_ratios": ratios}
    return goals | context | {"passed": passed}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text."""
    head = [
        "",
        "clients",
        "p50 ms",
        "p99 ms",
        "requests/s",
        "CPU ms each",
        "peak RSS MiB",
        "processes",
    ]
    lines = [head]
    for name, row in rows.items():
        if not row:
            lines.append([name, "FAILED", *[""] * (len(head) - 2)])
            continue
        memory_cells = [f"{row['peak_rss_mib']:.0f}", str(row["processes"])]
        for place, (count, at) in enumerate(row["clients"].items()):
            figures = [f"{at[key]:.2f}" for key in ("p50_ms", "p99_ms")]
            figures += [f"{at['requests_s']:.0f}", f"{at['cpu_ms']:.2f}"]
            first = place == 0
            lines.append(
                [name if first else "", count, *figures, *(memory_cells if first else ["", ""])]
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def verdict(goals: dict[str, Any]) -> str:
    """The goals in words."""
    lines = []
    for name, label, bound in (
        ("p50", f"p50 of ours / of {BOTH}, one client in turns", "at most"),
        ("rate", f"requests/s of ours / of {goals['mlserver']}, four clients", "at least"),
    ):
        goal = goals[name]
        ratio = "not measured" if goal["ratio"] is None else f"{goal['ratio']:.2f}"
        reached = "reached" if goal["passed"] else "MISSED"
        lines.append(f"{label}: {ratio}, goal {bound} {goal['goal']:g}: {reached}")
    if goals["p50_apart"] is not None:
        apart = goals["p50_apart"]
        lines.insert(1, f"(of the table's {BARE} + {ECHO}, each in a loop of its own: {apart:.2f})")
    lines += [
        f"(of {name}: {ratio:.2f})"
        for name, ratio in goals["mlserver_ratios"].items()
        if ratio is not None and name != goals["mlserver"]
    ]
    return "\n".join(lines)


def take_turns(
    folder: Path, repetitions: int, seconds: float, problems: list[str]
) -> list[dict[str, float]]:
    """All repetitions of the client that takes turns; what went wrong is added to ``problems``."""
    taken = []
    for number in range(repetitions):
        try:
            # Four contenders share the time.
            taken.append(edge_pair.measure(folder, 4 * seconds))
        except (RuntimeError, TimeoutError, OSError) as error:
            problems.append(f"turns, repetition {number + 1}: {error}")
            print(problems[-1], file=sys.stderr, flush=True)
    return taken


def machine() -> dict[str, Any]:
    """Where this ran, and how busy it was before."""
    return {
        "cpu": edge_process.cpu_name(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": list(os.getloadavg()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0 passed, 1 missed or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", help="parts of the names of contenders")
    parser.add_argument("--repetitions", type=int, default=3, help="of each contender (default 3)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="that clients send in each measurement (default 5)",
    )
    arguments = parser.parse_args(argv)
    if arguments.repetitions < 1 or arguments.seconds <= 0:
        parser.error("--repetitions and --seconds: must be positive")
    words = [word.lower() for word in arguments.words]
    chosen = [c for c in CONTENDERS if not words or any(w in c.name.lower() for w in words)]
    if not chosen:
        parser.error(f"no contender's name contains one of {words}")
    problems: list[str] = []
    missing: set[str] = set()
    for peer in sorted({c.environment for c in chosen if c.environment}):
        print(f"{peer}: its environment in .bench/{peer}", file=sys.stderr, flush=True)
        try:
            edge_servers.install(peer)
        except (RuntimeError, OSError) as error:  # the others' rows are worth having all the same
            missing.add(peer)
            problems.append(f"{peer} cannot be installed: {error}")
            print(problems[-1], file=sys.stderr, flush=True)
    where = machine()
    if where["load_before"][0] > 0.5:
        load_now = where["load_before"][0]
        print(f"load {load_now:.1f}: something else runs; times will be off", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fedge-edge-") as name:
        folder = Path(name)
        edge_model.write(folder)
        able = [c for c in chosen if c.environment not in missing]
        measured, failures = edge_load.play(able, folder, arguments.repetitions, arguments.seconds)
        pairs = (
            [] if words else take_turns(folder, arguments.repetitions, arguments.seconds, failures)
        )
    rows = {c.name: medians(measured.get(c.name, [])) for c in chosen}
    print(table(rows))
    if words:
        return 1 if missing or not all(rows.values()) else 0
    pair = (
        {name: statistics.median(one[name] for one in pairs) for name in pairs[0]} if pairs else {}
    )
    print(f"one client in turns: {', '.join(f'{name} {ms:.2f} ms' for name, ms in pair.items())}")
    goals = judge(rows, pair)
    peers = {c.environment for c in able if c.environment}
    result = {
        "table": "edge",
        "model": {"name": edge_model.NAME, "input": list(edge_model.SHAPE), "kind": "onnx-fp32"},
        "protocols": {"gRPC": "KServe v2, raw contents", LITSERVE: "JSON over HTTP, base64"},
        "seconds": arguments.seconds,
        "rows": rows,
        "turns_p50_ms": {"median": pair, "repetitions": pairs},
        "goals": goals,
        "passed": goals["passed"],
        "problems": problems + failures,
        "machine": where,
        "versions": {
            "ours": {
                n: version(n) for n in ("fedge", "onnxruntime", "numpy", "grpcio", "protobuf")
            },
            **{peer: edge_servers.versions(peer) for peer in sorted(peers)},
        },
        "repetitions": measured,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(verdict(goals))
    return 0 if goals["passed"] else 1


if __name__ == "__main__":
    # Ended from outside, it must still end its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
