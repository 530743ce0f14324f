"""Tool calls that are JSON objects: {"name": …, "arguments": …}.

Hermes and Qwen put each between `<tool_call>` and `</tool_call>`, Mistral a list of them after `[TOOL_CALLS]`, Llama 3
writes them as the whole reply, and so does any model that a grammar makes call.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart
from orchestrator.parsers.framed_calls import CallFrame, FramedCalls, Schemas
from orchestrator.parsers.json_source import json_string, json_text, json_value, unquoted
from orchestrator.parsers.source import SPACE, Source, Steps, skip, wait

_ARGUMENTS: Final = ("arguments", "parameters")


@dataclasses.dataclass(slots=True)
class _Call:
    index: int
    is_started: bool = False
    has_arguments: bool = False
    early_arguments: str = ""
    """That came before the name."""


class JsonCalls(FramedCalls):
    """`is_forced`: a grammar lets the model write nothing but calls; what is cut off before it is one is no content."""

    def __init__(self, frame: CallFrame, schemas: Schemas, new_id: NewCallId, *, is_forced: bool = False) -> None:
        super().__init__(frame, schemas, new_id)
        self._is_forced = is_forced

    def _begins_otherwise(self, source: Source) -> None:
        if self._is_forced:
            source.cut(len(source.rest))

    def _calls(self, source: Source) -> Steps[bool]:
        """Objects one after the other, to the end marker or to what is neither; whether one was a call."""
        first = self._num_calls
        character = yield from skip(source, SPACE + "[")
        while character == "{":
            source.pin()
            if not (yield from self._call(source)):
                source.rewind()
                break
            character = yield from skip(source, SPACE + ",;]")
        if self._num_calls > first:
            yield from self._ends(source)
        return self._num_calls > first

    def _call(self, source: Source) -> Steps[bool]:
        """One object. Its name makes it a call; without one, nothing is given on."""
        call, num_open = _Call(self._num_calls), 1
        source.cut(1)
        while num_open:
            if (yield from skip(source, SPACE + ",")) == "}":
                source.cut(1)
                num_open -= 1
                continue
            key = yield from _key(source)
            if key is None:
                break
            if key == "function" and (yield from wait(source)) == "{":  # Some models write OpenAI's own form.
                source.cut(1)
                num_open += 1
            elif not (yield from self._member(source, key, call)):
                return False
        if call.is_started and not call.has_arguments and (not num_open or not source.is_empty):
            yield CallArguments(call.index, "{}")
        return call.is_started

    def _member(self, source: Source, key: str, call: _Call) -> Steps[bool]:
        """False: this is no call."""
        if key in ("name", "function") and not call.is_started:
            name = yield from json_string(source)
            if name is None or not self._is_known(name):
                return False
            source.unpin_all()
            call.is_started = True
            self._num_calls += 1
            yield CallStart(call.index, self._new_id(), name)
            if call.has_arguments:
                yield CallArguments(call.index, unquoted(call.early_arguments))
        elif key in _ARGUMENTS and not call.has_arguments:
            call.has_arguments = True
            if call.is_started:
                yield from _arguments(source, call.index)
            else:
                call.early_arguments = yield from json_text(source)
        else:
            yield from json_text(source)
        return True

    def _is_known(self, name: str) -> bool:
        """Without markers a reply may well be an object with a name, and still no call."""
        return bool(self._frame.begin) or name in self._schemas


def _key(source: Source) -> Steps[str | None]:
    """A member's name and its colon; None if none stands here."""
    key = yield from json_string(source)
    if key is None or (yield from skip(source)) != ":":
        return None
    source.cut(1)
    yield from skip(source)
    return key


def _arguments(source: Source, index: int) -> Steps[None]:
    if (yield from wait(source)) == "{":
        yield from json_value(source, lambda text: CallArguments(index, text))
    elif text := (yield from json_text(source)):
        yield CallArguments(index, unquoted(text))
