"""JSON in a reply, read while it is written. Only its structure is looked at: values are for whoever runs the tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final

from orchestrator.parsers.deltas import Delta
from orchestrator.parsers.source import SPACE, Source, Steps, wait

_PLAIN: Final = re.compile(r'[^"{}\[\]<]*')
_QUOTED: Final = re.compile(r'[^"\\]*')
_SCALAR: Final = re.compile(r"[^\s,{}\[\]\"<]*")


class JsonEnd:
    """Finds where one JSON value ends; each character is looked at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_scalar = False
        """A number or a name, which ends where something else begins."""
        self._in_string = False
        self._after_backslash = False
        self.is_complete = False

    def scan(self, text: str) -> int:
        """How many characters at the beginning of `text` belong to the value."""
        at = 0
        while at < len(text) and not self.is_complete:
            if self._after_backslash:
                self._after_backslash = False
                at += 1
            elif self._in_string:
                at = self._scan_string(text, at)
            elif self._depth or (text[at] in '"{[' and not self._is_scalar):
                at = self._scan_structure(text, at)
            else:
                self._is_scalar = True
                at = _end(_SCALAR, text, at)
                self.is_complete = at < len(text)
        return at

    def _scan_string(self, text: str, at: int) -> int:
        at = _end(_QUOTED, text, at)
        if at == len(text):
            return at
        self._after_backslash = text[at] == "\\"
        self._in_string = self._after_backslash
        self.is_complete = not self._in_string and self._depth == 0
        return at + 1

    def _scan_structure(self, text: str, at: int) -> int:
        at = _end(_PLAIN, text, at)
        if at == len(text):
            return at
        match text[at]:
            case '"':
                self._in_string = True
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
                self.is_complete = self._depth == 0
            case _:  # A marker begins: the model forgot to close what it had opened.
                self.is_complete = True
                return at
        return at + 1


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None, "the pattern may be empty"
    return found.end()


def json_value(source: Source, make: Callable[[str], Delta]) -> Steps[None]:
    """Gives on one value's own text as it comes."""
    end = JsonEnd()
    while not end.is_complete and (yield from wait(source)):
        if count := end.scan(source.rest):
            yield make(source.cut(count))


def json_text(source: Source) -> Steps[str]:
    """One value's own text at once; what there is of it, if the reply ends within."""
    end, parts = JsonEnd(), []
    while not end.is_complete and (yield from wait(source)):
        parts.append(source.cut(end.scan(source.rest)))
    return "".join(parts)


def json_string(source: Source) -> Steps[str | None]:
    """A string; None if something else stands here, or the reply ends within."""
    if (yield from wait(source)) != '"':
        return None
    return _string_of((yield from json_text(source)))


def unquoted(text: str) -> str:
    """Arguments are an object, but some models write it as JSON within a JSON string; and nothing means none."""
    text = text.strip(SPACE)
    if text.startswith('"') and (inner := _string_of(text)) is not None:
        text = inner.strip(SPACE)
    return text if text not in ("", "null") else "{}"


def _string_of(text: str) -> str | None:
    """What a JSON string says; None if it is none, or no Unicode."""
    try:
        value: object = json.loads(text, strict=False)
        if not isinstance(value, str):
            return None
        value.encode()
    except ValueError:
        return None
    return value
