"""What every section of a TOML file has in common: kebab-case keys, nothing unknown, values that never change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedge.shared.protocol import SITE_NAME

SiteName = Annotated[str, Field(pattern=SITE_NAME)]


def _as_path(value: Any) -> Any:
    """Text as a path, as reading is strict otherwise; nothing else is one."""
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("must be a path, got empty text or a NUL")
        return Path(value)
    return value


FilePath = Annotated[Path, BeforeValidator(_as_path)]


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=_kebab,
        validate_default=True,
        allow_inf_nan=False,
    )
