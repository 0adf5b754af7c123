"""Reading and writing the configuration file, and what `--set` puts over it.

Paths in the file and in ``--set`` alike are relative to the working directory. Values are taken
as TOML types them: ``"3"`` is no number and ``true`` no count.
"""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

import tomli_w
from pydantic import ValidationError

from fedge.shared.config.error_messages import shown, worded
from fedge.shared.config.federation import Config
from fedge.shared.config.strategies import StrategySection
from fedge.shared.errors import ConfigError

#: Largest configuration file read, in bytes.
MAX_FILE: Final = 1 << 20

_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}")
_PLACE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")

_DEEPEST: Final = 16

Tree: TypeAlias = dict[str, Any]


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file.

    Args:
        path: a TOML file of at most 1 MiB.
        overrides: ``KEY=VALUE`` each, applied in order; see ``override``.

    Raises:
        ConfigError: 201 a value is not allowed; 202 a key is unknown; 203 the file cannot be read;
            204 it is not TOML; 205 an override is not ``KEY=VALUE``.
    """
    return from_tree(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Tree:
    """What the file parses to, with the overrides in it; not validated yet, see ``from_tree``.

    Raises:
        ConfigError: 201, 203, 204 or 205, as ``load``.
    """
    tree = _parse(_read(path), str(path))
    for text in overrides:
        override(tree, text)
    return tree


def load_resolved(path: Path) -> Config:
    """Read the configuration that ``dump`` wrote, for example a run directory's config.toml.

    Raises:
        ConfigError: as ``load``.
    """
    return load(path)


def dump(config: Config) -> str:
    """The whole configuration as TOML, defaults included; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, with the units in the descriptions."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(by_alias=True),
    }


def strategies() -> dict[str, str]:
    """What ``strategy.name`` may be, each with the paper that it comes from."""
    members = get_args(get_args(StrategySection)[0])
    return {
        get_args(member.model_fields["name"].annotation)[0]: (member.__doc__ or "").partition("\n")[
            0
        ]
        for member in members
    }


def from_tree(tree: Tree) -> Config:
    """Validate what TOML parsed to.

    Raises:
        ConfigError: 201 or 202, naming every key at fault by its path.
    """
    # An absent section that must be there is reported by the keys that it lacks.
    absent: Tree = {
        name: {}
        for name, field in Config.model_fields.items()
        if field.is_required() and name not in tree
    }
    try:
        return Config.model_validate(_frozen({**tree, **absent}), strict=True)
    except ValidationError as error:
        raise worded(error) from None


def override(tree: Tree, text: str) -> None:
    """Set one key of a tree in place.

    Args:
        tree: what TOML parsed to.
        text: ``section.key=VALUE``; the value is TOML, and text where it does not parse as TOML
            and does not begin like a TOML list, table or string.

    Raises:
        ConfigError: 205 the text is not ``KEY=VALUE``; 201 the key's section is a value.
    """
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not value or not _KEY.fullmatch(key):
        raise ConfigError(205, f"--set: must be KEY=VALUE, got {shown(text)}")
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                201, f"{'.'.join(sections[:depth])}: must be a table, got {shown(tree)}"
            )
    tree[name] = _value(value, key)


def _value(text: str, key: str) -> Any:
    try:
        parsed = _parse(f"value = {text}", "--set")
    except ConfigError:
        if text[0] in "[{\"'":
            raise ConfigError(
                205, f"--set {key}: must be a TOML value, got {shown(text)}"
            ) from None
        return text
    if parsed.keys() != {"value"}:  # a line break smuggled in further keys
        raise ConfigError(205, f"--set {key}: must be one value, got {shown(text)}")
    return parsed["value"]


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a device, socket or pipe"
            raise ConfigError(203, f"{path}: must be a file, got {kind}")
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(203, f"{path}: must be a file, got nothing of that name") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(203, f"{path}: must be readable, got {reason}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(203, f"{path}: must be at most {MAX_FILE} bytes, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            203, f"{path}: must be UTF-8, got byte 0x{data[error.start]:02x} in line {line}"
        ) from None


def _parse(text: str, where: str) -> Tree:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = _PLACE.search(message)
        reason = _PLACE.sub("", message)
        if place and place[1]:
            line, column = int(place[1]), int(place[2])
        else:
            line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
        raise ConfigError(
            204, f"{where}, line {line}, column {column}: {reason[:1].lower()}{reason[1:]}"
        ) from None
    except RecursionError:
        raise ConfigError(204, f"{where}: nested too deeply") from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise ConfigError(204, f"{where}: a number has too many digits") from None


def _frozen(value: Any, depth: int = 0) -> Any:
    """TOML's lists as tuples, which frozen sections hold, down to a depth that no key reaches."""
    if depth < _DEEPEST and isinstance(value, dict):
        return {key: _frozen(leaf, depth + 1) for key, leaf in value.items()}
    if depth < _DEEPEST and isinstance(value, list):
        return tuple(_frozen(leaf, depth + 1) for leaf in value)
    return value
