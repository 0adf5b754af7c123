"""The sections of a federation's configuration, each by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedge.shared.config.base_section import FilePath, Section, SiteName
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.strategies import FedAvg, StrategySection


class RunSection(Section):
    """How long, and from which seed."""

    rounds: int = Field(10, ge=1, le=100_000, description="number of rounds")
    seed: int = Field(
        42, ge=0, le=2**63 - 1, description="seed of the weights, the shares and the batches"
    )
    evaluate_every: int = Field(
        1, ge=1, description="rounds between evaluations; the last is always evaluated"
    )
    threads: int = Field(
        1, ge=1, le=256, description="CPU threads of a site's training; fixed, as sums depend on it"
    )


class TaskSection(Section):
    """What is learnt."""

    name: str = Field(description="name of an installed task, see `fedge config tasks`")


class DataSection(Section):
    """Where the examples come from and who holds which."""

    path: FilePath | None = Field(
        None,
        description="folder of the data files, for tasks that read files; relative to the working directory",
    )
    partition: Literal["dirichlet", "iid", "natural"] = Field(
        "dirichlet", description="natural: the data's own sites, for example hospitals"
    )
    alpha: float = Field(
        0.5, gt=0, le=1e6, description="Dirichlet concentration; smaller is less alike"
    )
    test_fraction: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="share of each site's examples held out, where the data has no split of its own",
    )
    standardise: Literal["federated", "site"] = Field(
        "federated",
        description="whose mean and deviation: of all sites together, or each site its own",
    )


class SitesSection(Section):
    """Who takes part."""

    count: int = Field(
        8, ge=1, le=100_000, description="number of sites; unused with the natural partition"
    )


class TrainSection(Section):
    """What a site does in a round."""

    optimizer: Literal["sgd", "adam"] = Field("sgd", description="fresh in every round")
    learning_rate: float = Field(0.05, gt=0, le=1e3, description="step size at the site")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="L2 penalty")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="examples a step")
    local_epochs: int | None = Field(
        None, ge=1, le=10_000, description="passes a round; 1 where neither is given"
    )
    local_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="steps a round, instead of epochs"
    )
    mixed_precision: Literal["off", "bfloat16", "float16"] = Field(
        "off",
        description="type of the forward and backward pass; the weights stay as they are; float16 needs a GPU",
    )

    @model_validator(mode="after")
    def _one_of(self) -> TrainSection:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("must hold local-epochs or local-steps, got both")
        return self


class RoundSection(Section):
    """What makes a round, and how long it may take."""

    fraction_train: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the registered sites invited to train, but at least min-sites of them, "
        "and secure-aggregation.min-sites times groups under masks",
    )
    min_sites: int = Field(
        2, ge=1, le=100_000, description="admitted updates without which a round makes no model"
    )
    require_sites: tuple[SiteName, ...] = Field(
        (), description="sites without whose update the run stops"
    )
    deadline: float = Field(
        600.0, gt=0, le=86_400, description="seconds from the invitation to the last reply"
    )
    max_skipped: int = Field(
        3, ge=1, le=100_000, description="rounds in a row without a model before the run stops"
    )


class AdmissionSection(Section):
    """What the gate lets through."""

    max_update_norm: float = Field(
        100.0,
        gt=0,
        le=1e30,
        description="L2 norm of a site's update (its weights less the round's)",
    )
    max_control_norm: float = Field(
        1_000.0,
        gt=0,
        le=1e30,
        description="L2 norm of the change of a site's control variate (Scaffold)",
    )
    max_size_ratio: float = Field(
        20.0,
        ge=1,
        le=1e9,
        description="training examples that one of three or more sites may register, in medians of the other sites",
    )
    max_examples: int = Field(
        10_000_000, ge=1, le=2**53, description="examples that a site may register"
    )
    max_loss: float = Field(10_000.0, gt=0, le=1e30, description="mean loss that a site may report")


class SecureAggregationSection(Section):
    """Sums under masks: the server sees the sum of the updates and no single one."""

    enabled: bool = Field(False, description="whether updates, metrics and counts are masked")
    min_sites: int = Field(
        5, ge=3, le=2048, description="fewest sites of a sum; each site's policy has its own"
    )
    groups: int = Field(
        1,
        ge=1,
        le=682,
        description="groups of sites, each with a sum of its own, for strategies that compare replies",
    )
    clipping_bound: float = Field(
        10.0, gt=0, le=1e6, description="L2 norm to which a longer update is scaled down"
    )
    value_bound: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="largest change of one parameter in a round; larger ones saturate, and are counted",
    )
    state_bound: float = Field(
        100.0,
        gt=0,
        le=1e6,
        description="largest change of a BatchNorm statistic or control variate in a round; larger ones saturate",
    )
    weight_cap: int = Field(
        10_000, ge=1, le=2**23, description="examples beyond which a site weighs no more"
    )
    attempts: int = Field(3, ge=1, le=100, description="tries at a sum, each with new keys")
    deadline: float = Field(
        60.0, gt=0, le=86_400, description="seconds for each exchange after the training"
    )


class CalibrationSection(Section):
    """What the sites say of the final model, so that it can be quantised without their examples."""

    enabled: bool = Field(
        False,
        description="whether the sites are asked, after the last round, for ranges of activations and for what each"
        " reduced precision scores on their held-out examples; needs fedge[export] at the server and the sites",
    )
    examples: int = Field(
        512,
        ge=64,
        le=65_536,
        description="most training examples that a site looks at for the ranges, drawn by seed and site; of no use"
        " where noise hides single examples, as a site then looks at all",
    )
    bound: float = Field(
        10_000.0,
        gt=0,
        le=2**14,
        description="to which a site clips its activations: no range tells of more",
    )
    quantile: float = Field(
        1.0,
        ge=0.9,
        le=1,
        description="share of the examples whose extremes a range holds, where sites count bins: under secure"
        " aggregation, or noise",
    )
    deadline: float = Field(
        120.0,
        gt=0,
        le=3600,
        description="seconds that one graph may take at a site, which grants no more than 300",
    )


class Sections(Section):
    """All sections, each checked by itself; which of them go together, ``Config`` checks."""

    task: TaskSection
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    sites: SitesSection = SitesSection()
    train: TrainSection = TrainSection()
    strategy: StrategySection = FedAvg(name="FedAvg")
    round: RoundSection = RoundSection()
    admission: AdmissionSection = AdmissionSection()
    secure_aggregation: SecureAggregationSection = SecureAggregationSection()
    privacy: PrivacySection = PrivacySection()
    calibration: CalibrationSection = CalibrationSection()
