"""Replies that a grammar makes calls: the same for every model, whatever its own way of calling is.

One function named by the client: the reply is its arguments. One call at least: a list of `{"name", "parameters"}`.
Where a client asks for JSON and offers tools, a call may come in the place of the JSON, in the model's own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.grammar import Grammar, GrammarKind
from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart, Delta, ReplyParser
from orchestrator.parsers.framed_calls import CallFrame, Schemas

_ANY_OBJECT: Final = '{"type": "object"}'


class NamedCall(ReplyParser):
    """All text is the arguments of one call."""

    def __init__(self, name: str, new_id: NewCallId) -> None:
        self._name = name
        self._new_id = new_id
        self._is_started = False

    def push(self, text: str) -> list[Delta]:
        start: list[Delta] = [] if self._is_started else [CallStart(0, self._new_id(), self._name)]
        self._is_started = True
        return [*start, CallArguments(0, text)]

    def finish(self) -> list[Delta]:
        return []


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Of the reply that `NamedCall` reads."""
    return dict(_as_object(schema))


def calls_schema(schemas: Schemas, *, is_parallel: bool, arguments: str = "parameters") -> dict[str, Any]:
    """Of a reply that is a list of calls. Each tool's schema keeps its own `$ref`s: they are moved along with it."""
    moved = {f"tool_{index}": _moved(schema, f"#/$defs/tool_{index}") for index, schema in enumerate(schemas.values())}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, arguments: {"$ref": f"#/$defs/{key}"}},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for name, key in zip(schemas, moved, strict=True)
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    limit = {} if is_parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": items, "$defs": moved}


def answer_or_calls(answer: Grammar, schemas: Schemas, frame: CallFrame, *, is_parallel: bool) -> Grammar | None:
    """A reply that is what the client asked for, or calls in the model's own way; None where nothing can say both."""
    if answer.kind not in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT) or not (frame.begin and frame.end):
        return None
    call = dict(calls_schema(schemas, is_parallel=False, arguments="arguments"))
    call = {**call.pop("items"), "$defs": call["$defs"], "x-guidance": {"lenient": True}}
    rules = (
        "start: answer | calls",
        f"answer: %json {answer.text or _ANY_OBJECT}",
        f"calls: one{'+' if is_parallel else ''}",
        f'one: {_quoted(frame.begin[0])} "\\n"? call "\\n"? {_quoted(frame.end[0])} "\\n"?',
        f"call: %json {orjson.dumps(call).decode()}",
    )
    return Grammar(GrammarKind.LARK, "\n".join(rules))


def _quoted(marker: str) -> str:
    return orjson.dumps(marker).decode()


def _as_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema if schema else {"type": "object", "properties": {}}


def _moved(schema: Mapping[str, Any], to: str) -> Any:
    def walk(part: Any) -> Any:
        if isinstance(part, list):
            return [walk(item) for item in part]
        if not isinstance(part, dict):
            return part
        walked = {key: walk(value) for key, value in part.items()}
        reference = walked.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            walked["$ref"] = to + reference[1:]
        return walked

    return walk(_as_object(schema))
