"""From admitted results to the next model: the strategy's arithmetic, and what is checked around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from numpy.typing import NDArray

from fedge.server.aggregation import strategies
from fedge.server.aggregation.updates import RoundResult, as_replies
from fedge.shared.errors import RunError
from fedge.shared.wire.tensors import NDArrays


def aggregate(
    strategy: flower.FedAvg,
    server_round: int,
    result: RoundResult,
    current: NDArrays,
    *,
    with_loss: bool,
) -> NDArrays:
    """The next global model.

    Args:
        strategy: whose ``configure_train`` was called for this round.
        server_round: the round.
        result: admitted, in site-name order.
        current: the round's model; the next has its names, order, shapes and types.
        with_loss: the strategy weighs by the training loss.

    Returns:
        The arrays. On an error the strategy's memory is as it was before the call.

    Raises:
        RunError: 506, the strategy cannot work with these replies; 507, what it made is not finite.
    """
    before = strategies.state(strategy)
    dtypes = {name: str(a.dtype) for name, a in current.items()}
    try:
        # Overflow is found below, in words, and not as numpy's warning.
        with np.errstate(all="ignore"):
            replies = as_replies(result, dtypes, with_loss=with_loss)
            count = len(replies)
            made, _ = strategy.aggregate_train(server_round, replies)
            if made is None:
                raise RunError(506, f"{type(strategy).__name__}: made no model of {count} replies")
            arrays = {name: _as_model(made[name].numpy(), a) for name, a in current.items()}
        _check_finite(arrays | strategies.state(strategy))
        if isinstance(strategy, flower.FedAvgM):
            # It would go on from its own copy, in which integers are not rounded as in the model.
            strategy.current_arrays = None
    except (AggregationError, InconsistentMessageReplies) as error:
        strategies.restore(strategy, before)
        raise RunError(506, f"{type(strategy).__name__}: {error}") from None
    except RunError:
        strategies.restore(strategy, before)
        raise
    return arrays


def _as_model(value: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """Flower promotes some results to float64; integer buffers come back as means."""
    if like.dtype.kind in "iu":
        value = np.rint(value)
    return np.asarray(value, dtype=like.dtype).reshape(like.shape)


def _check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    for name, a in arrays.items():
        if a.dtype.kind in "fc" and not np.isfinite(a).all():
            raise RunError(507, f"{name}: must be finite after aggregation, got NaN or infinity")
