"""OpenAI's JSON, put together by concatenation: nothing is built per token but the text itself.

`ChatShape` and `CompletionShape` differ only in names; each makes the pieces of one answer once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import orjson


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.num_prompt_tokens + other.num_prompt_tokens,
            self.num_cached_tokens + other.num_cached_tokens,
            self.num_tokens + other.num_tokens,
        )


class Shape(Protocol):
    """The JSON of one answer."""

    def opening(self, index: int) -> bytes:
        """The event before the first text of choice `index`; may be empty."""

    def text(self, index: int, text: str, token_ids: Sequence[int] | None) -> bytes:
        """An event with more text."""

    def finish(self, index: int, finish_reason: str) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...

    def whole(self, choices: Sequence[tuple[str, str, Sequence[int] | None]], usage: Usage) -> bytes:
        """The body of an answer that is not streamed; each choice is its text, finish reason and token ids."""


class _Shape:
    def __init__(self, answer_id: str, kind: str, model: str, created: int, *, include_usage: bool) -> None:
        self._fields = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + orjson.dumps(self._fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def usage(self, usage: Usage) -> bytes:
        return b"%b]," % self._head + b'"usage":' + orjson.dumps(usage.as_json()) + b"}\n\n"

    def _event(self, index: int, content: bytes, finish_reason: bytes, token_ids: Sequence[int] | None) -> bytes:
        ids = b"" if token_ids is None else b',"token_ids":' + orjson.dumps(list(token_ids))
        return b'%b{"index":%d,%b,"logprobs":null,"finish_reason":%b%b}%b' % (
            self._head, index, content, finish_reason, ids, self._tail,
        )  # fmt: skip


class ChatShape(_Shape):
    def __init__(self, answer_id: str, model: str, created: int, *, include_usage: bool) -> None:
        super().__init__(answer_id, "chat.completion.chunk", model, created, include_usage=include_usage)

    def opening(self, index: int) -> bytes:
        return self._event(index, b'"delta":{"role":"assistant","content":""}', b"null", None)

    def text(self, index: int, text: str, token_ids: Sequence[int] | None) -> bytes:
        return self._event(index, b'"delta":{"content":%b}' % orjson.dumps(text), b"null", token_ids)

    def finish(self, index: int, finish_reason: str) -> bytes:
        return self._event(index, b'"delta":{}', b'"%b"' % finish_reason.encode(), None)

    def whole(self, choices: Sequence[tuple[str, str, Sequence[int] | None]], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                **self._fields,
                "object": "chat.completion",
                "choices": [
                    {
                        "index": index,
                        "message": {"role": "assistant", "content": text, "refusal": None},
                        "logprobs": None,
                        "finish_reason": finish_reason,
                        **({} if token_ids is None else {"token_ids": token_ids}),
                    }
                    for index, (text, finish_reason, token_ids) in enumerate(choices)
                ],
                "usage": usage.as_json(),
            }
        )


class CompletionShape(_Shape):
    def __init__(self, answer_id: str, model: str, created: int, *, include_usage: bool) -> None:
        super().__init__(answer_id, "text_completion", model, created, include_usage=include_usage)

    def opening(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str, token_ids: Sequence[int] | None) -> bytes:
        return self._event(index, b'"text":%b' % orjson.dumps(text), b"null", token_ids)

    def finish(self, index: int, finish_reason: str) -> bytes:
        return self._event(index, b'"text":""', b'"%b"' % finish_reason.encode(), None)

    def whole(self, choices: Sequence[tuple[str, str, Sequence[int] | None]], usage: Usage) -> bytes:
        return orjson.dumps(
            {
                **self._fields,
                "choices": [
                    {
                        "index": index,
                        "text": text,
                        "logprobs": None,
                        "finish_reason": finish_reason,
                        **({} if token_ids is None else {"token_ids": token_ids}),
                    }
                    for index, (text, finish_reason, token_ids) in enumerate(choices)
                ],
                "usage": usage.as_json(),
            }
        )
