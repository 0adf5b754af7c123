"""`fedge compile`: compile a trained model for its targets, and qualify each artefact before it is kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.shared.cli.command import Command
from fedge.shared.compile.targets import CPU_FP32, NAMES, RTX_CAPABILITIES, SOURCES

if TYPE_CHECKING:
    from fedge.server.release.compile_record import Compiled
    from fedge.shared.bundle.manifest_artefacts import Artefact, Qualification

#: What happens to an artefact besides being built.
STEPS = ("exporting", "converting", "qualifying", "timing beside fp32")
_WIDEST = 60
_EVERY = 5.0  # seconds between two lines where stderr is no terminal


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT",
        help="a finished run, or a safetensors file",
    )
    parser.add_argument(
        "--targets",
        default=CPU_FP32,
        metavar="LIST",
        help=f"with commas between them: {', '.join(NAMES)} (default {CPU_FP32})",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the artefacts; made"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="of a CHECKPOINT outside its run's directory"
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        default=0.01,
        metavar="SHARE",
        help="what may be lost of the metric (default 0.01)",
    )
    parser.add_argument(
        "--keep-slower",
        action="store_true",
        help="keep INT8 for CPUs that is no faster here",
    )
    parser.add_argument("--json", action="store_true", help="print compile.json")


def _budget(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def _run(arguments: Namespace) -> int:
    from fedge.server.release.compiler import compile_model
    from fedge.shared.compile import targets
    from fedge.shared.errors import ReleaseError

    requested = targets.parse(arguments.targets)
    progress = _Progress()
    try:
        compiled = compile_model(
            arguments.source,
            requested,
            arguments.out,
            task=arguments.task,
            budget=arguments.budget,
            keep_slower=arguments.keep_slower,
            progress=progress,
        )
    finally:
        progress.end()
    if arguments.json:
        sys.stdout.write(json.dumps(compiled.to_json(), allow_nan=False) + "\n")
    else:
        sys.stdout.write(table(compiled) + f"{arguments.out}\n")
    if compiled.failed:
        raise ReleaseError(
            611,
            f"--targets: must all be built, got nothing of {', '.join(compiled.failed)}",
            remedy="See why in the output or in compile.json; what was built is there. "
            "Leave the target out to go on without it.",
        )
    return 0


class _Progress:
    """One line that changes on a terminal; elsewhere a line for each artefact, and now and then within a long build."""

    def __init__(self) -> None:
        self._step, self._shown, self._width = ("", ""), 0.0, 0
        self._terminal = sys.stderr.isatty()

    def __call__(self, name: str, phase: str, share: float) -> None:
        now = time.monotonic()
        # A builder has dozens of phases of its own, most of them too short to be read.
        step = (name, phase if phase in STEPS else "building")
        new = step != self._step
        if not new and now - self._shown < (0.2 if self._terminal else _EVERY):
            return
        self._step, self._shown = step, now
        shown = phase[:_WIDEST] if self._terminal else step[1]
        text = f"{name}  {shown}" + (f"  {100 * share:.0f} %" if share and not new else "")
        if self._terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Erase the line."""
        if self._terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


def table(compiled: Compiled) -> str:
    """The artefacts as a table of text, kept ones first, then those dropped with the reason."""
    head = ("artefact", "size", "p50", "agreement", "metric", "")
    rows = [head]
    rows += [(a.name, *_cells(a.bytes, a.qualification), _word(a)) for a in compiled.kept]
    rows += [
        (
            d.name,
            *_cells(d.bytes, d.qualification),
            d.reason if d.on_device else f"{'not kept' if d.bytes else 'not built'}: {d.reason}",
        )
        for d in compiled.dropped
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = []
    for name, *cells, last in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{name:{widths[0]}}", *numbers, last]).rstrip())
    return "\n".join(lines) + "\n"


def _cells(size: int, qualification: Qualification | None) -> tuple[str, str, str, str]:
    if qualification is None:
        return (f"{size:,}" if size else "-", "-", "-", "-")
    latency, score = qualification.latency, qualification.score
    return (
        f"{size:,}",
        f"{latency.p50_ms:.3g} ms" if latency else "-",
        "-" if qualification.agreement is None else f"{100 * qualification.agreement:.1f} %",
        "-" if score is None else f"{score.value:.4g}",
    )


def _word(artefact: Artefact) -> str:
    qualification = artefact.qualification
    if qualification is None or qualification.executed:
        # No device takes them on its CPU, however fast they are there.
        return "for GPUs" if artefact.kind in SOURCES.values() else ""
    return f"not executed here: {qualification.reason}"


COMMAND = Command(
    summary="compile a model for its targets, and prove each artefact",
    extra="export",
    arguments=_arguments,
    run=_run,
    epilog=(
        f"GPUs: {', '.join(f'sm{c}' for c in RTX_CAPABILITIES)}; a + joins them in one engine\n\n"
        "example:\n  fedge compile runs/a --targets cpu-int8,tensorrt-rtx:sm86+sm89 --out a"
    ),
)
