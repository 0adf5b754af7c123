"""``fedge audit``: attacks the privacy mechanism of a configuration."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.simulations.audit.canaries import Finding, Sizes
    from fedge.simulations.audit.inversion import Inversion


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to audit")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of audit.html and audit.json (default: runs/audit, or the next free)",
    )
    parser.add_argument("--json", action="store_true", help="print audit.json instead of a table")
    parser.add_argument(
        "--noise-factor", metavar="F", type=float, default=1.0,
        help="a check of the check: cut the noise to this share, as 0.25; exit status 1 says that it was caught",
    )  # fmt: skip


class ProgressLine:
    """Progress on standard error: one line that changes on a terminal, elsewhere a line for each part."""

    def __init__(self) -> None:
        import sys

        self._file, self._live, self._last = sys.stderr, sys.stderr.isatty(), ""

    def __call__(self, part: str, done: int, total: int) -> None:
        """Show the progress of a part.

        Args:
            part: its name.
            done: steps that are done.
            total: steps in all.
        """
        text = f"{part}: {100 * done // max(total, 1)} %"
        if self._live and text != self._last:
            self._file.write(f"\r\033[K{text}")
            self._file.flush()
            self._last = text
        elif not self._live and part != self._last:
            self._file.write(f"{part} ...\n")
            self._last = part

    def end(self) -> None:
        """Clear the line."""
        if self._live and self._last:
            self._file.write("\r\033[K")
            self._file.flush()


def _run(arguments: Namespace) -> int:
    return run(arguments)


def run(arguments: Namespace, sizes: Sizes | None = None) -> int:
    """Audit, print, write.

    Args:
        arguments: of the command line.
        sizes: of the audit; only tests pass others than the default.

    Returns:
        1 where the claim is contradicted, else 0.

    Raises:
        UsageError: 102, the share of the noise is out of its range, no noise, or none that is known; 107, the output
            cannot be written.
        ConfigError, DataError: as ``fedge simulate``; 201, the noise is incompatible with a secure sum.
    """
    import json
    import sys
    import time

    from fedge.shared.config.reader import dump, load
    from fedge.shared.errors import UsageError
    from fedge.shared.tasks.registry import get_task, require_task
    from fedge.simulations.audit.bound import MIN_FACTOR

    began, factor = time.monotonic(), arguments.noise_factor
    if not MIN_FACTOR <= factor <= 1:
        raise UsageError(102, f"--noise-factor: must be {MIN_FACTOR:g} to 1, got {factor:g}")
    config = load(arguments.config, arguments.set)
    if config.privacy.mechanism == "off" and factor != 1:
        raise UsageError(
            102, f"--noise-factor: must be 1 with privacy.mechanism off, got {factor:g}"
        )
    if config.privacy.epsilon is not None:
        raise UsageError(
            102,
            "privacy.noise-multiplier: must be set for an audit, got epsilon, for which each site finds its own;"
            " add --set privacy.noise-multiplier and leave epsilon out",
        )
    require_task(config.task.name)
    # Imported here, as these import torch.
    from fedge.client.data.dataset import site_shares
    from fedge.shared.privacy.checks.compatibility import require_compatible
    from fedge.shared.privacy.mechanisms.csprng import Entropy
    from fedge.shared.tasks.dry_run import check
    from fedge.simulations.audit import page
    from fedge.simulations.audit.canaries import Sizes, audit
    from fedge.simulations.audit.inversion import invert

    task = get_task(config.task.name)
    check(task)
    require_compatible(config.privacy, task, config.secure_aggregation.min_sites)
    shares = site_shares(config, task)
    out = folder(arguments.out, Path("runs/audit"))
    progress, entropy = ProgressLine(), Entropy()
    try:
        finding = audit(config, task, sizes or Sizes(), entropy, progress, noise_factor=factor)
        progress("one update", 0, 1)
        inversion = invert(config, task, next(iter(shares.values())), entropy)
    finally:
        progress.end()
    result = page.to_json(finding, inversion, time.monotonic() - began)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    text = json.dumps(result, indent=2) + "\n"
    html = page.render(finding, inversion, config.task.name, dump(config), when)
    write({out / "audit.json": text, out / "audit.html": html})
    if arguments.json:
        sys.stdout.write(text)
    else:
        sys.stdout.write(_table(finding, inversion, result) + f"\n{out / 'audit.html'}\n")
    return 1 if finding.verdict == "caught" else 0


def folder(chosen: Path | None, first: Path) -> Path:
    """Create the folder for results, before the work begins.

    Args:
        chosen: the folder, or None for the default.
        first: the default; where it exists, the next free number is appended.

    Raises:
        UsageError: 107, it cannot be created.
    """
    numbered = (first.with_name(f"{first.name}-{i}") for i in range(2, 100_000))
    out = chosen or (first if not first.exists() else next(p for p in numbered if not p.exists()))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    return out


def write(files: dict[Path, str]) -> None:
    """Write texts, each file whole or not at all.

    Raises:
        UsageError: 107, one cannot be written.
    """
    from fedge.shared.files import write_atomically

    for path, text in files.items():
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> Exception:
    from fedge.shared.errors import UsageError

    return UsageError(107, f"{path}: must be writable, got {error.strerror}")


def _table(finding: Finding, inversion: Inversion, result: dict[str, Any]) -> str:
    from fedge.simulations.audit.wording import audited, meant, words

    claim = (
        "none"
        if finding.claim is None
        else f"{finding.claim:.4f}  ({audited(finding)}, {meant(finding)})"
    )
    rows = [
        ("mechanism", finding.mechanism),
        ("claim", claim),
        (
            "lower bound",
            f"{finding.bound:.4f}  ({meant(finding)}, 95 % confidence; {finding.most:.4f} is the most it can show)",
        ),
        ("guesses right", f"{finding.correct} of {finding.sizes.guesses}, of {finding.sizes.canaries} canaries"),
        ("verdict", "CAUGHT" if finding.verdict == "caught" else finding.verdict),
    ]  # fmt: skip
    errors = [f"{v.name} {v.error:.1e}" for v in inversion.views]
    outcome = "largest error: " + ", ".join(errors) if errors else inversion.reason
    rows.append(("one update", outcome))
    rows.append(("time", f"{result['seconds']:.0f} s"))
    return "\n".join(f"{name:14} {value}" for name, value in rows) + f"\n\n{words(finding)}."


COMMAND = Command(
    summary="attack a configuration's privacy mechanism, and one update",
    extra="simulation",
    arguments=_arguments,
    run=_run,
    epilog=(
        "exit status: 0 where the claim is not contradicted, 1 where it is.\n\n"
        "example:\n"
        "  fedge audit examples/digits.toml --set privacy.mechanism=example \\\n"
        "    --set privacy.noise-multiplier=1 --out runs/audit"
    ),
)
