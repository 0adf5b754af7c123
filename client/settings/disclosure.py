"""What each request makes a site give out of its data, by message type and mechanism.

The policy is held against this table, not against what a request says of itself. It says the most that can leave: a
task that standardises nothing sends no sums, whatever was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from fedge.shared import protocol
from fedge.shared.config.privacy import CENTRAL, PrivacySection
from fedge.shared.secagg import messages

#: update: what training changed, with the loss where there is no mechanism. sizes: the number of training examples.
#: counts: the task's counters over held-out examples, and how many there are. sums: of each standardised column and of
#: its squares, and over how many rows. ranges: the smallest and largest values of inputs and activations, and over how
#: many rows.
Quantity: TypeAlias = Literal["update", "counts", "sizes", "sums", "ranges"]
#: clear: exact, this site's alone. masked: exact, in a sum over sites only. noised: with noise that hides the
#: mechanism's unit, charged to the ledger. trusted: exact, to a server that adds the noise; charged.
Form: TypeAlias = Literal["clear", "masked", "noised", "trusted"]
Disclosure: TypeAlias = Mapping[Quantity, Form]

#: Requests that read the data; later steps of a secure sum follow one of these.
ABOUT_DATA: Final = (
    protocol.REGISTER,
    protocol.TRAIN,
    protocol.EVALUATE,
    protocol.CALIBRATE,
    protocol.QUALIFY,
    messages.STATISTICS,
)


def disclosed(
    kind: str, section: PrivacySection, *, masked: bool, standardise: bool = False
) -> Disclosure | None:
    """What leaves the site with the reply to a request, or in the sum that it begins.

    Args:
        kind: its message type, of ``ABOUT_DATA``.
        section: the privacy section that it carries.
        masked: whether it is under secure aggregation.
        standardise: whether it asks for what a common standardisation needs, where it registers a site.

    Returns:
        The form of each quantity that leaves; None where every worker refuses the request.
    """
    exact: Form = "masked" if masked else "clear"
    if kind == protocol.REGISTER:
        return {} if masked else _registered(section, standardise=standardise)
    if kind == messages.STATISTICS:
        return {"sums": "masked"} if masked else None
    if kind == protocol.TRAIN:
        return _trained(section, masked=masked)
    quantity: Quantity = "ranges" if kind == protocol.CALIBRATE else "counts"
    if section.tells_counts:
        return {quantity: exact}
    if section.metrics == "off" or (section.mechanism == "distributed" and not masked):
        return None
    return {quantity: "noised"}


def _registered(section: PrivacySection, *, standardise: bool) -> Disclosure:
    sizes: Disclosure = {} if section.hides_sites else {"sizes": "clear"}
    counts: Disclosure = {"counts": "clear"} if section.tells_counts else {}
    # A worker whose task standardises refuses to register where the section says that no sums leave.
    summed = standardise and (section.mechanism == "off" or section.statistics == "unprotected")
    sums: Disclosure = {"sums": "clear"} if summed else {}
    return {**sizes, **counts, **sums}


def _trained(section: PrivacySection, *, masked: bool) -> Disclosure | None:
    mechanism = section.mechanism
    if mechanism == "off":
        exact: Form = "masked" if masked else "clear"
        return {"update": exact, "sizes": exact}
    if mechanism == "example":
        # The number of training examples is the weight of the update, and its epsilon tells it.
        return {"update": "noised"} if masked else {"update": "noised", "sizes": "clear"}
    if masked != (mechanism == "distributed"):
        return None
    return {"update": "trusted" if mechanism in CENTRAL else "noised"}
