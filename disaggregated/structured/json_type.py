"""A value of the wrong type, told in the words of JSON."""

from __future__ import annotations

from disaggregated.errors import InvalidRequest


def wrong_type(name: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}, is {json_type(value)}", param=name)


def json_type(value: object) -> str:
    """What JSON calls it."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
