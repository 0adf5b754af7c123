"""A server's requests are untrusted input: the type and range of each value are validated before use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ValidationError

from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.wire.npy import UndecodableError, decode
from fedge.shared.wire.tensors import NDArrays, Spec

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_ROUND = 1_000_000
MAX_SETTINGS_CHARS = 10_000
MAX_MU = 1e6
#: Noised queries of a run besides its evaluations, where it is calibrated.
CALIBRATIONS = 2


@dataclass(frozen=True)
class Address:
    """The run and round that a request belongs to."""

    run_id: str
    server_round: int


@dataclass(frozen=True)
class Terms:
    """The settings that training and evaluation have in common.

    Attributes:
        address: run and round.
        seed: of the run.
        threads: number of threads for torch.
        own_statistics: whether the site standardises by its own statistics.
        standardise: the federation's statistics, where ``own_statistics`` is false and the task
            standardises; else None.
    """

    address: Address
    seed: int
    threads: int
    own_statistics: bool
    standardise: Standardise | None


@dataclass(frozen=True)
class Training:
    """A round's training as the server requests it.

    Attributes:
        settings: optimiser, batches, steps.
        proximal_mu: weight of FedProx's proximal term; 0 for none.
        control: whether SCAFFOLD is on.
        accepted_round: the last round whose update of this site was counted, 0 for none.
        loss_at: where the reported loss is measured: "running" (mean over the local steps) or "received" (the weights
            as received).
        noised: whether what the update tells is bounded by noise, the site's or the server's.
    """

    settings: TrainSection
    proximal_mu: float
    control: bool
    accepted_round: int
    loss_at: str
    noised: bool


def refuse(where: str, expected: str, got: object) -> SiteError:
    """An error 414, worded "where: must be expected, got got".

    Args:
        where: key or part of the request.
        expected: what it must be.
        got: what it is; cut to 80 characters.
    """
    return SiteError(414, f"{where}: must be {expected}, got {str(got)[:80]}")


def config_of(request: RecordDict, task: str) -> ConfigRecord:
    """The configuration record of a request.

    Args:
        request: content of the message.
        task: name of the site's task.

    Raises:
        SiteError: 414, there is none, or it is of another task.
    """
    config = request.get(protocol.CONFIG)
    if not isinstance(config, ConfigRecord):
        raise refuse("request", f"a message with {protocol.CONFIG}", "none")
    if config.get(protocol.TASK) != task:
        raise refuse(protocol.TASK, task, config.get(protocol.TASK))
    return config


def address(config: ConfigRecord) -> Address:
    """Run and round of a request.

    Raises:
        SiteError: 414, one of them is missing or not allowed.
    """
    run_id = config.get(protocol.RUN_ID)
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        raise refuse(protocol.RUN_ID, f"text like {RUN_ID.pattern}", run_id)
    return Address(run_id, _integer(config, protocol.SERVER_ROUND, 0, MAX_ROUND))


def rounds(config: ConfigRecord) -> int:
    """The number of rounds of the whole run that a request belongs to, at least its own round.

    Raises:
        SiteError: 414, it is missing or not allowed.
    """
    return _integer(config, protocol.ROUNDS, address(config).server_round, MAX_ROUND)


def evaluations(config: ConfigRecord) -> int:
    """The number of noised evaluations and calibrations of the whole run that a request belongs to.

    Without ``protocol.EVALUATE_EVERY`` every round is evaluated.

    Raises:
        SiteError: 414, a number is missing or not allowed.
    """
    every = (
        _integer(config, protocol.EVALUATE_EVERY, 1, MAX_ROUND)
        if protocol.EVALUATE_EVERY in config
        else 1
    )
    # The last round is evaluated in any case; then ranges and scores are asked for.
    return -(-rounds(config) // every) + (CALIBRATIONS if protocol.CALIBRATION in config else 0)


def standardise(config: ConfigRecord) -> str:
    """Whose statistics the columns are standardised by: "federated" or "site".

    Raises:
        SiteError: 414, it is neither.
    """
    mode = config.get(protocol.STANDARDISE)
    if mode not in ("federated", "site"):
        raise refuse(protocol.STANDARDISE, "federated or site", mode)
    return str(mode)


def terms(config: ConfigRecord, columns: int | None) -> Terms:
    """Read the settings that training and evaluation have in common.

    Args:
        config: of the request.
        columns: number of columns that the task standardises; None where it standardises none.

    Raises:
        SiteError: 414, a value is missing or not allowed.
    """
    mode = standardise(config)
    federated = columns is not None and mode == "federated"
    return Terms(
        address=address(config),
        seed=_integer(config, protocol.SEED, 0, 2**63 - 1),
        threads=_integer(config, protocol.THREADS, 1, 256),
        own_statistics=columns is not None and mode == "site",
        standardise=_standardise(config, columns or 0) if federated else None,
    )


def training(config: ConfigRecord) -> Training:
    """Read the settings of a round's training.

    Raises:
        SiteError: 414, a value is missing or not allowed.
    """
    text = config.get(protocol.SETTINGS)
    if not isinstance(text, str) or len(text) > MAX_SETTINGS_CHARS:
        raise refuse(protocol.SETTINGS, "training settings as JSON", type(text).__name__)
    try:
        settings = TrainSection.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (protocol.SETTINGS, *first["loc"]))
        raise SiteError(414, f"{where}: {first['msg'][:200]}") from None
    control = config.get(protocol.CONTROL, False)
    if not isinstance(control, bool):
        raise refuse(protocol.CONTROL, "true or false", control)
    loss_at = config.get(protocol.LOSS_AT, "running")
    if loss_at not in ("running", "received"):
        raise refuse(protocol.LOSS_AT, "running or received", loss_at)
    mu = _number(config.get(protocol.PROXIMAL_MU, 0.0))
    if mu is None or not 0 <= mu <= MAX_MU:
        raise refuse(
            protocol.PROXIMAL_MU, f"a number from 0 to {MAX_MU:g}", config[protocol.PROXIMAL_MU]
        )
    server_round = _integer(config, protocol.SERVER_ROUND, 1, MAX_ROUND)
    accepted = 0
    if protocol.ACCEPTED_ROUND in config or control:
        accepted = _integer(config, protocol.ACCEPTED_ROUND, 0, server_round - 1)
    noised = section_of(config).mechanism != "off"
    return Training(settings, mu, control, accepted, str(loss_at), noised)


def arrays(request: RecordDict, expected: Mapping[str, Spec]) -> NDArrays:
    """The request's arrays, in the order of ``expected``.

    Raises:
        SiteError: 414, a name, shape or type differs from what is expected, or a value is not
            finite.
    """
    record = request.get(protocol.ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise refuse("request", f"a message with {protocol.ARRAYS}", "none")
    for name in expected:
        if name not in record:
            raise refuse(name, "among the arrays", "nothing")
    for name in record:
        if name not in expected:
            raise refuse("arrays", "those of the model", name)
    return {name: _decode(name, record[name], spec) for name, spec in expected.items()}


def _decode(name: str, array: Array, spec: Spec) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    try:
        values = decode(array, spec.shape, dtype)
    except UndecodableError as error:
        raise SiteError(414, f"{name}: {str(error)[:160]}") from None
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise refuse(name, "finite", "NaN or infinity")
    return values


def _standardise(config: ConfigRecord, columns: int) -> Standardise:
    mean, std = (
        floats(config, key, columns) for key in (protocol.FEATURE_MEAN, protocol.FEATURE_STD)
    )
    if min(std, default=0.0) < 0:
        raise refuse(protocol.FEATURE_STD, "0 or more", min(std))
    return Standardise(mean=mean, std=std)


def floats(config: ConfigRecord, key: str, count: int) -> tuple[float, ...]:
    """The list of exactly ``count`` finite numbers under a key.

    Raises:
        SiteError: 414, it is missing, of another length, or a value is not finite.
    """
    values = config.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise refuse(key, f"{count} numbers", len(values) if isinstance(values, list) else values)
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(numbers) != count:
        raise refuse(key, "finite numbers", values)
    return tuple(numbers)


def _integer(config: ConfigRecord, key: str, low: int, high: int) -> int:
    value = config.get(key)
    if type(value) is not int or not low <= value <= high:
        raise refuse(key, f"an integer from {low} to {high}", value)
    return value


def _number(value: object) -> float | None:
    # bool is a subclass of int in Python, but not accepted as a number here.
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


_MAX_SECTION: Final = 10_000


def section_of(config: ConfigRecord) -> PrivacySection:
    """The privacy section of a request; its mechanism is "off" where the request has none.

    Raises:
        SiteError: 414, it does not parse, or a value is not allowed.
    """
    text = config.get(protocol.PRIVACY)
    if text is None:
        return PrivacySection()
    if not isinstance(text, str) or len(text) > _MAX_SECTION:
        raise refuse(protocol.PRIVACY, "a section as JSON", type(text).__name__)
    try:
        return PrivacySection.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in (protocol.PRIVACY, *first["loc"]))
        raise SiteError(414, f"{where}: {first['msg'][:200]}") from None
