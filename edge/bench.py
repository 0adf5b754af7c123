"""`fedge-edge bench`: how fast the model is on this device, and what it takes."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge.edge.arguments import (
    add_bundle,
    add_statistics,
    add_threads,
    open_trusted,
    whole,
)
from fedge.shared.command import Command
from fedge.shared.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedge.shared.schema import InputSchema

_MAX_BATCH_VALUES = 2**26
_FEWEST_RUNS = 10


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "--runs",
        type=whole(1, 1_000_000),
        default=200,
        metavar="N",
        help="timed runs (default 200)",
    )
    parser.add_argument(
        "--batch", type=whole(1, 65_536), default=1, metavar="N", help="examples a run (default 1)"
    )
    parser.add_argument(
        "--seconds",
        type=whole(1, 3600),
        default=20,
        metavar="S",
        help=f"end then, if {_FEWEST_RUNS} runs are timed (default 20)",
    )
    add_statistics(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: Namespace) -> int:
    from fedge.edge.inputs import read_statistics
    from fedge.edge.runtime import EdgeModel

    start = time.perf_counter()
    bundle = open_trusted(arguments)
    verified = time.perf_counter()
    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    model = EdgeModel.from_bundle(bundle, threads=arguments.threads, statistics=statistics)
    loaded = time.perf_counter()

    from fedge.shared import preprocess

    x = example(model.manifest.input, arguments.batch)
    ready = preprocess.apply(model.steps, x)
    inference = timed(lambda: model.logits(ready), arguments.runs, arguments.seconds)
    whole = timed(lambda: model.predict(x), arguments.runs, arguments.seconds)
    result = {
        "p50_ms": percentile(inference, 50),
        "p99_ms": percentile(inference, 99),
        "items_per_second": round(arguments.batch * len(inference) / sum(inference) * 1e3, 1),
        "predict_p50_ms": percentile(whole, 50),
        "predict_p99_ms": percentile(whole, 99),
        "verify_ms": round((verified - start) * 1e3, 3),
        "load_ms": round((loaded - verified) * 1e3, 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "runs": len(inference),
        "batch": arguments.batch,
        "threads": arguments.threads,
        "device": "cpu",
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))
    return 0


def example(schema: InputSchema, batch: int) -> NDArray[Any]:
    """Raw examples ``(batch, *shape)`` of float32 that the schema allows.

    Raises:
        InputError: 805, the batch is too large to hold.
    """
    import math

    import numpy as np

    if batch * math.prod(schema.shape) > _MAX_BATCH_VALUES:
        raise InputError(
            805, f"--batch: must be at most {_MAX_BATCH_VALUES // math.prod(schema.shape)}"
        )
    x = np.random.default_rng(0).random((batch, *schema.shape)).astype(np.float32)
    for index, feature in enumerate(schema.features):
        if feature.categories:
            x[:, index] = feature.categories[0]
        else:
            x[:, index] = feature.low + (feature.high - feature.low) * x[:, index]
    return x


def timed(work: Callable[[], object], runs: int, seconds: float) -> list[float]:
    """Milliseconds of each run, after a tenth as many (at most 20) that are not counted."""
    for _ in range(max(1, min(20, runs // 10))):
        work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < runs:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        times.append((now - start) * 1e3)
        if now > end and len(times) >= _FEWEST_RUNS:
            break
    return times


def percentile(times: list[float], percent: int) -> float:
    """The smallest time that at least ``percent`` of all do not exceed, to the microsecond."""
    ordered = sorted(times)
    return round(ordered[-(-len(ordered) * percent // 100) - 1], 4)


def peak_rss_mb() -> float:
    """The most memory that this process held, in MB of 10^6 bytes."""
    # getrusage would count the parent's memory too, from before this program was started.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _text(result: dict[str, Any]) -> str:
    batch, threads = result["batch"], result["threads"]
    return (
        f"inference  p50 {result['p50_ms']:.3f} ms, p99 {result['p99_ms']:.3f} ms,"
        f" {result['items_per_second']:,.0f} items/s (batch {batch}, threads {threads}, {result['runs']} runs)\n"
        f"predict    p50 {result['predict_p50_ms']:.3f} ms, p99 {result['predict_p99_ms']:.3f} ms"
        " (with preprocessing and probabilities)\n"
        f"start      {result['verify_ms']:.1f} ms to verify, {result['load_ms']:.1f} ms to load\n"
        f"memory     {result['peak_rss_mb']:.0f} MB at its peak\n"
    )


COMMAND = Command(
    summary="time the model on this device",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge-edge bench model.fedge --trust release.key.pub --batch 32 --threads 2",
)
