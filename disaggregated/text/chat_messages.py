"""Messages as OpenAI's API has them, turned into what chat templates expect.

Templates ask whether a message *has* tool calls or a name, so what a client sends as null or empty is taken out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_type import wrong_type

LONG_CHARACTERS: Final = 1 << 16
_TEXT_OF_PART: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies in which content is one string (or None beside tool calls) and the arguments of tool calls are objects.

    Raises InvalidRequest naming the part that is not text: these models read nothing else.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if len(message) == 2 and type(message.get("content")) is str and message.get("role") in _PLAIN_ROLES:
        return dict(message)
    copy = {key: value for key, value in message.items() if value is not None}
    if isinstance(copy.get("content"), list):
        copy["content"] = _joined(copy["content"], f"{where}.content")
    if isinstance(function_call := copy.pop("function_call", None), Mapping):
        copy["tool_calls"] = [{"type": "function", "function": function_call}]
    if calls := copy.pop("tool_calls", None):
        copy["tool_calls"] = [_tool_call(call) for call in calls] if isinstance(calls, list) else calls
    if "reasoning" in copy:
        copy.setdefault("reasoning_content", copy.pop("reasoning"))
    copy["role"] = _ROLES.get(copy.get("role", ""), copy.get("role"))
    copy.setdefault("content", None if "tool_calls" in copy else "")
    return copy


_ROLES: Final = {"developer": "system", "function": "tool"}
"""Templates were written before the one existed, and after the other one was given up."""
_PLAIN_ROLES: Final = ("user", "assistant", "system")
"""Of most messages, which are a role and a text and stay as they are."""


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        texts.append(part if isinstance(part, str) else _text_of(part, f"{where}[{index}]"))
    return "\n".join(texts)


def _text_of(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise wrong_type(where, "text", part)
    member = _TEXT_OF_PART.get(str(part.get("type")))
    if member is None:
        raise InvalidRequest(
            f"{where} must be text, is {str(part.get('type'))[:80]!r}: this model reads nothing else", param=where
        )
    if not isinstance(text := part.get(member), str):
        raise wrong_type(f"{where}.{member}", "a string", text)
    return text


def _tool_call(call: Any) -> Any:
    """Clients send the arguments as JSON in a string, and templates print them with `tojson`: parse once, not twice."""
    if isinstance(call, Mapping) and isinstance(custom := call.get("custom"), Mapping):
        return _function_call(call, custom)
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = _parsed(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _parsed(arguments: str) -> Any:
    """Python's own parser keeps numbers as they are, however long, but takes a tenth of a second for a long text."""
    return json.loads(arguments) if len(arguments) <= LONG_CHARACTERS else orjson.loads(arguments)


def _function_call(call: Mapping[str, Any], custom: Mapping[str, Any]) -> dict[str, Any]:
    """A custom tool is a function with one argument: templates know nothing else."""
    others = {key: value for key, value in call.items() if key not in ("custom", "type")}
    function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    return {**others, "type": "function", "function": function}
