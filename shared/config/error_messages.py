"""Wording of configuration errors: the key's path, what it must be, what it was given.

Pydantic says where a value failed in terms of its own schema, with field names and union tags;
people need the key that they wrote. ``worded`` turns all failures of one reading into one
``ConfigError``.
"""

from __future__ import annotations

import datetime
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError

#: Longest message that lists every failure, in characters; beyond it the first is given and the
#: rest counted.
MAX_LIST: Final = 400
#: Longest value quoted, in characters.
MAX_VALUE: Final = 60
#: Similarity from which a known key is offered for an unknown one, 0 to 1.
NEAR: Final = 0.6

_WANTED: Final[dict[str, str]] = {
    "missing": "be given",
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be finite",
    "bool_type": "be true or false",
    "string_type": "be text",
    "path_type": "be text",
    "is_instance_of": "be text",
    "model_type": "be a table",
    "model_attributes_type": "be a table",
    "dict_type": "be a table",
    "tuple_type": "be a list",
    "list_type": "be a list",
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "string_pattern_mismatch": "match {pattern}",
    "literal_error": "be {expected}",
    "union_tag_invalid": "be one of {expected_tags}",
    "union_tag_not_found": "be given",
}
_GIVES_NOTHING: Final = {"missing", "union_tag_not_found"}
_MEANS_THE_TAG: Final = {"union_tag_invalid", "union_tag_not_found"}


def worded(error: ValidationError) -> ConfigError:
    """One ConfigError for all that a validation found.

    Returns:
        202 where a key is unknown (a misspelt key is often why another one is missing), else 201.
    """
    details = error.errors(include_url=False)
    unknown = [_unknown_key(d) for d in details if d["type"] == "extra_forbidden"]
    wrong = [_wrong_value(d) for d in details if d["type"] != "extra_forbidden"]
    lines = unknown + wrong
    message = "; ".join(lines)
    if len(message) > MAX_LIST and len(lines) > 1:
        message = f"{lines[0]} (and {len(lines) - 1} more)"
    return ConfigError(202 if unknown else 201, message)


