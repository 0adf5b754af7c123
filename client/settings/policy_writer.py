"""Writes a new ``policy.toml``: every key with its meaning, for an owner who edits it by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedge.client.settings.policy import FILE, Policy, SecurePolicy, read
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared.config import home_files
from fedge.shared.files import write_atomically

_TEXT: Final = """\
# What this site's worker serves. Only the site's owner changes this file; a change takes effect at the next request.

# Tasks that may be trained and evaluated here.
tasks = {tasks}
# SHA-256 of the Flower bundles that this site approved; `fedge server bundle` prints the server's.
bundles = {bundles}
# Versions of the server's fedge.
versions = {versions}

# Highest round of a run that is served.
max-rounds = {max_rounds}
# Minimum number of sites invited to a round. With few others, a model reveals more about this site.
min-cohort = {min_cohort}
# Whether the server may learn, when the site registers, the sum and the sum of squares of each feature over this site's
# training data, in the clear; a run with data.standardise = "federated" needs them, and is refused where this is false.
share-statistics = {share_statistics}
# Whether the server may learn, once in each run with calibration.enabled, the smallest and the largest value of each
# input and each activation of the final model, over at least 64 of the training examples (all where there are fewer).
# Each such value is some single example's own: of an input, the most extreme measurement that is in them; and a server
# that chooses the weights chooses what of that example they reveal. As share-statistics while this line is a comment,
# but false where privacy is required. Where it is false, ranges leave under secure aggregation or with noise; where
# privacy is required, with noise only.
{share_ranges}

# Device: cpu, cuda, cuda:N, or auto, which takes a GPU where there is one.
device = "{device}"
# Largest share of the GPU's memory.
gpu-memory-fraction = 0.9
# Largest data of the worker's process, in GiB; unbounded while this line is a comment. Only where it computes on the
# CPU: with a GPU it must stay a comment, and the service manager's bound (MemoryMax= of systemd) holds instead.
# memory-gib = 8.0
# Largest request that is read, in MiB.
max-request-mib = 1024

[secure-aggregation]
# Whether weights, metrics and counts leave the site under secure aggregation only; needs a signed roster here.
required = {required}
# Minimum number of sites of a sum. The fewer there are, the more the sum reveals of each.
min-sites = {min_sites}
# Sites of a sum that may collude with the server without learning this site's update: fewer than a third of min-sites,
# which this line makes sure of. As many as min-sites allows while it is a comment.
{secure_corrupt_sites}
# Largest L2 norm to which the server may have an update clipped.
max-clipping-bound = {max_clipping_bound}
# Largest bounds of the change of one parameter, and of a value that is none (BatchNorm), which no norm clips.
max-value-bound = {max_value_bound}
max-state-bound = {max_state_bound}
# Largest weight of the site, in examples.
max-weight-cap = {max_weight_cap}

[privacy]
# Whether the site takes part under differential privacy only.
required = {private}
# What must be hidden at least then: a single example, or the whole site with its numbers of examples.
unit = "{unit}"
# Name of this site's data in its ledger: all runs on them, of any server, share one budget. The site stops before the
# round that would exceed it.
study = "{study}"
epsilon = {epsilon}
delta = {delta}
# Whose epsilon counts: the server's, which sees who takes part, or that of the model's consumers.
against = "{against}"
# Whether counts over held-out examples may leave without noise where privacy is required.
share-metrics = {share_metrics}
# Whether mean and standard deviation of columns may be used without noise where privacy is required.
share-statistics = {share_private_statistics}
# Whether the server may get updates without noise, to add it itself, where privacy is required.
trust-server = {trust_server}
# Sites of a sum that may collude with the server; noise of all sites must make up for so many.
corrupt-sites = {corrupt_sites}
"""


def text(
    *,
    tasks: Sequence[str],
    bundles: Sequence[str],
    versions: Sequence[str],
    max_rounds: int,
    min_cohort: int,
    share_statistics: bool,
    share_ranges: bool | None,
    device: str,
    secure: SecurePolicy,
    privacy: PrivacyPolicy,
) -> str:
    """The policy as TOML with comments; the arguments are those of ``write``."""
    return _TEXT.format(
        tasks=_list(tasks),
        bundles=_list(bundles),
        versions=_list(versions),
        max_rounds=max_rounds,
        min_cohort=min_cohort,
        share_statistics=str(share_statistics).lower(),
        share_ranges=_optional("share-ranges", share_ranges, False),
        device=device,
        required=str(secure.required).lower(),
        min_sites=secure.min_sites,
        secure_corrupt_sites=_optional("corrupt-sites", secure.corrupt_sites, 0),
        max_clipping_bound=secure.max_clipping_bound,
        max_value_bound=secure.max_value_bound,
        max_state_bound=secure.max_state_bound,
        max_weight_cap=secure.max_weight_cap,
        private=str(privacy.required).lower(),
        unit=privacy.unit,
        study=privacy.study,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        against=privacy.against,
        share_metrics=str(privacy.share_metrics).lower(),
        share_private_statistics=str(privacy.share_statistics).lower(),
        trust_server=str(privacy.trust_server).lower(),
        corrupt_sites=privacy.corrupt_sites,
    )


def _optional(key: str, value: int | None, example: int) -> str:
    """The key; a comment with an example where it is not set."""
    return (
        f"{'# ' if value is None else ''}{key} = {str(example if value is None else value).lower()}"
    )


def _list(values: Sequence[str]) -> str:
    import tomli_w

    return tomli_w.dumps({"v": list(values)}, multiline_strings=False).partition("=")[2].strip()


def write(
    home: Path,
    *,
    tasks: Sequence[str],
    bundles: Sequence[str],
    versions: Sequence[str],
    max_rounds: int = 1_000,
    min_cohort: int = 2,
    share_statistics: bool = True,
    share_ranges: bool | None = None,
    device: str = "auto",
    secure: SecurePolicy | None = None,
    privacy: PrivacyPolicy | None = None,
) -> Policy:
    """Write a home's policy with comments, replacing an existing one.

    Args:
        home: created if missing, readable by its owner only.
        tasks: names of the tasks that are served.
        bundles: SHA-256 (hex) of approved Flower bundles.
        versions: allowed versions of the server's fedge.
        max_rounds: highest round served.
        min_cohort: minimum number of sites invited to a round.
        share_statistics: whether sums over features may leave the site.
        share_ranges: whether ranges of activations may; None for the default of ``shares_ranges``.
        device: as ``Policy.device``.
        secure: terms of secure aggregation; not required where None.
        privacy: terms of differential privacy; not required where None.

    Raises:
        ConfigError: 201, a value is not allowed; the file is then not written.
    """
    lists = {"tasks": tuple(tasks), "bundles": tuple(bundles), "versions": tuple(versions)}
    others = {
        "max-rounds": max_rounds,
        "min-cohort": min_cohort,
        "share-statistics": share_statistics,
        "device": device,
    }
    home_files.check({**lists, **others}, Policy, FILE)
    content = text(
        **lists,
        max_rounds=max_rounds,
        min_cohort=min_cohort,
        share_statistics=share_statistics,
        share_ranges=share_ranges,
        device=device,
        secure=secure or SecurePolicy(),
        privacy=privacy or PrivacyPolicy(),
    )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(home / FILE, content.encode())
    return read(home)
