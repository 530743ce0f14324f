"""Checks the messages of a chat, so that a template finds only what templates know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_parts import check_num_parts
from disaggregated.text.chat_messages import template_messages
from orchestrator.api.fields import shown, wrong_type

ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MAY_SAY_NOTHING: Final = frozenset({"assistant", "tool", "function"})
"""Who calls a tool says nothing besides, and a tool may have nothing to tell."""
ARGUMENTS_PARTS_MAX: Final = 1 << 18
"""JSON values in the arguments of one call: they are parsed for the template, and written again by it."""


def checked_messages(messages: object) -> list[Mapping[str, Any]]:
    """
    Raises:
        InvalidRequest: names the message, and in it the field, that is wrong.
    """
    if messages is None:
        raise InvalidRequest("messages is missing", param="messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array of messages", messages)
    if not messages:
        raise InvalidRequest("messages is empty", param="messages")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: object, name: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(name, "an object", message)
    role = message.get("role")
    if role is None:
        raise InvalidRequest(f"{name}.role is missing; it is one of {', '.join(sorted(ROLES))}", param=f"{name}.role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"{name}.role must be one of {', '.join(sorted(ROLES))}; is {shown(role)}", param=f"{name}.role"
        )
    content = message.get("content")
    if content is None and role not in _MAY_SAY_NOTHING:
        raise InvalidRequest(f"{name}.content is missing", param=f"{name}.content")
    if content is not None and not isinstance(content, (str, list)):
        raise wrong_type(f"{name}.content", "a string or an array of parts", content)
    for field in ("tool_call_id", "name", "reasoning_content", "reasoning", "refusal"):
        if not isinstance(message.get(field), str | None):
            raise wrong_type(f"{name}.{field}", "a string", message[field])
    if not isinstance(message.get("prefix"), bool | None):
        raise wrong_type(f"{name}.prefix", "true or false", message["prefix"])
    _check_calls(message, name)
    return message


def assistant_text(message: Mapping[str, Any]) -> str:
    """What it says, as templates show it; "" where it is not the assistant's."""
    if message["role"] != "assistant":
        return ""
    (as_shown,) = template_messages([message])
    return as_shown["content"] or ""


def _check_calls(message: Mapping[str, Any], name: str) -> None:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise wrong_type(f"{name}.tool_calls", "an array of calls", calls)
    for index, call in enumerate(calls or ()):
        where = f"{name}.tool_calls[{index}]"
        if not isinstance(call, dict):
            raise wrong_type(where, "an object", call)
        if call.get("type") == "custom":
            _check_custom(call.get("custom"), f"{where}.custom")
            continue
        _check_function(call.get("function"), f"{where}.function")
    if message.get("function_call") is not None:
        _check_function(message["function_call"], f"{name}.function_call")


def _check_custom(custom: object, where: str) -> None:
    if not isinstance(custom, dict):
        raise wrong_type(where, "an object", custom)
    for field in ("name", "input"):
        if not isinstance(custom.get(field), str):
            raise wrong_type(f"{where}.{field}", "a string", custom.get(field))


def _check_function(function: object, where: str) -> None:
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    if not isinstance(function.get("name"), str):
        raise wrong_type(f"{where}.name", "a string", function.get("name"))
    arguments, where = function.get("arguments"), f"{where}.arguments"
    if not isinstance(arguments, str | dict | None):
        raise wrong_type(where, "a string of JSON", arguments)
    if isinstance(arguments, str):
        check_num_parts(arguments.encode(), where, param=where, num_max=ARGUMENTS_PARTS_MAX)
