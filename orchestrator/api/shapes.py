"""OpenAI's JSON, put together by concatenation: nothing is built per token but the text itself.

A shape makes the pieces of one answer once. Where the text has a parser, `deltas` comes in the place of `text`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import orjson

from disaggregated.errors import DisaggregatedError
from orchestrator.api.error_body import error_fields
from orchestrator.parsers import CallArguments, CallStart, Content, Delta, Reasoning, calls_of, content_of, reasoning_of


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    num_reasoning_tokens: int = 0
    """Of these."""

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            **(
                {"completion_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens}}
                if self.num_reasoning_tokens
                else {}
            ),
        }

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_cached_tokens + other.num_cached_tokens,
            self.num_tokens + other.num_tokens,
            self.num_reasoning_tokens + other.num_reasoning_tokens,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One whole choice."""

    deltas: Sequence[Delta]
    """Joined, in the model's order."""
    finish_reason: str
    beside: Mapping[str, Any] | None
    """Further fields of the choice, where the client asked for some."""

    @property
    def content(self) -> str:
        return content_of(self.deltas)


class Counts(Protocol):
    """What a request took."""

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_cached_tokens(self) -> int: ...


class Shape(Protocol):
    """The JSON of one answer."""

    closing: bytes
    """Ends every stream."""

    def tell(self, fields: Mapping[str, Any]) -> None:
        """Further fields of the whole answer, or of a stream's first event. Called before anything else."""

    def opening(self, index: int) -> bytes:
        """The event before the first text of choice `index`; may be empty."""

    def text(self, index: int, text: str, beside: Mapping[str, Any] | None) -> bytes:
        """An event with more text of a reply that has no parser; all of it is content. `beside`: as in `Reply`."""

    def around_text(self, index: int) -> tuple[bytes, bytes] | None:
        """What stands around more text as JSON spells it, quotes included; None where it is not always the same."""

    def deltas(self, index: int, deltas: Sequence[Delta], beside: Mapping[str, Any] | None) -> bytes:
        """An event with more of a reply that has a parser. `deltas` is joined and may be empty."""

    def finish(self, index: int, finish_reason: str) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...

    def count(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """The events from here on, but for the last, tell that there are so many tokens."""

    def failed(self, error: DisaggregatedError) -> bytes:
        """The last event of a stream that broke."""

    def whole(self, replies: Sequence[Reply], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""


class _Shape:
    closing = b"data: [DONE]\n\n"

    def __init__(self, answer_id: str, kind: str, model: str, created: int, *, include_usage: bool) -> None:
        self._fields = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(self._fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._of_prompt = b""

    def tell(self, fields: Mapping[str, Any]) -> None:
        self._fields |= fields
        self._of_prompt = b"," + orjson.dumps(fields)[1:-1]

    def usage(self, usage: Usage) -> bytes:
        return b"%b]," % self._head + b'"usage":' + orjson.dumps(usage.as_json()) + b"}\n\n"

    def count(self, num_prompt_tokens: int, num_tokens: int) -> None:
        counts = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            num_prompt_tokens, num_tokens, num_prompt_tokens + num_tokens,
        )  # fmt: skip
        self._tail = b'],"usage":%b}\n\n' % counts

    def failed(self, error: DisaggregatedError) -> bytes:
        return b"data: " + orjson.dumps(error_fields(error)) + b"\n\n"

    def _around(self, index: int, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """As `_event` of content that begins and ends like this."""
        return (
            b'%b{"index":%d,%b' % (self._head, index, before),
            b'%b,"logprobs":null,"finish_reason":null}%b' % (after, self._tail),
        )

    def _event(self, index: int, content: bytes, finish_reason: bytes, beside: Mapping[str, Any] | None) -> bytes:
        logprobs, more = (b"null", b"") if beside is None else _fields_beside(beside)
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b}%b' % (
            self._head, index, content, logprobs, finish_reason, more, self._tail,
        )  # fmt: skip


def _fields_beside(beside: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The logprobs, and all other fields with a comma before them."""
    others = {name: value for name, value in beside.items() if name != "logprobs"}
    return orjson.dumps(beside.get("logprobs")), b"," + orjson.dumps(others)[1:-1] if others else b""


class ChatShape(_Shape):
    """`calls_functions`: the client speaks the API before tools, where a reply has one `function_call`."""

    def __init__(
        self, answer_id: str, model: str, created: int, *, include_usage: bool, calls_functions: bool = False
    ) -> None:
        super().__init__(answer_id, "chat.completion.chunk", model, created, include_usage=include_usage)
        self._calls_functions = calls_functions

    def opening(self, index: int) -> bytes:
        event = self._event(index, b'"delta":{"role":"assistant","content":""}', b"null", None)
        if self._of_prompt:
            event, self._of_prompt = b"%b%b}\n\n" % (event[: -len(b"}\n\n")], self._of_prompt), b""
        return event

    def text(self, index: int, text: str, beside: Mapping[str, Any] | None) -> bytes:
        return self._event(index, b'"delta":{"content":%b}' % orjson.dumps(text), b"null", beside)

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._around(index, b'"delta":{"content":"', b'"}')

    def deltas(self, index: int, deltas: Sequence[Delta], beside: Mapping[str, Any] | None) -> bytes:
        fields: dict[str, Any] = {}
        for name, kind in (("reasoning_content", Reasoning), ("content", Content)):
            if text := "".join(delta.text for delta in deltas if type(delta) is kind):
                fields[name] = text
        if calls := _call_deltas(deltas):
            fields |= {"function_call": calls[0]["function"]} if self._calls_functions else {"tool_calls": calls}
        return self._event(index, b'"delta":%b' % orjson.dumps(fields), b"null", beside)

    def finish(self, index: int, finish_reason: str) -> bytes:
        return self._event(index, b'"delta":{}', b'"%b"' % self._reason(finish_reason).encode(), None)

    def whole(self, replies: Sequence[Reply], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                **self._fields,
                "object": "chat.completion",
                "choices": [
                    {
                        "index": index,
                        "message": self._message(reply),
                        "logprobs": None,
                        "finish_reason": self._reason(reply.finish_reason),
                        **(reply.beside or {}),
                    }
                    for index, reply in enumerate(replies)
                ],
                "usage": usage.as_json(),
            }
        )

    def _message(self, reply: Reply) -> dict[str, Any]:
        calls = calls_of(reply.deltas)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.content or (None if calls else ""),
            "refusal": None,
        }
        if reasoning := reasoning_of(reply.deltas):
            message["reasoning_content"] = reasoning
        if calls and self._calls_functions:
            message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
        elif calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return message

    def _reason(self, finish_reason: str) -> str:
        return "function_call" if self._calls_functions and finish_reason == "tool_calls" else finish_reason


def _call_deltas(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """One entry for each call that is spoken of."""
    entries: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if type(delta) is CallStart:
            function = {"name": delta.name, "arguments": ""}
            entries[delta.index] = {
                "index": delta.index, "id": delta.call_id, "type": "function", "function": function
            }  # fmt: skip
        elif type(delta) is CallArguments:
            entry = entries.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
            entry["function"]["arguments"] += delta.text
    return list(entries.values())


class CompletionShape(_Shape):
    def __init__(self, answer_id: str, model: str, created: int, *, include_usage: bool) -> None:
        super().__init__(answer_id, "text_completion", model, created, include_usage=include_usage)

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str, beside: Mapping[str, Any] | None) -> bytes:
        return self._event(index, b'"text":%b' % orjson.dumps(text), b"null", beside)

    def around_text(self, index: int) -> tuple[bytes, bytes]:
        return self._around(index, b'"text":"', b'"')

    def deltas(self, index: int, deltas: Sequence[Delta], beside: Mapping[str, Any] | None) -> bytes:
        return self.text(index, content_of(deltas), beside)

    def finish(self, index: int, finish_reason: str) -> bytes:
        return self._event(index, b'"text":""', b'"%b"' % finish_reason.encode(), None)

    def whole(self, replies: Sequence[Reply], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                **self._fields,
                "choices": [
                    {
                        "index": index,
                        "text": reply.content,
                        "logprobs": None,
                        "finish_reason": reply.finish_reason,
                        **(reply.beside or {}),
                    }
                    for index, reply in enumerate(replies)
                ],
                "usage": usage.as_json(),
            }
        )


# What `whole` says of one reply that is nothing but text, in one formatting.

_PLAIN_CHAT: Final = (
    b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":'
    b'{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":"%b"}],"usage":'
    b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}}'
)
_PLAIN_COMPLETION: Final = (
    b'{"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,"choices":[{"index":0,"text":%b,'
    b'"logprobs":null,"finish_reason":"%b"}],"usage":'
    b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}}'
)


def plain_answer(
    *, is_chat: bool, request_id: str, model: str, created: int, text: str, finish_reason: str, counts: Counts
) -> bytes:
    num_prompt, num_tokens, num_cached = counts.num_prompt_tokens, counts.num_tokens, counts.num_cached_tokens
    return (_PLAIN_CHAT if is_chat else _PLAIN_COMPLETION) % (
        request_id.encode(),
        created,
        orjson.dumps(model),
        orjson.dumps(text),
        finish_reason.encode(),
        num_prompt,
        num_tokens,
        num_prompt + num_tokens,
        num_cached,
    )
