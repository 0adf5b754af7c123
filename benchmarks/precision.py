"""Trained models in fp32, fp16 and INT8: the metric that the sites counted, agreement, size and speed, side by side.

    python benchmarks/precision.py [--data FOLDER] [--tasks digits,gtsrb,hmp-adl] [--rounds N]

trains each task over its sites as `fedge simulate` does, with federated calibration, makes every graph of it as
`fedge compile` does, and builds TensorRT engines for three generations of GPUs, none of which is at hand. Each graph
is timed by `fedge-edge bench` in a process of its own. Prints a table, writes benchmarks/results/precision.json, where
the rows of tasks that are not named stay, and exits with 1 where an fp32 graph is more than 1e-4 from its network,
INT8 loses more than a point of the metric, or an engine is not built. The networks of shared/models: engines.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client.data.dataset import site_shares
from fedge.edge.backends.device import cpu_name
from fedge.edge.runtime.model import EdgeModel
from fedge.server.release import qualification
from fedge.server.release.artefacts import Builder, Built, artefact
from fedge.server.release.placeholder_manifest import placeholder_manifest, statistics_options
from fedge.server.runs import trained_model
from fedge.server.runs.trained_model import Trained
from fedge.shared.bundle.bundle import open_bundle, write_bundle
from fedge.shared.bundle.manifest import Parity
from fedge.shared.bundle.manifest_artefacts import ONNX_KINDS, Qualification
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Calibration
from fedge.shared.compile.onnx_export import export_onnx, opset_of
from fedge.shared.compile.parity import parity
from fedge.shared.compile.targets import Target
from fedge.shared.config import reader
from fedge.shared.config.federation import Config
from fedge.shared.crypto.dsse import load_private, load_public, new_key, public_path
from fedge.shared.errors import FedgeError
from fedge.simulations.engine import simulate

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
DATA = HERE.parent.parent / "shared" / "data"
RESULTS = HERE / "results" / "precision.json"
TASKS = {"digits": "digits", "gtsrb": "gtsrb", "hmp-adl": "hmp_adl"}
GPUS = (86, 89, 120)
BATCH = qualification.BATCHES[-1]
#: What multiplies many numbers at a time, of eight bits above all, by the names of the kernel.
INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm",
)  # fmt: skip
#: A share of the metric; and two logits of the fp32 graph and the network.
BUDGET, PARITY = 0.01, 1e-4


@dataclass(frozen=True)
class Row:
    """One artefact of one task; ``metric`` as the sites counted it, ``agreement`` over all their held-out examples."""

    task: str
    kind: str
    bytes: int
    metric: float | None
    agreement: float | None
    p50_ms: float | None
    items_per_second: float | None
    batched_items_per_second: float | None
    peak_rss_mb: float | None
    note: str = ""


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with gtsrb and hmp_adl in it"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas between them")
    parser.add_argument(
        "--rounds", type=int, help="of training; those of the example where not given"
    )
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rows, parities, missed = kept(set(arguments.tasks.split(",")))
    for name in arguments.tasks.split(","):
        with tempfile.TemporaryDirectory(prefix="fedge-precision-") as folder:
            measured, difference, problems = measure(name, arguments, Path(folder))
        rows += measured
        parities[name] = difference
        missed += problems
    print(f"{cpu_name()}: {' '.join(instructions())}")
    print(table(rows))
    for name, difference in parities.items():
        print(f"{name}: fp32 graph within {difference:.2g} of the network (goal {PARITY:g})")
    for line in missed:
        print(f"MISSED {line}")
    result = {
        "cores": os.cpu_count(),
        "processor": cpu_name(),
        "instructions": instructions(),
        "date": time.strftime("%Y-%m-%d"),
        "parity": parities,
        "rows": [asdict(row) for row in rows],
        "missed": missed,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if missed else 0


def instructions() -> list[str]:
    """Those of ``INSTRUCTIONS`` that the processor has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def kept(again: set[str]) -> tuple[list[Row], dict[str, float], list[str]]:
    """Rows, parities and missed goals of the last run, of tasks that are not measured again."""
    if not RESULTS.is_file():
        return [], {}, []
    previous = json.loads(RESULTS.read_text())
    return (
        [Row(**row) for row in previous["rows"] if row["task"] not in again],
        {name: value for name, value in previous["parity"].items() if name not in again},
        [line for line in previous["missed"] if line.partition(":")[0] not in again],
    )


def measure(
    name: str, arguments: argparse.Namespace, folder: Path
) -> tuple[list[Row], float, list[str]]:
    """Train, compile and time a task; its rows, the fp32 graph's parity, and the goals that it missed."""
    print(f"{name}: training", flush=True)
    config = configuration(name, arguments)
    run = simulate(config, folder / "run").path
    model = trained_model.from_run(run)
    calibrated = calibration.load(run / "calibration.json")
    fp32 = export_onnx(model.network, model.shape)
    close = parity(model.network, fp32, model.shape, examples=model.examples)
    builder = Builder(fp32, opset_of(fp32), calibrated.ranges, lambda *_: None)
    graphs = [
        Built(artefact(kind, data, opset_of(fp32)), data)
        for kind in ONNX_KINDS
        for data in [builder.graph(kind)]
    ]
    rows, problems = graph_rows(name, config, model, calibrated, graphs, close, folder)
    engines = builder.build([Target("tensorrt-rtx", GPUS)])
    for built in (b for b in engines.built if b.artefact.engine):
        rows.append(
            row(
                name,
                built,
                calibrated,
                None,
                f"built for {', '.join(f'sm{c}' for c in GPUS)}",
            )
        )
    problems += [f"{name}: {failed.name} {failed.reason}" for failed in engines.failed]
    if close.max_abs_difference > PARITY:
        problems.append(f"{name}: fp32 graph {close.max_abs_difference:g} from its network")
    return rows, close.max_abs_difference, problems


