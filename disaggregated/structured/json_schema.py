"""A client's JSON schema, made into the text of a grammar: bounded, and closed unless it says that it is open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_type import wrong_type

BYTES_MAX: Final = 128 << 10
SOURCE_CHARACTERS_MAX: Final = 2 * BYTES_MAX
"""Of one that is given as a text, blanks included."""
DEPTH_MAX: Final = 48
"""Of objects and arrays within each other; libraries have theirs not much above it."""

_OPENNESS: Final = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames")
_JOINED: Final = ("allOf", "$ref", "$dynamicRef", "if", "dependentSchemas")
"""Beside these a schema is only a part of one, and what it does not name may be another part's."""
_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES: Final = frozenset({"const", "enum", "default", "example", "examples", "x-guidance"})
"""Keywords whose objects are values, and no schemas."""


def schema_text(value: Any, name: str, *, is_lenient: bool = False) -> str:
    """`value` is a schema, or the JSON text of one. An object with `properties` that says nothing of further ones has
    none: a model that may add any property likes to.

    is_lenient: keywords that cannot be enforced are left out, instead of being refused.

    Raises:
        InvalidRequest: no schema, or one that is too large or too deep.
    """
    if isinstance(value, str):
        if len(value) > SOURCE_CHARACTERS_MAX:
            raise InvalidRequest(
                f"{name} has {len(value)} characters, the limit is {SOURCE_CHARACTERS_MAX}", param=name
            )
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"{name} is not valid JSON: {error}", param=name) from error
    if not isinstance(value, dict):
        raise wrong_type(name, "a JSON schema, an object", value)
    _check_size(value, name)
    if is_deeper(value, DEPTH_MAX):
        raise InvalidRequest(f"{name} is nested deeper than {DEPTH_MAX} levels", param=name)
    closed = _closed(value, is_part=False)
    if is_lenient:
        closed = {**closed, "x-guidance": {"lenient": True}}
    return _check_size(closed, name).decode()


def _check_size(schema: Mapping[str, Any], name: str) -> bytes:
    """Before anything else is done with it, and afterwards: it may have grown. The same, as JSON."""
    try:
        text = orjson.dumps(schema)
    except orjson.JSONEncodeError as error:
        if is_deeper(schema, DEPTH_MAX):
            raise InvalidRequest(f"{name} is nested deeper than {DEPTH_MAX} levels", param=name) from error
        raise InvalidRequest(f"{name} is not valid Unicode", param=name) from error
    if len(text) > BYTES_MAX:
        raise InvalidRequest(f"{name} has {len(text)} bytes, the limit is {BYTES_MAX}", param=name)
    return text


def is_deeper(value: Any, num_levels: int) -> bool:
    """Whether objects and arrays are nested in each other for more levels; itself without recursion."""
    level = [value]
    for _ in range(num_levels):
        level = [
            member
            for node in level
            for member in (node.values() if isinstance(node, dict) else node)
            if isinstance(member, (dict, list))
        ]
        if not level:
            return False
    return True


def _closed(schema: Any, *, is_part: bool) -> Any:
    """`is_part`: another schema has a say about the same object."""
    if not isinstance(schema, dict):
        return schema
    is_part = is_part or any(keyword in schema for keyword in _JOINED)
    closed = {keyword: _closed_member(keyword, value, is_part=is_part) for keyword, value in schema.items()}
    if "properties" in schema and not is_part and not any(keyword in schema for keyword in _OPENNESS):
        closed["additionalProperties"] = False
    return closed


def _closed_member(keyword: str, value: Any, *, is_part: bool) -> Any:
    if keyword in _VALUES:
        return value
    if keyword in _MAPS and isinstance(value, dict):
        return {key: _closed(member, is_part=False) for key, member in value.items()}
    if isinstance(value, list):
        joins = keyword == "allOf" or (is_part and keyword in ("anyOf", "oneOf"))
        return [_closed(member, is_part=joins) for member in value]
    return _closed(value, is_part=keyword in ("not", "if", "then", "else"))
