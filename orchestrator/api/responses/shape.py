"""A response as JSON, whole or in events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from disaggregated.errors import DisaggregatedError
from orchestrator.api.responses.events import EventWriter
from orchestrator.api.responses.output import Output
from orchestrator.api.responses.tools import OfferedTools
from orchestrator.api.shapes import Reply, Usage
from orchestrator.parsers import Content, Delta

Keep = Callable[[dict[str, Any]], None]


class ResponsesShape:
    """Of one response, which has one reply."""

    closing = b""
    """The last event says that it is the last one."""

    def __init__(self, response: Mapping[str, Any], *, keep: Keep, tools: OfferedTools | None = None) -> None:
        """`response`: every field whose value is known before the first token. `keep` gets the response when it has
        ended, before its client does. `tools`: that the client gave, in whose words calls are told."""
        self._response = response
        self._keep = keep
        self._output = Output(tools or OfferedTools())
        self._events = EventWriter()
        self._finish_reason = ""

    def whole(self, replies: Sequence[Reply], usage: Usage) -> bytes:
        (reply,) = replies
        self._output.add_all(reply.deltas, _logprobs(reply.beside))
        self._output.finish()
        self._finish_reason = reply.finish_reason
        return orjson.dumps(self._ended(usage))

    def tell(self, fields: Mapping[str, Any]) -> None:
        """A response has nothing of the kind: who asks for it is refused."""

    def opening(self, index: int) -> bytes:
        begun = {**self._response, "status": "in_progress", "output": [], "usage": None}
        event = self._events.event
        return event("response.created", response=begun) + event("response.in_progress", response=begun)

    def text(self, index: int, text: str, beside: Mapping[str, Any] | None) -> bytes:
        return self.deltas(index, [Content(text)] if text else [], beside)

    def around_text(self, index: int) -> None:
        """Every event has a number of its own."""

    def deltas(self, index: int, deltas: Sequence[Delta], beside: Mapping[str, Any] | None) -> bytes:
        return b"".join([self._events.grown(grown) for grown in self._output.add_all(deltas, _logprobs(beside))])

    def finish(self, index: int, finish_reason: str) -> bytes:
        self._finish_reason = finish_reason
        events = b"".join([self._events.grown(grown) for grown in self._output.finish()])
        return events + self._events.close("incomplete" if self._is_cut else "completed")

    def usage(self, usage: Usage) -> bytes:
        """The last event of a stream."""
        ended = self._ended(usage)
        return self._events.event(f"response.{ended['status']}", response=ended)

    def count(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """A response is counted at its end."""

    def failed(self, error: DisaggregatedError) -> bytes:
        """The last event of a stream that broke."""
        failed = {
            **self._response,
            "status": "failed",
            "error": {"code": "server_error", "message": str(error)},
            "output": self._output.as_json(is_cut=True),
        }
        return self._events.event("response.failed", response=failed)

    @property
    def _is_cut(self) -> bool:
        return self._finish_reason == "length"

    def _ended(self, usage: Usage) -> dict[str, Any]:
        ended = {
            **self._response,
            "status": "incomplete" if self._is_cut else "completed",
            "completed_at": None if self._is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if self._is_cut else None,
            "output": self._output.as_json(is_cut=self._is_cut),
            "usage": usage_as_json(usage),
        }
        self._keep(ended)
        return ended


def _logprobs(beside: Mapping[str, Any] | None) -> Sequence[dict[str, Any]]:
    shown = None if beside is None else beside.get("logprobs")
    return shown["content"] if shown else ()


def usage_as_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_tokens,
    }
