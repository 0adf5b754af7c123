"""Unit files of systemd: filled in from a template, and written for the operator to install."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedge.shared.errors import ConfigError, UsageError
from fedge.shared.files import reason, write_atomically

# Nothing that systemd would expand or split at.
_PLAIN_PATH: Final = re.compile(r"(/[A-Za-z0-9_.+@-]+)+/?")


def filled(
    package: str, name: str, *, words: Mapping[str, str] | None = None, **paths: Path
) -> str:
    """The text of a unit, with ``@KEY@`` replaced.

    Args:
        package: that holds the template.
        name: of the template.
        words: replacements by key.
        paths: absolute paths by key, in lower case.

    Raises:
        ConfigError: 201, a path is not absolute, or has characters that a unit cannot hold.
    """
    text = files(package).joinpath(name).read_text(encoding="utf-8")
    for key, path in paths.items():
        if _PLAIN_PATH.fullmatch(str(path)) is None or ".." in path.parts:
            raise ConfigError(
                201,
                f"{key}: must be an absolute path of letters, digits and '_.+@-', got {str(path)!r}",
            )
    for key, value in {**{k.upper(): str(p) for k, p in paths.items()}, **(words or {})}.items():
        text = text.replace(f"@{key}@", value)
    return text


def write(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    """Write files, readable by everybody, over those of an earlier release.

    Args:
        folder: created if missing.
        contents: of the files, by name.

    Returns:
        Their paths.

    Raises:
        UsageError: 107, the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write_atomically(folder / name, text.encode())
            (folder / name).chmod(0o644)
    except OSError as error:
        raise UsageError(107, f"{folder}: cannot be written ({reason(error)})") from None
    return [folder / name for name in contents]
