"""What the sites of a round bring: single updates, or one sum of them. The strategy sees either as Flower replies.

A sum (of a secure aggregation, or of a cohort trained in one stack) is a weighted mean with its weight, so it can
be handed over as the one reply of a site as large as all of them; strategies that look at single updates refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedge.shared import protocol
from fedge.shared.wire.npy import encode
from fedge.shared.wire.tensors import NDArrays


@dataclass(frozen=True)
class Update:
    """One site's admitted result.

    Attributes:
        arrays: the site's weights (not their difference), in the model's order.
        num_examples: training examples, the weight of the mean.
        train_loss: mean loss, or None where the site's figure was dropped, or told by nobody.
        epsilon: what the site's study has spent against the model's readers and against the server, as it says;
            infinite against a server that gets updates without noise, None without differential privacy.
        ledger: SHA-256 (hex) of the site's privacy ledger.
    """

    site: str
    arrays: NDArrays
    num_examples: int
    train_loss: float | None
    epsilon: tuple[float, float, float] | None = None
    ledger: str | None = None


@dataclass(frozen=True)
class Singles:
    """Admitted updates in the order of the sites' names, so that every sum is the same on every run."""

    updates: tuple[Update, ...]


@dataclass(frozen=True)
class Summed:
    """One sum over sites, as the mean that it gives.

    Attributes:
        sites: who is in it.
        mean: sum of ``num_examples * arrays`` over the sites, by ``weight``; in float64 or the model's types.
        weight: sum of ``num_examples``.
        loss_total: sum of ``num_examples * train_loss``; None where the sites do not tell it.
    """

    sites: tuple[str, ...]
    mean: NDArrays
    weight: int
    loss_total: float | None


@dataclass(frozen=True)
class Groups:
    """One sum for each of several groups of sites, for strategies that compare: each group counts as one reply."""

    groups: tuple[Summed, ...]


RoundResult: TypeAlias = Singles | Summed | Groups

#: Metric of a sum's reply: how many sites are in it. A reply without it is one site's.
NUM_SITES = "num-sites"


def summed(updates: tuple[Update, ...]) -> Summed:
    """Add updates in the order given, in float64."""
    weight = sum(u.num_examples for u in updates)
    return Summed(
        sites=tuple(u.site for u in updates),
        mean={
            k: np.sum([u.num_examples * u.arrays[k].astype(np.float64) for u in updates], axis=0)
            / weight
            for k in updates[0].arrays
        },
        weight=weight,
        loss_total=sum(u.num_examples * (u.train_loss or 0.0) for u in updates),
    )


def record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Flower's record of named arrays."""
    return ArrayRecord({name: encode(np.asarray(a)) for name, a in arrays.items()})


def _reply(
    request: Message,
    arrays: Mapping[str, NDArray[Any]],
    num_examples: int,
    loss: float | None,
    num_sites: int | None = None,
) -> Message:
    metrics: dict[str, int | float] = {protocol.NUM_EXAMPLES: num_examples}
    if loss is not None:
        metrics[protocol.TRAIN_LOSS] = loss
    if num_sites is not None:
        metrics[NUM_SITES] = num_sites
    # Counters travel as floating-point numbers: QFedAvg works in place, which integers cannot hold.
    floats = {k: a.astype(np.float64) if a.dtype.kind in "iub" else a for k, a in arrays.items()}
    content = RecordDict(
        {protocol.ARRAYS: record(floats), protocol.METRICS: MetricRecord({**metrics})}
    )
    return Message(content, reply_to=request)


def as_replies(
    result: RoundResult, dtypes: Mapping[str, str], *, with_loss: bool = False
) -> list[Message]:
    """Fresh replies that hold exactly what Flower's strategies read; they may empty them.

    Args:
        result: the admitted updates, or their sum.
        dtypes: numpy type of each of the model's arrays, to which a sum's mean is rounded where it is floating.
        with_loss: add the training loss (QFedAvg weighs by it).
    """
    request = Message(
        RecordDict({protocol.CONFIG: ConfigRecord()}), dst_node_id=0, message_type=protocol.TRAIN
    )
    match result:
        case Singles(updates):
            return [
                _reply(request, u.arrays, u.num_examples, u.train_loss if with_loss else None)
                for u in updates
            ]
        case Summed():
            return [_summed_reply(request, result, dtypes, with_loss=with_loss)]
        case Groups(groups):
            return [_summed_reply(request, g, dtypes, with_loss=with_loss) for g in groups]


def sites(result: RoundResult) -> list[str]:
    """Who is in it, sorted by site."""
    match result:
        case Singles(updates):
            return [u.site for u in updates]
        case Summed():
            return list(result.sites)
        case Groups(groups):
            return sorted(site for g in groups for site in g.sites)


def examples(result: RoundResult) -> dict[str, int]:
    """Training examples by site, where the server knows them: under masks it does not."""
    if isinstance(result, Singles):
        return {u.site: u.num_examples for u in result.updates}
    return {}


def epsilon(result: RoundResult) -> dict[str, tuple[float, float, float]]:
    """What each site has spent, where they say it."""
    if not isinstance(result, Singles):
        return {}
    return {u.site: u.epsilon for u in result.updates if u.epsilon is not None}


def ledgers(result: RoundResult) -> dict[str, str]:
    """The digest of each site's privacy ledger, where they say it."""
    if not isinstance(result, Singles):
        return {}
    return {u.site: u.ledger for u in result.updates if u.ledger is not None}


def train_loss(result: RoundResult) -> float | None:
    """The mean loss over the examples, of those that told it."""
    match result:
        case Singles(updates):
            told = [(u.num_examples, u.train_loss) for u in updates if u.train_loss is not None]
        case Summed():
            told = _told([result])
        case Groups(groups):
            told = _told(groups)
    weight = sum(n for n, _ in told)
    return sum(n * loss for n, loss in told) / weight if weight else None


def _told(sums: Sequence[Summed]) -> list[tuple[int, float]]:
    return [(s.weight, s.loss_total / s.weight) for s in sums if s.loss_total is not None]


def _summed_reply(
    request: Message, summed: Summed, dtypes: Mapping[str, str], *, with_loss: bool
) -> Message:
    mean = {k: _rounded(m, k, dtypes) for k, m in summed.mean.items()}
    loss = (
        summed.loss_total / summed.weight if with_loss and summed.loss_total is not None else None
    )
    return _reply(request, mean, summed.weight, loss, len(summed.sites))


def _rounded(mean: NDArray[Any], name: str, dtypes: Mapping[str, str]) -> NDArray[Any]:
    """A mean in the type of the tensor it belongs to; a control variate has its tensor's."""
    dtype = np.dtype(dtypes[name.removeprefix(protocol.CONTROL_PREFIX)])
    return np.asarray(mean, dtype=dtype if dtype.kind == "f" else np.float64)
