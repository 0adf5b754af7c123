"""`fedge privacy restore`: take an older copy of a site's privacy ledger, with a charge for what was sent since."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from fedge.shared.config.privacy import Unit
    from fedge.shared.privacy.accounting.charges import Charge, Entry
    from fedge.shared.privacy.accounting.epsilon import Release

#: What such a charge has in place of a run, and of a mechanism unless it is one of the server's.
RESTORED: Final = "restored"
#: Delta to account at where the copy names none; a budget is held at its own delta all the same.
_DELTA: Final = 1e-5

_EXAMPLE: Final = (
    "example:\n"
    "  fedge privacy restore --home site --noise-multiplier 1 \\\n    --sampling-rate 0.1 --steps 100"
)


def add(actions: _SubParsersAction[ArgumentParser]) -> None:
    """Add the action to those of `fedge privacy`."""
    parser = actions.add_parser(
        "restore",
        help="take an older copy of a site's ledger, with a charge for what was sent since",
        description=(
            "Take the copy of the privacy ledger that lies in the home, although it is an older\n"
            "one, with a charge for what was sent since. No budget stops the charge, and it\n"
            "stays. Where you are not sure, give less noise and more steps."
        ),
        epilog=_EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--home", metavar="HOME", type=Path, required=True, help="the site's home")
    parser.add_argument(
        "--noise-multiplier", metavar="S", type=float, required=True,
        help="the least of what was sent since; 0 for no noise",
    )  # fmt: skip
    parser.add_argument(
        "--sampling-rate", metavar="Q", type=float, required=True,
        help="the greatest of what was sent since; 1 for no sampling",
    )  # fmt: skip
    parser.add_argument(
        "--steps", metavar="N", type=int, required=True, help="how many releases were sent since"
    )
    parser.add_argument(
        "--unit", choices=("example", "site"),
        help="what the noise hides (default: as the study's newest charge)",
    )  # fmt: skip
    parser.add_argument(
        "--own-noise", action="store_true",
        help="every release since had the site's own noise (example, distributed or local); without it the server may"
        " have had updates without any (central, central-mf), and epsilon against the server is infinite",
    )  # fmt: skip
    parser.add_argument(
        "--study", metavar="NAME", help="charge this one only (default: every study in the copy)"
    )


def run(arguments: Namespace) -> int:
    """Charge, and print what is then spent.

    Raises:
        UsageError: 102, an option is out of its range, or the copy leaves open what is charged.
        DeployError: 901, the home has no ledger and never had one.
        SiteError: 428, the copy cannot be relied on: it is damaged, altered, or not this site's.
    """
    import sys

    from fedge.shared.config.privacy import CENTRAL
    from fedge.shared.errors import UsageError
    from fedge.shared.privacy.accounting.epsilon import Release
    from fedge.shared.privacy.ledger.ledger import FILE, Ledger

    try:
        release = Release(arguments.noise_multiplier, arguments.sampling_rate, arguments.steps)
        added = Ledger.restore(
            arguments.home / FILE,
            lambda entries: charges_since(
                entries,
                release,
                arguments.study,
                arguments.unit,
                RESTORED if arguments.own_noise else CENTRAL[0],
            ),
        )
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UsageError(102, f"--{name.replace('_', '-')}:{rest}") from None
    for entry in added:
        sys.stdout.write(
            f"charge {entry.id}: study {entry.charge.study}, unit {entry.charge.unit}: "
            f"epsilon is now {entry.epsilon_consumers:.4f} against the consumers, "
            f"{entry.epsilon_server:.4f} against the server, at delta {entry.epsilon_delta:g}\n"
        )
    return 0


def charges_since(
    entries: Sequence[Entry],
    release: Release,
    study: str | None,
    unit: Unit | None,
    mechanism: str,
) -> list[tuple[Charge, float]]:
    """Charges for what an older copy of a ledger lacks, each with the delta to account at.

    Args:
        entries: the copy's, the oldest first.
        release: what was sent since.
        study: privacy budget account to charge; every one in the copy where None, as it cannot say which one went on.
        unit: of privacy; that of the study's newest charge where None.
        mechanism: to charge under; with one of the server's nothing bounds what the server learnt.

    Raises:
        ValueError: the copy leaves study or unit open, or a value is out of its range.
    """
    from fedge.shared.privacy.accounting.charges import Charge

    newest = {entry.charge.study: entry for entry in entries}
    studies = list(newest) if study is None else [study]
    if not studies:
        raise ValueError("study: must be given, as the copy holds no charges; got none")
    charges = []
    for name in studies:
        last = newest.get(name)
        charged_unit = unit or (last.charge.unit if last else None)
        if charged_unit is None:
            raise ValueError(f"unit: must be given, as the copy has no charge of {name}; got none")
        delta = last.epsilon_delta if last else _DELTA
        charge = Charge(
            study=name,
            unit=charged_unit,
            run_id=RESTORED,
            server_round=0,
            purpose="train",
            attempt=0,
            mechanism=mechanism,
            release=release,
            delta=delta,
            # No request is answered; this says from where on charges are missing.
            digest=entries[-1].hash if entries else "0" * 64,
        )
        charges.append((charge, delta))
    return charges