def configuration(name: str, arguments: argparse.Namespace) -> Config:
    """The example's configuration, calibrated at the end."""
    tree = ["calibration.enabled=true"]
    if name != "digits":
        tree.append(f'data.path="{(arguments.data / TASKS[name]).absolute()}"')
    if arguments.rounds:
        tree.append(f"run.rounds={arguments.rounds}")
    return reader.load(EXAMPLES / f"{name}.toml", tree)


def graph_rows(
    name: str,
    config: Config,
    model: Trained,
    calibrated: Calibration,
    graphs: Sequence[Built],
    close: Parity,
    folder: Path,
) -> tuple[list[Row], list[str]]:
    """Time every graph in a process of its own, and hold its labels against the fp32 graph's."""
    unproven = Qualification(False, "being measured")
    listed = tuple(replace(b.artefact, qualification=unproven) for b in graphs)
    key, bundle = folder / "key", folder / "all.fedge"
    new_key(key)
    manifest = placeholder_manifest(model, close, listed)
    write_bundle(bundle, manifest, {b.artefact.name: b.data for b in graphs}, load_private(key))
    options = statistics_options(manifest, folder)
    verified = open_bundle(bundle, load_public(public_path(key)))
    held_out = np.concatenate([s.test_features for s in site_shares(config, model.task).values()])
    expected = labels(EdgeModel.from_bundle(verified, artefact=graphs[0].artefact.name), held_out)
    rows, problems = [], []
    for built in graphs:
        one = qualification.bench(bundle, public_path(key), built.artefact.name, options)
        agreement = None
        if not one.failure:
            try:
                own = EdgeModel.from_bundle(verified, artefact=built.artefact.name)
                agreement = float(np.mean(labels(own, held_out) == expected))
            except FedgeError as error:
                one = qualification.Timed({}, str(error))
        measured = row(name, built, calibrated, one, one.failure, agreement)
        rows.append(measured)
        problems += loss_problems(measured, rows[0])
    return rows, problems


def labels(model: EdgeModel, features: NDArray[Any]) -> NDArray[Any]:
    """Predicted class of every example, ``(n,)``."""
    parts = [model.predict(features[i : i + 256]).indices for i in range(0, len(features), 256)]
    return np.concatenate(parts)


def row(
    name: str,
    built: Built,
    calibrated: Calibration,
    one: qualification.Timed | None,
    note: str,
    agreement: float | None = None,
) -> Row:
    """A row; the metric counts only where the sites counted these very bytes."""
    counted = calibrated.candidates.get(built.artefact.kind)
    metric = None
    if counted is not None and counted.sha256 == built.artefact.sha256:
        metric = counted.metrics.get("accuracy")
    timed = one.result if one else {}
    return Row(
        name,
        built.artefact.kind,
        built.artefact.bytes,
        metric,
        agreement,
        timed.get("p50_ms"),
        timed.get("items_per_second"),
        timed["others"][0]["items_per_second"] if timed else None,
        timed.get("peak_rss_mb"),
        note,
    )


def loss_problems(int8: Row, fp32: Row) -> list[str]:
    """Problems of an INT8 graph by the sites' counts."""
    if "int8" not in int8.kind:
        return []
    if int8.metric is None or fp32.metric is None:
        return [f"{int8.task}: the sites counted no metric of {int8.kind}"]
    if int8.metric < fp32.metric - BUDGET:
        points = 100 * (fp32.metric - int8.metric)
        return [f"{int8.task}: {int8.kind} loses {points:.2f} points (goal {100 * BUDGET:g})"]
    return []


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = (
        "task",
        "artefact",
        "kB",
        "metric",
        "agreement",
        "p50 ms",
        "items/s at 1",
        f"at {BATCH}",
        "MB",
        "",
    )
    lines = [head, *(cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join(
            [
                f"{line[0]:{widths[0]}}",
                f"{line[1]:{widths[1]}}",
                *(f"{cell:>{w}}" for cell, w in zip(line[2:-1], widths[2:], strict=True)),
                line[-1],
            ]
        ).rstrip()
        for line in lines
    )


def cells(r: Row) -> tuple[str, ...]:
    """A row as text."""
    return (
        r.task,
        r.kind,
        f"{r.bytes / 1e3:,.0f}",
        "-" if r.metric is None else f"{100 * r.metric:.2f} %",
        "-" if r.agreement is None else f"{100 * r.agreement:.2f} %",
        "-" if r.p50_ms is None else f"{r.p50_ms:.3f}",
        *(
            "-" if n is None else f"{n:,.0f}"
            for n in (r.items_per_second, r.batched_items_per_second)
        ),
        "-" if r.peak_rss_mb is None else f"{r.peak_rss_mb:.0f}",
        r.note,
    )


if __name__ == "__main__":
    sys.exit(main())
