"""Reads the fields of a request body. What is wrong is told by the field's name and, where there is one, the limit."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_type import json_type, wrong_type

__all__ = ["NESTING_MAX", "Fields", "json_type", "shown", "wrong_type"]

NESTING_MAX: Final = 128
"""Objects and arrays in each other, in one body."""
_ORJSON_NESTING_MAX: Final = 254
_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class Fields:
    """A JSON object from a client. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "", num_bytes: float = math.inf) -> None:
        """prefix: before each field's name when it is told."""
        self.values = values
        self.num_bytes = num_bytes
        """They have at most so many, as JSON."""
        self._prefix = prefix

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """
        Raises:
            InvalidRequest: not JSON, not an object, or nested deeper than anything that reads it later may recurse.
        """
        try:
            values = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise InvalidRequest(f"the body must be a JSON object, is {json_type(values)}")
        if body.count(b"{") + body.count(b"[") > NESTING_MAX and _is_nested_deeper(values, NESTING_MAX):
            raise InvalidRequest(f"the body is nested deeper than {NESTING_MAX} levels")
        return cls(values, num_bytes=len(body))

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and not value.is_integer():
            raise InvalidRequest(f"{self._prefix}{name} must be an integer, is {value}", param=self._prefix + name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(self._prefix + name, "an integer", value)
        _check_range(self._prefix + name, value, low, high)
        return int(value)

    def number(self, name: str, *, low: float, high: float) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(self._prefix + name, "a number", value)
        _check_range(self._prefix + name, value, low, high)
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(self._prefix + name, "true or false", value)
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong_type(self._prefix + name, "a string", value)
        return value

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong_type(self._prefix + name, "an object", value)
        return value

    def nested(self, name: str) -> Fields:
        """The fields of an object in it, told as `name.field`; none where it is absent."""
        return Fields(self.mapping(name) or {}, prefix=f"{self._prefix}{name}.")


def _is_nested_deeper(values: Any, limit: int) -> bool:
    """orjson refuses to write what is nested deeper than its own limit, and finds out faster than a loop here could:
    so the value is put at the depth where that limit is ours."""
    for _ in range(_ORJSON_NESTING_MAX - limit):
        values = [values]
    try:
        orjson.dumps(values)
    except orjson.JSONEncodeError:
        return True
    return False


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if value < low:
        raise InvalidRequest(f"{name} must be at least {low}, is {value}", param=name)
    if not value <= high:
        raise InvalidRequest(f"{name} must be at most {high}, is {value}", param=name)


def shown(value: object) -> str:
    """What a client wrote, short enough for a message, however long or deep it is."""
    return _SHORT.repr(value)
