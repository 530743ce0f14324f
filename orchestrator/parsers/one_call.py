"""A client that can take one call only (`parallel_tool_calls: false`): the reply ends where a second one begins."""

from __future__ import annotations

from orchestrator.parsers.deltas import CallStart, Delta, ReplyParser


class OneCall(ReplyParser):
    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser

    def push(self, text: str) -> list[Delta]:
        return self._first(self._parser.push(text))

    def finish(self) -> list[Delta]:
        return self._first(self._parser.finish())

    def _first(self, deltas: list[Delta]) -> list[Delta]:
        if self.has_enough:
            return []
        for at, delta in enumerate(deltas):
            if type(delta) is CallStart and delta.index > 0:
                self.has_enough = True
                return deltas[:at]
        return deltas
