"""``[privacy]`` of policy.toml: the site's terms of differential privacy."""

from __future__ import annotations

from typing import Final, Literal

from flwr.app import ConfigRecord
from pydantic import Field

from fedge.client.requests import section_of
from fedge.shared import protocol
from fedge.shared.config.base_section import Section
from fedge.shared.config.privacy import CENTRAL
from fedge.shared.errors import SiteError
from fedge.shared.secagg import messages

_REFUSED: Final = 418
#: Requests that read the data; later steps of a secure sum follow one of these.
_ABOUT_DATA: Final = (
    protocol.REGISTER,
    protocol.TRAIN,
    protocol.EVALUATE,
    protocol.CALIBRATE,
    protocol.QUALIFY,
    messages.STATISTICS,
)
#: Counts over held-out examples.
_METRICS: Final = (protocol.EVALUATE, protocol.QUALIFY)


class PrivacyPolicy(Section):
    """The site's terms of differential privacy."""

    required: bool = Field(
        False, description="whether the site takes part under differential privacy only"
    )
    study: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}$",
        description="name of the site's data in its ledger; all runs on them, of any server, share one budget",
    )
    epsilon: float = Field(
        10.0,
        ge=0,
        le=1e9,
        description="privacy budget that all runs of the study may spend together",
    )
    delta: float = Field(1e-5, ge=1e-10, lt=1, description="at which epsilon is computed")
    against: Literal["server", "consumers"] = Field(
        "server",
        description="whose epsilon the budget bounds: the server's, which sees who takes part, or that of the model's"
        " consumers",
    )
    share_metrics: bool = Field(
        False,
        description="whether counts over held-out examples may leave without noise where privacy is required",
    )
    share_statistics: bool = Field(
        False,
        description="whether mean and standard deviation of columns may be used without noise where privacy is"
        " required",
    )
    trust_server: bool = Field(
        False,
        description="whether the server may get updates without noise, to add it itself, where privacy is required",
    )
    corrupt_sites: int = Field(
        0,
        ge=0,
        le=2048,
        description="sites of a sum that may collude with the server; noise of all sites must make up for so many",
    )


def simulated() -> PrivacyPolicy:
    """The terms of a simulated site, which has no owner."""
    return PrivacyPolicy(epsilon=1e9, against="consumers")


def allow(policy: PrivacyPolicy, kind: str, config: ConfigRecord) -> None:
    """Check a request against the policy.

    Args:
        policy: of the site.
        kind: the message type.
        config: configuration record of the request.

    Raises:
        SiteError: 418, the site's owner does not allow it; 414, its privacy section does not parse.
    """
    if kind not in _ABOUT_DATA:
        return
    section = section_of(config)
    # How many sites may add no noise is the owner's to say wherever the noise is shared, required or not.
    if section.mechanism == "distributed" and section.corrupt_sites < policy.corrupt_sites:
        raise _refusal(
            "privacy.corrupt-sites", f"at least {policy.corrupt_sites}", section.corrupt_sites
        )
    if not policy.required:
        return
    if section.mechanism == "off":
        raise _refusal(kind, "under differential privacy", "without")
    if section.mechanism in CENTRAL and not policy.trust_server:
        expected = "of the site's own while privacy.trust-server is false"
        raise _refusal("privacy.mechanism", expected, section.mechanism)
    if section.statistics == "unprotected" and not policy.share_statistics:
        expected = "off while privacy.share-statistics is false"
        raise _refusal("privacy.statistics", expected, section.statistics)
    noised = section.metrics == "noised"
    if kind in _METRICS and not policy.share_metrics and not noised:
        raise _refusal(
            kind, "left out while privacy.share-metrics is false, or noised", section.metrics
        )


def _refusal(key: str, expected: str, got: object) -> SiteError:
    return SiteError(_REFUSED, f"{key}: must be {expected} by policy.toml, got {str(got)[:80]!r}")
