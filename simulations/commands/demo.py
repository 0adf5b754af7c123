"""``fedge demo``: the whole chain in under a minute."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fedge.shared.cli.command import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="run directory (default: runs/demo, or the next free)",
    )
    parser.add_argument(
        "--edge", metavar="BIN", type=Path, help="bin folder of the device's environment"
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")


def _free(folder: Path) -> Path:
    """The folder, or the first numbered one beside it that does not exist."""
    candidates = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 100_000))
    return folder if not folder.exists() else next(c for c in candidates if not c.exists())


def _environment(held: dict[str, Any]) -> str:
    """The device's environment in words."""
    heavy = [name for name in ("torch", "flwr") if held[name]]
    text = (
        f"with {' and '.join(heavy)} among them" if heavy else "neither torch nor flwr among them"
    )
    return f"{held['packages']} packages, {text}"


def _run(arguments: Namespace) -> int:
    import json
    import sys
    import time

    from fedge.server.runs.directory import require_free
    from fedge.simulations import demo_device

    started = time.monotonic()

    def say(text: str) -> None:
        if not arguments.json:
            sys.stdout.write(text)

    edge = demo_device.find(arguments.edge)
    out = arguments.out or _free(Path("runs/demo"))
    require_free(out, resume=False)
    # Imported here, as these import torch and Flower.
    from fedge.simulations import demo
    from fedge.simulations.terminal.progress import Progress
    from fedge.simulations.terminal.summary import summary_table

    config = demo.configuration()
    say(
        f"Training {config.task.name} over {config.sites.count} sites "
        f"(Dirichlet {config.data.alpha:g}), {config.run.rounds} rounds of {config.strategy.name}\n"
    )
    with Progress() as progress:
        directory = demo.federate(out, progress)
    lines = [json.loads(line) for line in directory.rounds.read_text(encoding="utf-8").splitlines()]
    metrics = json.loads(directory.metrics.read_text(encoding="utf-8"))
    say(summary_table(metrics, lines) + "\n")
    summary = demo.sign(directory)
    parity = summary.manifest.parity
    say(
        f"Exported to ONNX: largest difference {parity.max_abs_difference:.1e}, allowed {parity.tolerance:.0e}\n"
    )
    say(f"Signed {directory.path / 'model.fedge'} ({summary.bundle.bytes:,} bytes)\n")
    device_result = demo.run_on(edge, directory)
    say(f"Device: {_environment(device_result['environment'])}\n")
    say(
        f"Device verified the bundle and predicted {device_result['rows']} test images: "
        f"accuracy {device_result['metrics']['accuracy']:.4f}, {device_result['agreement']:.2%} as trained\n"
    )
    if arguments.json:
        results = {"metrics": metrics, "release": summary.to_json(), "device": device_result}
        sys.stdout.write(json.dumps({**results, "report": str(directory.report)}) + "\n")
    say(f"Done in {time.monotonic() - started:.0f} s; the report:\n{directory.report}\n")
    return 0


COMMAND = Command(
    summary="federate, release and run a model on a device, in under a minute",
    extra="simulation",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge demo --out runs/demo",
)
