"""What many tests build or expect alike: refusals by number, configurations, single sections.

``from builders import ...`` finds this file by ``pythonpath`` in pyproject.toml.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest

from fedge.shared import errors
from fedge.shared.errors import FedgeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedge.shared.config.federation import Config

_M = TypeVar("_M", bound="BaseModel")

#: A run that takes little time, with as many sites as masks ask for.
SMALL: Final[Mapping[str, Mapping[str, Any]]] = {
    "run": {"rounds": 2},
    "sites": {"count": 5},
    "train": {"local-steps": 3, "batch-size": 16},
}

#: Whose fault a number's first digit names.
_KINDS: Final = ("Usage", "Config", "Data", "Site", "Run", "Release", "Bundle", "Input", "Deploy")


def refusal(
    code: int,
    call: Callable[..., object],
    /,
    *args: Any,
    kind: type[FedgeError] = FedgeError,
    **more: Any,
) -> FedgeError:
    """The error of a call that must be refused.

    Args:
        code: number that the error must have; it must also be of the class of that block, 4xx a SiteError.
        call: called with ``args`` and ``more``.
        kind: class that it must be of besides.
    """
    with pytest.raises(getattr(errors, f"{_KINDS[code // 100 - 1]}Error")) as caught:
        call(*args, **more)
    error: FedgeError = caught.value
    assert error.code == code, error
    assert isinstance(error, kind), repr(error)
    return error


def refused(code: int, call: Callable[..., object], /, *args: Any, **more: Any) -> str:
    """The message of a call that must be refused; arguments as ``refusal``."""
    return refusal(code, call, *args, **more).message


def config(task: str = "digits", **sections: Mapping[str, Any] | None) -> Config:
    """A validated configuration: sections over those of ``SMALL``, key by key.

    Args:
        task: name of an installed task.
        sections: names and keys in kebab-case or snake_case. ``None`` for a key leaves it out, for a
            section what ``SMALL`` has of it too: what holds then are the defaults of fedge itself.

    Raises:
        ConfigError: 201 or 202.
    """
    from fedge.shared.config import reader

    tree: dict[str, Any] = {"task": {"name": task}, **SMALL}
    for name, values in _kebab(sections).items():
        tree[name] = None if values is None else {**tree.get(name, {}), **_kebab(values)}
    return reader.from_tree({k: _given(v) for k, v in _given(tree).items()})


def section(kind: type[_M], /, **values: Any) -> _M:
    """A validated section by itself; keys in kebab-case or snake_case, those that are None left out."""
    return kind.model_validate(_given(_kebab(values)))


def privacy_asked(mechanism: str = "example", **values: Any) -> str:
    """``[privacy]`` as a request carries it, in JSON; keys as in ``section``."""
    given = {"noise-multiplier": 1.0, "statistics": "unprotected", **_kebab(values)}
    return json.dumps(_given({"mechanism": mechanism, **given}))


def _kebab(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in values.items()}


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
