"""Our secure aggregation beside Flower's own SecAgg+: a client's and the server's seconds, bytes, and the masks' speed.

    python benchmarks/secure_aggregation.py [--quick] [--rounds N] [--json]

runs ours, ours in one thread, Flower's, ours ... in one process, on the same number of clients, neighbours and
parameters, and takes medians. Ours shares masks, checksums and sums among the cores there are; Flower's has them too,
but uses one. fedge_secagg.py and flower_secagg.py say what is timed; both count all of a side's work
but training and transport. Prints a table, writes benchmarks/results/secure_aggregation.json, and exits with 1 where a
goal is missed. ``--quick`` is a small run without goals or file.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fedge_secagg
import flower_secagg

from fedge.shared.crypto import keystream
from fedge.shared.crypto.keystream import KEY_BYTES
from fedge.shared.secagg import masking, parallel

RESULTS = Path(__file__).resolve().parent / "results" / "secure_aggregation.json"
UPLOAD_GOAL: Final = 0.51
#: Of the bare add, where the processor makes keystream so fast at all.
MASK_GOAL: Final = 0.55
#: Masks of one client of ten: nine pairs' and its own.
MASKS: Final = 10
GIGA: Final = 1e9


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        n: clients.
        degree: neighbours of each, forced on both sides.
        d: parameters.
        rounds: of each side.
        dropped: fractions lost before the upload that the server is timed with.
        client_goal: least ratio of Flower's seconds to ours.
        server_goal: the same for the server without drops.
    """

    n: int
    degree: int
    d: int
    rounds: int
    dropped: tuple[float, ...] = (0.0,)
    client_goal: float | None = None
    server_goal: float | None = None


SETTINGS: Final = (
    Setting(10, 9, 10**6, 7, (0.0, 0.3), server_goal=18),
    Setting(10, 9, 10**7, 5, (0.0, 0.3), client_goal=6, server_goal=10),
    Setting(50, 49, 10**5, 3),
    Setting(100, 30, 10**5, 3, server_goal=200),
)
QUICK: Final = (Setting(5, 4, 10**4, 2, (0.0, 0.2)), Setting(8, 4, 10**4, 2))


def compare(setting: Setting, rounds: int | None = None) -> list[dict[str, Any]]:
    """Both sides in turns; a row for the client, and one for the server with each fraction of drops."""
    count = rounds or setting.rounds
    size = (setting.n, setting.degree, setting.d)
    facts = {"n": setting.n, "degree": setting.degree, "d": setting.d, "rounds": count}
    sides: dict[str, Callable[..., Any]] = {
        "fedge": fedge_secagg.client_once,
        "one_thread": _in_one_thread(fedge_secagg.client_once),
        "flower": flower_secagg.client_once,
    }
    rows = [
        facts | {"who": "client", "dropped": 0.0} | _row(sides, size, count, setting.client_goal)
    ]
    for dropped in setting.dropped:
        server = functools.partial(fedge_secagg.server_once, dropped=dropped)
        sides = {
            "fedge": server,
            "one_thread": _in_one_thread(server),
            "flower": functools.partial(flower_secagg.server_once, dropped=dropped),
        }
        goal = None if dropped else setting.server_goal
        rows.append(facts | {"who": "server", "dropped": dropped} | _row(sides, size, count, goal))
    return rows


def _in_one_thread(once: Callable[..., Any]) -> Callable[..., Any]:
    def alone(*size: int, seed: int) -> Any:
        before = parallel.use_threads(1)
        try:
            return once(*size, seed=seed)
        finally:
            parallel.use_threads(before)

    return alone


def _row(
    sides: Mapping[str, Callable[..., Any]],
    size: tuple[int, int, int],
    count: int,
    goal: float | None,
) -> dict[str, Any]:
    timings: dict[str, list[Any]] = {name: [] for name in sides}
    for seed in range(count):
        for name, once in sides.items():
            timings[name].append(once(*size, seed=seed))
    median = {name: statistics.median(t.seconds for t in all_) for name, all_ in timings.items()}
    return {
        **{f"{name}_seconds": median[name] for name in sides},
        **{f"{name}_all": [t.seconds for t in all_] for name, all_ in timings.items()},
        **{
            f"{name}_parts": {
                part: statistics.median(t.parts[part] for t in all_) for part in all_[0].parts
            }
            for name, all_ in timings.items()
        },
        **{f"{name}_upload_bytes": all_[0].upload_bytes for name, all_ in timings.items()},
        "ratio": median["flower"] / median["fedge"],
        "one_thread_ratio": median["flower"] / median["one_thread"],
        "goal": goal,
    }


