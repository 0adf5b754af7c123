"""``[privacy]``: which mechanism protects whom, and how much noise it adds."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from pydantic import Field, model_validator

from fedge.shared.config.base_section import Section

Unit: TypeAlias = Literal["example", "site"]

#: Keys that one mechanism alone has a use for.
_OF_MECHANISM: Final = {
    "epsilon": "example",
    "corrupt_sites": "distributed",
    "sampling_rate": "central",
    "clipping_quantile": "central",
    "clipping_learning_rate": "central",
    "count_noise_multiplier": "central",
    "bands": "central-mf",
    "min_separation": "central-mf",
}


class PrivacySection(Section):
    """Differential privacy: what the model may tell of the data (docs/explanation/privacy.md)."""

    mechanism: Literal["off", "example", "distributed", "central", "central-mf", "local"] = Field(
        "off",
        description="example: DP-SGD at each site, which protects single examples; the others protect whole sites."
        " distributed: noise of all sites under their masks; central: noise of the server, which is trusted with the"
        " updates; central-mf: the same, correlated over the rounds; local: each site adds all of its own noise",
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="standard deviation of the noise, by what one unit can change: the clipping bound, twice that with"
        " local, and with central-mf what all of a site's rounds change together; `fedge privacy calibrate` finds it",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="what the run may cost each site's examples, instead of noise-multiplier: each site then finds the"
        " noise that its number of examples asks for (example)",
    )
    delta: float = Field(1e-5, ge=1e-10, lt=1, description="at which that epsilon is meant")
    clipping_bound: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="L2 norm to which an example's gradient (example) or a site's update (others) is scaled down",
    )
    corrupt_sites: int = Field(
        0,
        ge=0,
        le=2048,
        description="sites of a sum that may add no noise (distributed); the others then add more",
    )
    sampling_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="chance of each site to be drawn in a round, each by a coin of its own (central)",
    )
    clipping_quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the updates that the clipping bound shall not scale down, which it then follows from"
        " round to round (central); without it the bound stays",
    )
    clipping_learning_rate: float = Field(
        0.2, gt=0, le=10, description="how fast the bound follows that share"
    )
    count_noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="standard deviation of the noise on the number of updates within the bound; unless given a"
        " twentieth of the sites drawn on average, but noise-multiplier at least",
    )
    bands: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="rounds over which noise is correlated (central-mf); the best number unless given",
    )
    min_separation: int = Field(
        1,
        ge=1,
        le=100_000,
        description="the sites take turns: each is asked every so many rounds (central-mf)",
    )
    metrics: Literal["off", "noised", "unprotected"] = Field(
        "off",
        description="off: nobody evaluates; noised: counts over held-out examples get noise, and are charged;"
        " unprotected: they leave the sites without",
    )
    metrics_noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="standard deviation of the noise on those counts, by what they can change by",
    )
    statistics: Literal["off", "unprotected"] = Field(
        "off",
        description="off: no task that standardises; unprotected: mean and deviation are used without noise",
    )

    @model_validator(mode="after")
    def _whole(self) -> PrivacySection:
        if self.mechanism == "off":
            if self.noise_multiplier is not None:
                raise ValueError("mechanism must be named where noise-multiplier is set, got off")
            if self.metrics == "noised":
                raise ValueError(
                    "metrics must be off or unprotected with mechanism off, got noised"
                )
        elif self.noise_multiplier is None and self.epsilon is None:
            other = " or epsilon" if self.mechanism == "example" else ""
            raise ValueError(f"must hold noise-multiplier{other} with {self.mechanism}, got none")
        elif self.noise_multiplier is not None and self.epsilon is not None:
            raise ValueError("must hold noise-multiplier or epsilon, got both")
        if self.epsilon is None and self.delta != type(self).model_fields["delta"].default:
            raise ValueError("must hold epsilon where delta is set, got none")
        if self.metrics == "noised" and self.metrics_noise_multiplier is None:
            raise ValueError("must hold metrics-noise-multiplier with metrics noised, got none")
        if self.metrics != "noised" and self.metrics_noise_multiplier is not None:
            raise ValueError(
                f"metrics must be noised where metrics-noise-multiplier is set, got {self.metrics}"
            )
        for key, mechanism in _OF_MECHANISM.items():
            if (
                self.mechanism != mechanism
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                name = key.replace("_", "-")
                raise ValueError(
                    f"mechanism must be {mechanism} where {name} is set, got {self.mechanism}"
                )
        return self._agreed()

    def _agreed(self) -> PrivacySection:
        """The noise on the count must leave room for that on the updates."""
        count, all_ = self.count_noise_multiplier, self.noise_multiplier
        if count is None or all_ is None:
            return self
        if self.clipping_quantile is None:
            raise ValueError(
                "clipping-quantile must be set where count-noise-multiplier is, got none"
            )
        if count <= all_ / 2:
            raise ValueError(
                f"count-noise-multiplier must be above half of noise-multiplier, {all_ / 2:g}, got {count:g}"
            )
        return self

    @property
    def unit(self) -> Unit:
        """What the noise hides."""
        return "example" if self.mechanism == "example" else "site"

    @property
    def hides_sites(self) -> bool:
        """Whether it is whole sites that are protected, whose numbers of examples are then hidden too."""
        return self.mechanism not in ("off", "example")

    @property
    def tells_counts(self) -> bool:
        """Whether counts over held-out examples leave exact, and with them how many there are."""
        return self.mechanism == "off" or self.metrics == "unprotected"


#: Mechanisms whose noise is the server's: it gets the updates without, so that nothing bounds what it learns.
CENTRAL: Final = ("central", "central-mf")
