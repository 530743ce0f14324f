"""JSON schemas of single fields. A field that is null counts as absent, everywhere."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def integer(about: str, *, low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high, "description": about}


def number(about: str, *, low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high, "description": about}


def flag(about: str, *, default: bool = False) -> Schema:
    return {"type": ["boolean", "null"], "default": default, "description": about}


def text(about: str, **limits: Any) -> Schema:
    return {"type": ["string", "null"], **limits, "description": about}


def mapping(about: str, **limits: Any) -> Schema:
    return {"type": ["object", "null"], **limits, "description": about}


def array(about: str, items: Schema, **limits: Any) -> Schema:
    return {"type": ["array", "null"], "items": items, **limits, "description": about}


def one_of(about: str, *schemas: Schema) -> Schema:
    """Also null."""
    return {"anyOf": [*schemas, {"type": "null"}], "description": about}


def required(schema: Schema) -> Schema:
    """The same without null."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [one for one in schema["anyOf"] if one != {"type": "null"}]}
    kinds = schema["type"]
    return {**schema, "type": kinds[0] if isinstance(kinds, list) else kinds}


def record(properties: Schema, *names: str) -> Schema:
    """An object with at least the fields `names`; unknown ones are taken, and named in the answer's header."""
    return {"type": "object", "required": list(names), "properties": properties}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def token_ids(about: str, **limits: Any) -> Schema:
    return array(about, {"type": "integer", "minimum": 0}, **limits)
