"""The one configuration: the same TOML file simulates, deploys and releases.

Every section is a frozen Pydantic model with kebab-case keys; units stand in the descriptions. Reading, ``--set``
and the errors' wording are in ``fedge.shared.config.reader``.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from fedge.shared.config import privacy_rules
from fedge.shared.config.sections import Sections
from fedge.shared.config.strategies import (
    COMPARING,
    Bulyan,
    Krum,
    MultiKrum,
    QFedAvg,
    least_replies,
)
from fedge.shared.protocol import MAX_SITES


class Config(Sections):
    """A federation."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        found = [
            *self._momentum_problems(),
            *self._calibration_problems(),
            *self._site_count_problems(),
            *self._secure_aggregation_problems(),
            *privacy_rules.incompatible(self),
        ]
        if found:
            raise ValueError("; ".join(found))
        return self

    def _momentum_problems(self) -> Iterator[str]:
        if self.train.optimizer == "adam" and self.train.momentum:
            yield f"train.momentum: must be 0 with adam, got {self.train.momentum}"

    def _calibration_problems(self) -> Iterator[str]:
        histograms = self.secure_aggregation.enabled or self.privacy.metrics == "noised"
        if self.calibration.quantile < 1 and not histograms:
            yield (
                "calibration.quantile: must be 1 without secure-aggregation or noise, as sites then report extremes, of"
                f" which there is no quantile, got {self.calibration.quantile}"
            )

    def _secure_aggregation_problems(self) -> Iterator[str]:
        """What secure aggregation excludes."""
        secure, chosen = self.secure_aggregation, self.strategy
        if not secure.enabled:
            return
        if isinstance(chosen, QFedAvg):
            yield (
                "strategy.name: must be a mean weighted by examples with secure-aggregation,"
                " got QFedAvg, which weighs each site by its own loss"
            )
        elif isinstance(chosen, COMPARING):
            least = least_replies(chosen)
            if secure.groups < least:
                yield (
                    f"secure-aggregation.groups: must be at least {least} with {chosen.name}, which compares"
                    f" replies and sees one a group, got {secure.groups}"
                )
        elif secure.groups > 1:
            yield (
                f"secure-aggregation.groups: must be 1 with {chosen.name}, which adds all replies: a sum over more"
                f" sites hides each better, got {secure.groups}"
            )
        if self.data.partition != "natural":
            most = self.sites.count // secure.groups
            if secure.min_sites > most:
                each = " in each group" if secure.groups > 1 else ""
                yield (
                    f"secure-aggregation.min-sites: must be at most {most}{each} with {self.sites.count} sites,"
                    f" got {secure.min_sites}"
                )
            if most > MAX_SITES:
                yield f"sites.count: must be at most {MAX_SITES} in a secure sum, got {most}"

    def _site_count_problems(self) -> Iterator[str]:
        """What no run could fulfil; natural sites are known only once the data is read."""
        if self.data.partition == "natural":
            return
        count, chosen = self.sites.count, self.strategy
        numbers = [("round.min-sites", self.round.min_sites, count)]
        if isinstance(chosen, MultiKrum):
            numbers.append(("strategy.num-nodes-to-select", chosen.num_nodes_to_select, count))
        if isinstance(chosen, Krum | MultiKrum | Bulyan):
            # Their guarantees ask for 2f + 3 or 4f + 3 sites against f attackers.
            each = 4 if isinstance(chosen, Bulyan) else 2
            most = max(count - 3, 0) // each
            numbers.append(("strategy.num-malicious-nodes", chosen.num_malicious_nodes, most))
        sites = "1 site" if count == 1 else f"{count} sites"
        for key, value, most in numbers:
            if value > most:
                yield f"{key}: must be at most {most} with {sites}, got {value}"