def shown(value: Any) -> str:
    """A TOML value as a message quotes it, short."""
    match value:
        case bool():
            text = "true" if value else "false"
        case int():
            # Python refuses to print integers of thousands of digits.
            text = (
                str(value)
                if value.bit_length() <= 256
                else f"a number of {value.bit_length()} bits"
            )
        case str():
            text = json.dumps(value, ensure_ascii=False)
        case Mapping():
            text = "a table"
        case list() | tuple():
            text = f"a list of {len(value)}"
        case datetime.date() | datetime.time():
            text = f"the date or time {value.isoformat()}"
        case _:
            text = repr(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


def keys(model: type[BaseModel] = Config) -> Iterator[tuple[str, ...]]:
    """Every key of a configuration as a path, in the order of declaration, sections left out."""
    for name, field in _fields(model).items():
        members = _models(field).values()
        if not members:
            yield (name,)
        found = {(name, *rest): None for member in members for rest in keys(member)}
        yield from found


def _wrong_value(detail: ErrorDetails) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    path = _key_path(detail["loc"])
    if kind in _MEANS_THE_TAG:
        tag = context["discriminator"].strip("'")
        path = f"{path}.{tag}"
        value = value.get(tag) if isinstance(value, Mapping) else value
    if kind == "value_error":  # worded where the check stands, see fedge.shared.config.federation
        # A check across sections names its keys itself.
        return f"{path}: {context['error']}" if path else str(context["error"])
    wanted = _WANTED.get(kind)
    if wanted is None:
        wanted = "be " + detail["msg"].removeprefix("Input should be ").lower()
    else:
        wanted = wanted.format_map(_readable(context))
    got = "nothing" if kind in _GIVES_NOTHING else shown(value)
    nearest = _nearest_tag(value, context) if kind == "union_tag_invalid" else ""
    return f"{path}: must {wanted}, got {got}{nearest}"


def _readable(context: Mapping[str, Any]) -> dict[str, str]:
    """Pydantic's bounds and lists as people write them: 1 for 1.0, no quotes around tags."""
    values = {}
    for key, value in context.items():
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
            value = int(value)
        values[key] = str(value).replace("'", "") if key == "expected_tags" else str(value)
    return values


def _nearest_tag(value: Any, context: Mapping[str, Any]) -> str:
    tags = str(context["expected_tags"]).replace("'", "").split(", ")
    by_folded = {tag.lower(): tag for tag in tags}
    close = difflib.get_close_matches(str(value).lower(), by_folded, n=1)
    return f"; the nearest is {by_folded[close[0]]}" if close else ""


def _unknown_key(detail: ErrorDetails) -> str:
    loc = detail["loc"]
    path, tag = _walk(loc)
    name = str(loc[-1])
    owner = f" of {tag}" if tag else ""
    others = _members_with(loc, name) if tag else []
    if others:
        return f"{_dotted(path)}: must be a key{owner}, got a key of {', '.join(others)}"
    known_keys = (
        _sections() if isinstance(detail["input"], Mapping) else _settable(str(path[0]), tag)
    )
    nearest = _nearest(tuple(str(part) for part in path), known_keys)
    offer = f"the nearest is {nearest}" if nearest else "there is none like it"
    return f"{_dotted(path)}: must be a known key{owner}; {offer}"


def _nearest(path: tuple[str, ...], known_keys: Sequence[tuple[str, ...]]) -> str:
    """The known path most like ``path``, empty where none is near."""
    folded = tuple(part.replace("_", "-").lower() for part in path)
    best, best_score = "", NEAR
    for candidate in known_keys:
        last = difflib.SequenceMatcher(None, folded[-1], candidate[-1]).ratio()
        whole = difflib.SequenceMatcher(None, ".".join(folded), ".".join(candidate)).ratio()
        # A key of the same section wins over a little more likeness elsewhere.
        near_by = 0.1 if candidate[:-1] == folded[:-1] and last >= NEAR else 0.0
        score = max(last, whole) + near_by
        if score > best_score:
            best, best_score = ".".join(candidate), score
    return best


def _sections() -> list[tuple[str, ...]]:
    return [(name,) for name, field in _fields(Config).items() if _models(field)]


def _settable(section: str, tag: str) -> list[tuple[str, ...]]:
    """All keys, less those of the union in ``section`` that the member ``tag`` does not have."""
    if not tag:
        return list(keys())
    own = {(section, *rest) for rest in keys(_models(_fields(Config)[section])[tag])}
    return [path for path in keys() if path[0] != section or path in own]


def _members_with(loc: Sequence[int | str], name: str) -> list[str]:
    """Tags of the union's members that know a key, where the failure lies directly in a member."""
    if len(loc) != 3:
        return []
    members = _models(_fields(Config)[str(loc[0])])
    return [tag for tag, member in members.items() if name in _fields(member)]


def _key_path(loc: Sequence[int | str]) -> str:
    return _dotted(_walk(loc)[0])


def _walk(loc: Sequence[int | str]) -> tuple[tuple[int | str, ...], str]:
    """Pydantic's location as the path that was written, and the last union tag met on the way."""
    path: list[int | str] = []
    models: dict[str, type[BaseModel]] = {"": Config}
    tag = ""
    for part in loc:
        if models and "" not in models:  # below a union, its tag comes first
            tag = str(part)
            models = {"": models[tag]} if tag in models else {}
            continue
        path.append(part)
        model = models.get("")
        field = _fields(model).get(str(part)) if model else None
        models = _models(field) if field else {}
    return tuple(path), tag


def _dotted(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_plain(part)}"
    return text.removeprefix(".")


def _plain(key: str) -> str:
    """A key as TOML allows it bare, otherwise quoted and short."""
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() and len(key) <= MAX_VALUE else shown(key)


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The models behind a field: one under the empty tag, a union's by tag, none for a value."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    if not isinstance(field.discriminator, str):
        return {}
    return {
        get_args(member.model_fields[field.discriminator].annotation)[0]: member
        for member in get_args(annotation)
    }