def mask_speed(d: int, masks: int = MASKS, rounds: int = 9) -> dict[str, float]:
    """GB/s of masks that are made and added to ``d`` values, beside adding a vector that is there.

    Returns:
        ``masks`` for as many in one call, ``one`` for a call with one, ``add`` for the bare addition of two vectors of
        uint32, ``checksum`` of one; each by the bytes of what is added, in one thread, medians of rounds in turns.
        ``keystream`` for the bare keystream, as it was measured when the path was chosen.
    """
    vector, other = np.zeros(d, np.uint32), np.ones(d, np.uint32)
    keys = [(os.urandom(KEY_BYTES), 1) for _ in range(masks)]
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "add": (1, lambda: np.add(vector, other, out=vector)),
        "masks": (masks, lambda: masking.add_masks(vector, keys)),
        "one": (1, lambda: masking.add_masks(vector, keys[:1])),
        "checksum": (1, lambda: masking.checksum(vector)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    before = parallel.use_threads(1)
    for _ in range(rounds):
        for name, (_, call) in work.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    parallel.use_threads(before)
    found = {
        name: count * vector.nbytes / statistics.median(seconds[name]) / GIGA
        for name, (count, _) in work.items()
    }
    return found | {"keystream": max(keystream.rates().values()) / GIGA}


def judge(
    rows: Sequence[dict[str, Any]], speed: Mapping[str, float], elsewhere: Elsewhere
) -> dict[str, Any]:
    """Hold what was measured against the goals.

    Returns:
        All as JSON values; ``missed`` says which goals were not reached, in words.
    """
    missed = [
        f"{_label(row)}: must be {row['goal']:g} times as fast, is {row['ratio']:.1f}"
        for row in rows
        if row["goal"] is not None and row["ratio"] < row["goal"]
    ]
    for row in rows:
        if row["who"] == "client":
            share = row["fedge_upload_bytes"] / row["flower_upload_bytes"]
            row["upload_share"] = share
            if share > UPLOAD_GOAL:
                missed.append(f"{_label(row)}: must upload {UPLOAD_GOAL:g} of it, is {share:.3f}")
    share = speed["masks"] / speed["add"]
    if share < MASK_GOAL <= speed["keystream"] / speed["add"]:
        missed.append(f"masks: must be {MASK_GOAL:.0%} as fast as the bare add, are {share:.0%}")
    return {
        "table": "secure aggregation",
        "rows": list(rows),
        "mask_gigabytes_per_second": dict(speed),
        "mask_share": share,
        "missed": missed,
        "machine": machine(elsewhere),
    }


class Elsewhere:
    """How busy others keep the processor while this process measures (Linux; None elsewhere)."""

    def __init__(self) -> None:
        self._before = self._now()

    @property
    def cores(self) -> float | None:
        """Cores that others have used since, on average."""
        now = self._now()
        if now is None or self._before is None:
            return None
        busy, own, at = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, (busy - own) / at)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, *rest = map(int, stat.read_text().split("\n")[0].split()[1:9])
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.monotonic()


def machine(elsewhere: Elsewhere) -> dict[str, Any]:
    """Where this was measured, and beside how much else."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "keystream": keystream.fastest().__name__,
        "keystream_gb_per_second": {name: rate / GIGA for name, rate in keystream.rates().items()},
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": parallel.threads(),
        "load": list(os.getloadavg()),
        "cores_busy_elsewhere": elsewhere.cores,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fedge", "flwr", "numpy", "cryptography")},
    }


def table(result: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        "| | N | degree | d | dropped | fedge s | one thread s | Flower s "
        "| ratio | one thread | goal |",
        "|---" * 11 + "|",
    ]
    for row in result["rows"]:
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        lines.append(
            f"| {row['who']} | {row['n']} | {row['degree']} | {row['d']:.0e} | {row['dropped']:.0%} "
            f"| {row['fedge_seconds']:.4f} | {row['one_thread_seconds']:.4f} | {row['flower_seconds']:.3f} "
            f"| {row['ratio']:.1f} | {row['one_thread_ratio']:.1f} | {goal} |"
        )
    shares = [row["upload_share"] for row in result["rows"] if "upload_share" in row]
    speed = result["mask_gigabytes_per_second"]
    lines.append(
        f"Upload: {max(shares):.3f} of Flower's at most. Masks: {speed['masks']:.2f} GB/s with {MASKS} in one call, "
        f"{speed['one']:.2f} with one; the bare add {speed['add']:.2f}, so {result['mask_share']:.0%} of it. "
        f"The checksum {speed['checksum']:.2f}."
    )
    streams = result["machine"]["keystream_gb_per_second"]
    lines.append(
        f"Keystream by {result['machine']['keystream']}, the faster of "
        + ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in streams.items())
        + "."
    )
    lines += [f"MISSED: {line}" for line in result["missed"]]
    busy = result["machine"]["cores_busy_elsewhere"]
    lines.append(
        f"Cores that others used meanwhile: {'unknown' if busy is None else f'{busy:.2f}'}"
    )
    return "\n".join(lines)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['who']} at N = {row['n']}, d = {row['d']:.0e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0 passed, 1 a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small run without goals or file")
    parser.add_argument("--rounds", type=int, help="of each side, instead of each row's own number")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args(argv)
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds: must be at least 1, got {arguments.rounds}")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # What the imports left is looked through by no collection.
    gc.freeze()
    rows: list[dict[str, Any]] = []
    elsewhere = Elsewhere()
    speed = mask_speed(10**5 if arguments.quick else 10**7)
    for setting in QUICK if arguments.quick else SETTINGS:
        print(f"N = {setting.n}, d = {setting.d:.0e}", file=sys.stderr, flush=True)
        rows += compare(setting, arguments.rounds)
    result = judge(rows, speed, elsewhere)
    if arguments.quick:
        result["missed"] = []
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if not arguments.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
    print(text if arguments.json else table(result))
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
