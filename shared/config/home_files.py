"""The small TOML files of a home, a site's or the server's: bounded, parsed, and held against a frozen model."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from fedge.shared.config.base_section import Section
from fedge.shared.config.error_messages import worded
from fedge.shared.errors import ConfigError, DeployError
from fedge.shared.files import read_bounded, reason

MAX_FILE: Final = 1 << 20

_S = TypeVar("_S", bound=Section)


def read(path: Path, model: type[_S]) -> _S:
    """Read a file of a home.

    Args:
        path: a TOML file of at most 1 MiB.
        model: what it must hold.

    Raises:
        DeployError: 901, there is no such file.
        ConfigError: 201 a value is not allowed; 202 a key is unknown; 203 the file cannot be read;
            204 it is not TOML. Messages begin with the file's name.
    """
    name = path.name
    try:
        text = read_bounded(path, MAX_FILE).decode("utf-8")
    except FileNotFoundError:
        raise DeployError(901, f"{path.parent}: must hold {name}, got none") from None
    except OSError as error:
        raise ConfigError(203, f"{path}: must be readable, got {reason(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(203, f"{path}: must be UTF-8, got other bytes") from None
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # RecursionError: nested too deeply; ValueError also for numbers of thousands of digits.
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(204, f"{path}: must be TOML, got {first[:160]}") from None
    return check(tree, model, name)


def check(tree: Mapping[str, Any], model: type[_S], name: str) -> _S:
    """Hold what TOML parsed to against a model.

    Args:
        tree: of the file.
        model: what it must hold.
        name: of the file, with which messages begin.

    Raises:
        ConfigError: 201 a value is not allowed; 202 a key is unknown.
    """
    _known(tree, model, name)
    try:
        return model.model_validate(_frozen(tree, model), strict=True)
    except ValidationError as error:
        found = worded(error)
        raise ConfigError(found.code, f"{name}: {found.message}") from None


def _known(tree: Mapping[str, Any], model: type[BaseModel], name: str, prefix: str = "") -> None:
    """Refuse a key that the model does not have, naming the nearest of that table."""
    fields = {field.alias or key: field for key, field in model.model_fields.items()}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key.replace("_", "-"), fields, n=1)
            hint = f"the nearest is {prefix}{near[0]}" if near else "there is none like it"
            raise ConfigError(202, f"{name}: {prefix}{key[:60]!r}: must be a known key; {hint}")
        inner = fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _known(value, inner, name, f"{prefix}{key}.")


def _frozen(tree: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """TOML's lists as tuples, and tables that must be there as empty ones, whose keys are then named."""
    found: dict[str, Any] = {}
    for key, field in model.model_fields.items():
        name, inner = field.alias or key, field.annotation
        section = isinstance(inner, type) and issubclass(inner, BaseModel)
        if name in tree:
            value = tree[name]
            if isinstance(value, list):
                value = tuple(value)
            elif section and isinstance(value, dict):
                value = _frozen(value, inner)  # type: ignore[arg-type]
            found[name] = value
        elif section and field.is_required():
            found[name] = {}
    return found
