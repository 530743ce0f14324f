"""Tool calls in which every argument has tags of its own: Qwen3-Coder, GLM 4.5 and MiniMax M2.

Values are plain text, and only the tool's schema tells a number from a string. Text is given on as it comes, as part of
a JSON string: these models write whole files into one argument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart, Content
from orchestrator.parsers.framed_calls import Schemas
from orchestrator.parsers.source import (
    GrammarParser,
    Source,
    Steps,
    collect,
    collect_before,
    skip,
    take_one_of,
    until,
)

BEGIN: Final = "<tool_call>"
END: Final = "</tool_call>"


class TaggedCalls(GrammarParser):
    """The frame that both share; a subclass reads a name, and names and ends of values."""

    value_end: str

    def __init__(self, schemas: Schemas, new_id: NewCallId) -> None:
        super().__init__()
        self._schemas = schemas
        self._new_id = new_id
        self._num_calls = 0

    def _name(self, source: Source, marker: str) -> Steps[str | None]:
        """Of the call that begins with `marker`; None if this is none."""
        raise NotImplementedError

    def _key(self, source: Source) -> Steps[str | None]:
        """Of the next argument, whose value follows; None after the last one, when the call's end is read."""
        raise NotImplementedError

    begins: tuple[str, ...] = (BEGIN,)

    def _grammar(self, source: Source) -> Steps[None]:
        while marker := (yield from until(source, self.begins, Content, trims=True)):
            source.pin()
            name = yield from self._name(source, marker)
            if name is None:
                source.rewind()
                yield Content(marker)
                continue
            source.unpin_all()
            yield from self._call(source, name)
            yield from skip(source)

    def _call(self, source: Source, name: str) -> Steps[None]:
        index = self._num_calls
        self._num_calls += 1
        yield CallStart(index, self._new_id(), name)
        opening = "{"
        while (key := (yield from self._key(source))) is not None:
            yield CallArguments(index, f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
            opening = ", "
            yield from self._argument(source, index, self._schema(name, key))
            if source.is_over and source.is_empty:
                return
        yield CallArguments(index, "{}" if opening == "{" else "}")

    def _schema(self, name: str, key: str) -> Mapping[str, Any]:
        properties = self._schemas.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        return schema if isinstance(schema, dict) else {"type": "string"}

    def _argument(self, source: Source, index: int, schema: Mapping[str, Any]) -> Steps[None]:
        yield from take_one_of(source, ["\n"])
        ends = [f"\n{self.value_end}", self.value_end]
        if schema.get("type") == "string":
            yield CallArguments(index, '"')
            end = yield from until(source, ends, lambda text: CallArguments(index, _escaped(text)))
            if end:
                yield CallArguments(index, '"')
        elif (text := (yield from collect(source, ends))) is not None:
            yield CallArguments(index, _value(text))
        else:
            source.cut(len(source.rest))


class QwenCoderCalls(TaggedCalls):
    """<function=name> <parameter=key> value </parameter> … </function>, with or without `<tool_call>` around it."""

    begins = (BEGIN, "<function=")
    value_end = "</parameter>"

    def _name(self, source: Source, marker: str) -> Steps[str | None]:
        if marker.endswith(BEGIN):
            yield from skip(source)
            if not (yield from take_one_of(source, ["<function="])):
                return None
        return (yield from collect(source, [">"]))

    def _key(self, source: Source) -> Steps[str | None]:
        yield from skip(source)
        if (yield from take_one_of(source, ["<parameter=", "</function>"])) == "<parameter=":
            return (yield from collect(source, [">"]))
        yield from skip(source)
        yield from take_one_of(source, [END])
        return None


class GlmCalls(TaggedCalls):
    """<tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> … </tool_call>"""

    value_end = "</arg_value>"

    def _name(self, source: Source, marker: str) -> Steps[str | None]:
        name = yield from collect_before(source, "<")
        return name.strip() if name and name.strip() else None

    def _key(self, source: Source) -> Steps[str | None]:
        yield from skip(source)
        if (yield from take_one_of(source, ["<arg_key>", END])) != "<arg_key>":
            return None
        key = yield from collect(source, ["</arg_key>"])
        yield from skip(source)
        yield from take_one_of(source, ["<arg_value>"])
        return key


class MiniMaxCalls(TaggedCalls):
    """<minimax:tool_call> <invoke name="name"> <parameter name="key">value</parameter> … </invoke> … </…>"""

    begins = ("<minimax:tool_call>", "<invoke name=")
    value_end = "</parameter>"

    def _name(self, source: Source, marker: str) -> Steps[str | None]:
        if not marker.endswith("="):
            yield from skip(source)
            if not (yield from take_one_of(source, ["<invoke name="])):
                return None
        return (yield from _quoted(source))

    def _key(self, source: Source) -> Steps[str | None]:
        yield from skip(source)
        if (yield from take_one_of(source, ["<parameter name=", "</invoke>"])) == "<parameter name=":
            return (yield from _quoted(source))
        yield from skip(source)
        yield from take_one_of(source, ["</minimax:tool_call>"])
        return None


def _quoted(source: Source) -> Steps[str | None]:
    """An attribute's value, to the end of its tag."""
    text = yield from collect(source, [">"])
    return None if text is None else text.strip().strip("\"'")


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _value(text: str) -> str:
    """What is no JSON is text, but for the names that Python has for three of its values."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return text.strip()
