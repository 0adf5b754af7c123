"""``[strategy]``: how the sites' replies become the next model, with the settings of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedge.shared.config.base_section import Section


class _Strategy(Section):
    pass


class FedAvg(_Strategy):
    """The mean weighted by examples (McMahan et al., AISTATS 2017)."""

    name: Literal["FedAvg"]


class FedProx(_Strategy):
    """FedAvg with a proximal term at the sites (Li et al., MLSys 2020)."""

    name: Literal["FedProx"]
    proximal_mu: float = Field(
        0.0, ge=0, le=1e6, description="weight of the proximal term; 0 is FedAvg"
    )


class FedAvgM(_Strategy):
    """FedAvg with momentum at the server (Hsu et al., 2019)."""

    name: Literal["FedAvgM"]
    server_learning_rate: float = Field(1.0, gt=0, le=1e3, description="step size at the server")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="at the server")


class FedAdam(_Strategy):
    """Adam at the server (Reddi et al., ICLR 2021)."""

    name: Literal["FedAdam"]
    eta: float = Field(0.1, gt=0, le=1e3, description="server learning rate")
    beta_1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta_2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment")
    tau: float = Field(1e-3, gt=0, le=1e3, description="degree of adaptivity")
    bias_correction: bool = Field(
        True, description="Flower corrects Adam's bias; the paper does not"
    )


class FedYogi(_Strategy):
    """Yogi at the server (Reddi et al., ICLR 2021)."""

    name: Literal["FedYogi"]
    eta: float = Field(0.01, gt=0, le=1e3, description="server learning rate")
    beta_1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta_2: float = Field(0.99, ge=0, lt=1, description="decay of the second moment")
    tau: float = Field(1e-3, gt=0, le=1e3, description="degree of adaptivity")


class FedAdagrad(_Strategy):
    """Adagrad at the server (Reddi et al., ICLR 2021)."""

    name: Literal["FedAdagrad"]
    eta: float = Field(0.1, gt=0, le=1e3, description="server learning rate")
    tau: float = Field(1e-3, gt=0, le=1e3, description="degree of adaptivity")
    beta_1: float = Field(0.0, ge=0, lt=1, description="first moment's decay; Flower fixes it at 0")


class QFedAvg(_Strategy):
    """More weight to sites with a higher loss (Li et al., ICLR 2020)."""

    name: Literal["QFedAvg"]
    q: float = Field(0.1, ge=0, le=100, description="fairness; 0 is close to FedAvg")
    client_learning_rate: float | None = Field(
        None, gt=0, le=1e3, description="where unset, train.learning-rate"
    )


class FedMedian(_Strategy):
    """The median of each weight (Yin et al., ICML 2018)."""

    name: Literal["FedMedian"]


class FedTrimmedAvg(_Strategy):
    """The mean of each weight without its extremes (Yin et al., ICML 2018)."""

    name: Literal["FedTrimmedAvg"]
    beta: float = Field(0.2, ge=0, lt=0.5, description="share cut off at each end")


class Krum(_Strategy):
    """The one update closest to the others, so for like sites (Blanchard et al., NeurIPS 2017)."""

    name: Literal["Krum"]
    num_malicious_nodes: int = Field(0, ge=0, le=100_000, description="attackers to withstand")


class MultiKrum(_Strategy):
    """The mean of the updates closest to the others (Blanchard et al., NeurIPS 2017)."""

    name: Literal["MultiKrum"]
    num_malicious_nodes: int = Field(0, ge=0, le=100_000, description="attackers to withstand")
    num_nodes_to_select: int = Field(1, ge=1, le=100_000, description="updates that are averaged")


class Bulyan(_Strategy):
    """Krum's choice, then a trimmed mean (El Mhamdi et al., ICML 2018)."""

    name: Literal["Bulyan"]
    num_malicious_nodes: int = Field(0, ge=0, le=100_000, description="attackers to withstand")


class Scaffold(_Strategy):
    """Control variates against drift, option II (Karimireddy et al., ICML 2020)."""

    name: Literal["Scaffold"]
    server_learning_rate: float = Field(1.0, gt=0, le=1e3, description="step size at the server")


StrategySection = Annotated[
    FedAvg | FedProx | FedAvgM | FedAdam | FedYogi | FedAdagrad | QFedAvg | FedMedian
    | FedTrimmedAvg | Krum | MultiKrum | Bulyan | Scaffold,
    Field(discriminator="name"),
]  # fmt: skip


#: Strategies that look at single replies and compare them.
COMPARING = (FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan)


def least_replies(section: FedMedian | FedTrimmedAvg | Krum | MultiKrum | Bulyan) -> int:
    """Replies of which a comparison says something: 2f + 3 or 4f + 3 of Krum's papers, else three."""
    if isinstance(section, Krum | MultiKrum | Bulyan):
        each = 4 if isinstance(section, Bulyan) else 2
        return each * section.num_malicious_nodes + 3
    return 3
