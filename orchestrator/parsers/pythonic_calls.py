"""Tool calls as Python writes them: `[weather(city="Oslo", days=3), time()]` (Llama 4, LFM2).

A call is given on when its bracket closes: until then, what its arguments are as JSON is not known.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

from orchestrator.parsers.deltas import CallArguments, CallStart
from orchestrator.parsers.framed_calls import FramedCalls
from orchestrator.parsers.source import SPACE, Source, Steps, skip, wait

_PLAIN: Final = re.compile(r"[^()\[\]{}\"']*")
_QUOTED: Final = {quote: re.compile(rf"[^\\{quote}]*") for quote in "'\""}
_JSON_NAMES: Final[dict[str, Any]] = {"true": True, "false": False, "null": None}


class PythonicCalls(FramedCalls):
    """A name that is no tool's makes it content."""

    may_be_bare = True

    def _calls(self, source: Source) -> Steps[bool]:
        first = self._num_calls
        if (yield from skip(source)) != "[":
            return False
        source.cut(1)
        while (yield from skip(source, SPACE + ",")) not in ("]", ""):
            source.pin()
            call = _parsed((yield from _call_text(source)))
            if call is None or call[0] not in self._schemas:
                source.rewind()
                return self._num_calls > first
            source.unpin_all()
            index = self._num_calls
            self._num_calls += 1
            yield CallStart(index, self._new_id(), call[0])
            yield CallArguments(index, call[1])
        if self._num_calls > first:
            if not source.is_empty:
                source.cut(1)
            yield from skip(source)
            yield from self._ends(source)
        return self._num_calls > first


def _call_text(source: Source) -> Steps[str]:
    """To the bracket that closes the first one; each character is looked at once."""
    parts: list[str] = []
    depth, quote = 0, ""
    while character := (yield from wait(source)):
        if count := _num_plain(source.rest, quote):
            parts.append(source.cut(count))
            continue
        parts.append(source.cut(1))
        if quote and character == "\\":
            if (yield from wait(source)):
                parts.append(source.cut(1))
        elif quote:
            quote = ""
        elif character in _QUOTED:
            quote = character
        else:
            depth += 1 if character in "([{" else -1
            if depth <= 0:
                break
    return "".join(parts)


def _num_plain(text: str, quote: str) -> int:
    found = (_QUOTED[quote] if quote else _PLAIN).match(text)
    assert found is not None, "the pattern may be empty"
    return found.end()


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and arguments as JSON; None if it is no call with arguments that are values by name."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
        if None in arguments:
            return None
        return ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr) -> Any:
    """A literal, in which JSON's own names may stand for Python's."""
    for child in ast.walk(node):
        for name, field in ast.iter_fields(child):
            if isinstance(field, list):
                setattr(child, name, [_constant(item) for item in field])
            else:
                setattr(child, name, _constant(field))
    return ast.literal_eval(_constant(node))


def _constant(node: Any) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return ast.copy_location(ast.Constant(_JSON_NAMES[node.id]), node)
    return node
