"""The networks of shared/models, small and untrained: their graphs, and engines for three generations of GPUs.

    python benchmarks/engines.py [--families cnn,transformer]

Of each family, at other sizes than the example's: how far the fp32 graph is from its network in torch; one engine of
TensorRT for RTX for sm86, sm89 and sm120 in fp32, fp16 and INT8, built in a child process without a GPU, with its size
and the seconds of its build, or the builder's words where it is refused. No engine is executed. Prints a table, writes
benchmarks/results/engines.json, and exits with 1 where a graph is more than 1e-4 from its network, or a family has no
engine in any precision.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from network_families import FAMILIES, Family

from fedge.edge.backends.device import cpu_name
from fedge.shared.compile.onnx_export import export_onnx
from fedge.shared.compile.parity import parity
from fedge.shared.compile.quantisation import activations, quantise, to_fp16
from fedge.shared.compile.tensorrt import around, build_in_child
from fedge.shared.errors import FedgeError

RESULTS = Path(__file__).resolve().parent / "results" / "engines.json"
GPUS = (86, 89, 120)
PARITY = 1e-4
DEADLINE = 600.0
PACKAGES = ("torch", "onnx", "onnxruntime", "tensorrt_rtx_cu13")


@dataclass(frozen=True)
class Engine:
    """One engine for all of ``GPUS``; its bytes are 0 and ``refused`` has the builder's words where there is none."""

    precision: str
    bytes: int
    seconds: float
    refused: str = ""


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES), help="with commas between them")
    names = parser.parse_args().families.split(",")
    parities, engines, missed = {}, {}, []
    print(f"{'family':21} {'fp32 graph off by':>18}  fp32, fp16 and INT8 engines: kB, seconds")
    for name in names:
        parities[name], engines[name] = measured(FAMILIES[name])
        print(f"{name:21} {parities[name]:18.1e}  {text(engines[name])}", flush=True)
        if parities[name] > PARITY:
            missed.append(
                f"{name}: fp32 graph {parities[name]:g} from its network (goal {PARITY:g})"
            )
        if all(engine.refused for engine in engines[name]):
            missed.append(f"{name}: no engine")
    for name, built in engines.items():
        for engine in (e for e in built if e.refused):
            print(f"{name} {engine.precision}: {engine.refused}")
    for line in missed:
        print(f"MISSED {line}")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": cpu_name(),
        "versions": {name: version(name) for name in PACKAGES},
        "capabilities": GPUS,
        "parity": parities,
        "engines": {name: [asdict(e) for e in built] for name, built in engines.items()},
        "missed": missed,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if missed else 0


def measured(family: Family) -> tuple[float, list[Engine]]:
    """How far the fp32 graph is from the network, and the engine of each precision."""
    torch.manual_seed(0)
    network = family.build().eval()
    fp32 = export_onnx(network, family.given)
    close = parity(network, fp32, family.given, batch_sizes=(1, 2, 5), sizes=family.others)
    sizes = around(family.given.sizes)
    if family.given.tokens:
        # Positions of the small Transformers end at 30.
        sizes = {axis: (low, best, min(high, 30)) for axis, (low, best, high) in sizes.items()}

    def int8() -> bytes:
        # The ranges do not matter to the builder.
        return quantise(fp32, dict.fromkeys(activations(fp32), (-2.0, 2.0)), symmetric=True)

    graphs = {"fp32": lambda: fp32, "fp16": lambda: to_fp16(fp32), "int8": int8}
    return close.max_abs_difference, [build(name, graph, sizes) for name, graph in graphs.items()]


def build(
    precision: str, graph: Callable[[], bytes], sizes: dict[str, tuple[int, int, int]]
) -> Engine:
    """One engine of a graph, or why there is none."""
    start, size, refused = time.perf_counter(), 0, ""
    try:
        built = build_in_child(
            graph(), runtime="tensorrt-rtx", capabilities=GPUS, sizes=sizes, deadline=DEADLINE
        )
        size = len(built.engine)
    except FedgeError as error:
        refused = error.message
    return Engine(precision, size, round(time.perf_counter() - start, 1), refused)


def text(engines: Sequence[Engine]) -> str:
    """The engines of a family in one line."""
    return "  ".join(
        f"{'refused':>14}" if e.refused else f"{e.bytes / 1e3:8,.0f} {e.seconds:5.1f}"
        for e in engines
    )


if __name__ == "__main__":
    sys.exit(main())
