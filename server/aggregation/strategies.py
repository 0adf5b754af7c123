"""The strategies: Flower's own classes for the arithmetic, SCAFFOLD, and two named options that published tables need.

Sampling, quorum, deadlines and admission are the round loop's; a strategy gets exactly the cohort and the admitted
replies. ``state`` and ``restore`` carry a server optimiser's memory through a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedge.server.aggregation.updates import NUM_SITES, record
from fedge.shared import protocol
from fedge.shared.config import strategies as cfg
from fedge.shared.wire.tensors import NDArrays

# The cohort is chosen before a strategy is asked: everybody whom it sees takes part.
_EVERYBODY: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 1.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}


class FedAdam(flower.FedAdam):
    """Flower's FedAdam, with the bias correction as an option.

    Adaptive Federated Optimization, ICLR 2021, https://arxiv.org/abs/2003.00295, has none in its Algorithm 2.
    """

    def __init__(self, *, bias_correction: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.bias_correction = bias_correction

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, dividing out the correction that Flower applies where none is wanted."""
        if self.bias_correction:
            return super().aggregate_train(server_round, replies)
        correction = math.sqrt(1 - self.beta_2 ** (server_round + 1)) / (
            1 - self.beta_1 ** (server_round + 1)
        )
        eta = self.eta
        self.eta = eta / correction
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            self.eta = eta


class FedAdagrad(flower.FedAdagrad):
    """Flower's FedAdagrad, with the first moment's decay as an option (Flower fixes it at 0)."""

    def __init__(self, *, beta_1: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta_1 = beta_1


class Scaffold(flower.FedAvg):
    """SCAFFOLD: Stochastic Controlled Averaging, ICML 2020, https://arxiv.org/abs/1910.06378.

    The server's control variate travels beside the weights under ``control/``; a site answers with its new weights
    and the change of its own control variate. Means are weighted by examples, as in FedAvg, for both: so
    the server's variate stays the weighted mean of the sites' where all of them take part.

    Args:
        server_learning_rate: eta_g of the paper's line 16.
        num_sites: N of the paper's line 17, all sites of the federation, sampled or not.
    """

    def __init__(
        self, *, server_learning_rate: float = 1.0, num_sites: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self.server_learning_rate = server_learning_rate
        self.num_sites = num_sites
        self.control: NDArrays | None = None
        self.current_arrays: NDArrays | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the server's control variate with the weights."""
        self.current_arrays = {k: a.numpy() for k, a in arrays.items()}
        if self.control is None:
            self.control = {
                k: np.zeros_like(a) for k, a in self.current_arrays.items() if a.dtype.kind == "f"
            }
        config[protocol.CONTROL] = True
        control = {protocol.CONTROL_PREFIX + k: c for k, c in self.control.items()}
        return super().configure_train(
            server_round, record({**self.current_arrays, **control}), config, grid
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step the weights by eta_g and the control variate by |S|/N of the mean change."""
        replies = list(replies)
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or self.current_arrays is None or self.control is None:
            return None, metrics
        share = sum(_sites_in(reply) for reply in replies) / self.num_sites
        for name, control in self.control.items():
            change = mean[protocol.CONTROL_PREFIX + name].numpy()
            self.control[name] = (control + share * change).astype(control.dtype)
        eta = self.server_learning_rate
        stepped = {k: x + eta * (mean[k].numpy() - x) for k, x in self.current_arrays.items()}
        return record(stepped), metrics


def _sites_in(reply: Message) -> int:
    return int(str(reply.content.metric_records[protocol.METRICS].get(NUM_SITES, 1)))


def build(
    section: cfg.StrategySection, *, client_learning_rate: float, num_sites: int
) -> flower.FedAvg:
    """The strategy of a configuration.

    Args:
        section: ``strategy`` of the configuration.
        client_learning_rate: ``train.learning-rate``, QFedAvg's default.
        num_sites: registered sites, for SCAFFOLD.
    """
    options: dict[str, Any] = section.model_dump(exclude={"name"}) | _EVERYBODY
    match section:
        case cfg.FedAdam():
            return FedAdam(**options)
        case cfg.FedAdagrad():
            return FedAdagrad(**options)
        case cfg.Scaffold():
            return Scaffold(num_sites=num_sites, **options)
        case cfg.QFedAvg():
            options["client_learning_rate"] = section.client_learning_rate or client_learning_rate
            return flower.QFedAvg(train_loss_key=protocol.TRAIN_LOSS, **options)
        case _:
            built: flower.FedAvg = getattr(flower, section.name)(**options)
            return built


def weighs_by_loss(section: cfg.StrategySection) -> bool:
    """Whether a site's training loss decides its weight, so that a missing one rejects the update."""
    return isinstance(section, cfg.QFedAvg)


def minimum_replies(section: cfg.StrategySection) -> int:
    """Replies below which the strategy's guarantee, or its arithmetic, does not hold."""
    match section:
        case cfg.Bulyan() | cfg.Krum() | cfg.MultiKrum():
            return cfg.least_replies(section)
        case _:
            return 1


# Attributes that hold a strategy's memory between rounds; those that configure_train sets again are not among them.
_NAMED_STATE = ("m_t", "v_t", "control")


def state(strategy: flower.FedAvg) -> NDArrays:
    """A strategy's memory as named arrays, ``slot/name``."""
    found: NDArrays = {}
    for slot in _NAMED_STATE:
        held: Mapping[str, NDArray[Any]] | None = getattr(strategy, slot, None)
        found |= {f"{slot}/{name}": a for name, a in (held or {}).items()}
    momentum: list[NDArray[Any]] | None = getattr(strategy, "momentum_vector", None)
    return found | {f"momentum_vector/{i:06d}": a for i, a in enumerate(momentum or [])}


def restore(strategy: flower.FedAvg, memory: Mapping[str, NDArray[Any]]) -> None:
    """Put back what ``state`` returned; slots that it did not hold become empty."""
    slots: dict[str, NDArrays] = {}
    for key, a in memory.items():
        slot, name = key.split("/", 1)
        slots.setdefault(slot, {})[name] = a.copy()
    for slot in _NAMED_STATE:
        if hasattr(strategy, slot):
            setattr(strategy, slot, slots.get(slot))
    if isinstance(strategy, flower.FedAvgM):
        momentum = slots.get("momentum_vector")
        strategy.momentum_vector = (
            None if momentum is None else [momentum[k] for k in sorted(momentum)]
        )
        # FedAvgM keeps its own copy of the weights; empty, it takes the next round's.
        strategy.current_arrays = None
