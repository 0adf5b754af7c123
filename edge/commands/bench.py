"""`fedge-edge bench`: measures time and memory of the model on this device."""

from __future__ import annotations

import itertools
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from fedge.edge.commands.arguments import (
    add_artifact,
    add_bundle,
    add_statistics,
    add_threads,
    open_trusted,
    whole,
)
from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.edge.runtime.model import EdgeModel
    from fedge.shared.bundle.bundle import Bundle


#: Inputs over which labels are compared, in batches of so many, and the seconds that end it before.
_LABELS, _BATCH, _LABEL_SECONDS = 1000, 32, 10.0


def _arguments(parser: ArgumentParser) -> None:
    add_bundle(parser)
    add_artifact(parser)
    parser.add_argument(
        "--parity",
        action="store_true",
        help="then compare it with the fp32 graph, on made-up inputs",
    )
    parser.add_argument(
        "--runs",
        type=whole(1, 1_000_000),
        default=200,
        metavar="N",
        help="timed runs (default 200)",
    )
    parser.add_argument(
        "--batch",
        type=whole(1, 65_536),
        action="append",
        metavar="N",
        help="examples a run (default 1); repeated, each is timed in turn",
    )
    parser.add_argument(
        "--seconds",
        type=whole(1, 3600),
        default=20,
        metavar="S",
        help="end then, if 10 runs are timed (default 20)",
    )
    add_statistics(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: Namespace) -> int:
    from fedge.edge.inputs.reader import read_statistics
    from fedge.edge.runtime.model import EdgeModel

    start = time.perf_counter()
    bundle, record = open_trusted(arguments)
    verified = time.perf_counter()
    statistics = read_statistics(arguments.statistics) if arguments.statistics else None
    model = EdgeModel.from_bundle(
        bundle,
        threads=arguments.threads,
        statistics=statistics,
        artefact=arguments.artifact,
        record=record,
    )
    loaded = time.perf_counter()

    from fedge.edge.backends.timing import peak_rss_mb, percentile, timed
    from fedge.shared.bundle import generated_examples

    def measured(batch: int) -> dict[str, Any]:
        x = generated_examples.example(model.manifest.input, batch, model.steps)
        ready = model.prepare(x)
        inference = timed(lambda: model.logits(ready), arguments.runs, arguments.seconds)
        whole = timed(lambda: model.predict(x), arguments.runs, arguments.seconds)
        return {
            "p50_ms": percentile(inference, 50),
            "p99_ms": percentile(inference, 99),
            "items_per_second": round(batch * len(inference) / sum(inference) * 1e3, 1),
            "predict_p50_ms": percentile(whole, 50),
            "predict_p99_ms": percentile(whole, 99),
            "runs": len(inference),
            "batch": batch,
        }

    # The figures of the first batch size stand by themselves, those of the others in a list.
    first, *others = [measured(batch) for batch in arguments.batch or [1]]
    result = {
        **first,
        "others": others,
        "verify_ms": round((verified - start) * 1e3, 3),
        "load_ms": round((loaded - verified) * 1e3, 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "threads": arguments.threads,
        "device": model.device,
        "artefact": model.artefact,
        "backend": model.backend,
        "why": model.why,
    }
    if arguments.parity:
        result |= _compared(bundle, model, arguments.threads)
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))
    return 0


def _compared(bundle: Bundle, model: EdgeModel, threads: int) -> dict[str, float]:
    """How far the model is from the fp32 graph on the CPU, on batches of several sizes."""
    from fedge.edge.outputs import parity
    from fedge.edge.runtime.choice import reference

    graph = reference(bundle, model.shapes, threads)
    ours, theirs = [], []
    end, count = time.monotonic() + _LABEL_SECONDS, 0
    # A share of labels is told to a point by a thousand inputs; by the few of the batch sizes not to two.
    for number, size in enumerate(itertools.chain(parity.BATCH_SIZES, itertools.repeat(_BATCH))):
        if number >= len(parity.BATCH_SIZES) and (count >= _LABELS or time.monotonic() > end):
            break
        # As a seed, the size of each of the first batches; others have one of their own.
        seed = size if number < len(parity.BATCH_SIZES) else 1000 + number
        for batch in parity.examples(model.manifest, model.steps, [size], seed=seed):
            ours.append(model.logits(batch))
            theirs.append(graph.run(batch))
        count += size
    return dict(vars(parity.difference(ours, theirs, model.manifest.output, model.artefact)))


def _text(result: dict[str, Any]) -> str:
    timings = "".join(
        f"inference  p50 {one['p50_ms']:.3f} ms, p99 {one['p99_ms']:.3f} ms,"
        f" {one['items_per_second']:,.0f} items/s (batch {one['batch']}, threads {result['threads']},"
        f" {one['runs']} runs)\n"
        f"predict    p50 {one['predict_p50_ms']:.3f} ms, p99 {one['predict_p99_ms']:.3f} ms"
        " (with preprocessing and probabilities)\n"
        for one in (result, *result["others"])
    )
    return (
        f"{timings}"
        f"start      {result['verify_ms']:.1f} ms to verify, {result['load_ms']:.1f} ms to load\n"
        f"memory     {result['peak_rss_mb']:.0f} MB at its peak\n"
        f"backend    {result['backend']}, {result['device']}: {result['why']}\n"
    ) + (
        f"parity     within {result['max_abs_difference']:.3g} of fp32, whose largest logit is"
        f" {result['largest_logit']:.3g}; {100 * result['agreement']:.4g} % the same labels\n"
        if "agreement" in result
        else ""
    )


COMMAND = Command(
    summary="time the model on this device",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge-edge bench model.fedge --trust release.key.pub --batch 32 --threads 2",
)
