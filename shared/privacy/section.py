"""``[privacy]``: which mechanism protects whom, and how much noise it adds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedge.shared.section import Section


class PrivacySection(Section):
    """Differential privacy: what the model may tell of the data (docs/explanation/privacy.md)."""

    mechanism: Literal["off", "example", "distributed"] = Field(
        "off",
        description="example: DP-SGD at each site, which protects single examples; distributed: noise of all sites"
        " under their masks, which protects whole sites",
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        le=1e4,
        description="standard deviation of the noise, by the clipping bound; `fedge privacy calibrate` finds it",
    )
    clipping_bound: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="L2 norm to which an example's gradient (example) or a site's update (distributed) is scaled down",
    )
    corrupt_sites: int = Field(
        0,
        ge=0,
        le=2048,
        description="sites of a sum that may add no noise (distributed); the others then add more",
    )
    metrics: Literal["off", "unprotected"] = Field(
        "off",
        description="off: nobody evaluates; unprotected: counts over held-out examples leave the sites without noise",
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
        elif self.noise_multiplier is None:
            raise ValueError(f"must hold noise-multiplier with {self.mechanism}, got none")
        return self
