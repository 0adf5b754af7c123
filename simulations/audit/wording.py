"""An audit's verdict and limits in words."""

from __future__ import annotations

from typing import Final

from fedge.server.report import format as fmt
from fedge.shared.config.privacy import CENTRAL
from fedge.simulations.audit.canaries import Finding, P

_PLAIN: Final = "What the server computes from one site's weights without masks and noise."
_MEAN: Final = (
    "The same attack on what the model's readers get: the first round's mean, with the server's noise, in which this "
    "site alone has an update."
)
_TRUSTED: Final = (
    "What the server computes from one site's weights, which it gets without noise: it adds that itself, and is "
    "trusted with the example."
)
_VIEWS: Final = {
    "plain": ("One plain update", _PLAIN),
    "masked": ("One masked vector", "The same attack on what the server gets under masks."),
    "example": ("One update with DP-SGD", "The same attack on the update after the configured clipping and noise."),
    "distributed": (
        "The opened sum",
        "The same attack on a sum in which this site alone has an update; all the others add noise only.",
    ),
    "central": ("The noised mean", _MEAN),
    "central-mf": ("The noised mean", _MEAN),
    "local": (
        "One update with local noise",
        "The same attack on what the server gets: the update after the site's own clipping and noise.",
    ),
}  # fmt: skip
_AN_UPDATE: Final = "each the update of one site"
_AN_EXAMPLE: Final = "each a training example with a gradient of its own"


def words(finding: Finding) -> str:
    """The verdict in a sentence."""
    bound = f"{finding.bound:.2f}"
    if finding.claim is None:
        most = ", as much as this audit can show" if finding.bound == finding.most else ""
        return f"Nothing protects: epsilon of plain training {meant(finding)} is at least {bound}{most}"
    claim = f"{finding.claim:.2f}"
    if finding.verdict == "caught":
        return f"CAUGHT: epsilon {meant(finding)} is at least {bound}, above the claim of {claim}"
    more = (
        ""
        if finding.could_contradict
        else f"; no outcome could, as this audit shows {finding.most:.2f} at most"
    )
    proved = f"the guesses prove an epsilon of {bound} {meant(finding)}"
    return f"Not contradicted: {proved}, below the claim of {claim}{more}"


def meant(finding: Finding) -> str:
    """Whose epsilon claim and bound are, and at which delta."""
    return f"for one {finding.unit} at delta {finding.delta:g}"


def audited(finding: Finding) -> str:
    """What claim and bound are of."""
    if finding.mechanism == "central-mf":
        return (
            "the whole run, 1 round"
            if finding.rounds == 1
            else f"the whole run, {finding.rounds} rounds"
        )
    return "one update" if finding.mechanism == "local" else "one release"


def how(finding: Finding) -> str:
    """What canaries were, and how they were guessed."""
    does = {
        "distributed": f"{_AN_UPDATE}, added modulo 2^32. The {finding.honest} sites that the configuration counts on "
        "add noise, the others none: the worst sum that is promised to protect",
        "example": f"{_AN_EXAMPLE}, in one step of DP-SGD over all of them",
        "central": f"{_AN_UPDATE}, in one round of noise of the server's, in which every site is drawn",
        "central-mf": f"{_AN_UPDATE}, the same in each of its turns, from the first round on. As the promise is for "
        f"the whole run, its {fmt.count(finding.rounds)} rounds are looked at together, weighed so that the correlated "
        "noise takes itself back as far as it can",
        "local": f"{_AN_UPDATE}, with all of its noise from the site itself, and looked at alone",
        "off": f"{_AN_EXAMPLE}, in one plain step over all of them",
    }[finding.mechanism]
    sizes = finding.sizes
    coin = "A coin said of each whether it was in. From what came out alone"
    if finding.mechanism == "local":
        coin = (
            "A coin said of each whether the site sent it (in) or its negation (out), the two updates that are "
            "farthest apart. From what came out of each"
        )
    return (
        f"{fmt.count(sizes.canaries)} canaries over {fmt.count(sizes.parameters)} parameters, {does}. {coin}, half of "
        "the guesses named those that look most like in, and half those that look most like out; how many to guess "
        "was fixed before."
    )


def can() -> list[str]:
    """What an audit shows."""
    return [
        "It can contradict: a bound above the claim says that noise, clipping or accounting is wrong, and is itself "
        f"wrong in {P:.0%} of honest audits at most.",
        "It runs the code that a real run does: clipping, rounding, noise, sum and decoding are those of the product.",
    ]


def cannot(finding: Finding) -> list[str]:
    """What it does not."""
    scope = (
        "It looks at one run, not at several: how runs add up is the accountant's, and a site's ledger's."
        if finding.mechanism == "central-mf"
        else "It looks at one release, not at a whole run: how releases add up is the accountant's, and a site's"
        " ledger's."
    )
    said = [
        "It cannot confirm: a bound below the claim is what this one attack found. A better one may find more. "
        "Even sound noise and the best guesses leave a wide gap between the two.",
        f"It cannot show more than {finding.most:.2f} {meant(finding)}, however little is protected;"
        " a larger claim is out of its reach.",
        scope,
        "It does not look at sampling, at the generator of the random bits, at time, or at what leaves beside the "
        "mechanism, as held-out metrics that were declared unprotected.",
    ]
    if finding.mechanism in CENTRAL:
        said.append(
            "It looks at what the model's readers get. The server gets every update without noise, and nothing is "
            "claimed against it."
        )
    return said


def view(name: str, mechanism: str) -> tuple[str, str]:
    """Name of a form of the update, and what it is.

    Args:
        name: of the form.
        mechanism: that is configured.
    """
    if name == "plain" and mechanism in CENTRAL:
        return "What the server gets", _TRUSTED
    if name == "masked" and mechanism in CENTRAL:
        return (
            "One masked vector",
            "For comparison: under masks, which do not go with noise of the server's.",
        )
    return _VIEWS[name]
