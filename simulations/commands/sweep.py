"""``fedge sweep``: accuracy against epsilon, one configuration under several noise multipliers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Final

from fedge.shared.cli.command import Command

#: Most noise multipliers, and most seeds, of a sweep; the configuration has the same limit of a multiplier.
MAX_VALUES: Final = 100
MAX_NOISE: Final = 1e4


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to train")
    parser.add_argument("--noise-multiplier", metavar="0.5,1,2,4", required=True)
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=3, help="runs of each, counted up from run.seed (default: 3)"
    )  # fmt: skip
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable"
    )
    parser.add_argument(
        "--delta", metavar="D", type=float, default=1e-5, help="of epsilon (default: 1e-5)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="new, or a sweep to continue (default: runs/sweep*)",
    )
    parser.add_argument("--json", action="store_true", help="print sweep.json instead of a table")


def _run(arguments: Namespace) -> int:
    """Train, print, write.

    Returns:
        1 where a run failed, else 0.

    Raises:
        UsageError: 102, an option is out of its range, or no mechanism is named; 107, the output cannot be written,
            or the folder holds something else.
        ConfigError, DataError: as ``fedge simulate``; 208, another process uses the folder.
    """
    import json
    import sys
    import time

    from fedge.shared.config.reader import read_tree
    from fedge.shared.errors import ConfigError, UsageError
    from fedge.shared.tasks.registry import get_task, require_task
    from fedge.simulations import sweep

    noise_multipliers = _numbers(arguments.noise_multiplier)
    _require(arguments)
    tree = read_tree(arguments.config, arguments.set)
    section = tree.get("privacy", {})
    if isinstance(section, dict) and section.get("mechanism", "off") == "off":
        raise UsageError(
            102,
            "privacy.mechanism: must be one that adds noise, got off; add --set privacy.mechanism=example",
        )
    jobs = sweep.jobs(tree, noise_multipliers, arguments.seeds)
    config = jobs[1].config
    require_task(config.task.name)
    # Imported here, as these import torch.
    from fedge.client.data.dataset import site_shares
    from fedge.server.report.page.sweep import parse
    from fedge.server.runs.directory import RunDirectory
    from fedge.shared.privacy.checks.compatibility import require_compatible
    from fedge.shared.tasks.dry_run import check
    from fedge.simulations import sweep_page
    from fedge.simulations.commands.audit import ProgressLine, folder, write

    task = get_task(config.task.name)
    # A sweep of which no run is possible ends before it begins.
    check(task)
    refusals = []
    for job in jobs[1:]:
        try:
            require_compatible(job.config.privacy, task, job.config.secure_aggregation.min_sites)
            break
        except ConfigError as error:
            # The noise of another run may be compatible; then this one is listed with its error.
            refusals.append(error)
    else:
        raise refusals[0]
    site_shares(config, task)
    out = folder(arguments.out, Path("runs/sweep"))
    with RunDirectory(out).lock():
        base = sweep.base_of(config)
        _begin(out, base)
        sys.stderr.write(f"{out}: {len(jobs)} runs; if interrupted, go on with --out {out}\n")
        progress = ProgressLine()
        try:
            outcomes = sweep.run(jobs, out, arguments.delta, progress)
        finally:
            progress.end()
        result = sweep.to_json(outcomes, arguments.delta)
        parsed = parse(result)
        if parsed is None:
            raise ValueError("sweep: must hold a point, got none")
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        page = out / "sweep.html"
        write({out / sweep.NAME: text, page: sweep_page.render(parsed, base, when)})
        try:
            sweep.attach_to_runs(outcomes, result, out)
        except OSError as error:
            raise UsageError(107, f"{out}: must be writable, got {error.strerror}") from None
    sys.stdout.write(text if arguments.json else f"{sweep_page.table(parsed)}\n{page}\n")
    return 1 if any(outcome.value is None for outcome in outcomes) else 0


def _numbers(text: str) -> list[float]:
    """The noise multipliers, ascending."""
    from fedge.shared.errors import UsageError

    try:
        numbers = sorted(float(part) for part in text.split(","))
    except ValueError:
        numbers = []
    if (
        not 1 <= len(numbers) <= MAX_VALUES
        or not all(0 < number <= MAX_NOISE for number in numbers)
        or len(set(numbers)) < len(numbers)
    ):
        raise UsageError(
            102,
            f"--noise-multiplier: must be up to {MAX_VALUES} numbers above 0 and up to {MAX_NOISE:g}, each once, "
            f"with commas, got {text[:100]!r}",
        )
    return numbers


def _require(arguments: Namespace) -> None:
    from fedge.shared.errors import UsageError
    from fedge.shared.privacy.accounting.epsilon import MIN_DELTA

    if not 1 <= arguments.seeds <= MAX_VALUES:
        raise UsageError(102, f"--seeds: must be 1 to {MAX_VALUES}, got {arguments.seeds}")
    if not MIN_DELTA <= arguments.delta < 1:
        raise UsageError(102, f"--delta: must be {MIN_DELTA:g} to below 1, got {arguments.delta:g}")


def _begin(out: Path, base: str) -> None:
    """Begin a sweep in a folder, or check that the folder's sweep has the same configuration."""
    from fedge.shared.errors import UsageError
    from fedge.simulations.commands.audit import write

    path = out / "config.toml"
    try:
        begun = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        others = sorted(p.name for p in out.iterdir() if p.name not in ("lock", ".config.toml.tmp"))
    except OSError as error:
        raise UsageError(107, f"{out}: must be readable, got {error.strerror}") from None
    if begun == base:
        return
    if begun:
        pairs = zip(begun.splitlines(), base.splitlines(), strict=False)
        first = next((f"{a!r:.80} then, {b!r:.80} now" for a, b in pairs if a != b), "more keys")
        raise UsageError(107, f"{out}: must hold a sweep of the same configuration, got {first}")
    if others:
        raise UsageError(107, f"{out}: must be empty or hold a sweep, got {others[0]}")
    write({path: base})


COMMAND = Command(
    summary="train under several noise multipliers: accuracy against epsilon",
    extra="simulation",
    arguments=_arguments,
    run=_run,
    epilog=(
        "exit status: 1 where a run failed; with the same --out, what is missing runs.\n\n"
        "example:\n"
        "  fedge sweep examples/digits.toml --set privacy.mechanism=example \\\n"
        "    --noise-multiplier 0.5,1,2,4 --out runs/sweep"
    ),
)
