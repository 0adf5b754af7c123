"""``policy.toml``: the requests that a site's worker serves, decided by its owner only.

The worker checks every request against it before anything else. There is no default: a
worker without this file does not start, and one whose file becomes invalid refuses everything
until the file is fixed. A change takes effect at the next request.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Final

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, model_validator

from fedge.client import requests
from fedge.client.settings import privacy_policy
from fedge.client.settings.disclosure import ABOUT_DATA, disclosed
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared import protocol
from fedge.shared.config import home_files
from fedge.shared.config.base_section import Section
from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.secagg import messages

FILE: Final = "policy.toml"

_REFUSED: Final = 418
_NOT_APPROVED: Final = 419
Name = Annotated[str, Field(min_length=1, max_length=64)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_COHORTS: Final = (protocol.TRAIN, protocol.EVALUATE, protocol.CALIBRATE, protocol.QUALIFY)
#: Requests whose replies reveal something of the data, except under secure aggregation.
_IN_CLEAR: Final = (protocol.REGISTER, *_COHORTS)


class SecurePolicy(Section):
    """The site's terms of secure aggregation."""

    required: bool = Field(
        False,
        description="whether weights, metrics and counts leave the site under secure aggregation only",
    )
    min_sites: int = Field(5, ge=3, le=2048, description="minimum number of sites of a sum")
    corrupt_sites: int | None = Field(
        None,
        ge=0,
        le=2048,
        description="sites of a sum that may collude with the server; must be fewer than a third of min-sites, and are"
        " as many as that allows unless given",
    )
    max_clipping_bound: float = Field(
        100.0, gt=0, le=1e6, description="largest L2 norm to which an update is clipped"
    )
    max_value_bound: float = Field(
        1_000.0, gt=0, le=1e6, description="largest bound of a single parameter's change"
    )
    max_state_bound: float = Field(
        10_000.0,
        gt=0,
        le=1e6,
        description="largest bound of the change of a value that is not a parameter, which no norm clips",
    )
    max_weight_cap: int = Field(
        2**23, ge=1, le=2**23, description="largest weight of the site, in examples"
    )

    @model_validator(mode="after")
    def _has_enough_honest_sites(self) -> SecurePolicy:
        # A sum has min_sites or more, whoever chooses them. With a third of them on its side a server could have both
        # of a site's secrets opened, one by each of two lists of survivors (fedge.shared.secagg.neighbour_graph).
        if self.corrupt_sites is not None and 3 * self.corrupt_sites >= self.min_sites:
            raise ValueError(
                f"min-sites: must be above 3 times corrupt-sites, {3 * self.corrupt_sites},"
                f" got {self.min_sites}"
            )
        return self


class Policy(Section):
    """The requests that the worker serves, and its limits on the machine."""

    tasks: tuple[Name, ...] = Field(description="tasks that may be trained and evaluated")
    bundles: tuple[Digest, ...] = Field(
        description="SHA-256 of the Flower bundles (FAB) that the site approved"
    )
    versions: tuple[Name, ...] = Field(description="versions of the server's fedge")
    max_rounds: int = Field(
        1_000, ge=1, le=1_000_000, description="highest round of a run that is served"
    )
    min_cohort: int = Field(
        2, ge=0, le=100_000, description="minimum number of sites invited to a round that is served"
    )
    share_statistics: bool = Field(
        True,
        description="whether sums over each feature of the training data may go to the server in the clear",
    )
    share_ranges: bool | None = Field(
        None,
        description="whether the smallest and largest value of each input and activation over training examples, which"
        " are single examples' own, may go to the server without noise, and in the clear; as share-statistics unless"
        " given, but false where privacy is required",
    )
    device: str = Field(
        "auto",
        pattern=r"^(cpu|auto|cuda(:[0-9]{1,2})?)$",
        description="cpu, cuda, cuda:N, or auto: a GPU where there is one",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="largest data of the worker's process, in GiB; only where it computes on the CPU",
    )
    gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="largest share of a GPU's memory"
    )
    max_request_mib: int = Field(
        1024, ge=1, le=1_048_576, description="largest request that is read, in MiB"
    )
    secure_aggregation: SecurePolicy = SecurePolicy()
    privacy: PrivacyPolicy = PrivacyPolicy()


def approve(policy: Policy, bundle: str) -> None:
    """Check a Flower bundle against the policy.

    Args:
        policy: of the site.
        bundle: SHA-256 of the bundle, hexadecimal.

    Raises:
        SiteError: 419, the site did not approve it.
    """
    if bundle not in policy.bundles:
        raise SiteError(
            _NOT_APPROVED,
            f"bundle: must be one of {len(policy.bundles)} in {FILE}, got {bundle or 'none'}",
        )


