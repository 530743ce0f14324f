"""Calls of custom tools, as chats tell them: a name and a text, where functions have a name and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from orchestrator.api.custom_tools import custom_input
from orchestrator.api.shapes import ChatShape, Reply
from orchestrator.parsers import CallArguments, CallStart, Delta


class CustomCallsShape(ChatShape):
    """For chats that have custom tools. Their input is known as a whole only: the model writes it within JSON."""

    def __init__(
        self, answer_id: str, model: str, created: int, *, include_usage: bool, custom: frozenset[str]
    ) -> None:
        super().__init__(answer_id, model, created, include_usage=include_usage)
        self._custom = custom
        self._written: dict[tuple[int, int], list[str]] = {}
        """Of each reply and each of its custom calls."""

    def deltas(self, index: int, deltas: Sequence[Delta], beside: Mapping[str, Any] | None) -> bytes:
        others: list[Delta] = []
        begun = b""
        for delta in deltas:
            if type(delta) is CallStart and delta.name in self._custom:
                self._written[index, delta.index] = []
                entry = {"id": delta.call_id, "type": "custom", "custom": {"name": delta.name, "input": ""}}
                begun += self._call_event(index, {"index": delta.index, **entry})
            elif type(delta) is CallArguments and (index, delta.index) in self._written:
                self._written[index, delta.index].append(delta.text)
            else:
                others.append(delta)
        return (super().deltas(index, others, beside) if others or beside else b"") + begun

    def finish(self, index: int, finish_reason: str) -> bytes:
        events = b""
        for (reply, call), pieces in self._written.items():
            if reply == index:
                custom = {"input": custom_input("".join(pieces))}
                events += self._call_event(index, {"index": call, "custom": custom})
        return events + super().finish(index, finish_reason)

    def _call_event(self, index: int, entry: dict[str, Any]) -> bytes:
        return self._event(index, b'"delta":%b' % orjson.dumps({"tool_calls": [entry]}), b"null", None)

    def _message(self, reply: Reply) -> dict[str, Any]:
        message = super()._message(reply)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._told(call) for call in calls]
        return message

    def _told(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        if function["name"] not in self._custom:
            return call
        custom = {"name": function["name"], "input": custom_input(function["arguments"])}
        return {"id": call["id"], "type": "custom", "custom": custom}
