"""docs/reference/attacks.md, from running every attack: `cd tests; ../.venv/bin/python -m attacks.table`.

A test holds that the page is current.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from . import flower_secagg as flower
from .flower_parties import Outcome
from .ours import ATTACKS, FAULTS, Attack
from .ours_more import MORE
from .privacy import PRIVACY, flower_dealer, flower_local_dp
from .promises import OVERFLOWS, PROMISES

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reference" / "attacks.md"
SEED: Final = 7

_HEAD: Final = """\
<!-- Written by tests/attacks/table.py from running the attacks. -->

# Attacks by the server

Each row is an attack that a test runs: a server that deviates, six sites, of which site-3 is the victim. On the left
against fedge's own sites, on the right against the clients of Flower's SecAgg+, which Flower has under its legacy API
only. "Succeeds" means that the server had the victim's update to a few quantisation steps; "refused" means that every
site that was told something else than an honest server tells raised, logged it and gave nothing more. For a fault,
"succeeds" means that it changed or ended the round.

What the numbers mean is in [errors](errors.md).
"""
_MORE: Final = """
## More on fedge

What has no counterpart in Flower's protocol. The last row is not refused: it is what no protocol for one sum can
refuse.
"""


_PRIVACY: Final = """
## On noise, budget and policy

By a server, or by a site where it says so; against the policy that an owner wrote, the ledger of a site, and what the
noise has to hide. Flower has no policy of a site, no ledger and no unit. {flower}. Where a site of SecAgg+ deals shares
of another secret, {dealer}.
"""
_PROMISES: Final = """
## On other promises of the documents

By a server, a site or a relay that was taken over, as each row says. "Succeeds" stands where the documents promise
nothing. A share that a client of Flower's cannot decrypt is its flipped-box-bit above: the error names no sender.
SecAgg+ has no checksum, and a node no ledger, policy or worker; what Flower does about folders stands in the row.
"""


def run_ours(attacks: Iterable[Callable[[Path], Attack]]) -> dict[str, Outcome]:
    """Outcomes by name."""
    found = {}
    for attack in attacks:
        with TemporaryDirectory() as home:
            outcome = attack(Path(home)).outcome
        found[outcome.name] = outcome
    return found


def page() -> str:
    """The page; every attack is run."""
    ours = run_ours((*ATTACKS, *FAULTS))
    theirs = {outcome.name: outcome for outcome in flower.run_all(SEED)}
    lines = [
        _HEAD,
        f"| attack | fedge | Flower {' and '.join(flower.MEASURED)} SecAgg+ |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {_cell(o)} | {_cell(theirs[name])} |" for name, o in ours.items()]
    lines += [_MORE, "| attack | what the server does | fedge |", "|---|---|---|"]
    for attack, (name, outcome) in zip(MORE, run_ours(MORE).items(), strict=True):
        lines.append(f"| {name} | {attack.__doc__} | {_cell(outcome)} |")
    lines += [_PRIVACY.format(flower=flower_local_dp(), dealer=flower_dealer())]
    lines += _rows((*PRIVACY, *OVERFLOWS))
    lines += [_PROMISES, *_rows(PROMISES)]
    return "\n".join(lines) + "\n"


def _rows(attacks: Iterable[Callable[[Path], Outcome]]) -> list[str]:
    lines = ["| attack | what is done | fedge |", "|---|---|---|"]
    for attack in attacks:
        with TemporaryDirectory() as home:
            outcome = attack(Path(home))
        lines.append(f"| {outcome.name} | {attack.__doc__} | {_cell(outcome)} |")
    return lines


def _cell(outcome: Outcome) -> str:
    return f"**{outcome.verdict}**: {outcome.what_happened}".replace("|", "\\|")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    PAGE.write_text(page(), encoding="utf-8")