def allow(policy: Policy, kind: str, content: RecordDict, bundle: str) -> None:
    """Check a request against the policy; what it does not name is not allowed.

    ``min-cohort`` is not checked for a request to register: its number counts the nodes that register together, and a
    late joiner registers alone. What registering reveals is bounded by ``share-statistics``.

    Args:
        policy: of the site.
        kind: the message type.
        content: of the request.
        bundle: SHA-256 of the Flower bundle that it came through.

    Raises:
        SiteError: 419, the bundle is not approved; 418, anything else is not allowed.
    """
    approve(policy, bundle)
    record = content.get(protocol.CONFIG)
    config = record if isinstance(record, ConfigRecord) else ConfigRecord()
    for key, allowed in ((protocol.TASK, policy.tasks), (protocol.VERSION, policy.versions)):
        value = config.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise _refusal(key, f"one of {', '.join(allowed) or 'none'}", value)
    number = config.get(protocol.SERVER_ROUND)
    if type(number) is not int or number > policy.max_rounds:
        raise _refusal(protocol.SERVER_ROUND, f"at most {policy.max_rounds}", number)
    secure = content.get(messages.SECURE)
    masked = isinstance(secure, ConfigRecord)
    if isinstance(secure, ConfigRecord):
        _allow_secure(policy.secure_aggregation, secure)
    elif policy.secure_aggregation.required and kind in _IN_CLEAR:
        raise _refusal(kind, "under secure aggregation", "in clear")
    if kind in ABOUT_DATA:
        _allow_disclosure(policy, kind, config, masked=masked)
    if kind in _COHORTS:
        cohort = config.get(protocol.COHORT, 0)
        if type(cohort) is not int or cohort < policy.min_cohort:
            raise _refusal(protocol.COHORT, f"at least {policy.min_cohort}", cohort)


def _allow_disclosure(policy: Policy, kind: str, config: ConfigRecord, *, masked: bool) -> None:
    """Hold what the request makes the site give out against the policy, whatever it says of itself."""
    section = requests.section_of(config)
    # None or an unknown word, which the worker refuses, is taken for the one that makes more leave.
    standardise = config.get(protocol.STANDARDISE) != "site"
    # None is served by no worker, and says why itself.
    disclosure = disclosed(kind, section, masked=masked, standardise=standardise) or {}
    if disclosure.get("sums") == "clear" and not policy.share_statistics:
        expected = "site while share-statistics is false"
        raise _refusal(protocol.STANDARDISE, expected, config.get(protocol.STANDARDISE))
    privacy_policy.allow(policy.privacy, kind, section, disclosure)
    if disclosure.get("ranges", "noised") != "noised" and not shares_ranges(policy):
        # Where privacy is required, secure aggregation does not replace noise.
        if policy.privacy.required:
            expected = "with noise while privacy.required is true and share-ranges is not"
            raise _refusal(kind, expected, "without")
        if not masked:
            expected = "under secure aggregation or with noise while share-ranges is false"
            raise _refusal(kind, expected, "in clear")
    if (
        kind == protocol.TRAIN
        and section.mechanism == "distributed"
        and section.clipping_bound > policy.secure_aggregation.max_clipping_bound
    ):
        # The bound to which an update is clipped for distributed noise is that of its section, not of the sum.
        expected = f"at most {policy.secure_aggregation.max_clipping_bound:g}"
        raise _refusal("privacy.clipping-bound", expected, section.clipping_bound)


def shares_ranges(policy: Policy) -> bool:
    """Whether ranges of activations over training data may leave without noise and in clear, set or by default."""
    if policy.share_ranges is not None:
        return policy.share_ranges
    return policy.share_statistics and not policy.privacy.required


def _allow_secure(policy: SecurePolicy, secure: ConfigRecord) -> None:
    """Check the bounds of a secure sum, where a request states them, against the policy."""
    for key, maximum in (
        (messages.CLIPPING_BOUND, policy.max_clipping_bound),
        (messages.VALUE_BOUND, policy.max_value_bound),
        (messages.STATE_BOUND, policy.max_state_bound),
        (messages.WEIGHT_CAP, policy.max_weight_cap),
    ):
        value = secure.get(key, 0)
        if not isinstance(value, int | float) or not value <= maximum:
            raise _refusal(key, f"at most {maximum:g}", value)


def _refusal(key: str, expected: str, got: object) -> SiteError:
    return SiteError(_REFUSED, f"{key}: must be {expected} by {FILE}, got {str(got)[:80]!r}")


def read(home: Path) -> Policy:
    """Read a home's policy.

    Raises:
        DeployError: 901, there is none.
        ConfigError: 201 to 204, its content is not allowed.
    """
    return home_files.read(home / FILE, Policy)


class PolicyFile:
    """A home's policy, read again when its file changes.

    Raises:
        DeployError: 901, there is none.
        ConfigError: 201 to 204, its content is not allowed.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        # Its state is noted before it is read, so that a change in between is noticed.
        self._seen = self._mark()
        self._policy: Policy | None = read(home)
        self._problem = ""

    def current(self) -> Policy:
        """The policy as the file is now.

        Raises:
            SiteError: 418, the file is missing or invalid, so nothing is allowed.
        """
        with self._lock:
            mark = self._mark()
            if mark != self._seen or mark is None:
                self._seen = mark
                try:
                    self._policy, self._problem = read(self._home), ""
                except FedgeError as error:
                    self._policy, self._problem = None, str(error)
            if self._policy is None:
                raise SiteError(_REFUSED, f"{FILE}: must be readable, got {self._problem}")
            return self._policy

    def _mark(self) -> tuple[int, int, int, int] | None:
        try:
            status = (self._home / FILE).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
