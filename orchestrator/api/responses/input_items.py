"""The items of a Responses body, turned into the messages of a chat.

A chat says in one message what the assistant thought, said and called; here these are items in a row. They are put
together again: a template renders only what looks like what the model itself would have written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.custom_tools import custom_arguments
from orchestrator.api.fields import json_type, shown, wrong_type
from orchestrator.api.responses.tools import chat_name

Message = dict[str, Any]

ROLES: Final = frozenset({"user", "assistant", "system", "developer"})
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal"})


def messages_of(items: object, name: str, *, before: Sequence[Message] = ()) -> list[Message]:
    """`before` is what was said until here; the last of its messages is copied before it is added to.

    Raises:
        InvalidRequest: names the item that is wrong, of a kind that a text model cannot read, or an answer to nothing.
    """
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise wrong_type(name, "a string or an array of items", items)
    conversation = _Conversation(before)
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise wrong_type(f"{name}[{index}]", "an object", item)
        conversation.add(item, f"{name}[{index}]")
    if not conversation.messages:
        raise InvalidRequest(f"{name} is empty", param=name)
    return conversation.messages


class _Conversation:
    def __init__(self, before: Sequence[Message]) -> None:
        self.messages: list[Message] = [*before[:-1], dict(before[-1])] if before else []
        self._calls_before = before[-1].get("tool_calls") if before else None
        self._call_ids = {call["id"] for message in before for call in message.get("tool_calls", ())}

    def add(self, item: Mapping[str, Any], name: str) -> None:
        kind = item.get("type", "message")
        match kind:
            case "message":
                self._add_message(item, name)
            case "function_call":
                self._add_call(item, name, _text_field(item, "arguments", name))
            case "custom_tool_call":
                self._add_call(item, name, custom_arguments(_text_field(item, "input", name)))
            case "function_call_output" | "custom_tool_call_output":
                self._add_call_output(item, name)
            case "reasoning":
                self._add_reasoning(item, name)
            case _:
                raise InvalidRequest(f"{name}.type {shown(kind)} is not supported here", param=f"{name}.type")

    def _add_message(self, item: Mapping[str, Any], name: str) -> None:
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidRequest(
                f"{name}.role must be one of {', '.join(sorted(ROLES))}; is {shown(role)}", param=f"{name}.role"
            )
        text = _text_of(item.get("content"), f"{name}.content")
        if role == "assistant":
            self._assistant("content")["content"] = text
        else:
            self.messages.append({"role": role, "content": text})

    def _add_reasoning(self, item: Mapping[str, Any], name: str) -> None:
        """Where only a summary or ciphertext came back, that is all there is to remember."""
        parts = item.get("content") or item.get("summary")
        if text := _text_of(parts, f"{name}.content") if parts else "":
            self._assistant("reasoning_content", "content", "tool_calls")["reasoning_content"] = text

    def _add_call(self, item: Mapping[str, Any], name: str, arguments: str) -> None:
        call_id, function = _text_field(item, "call_id", name), _text_field(item, "name", name)
        if item.get("namespace") is not None:
            function = chat_name(function, _text_field(item, "namespace", name))
        self._call_ids.add(call_id)
        call = {"id": call_id, "type": "function", "function": {"name": function, "arguments": arguments}}
        self._own_calls(self._assistant()).append(call)

    def _own_calls(self, message: Message) -> list[Any]:
        """Those of `message`, to be added to; where it came with the conversation before, a copy, made once."""
        calls = message.get("tool_calls")
        if calls is None or calls is self._calls_before:
            message["tool_calls"] = calls = list(calls or ())
        return calls

    def _add_call_output(self, item: Mapping[str, Any], name: str) -> None:
        call_id = _text_field(item, "call_id", name)
        if call_id not in self._call_ids:
            name += ".call_id"
            raise InvalidRequest(f"{name}: there is no call {shown(call_id)} before it", param=name)
        output = _text_of(item.get("output"), f"{name}.output")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})

    def _assistant(self, *unless: str) -> Message:
        """The assistant's message that is being put together; a new one if it already has one of `unless`."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or any(last.get(field) is not None for field in unless):
            last = {"role": "assistant", "content": None}
            self.messages.append(last)
        return last


def _text_of(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{name} is missing", param=name)
    if not isinstance(content, list):
        raise wrong_type(name, "a string or an array of parts", content)
    return "\n".join(_text_of_part(part, f"{name}[{index}]") for index, part in enumerate(content))


def _text_of_part(part: object, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    if isinstance(part, dict) and isinstance(kind, str) and kind in _TEXT_PARTS:
        return _text_field(part, "refusal" if kind == "refusal" else "text", name)
    raise InvalidRequest(f"{name} must be text, is {shown(kind)}", param=name)


def _text_field(item: Mapping[str, Any], field: str, name: str) -> str:
    value = item.get(field)
    if value is None:
        raise InvalidRequest(f"{name}.{field} is missing", param=f"{name}.{field}")
    if not isinstance(value, str):
        raise wrong_type(f"{name}.{field}", "a string", value)
    return value
