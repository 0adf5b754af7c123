"""``[privacy]`` of policy.toml: the site's terms of differential privacy."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from fedge.client.settings.disclosure import Disclosure
from fedge.shared.config.base_section import Section
from fedge.shared.config.privacy import PrivacySection, Unit
from fedge.shared.errors import SiteError

_REFUSED: Final = 418


class PrivacyPolicy(Section):
    """The site's terms of differential privacy."""

    required: bool = Field(
        False, description="whether the site takes part under differential privacy only"
    )
    unit: Unit = Field(
        "example",
        description="what must be hidden at least where privacy is required: a single example, or the whole site with"
        " its numbers of examples, which a run under the mechanism example does not do",
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


def allow(
    policy: PrivacyPolicy, kind: str, section: PrivacySection, disclosure: Disclosure
) -> None:
    """Hold what a request makes the site give out against the policy.

    Args:
        policy: of the site.
        kind: the message type.
        section: the privacy section that the request carries.
        disclosure: what leaves the site, in which form.

    Raises:
        SiteError: 418, the site's owner does not allow it.
    """
    # How many sites may add no noise is the owner's to say wherever the noise is shared, required or not.
    if section.mechanism == "distributed" and section.corrupt_sites < policy.corrupt_sites:
        raise _refusal(
            "privacy.corrupt-sites", f"at least {policy.corrupt_sites}", section.corrupt_sites
        )
    if not policy.required:
        return
    if section.mechanism == "off":
        raise _refusal(kind, "under differential privacy", "without")
    if policy.unit == "site" and not section.hides_sites:
        expected = "one that hides the whole site while privacy.unit is site"
        raise _refusal("privacy.mechanism", expected, section.mechanism)
    if disclosure.get("update") == "trusted" and not policy.trust_server:
        expected = "of the site's own while privacy.trust-server is false"
        raise _refusal("privacy.mechanism", expected, section.mechanism)
    # Also where no sum leaves: a mean and a deviation of the site's own, without noise, are in every row that trains,
    # so that one row moves the gradients of all others, beyond what clipping bounds.
    exact_sums = disclosure.get("sums", "noised") != "noised" or section.statistics == "unprotected"
    if exact_sums and not policy.share_statistics:
        expected = "off while privacy.share-statistics is false, and no sums asked for"
        raise _refusal("privacy.statistics", expected, section.statistics)
    if disclosure.get("counts", "noised") != "noised" and not policy.share_metrics:
        expected = "left out while privacy.share-metrics is false, or noised"
        raise _refusal(kind, expected, section.metrics)


def _refusal(key: str, expected: str, got: object) -> SiteError:
    return SiteError(_REFUSED, f"{key}: must be {expected} by policy.toml, got {str(got)[:80]!r}")
