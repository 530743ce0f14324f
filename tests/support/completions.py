"""A client that speaks token ids: `/v1/completions` with a token-id prompt and the generated ids in the answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson


@dataclasses.dataclass(slots=True, kw_only=True)
class Completion:
    """What a client saw, and when."""

    request_id: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float | None] = dataclasses.field(default_factory=list)
    """Of the tokens, where they were asked for."""
    finish_reason: str | None = None
    cached_tokens: int = 0
    start_s: float = 0.0
    times_s: list[float] = dataclasses.field(default_factory=list)
    """When each chunk with tokens arrived."""

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]


class CompletionFailed(Exception):
    """The server said so; the message is its body."""


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], *, max_tokens: int = 64, **body: Any
) -> Completion:
    """Stream one completion of token ids; greedy and without EOS unless `body` says otherwise."""
    completion = Completion(start_s=time.monotonic())
    fields = {
        "model": "smollm2-135m-instruct", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}, **body,
    }  # fmt: skip
    async with session.post(f"{url}/v1/completions", json=fields) as answer:
        completion.request_id = answer.headers.get("x-request-id", "")
        if answer.status != 200:
            raise CompletionFailed(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                _take(completion, orjson.loads(line[6:]))
    return completion


def _take(completion: Completion, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise CompletionFailed(str(chunk["error"]))
    for choice in chunk["choices"]:
        if choice.get("token_ids"):
            completion.times_s.append(time.monotonic())
            completion.token_ids += choice["token_ids"]
            completion.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
        completion.finish_reason = choice.get("finish_reason") or completion.finish_reason
    if usage := chunk.get("usage"):
        completion.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
