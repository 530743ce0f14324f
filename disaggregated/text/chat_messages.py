"""Messages as OpenAI's API has them, turned into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from disaggregated.errors import InvalidRequest


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies in which content is one string (or None) and the arguments of tool calls are objects.

    Raises InvalidRequest naming the part that is not text: these models read nothing else.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    copy = dict(message)
    if isinstance(copy.get("content"), list):
        copy["content"] = _joined(copy["content"], f"{where}.content")
    if isinstance(copy.get("tool_calls"), list):
        copy["tool_calls"] = [_tool_call(call) for call in copy["tool_calls"]]
    return copy


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequest(f"content parts must be text, this one is {kind!r}", param=f"{where}[{index}]")
    return "\n".join(texts)


def _tool_call(call: Any) -> Any:
    """Clients send the arguments as JSON in a string, and templates print them with `tojson`: parse once, not twice."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call
