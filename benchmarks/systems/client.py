"""A streamed completion of token ids, as any OpenAI client asks for it, and when each of its tokens came.

Not every server tells token ids. A chunk without ids counts as one token: every server here sends one chunk a token
unless it falls behind. The total is the server's own usage.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import aiohttp
import orjson


class CompletionFailed(Exception):
    """The server said so; the message is its body."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Timeline:
    """One request as its client saw it. Times are of time.monotonic()."""

    BEGUN_TOKENS: ClassVar[int] = 3

    start_s: float = 0.0
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    """When each chunk came, and how many tokens it held."""
    num_tokens: int = 0
    has_begun: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Set with the third token: it decodes."""

    def arrived(self, num_tokens: int, now_s: float) -> None:
        self.arrivals.append((now_s, num_tokens))
        if len(self.arrivals) == self.BEGUN_TOKENS:
            self.has_begun.set()

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.start_s

    def gaps(self) -> list[tuple[float, float]]:
        """(when, seconds since the token before) of every token but the first; tokens of one chunk share its gap."""
        found = []
        for (before_s, _), (after_s, num_tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            found += [(after_s, (after_s - before_s) / num_tokens)] * num_tokens
        return found


class Target(Protocol):
    async def complete(self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int) -> Timeline:
        """One whole streamed completion. `Timeline` is filled while it goes on if the caller gives one."""

    async def follow(
        self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int, timeline: Timeline
    ) -> None:
        """The same into `timeline`, for who wants to look at it, or cancel it, before the end."""


class Following:
    """The half of a Target that both kinds share."""

    async def complete(self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int) -> Timeline:
        timeline = Timeline(start_s=time.monotonic())
        await self.follow(http, prompt, max_tokens, timeline)
        return timeline

    async def follow(
        self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int, timeline: Timeline
    ) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OneUrl(Following):
    """Any server, or front door, with an OpenAI API."""

    url: str
    model: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    async def follow(
        self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int, timeline: Timeline
    ) -> None:
        await stream(http, self.url, {**request_body(self.model, prompt, max_tokens), **self.extra}, timeline)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NixlPair(Following):
    """vLLM's two servers without the proxy in front of them, which saves it that cost: first the prefill, then its
    `kv_transfer_params` to the server that decodes, whose tokens are the client's."""

    prefill_url: str
    decode_url: str
    model: str

    async def follow(
        self, http: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int, timeline: Timeline
    ) -> None:
        asked = {"do_remote_decode": True, "do_remote_prefill": False}
        absent = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        body = {**request_body(self.model, prompt, 1), "stream": False, "kv_transfer_params": {**asked, **absent}}
        del body["stream_options"]
        async with http.post(f"{self.prefill_url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise CompletionFailed(f"prefill {answer.status}: {await answer.text():.300}")
            handed_over = (await answer.json())["kv_transfer_params"]
        decode = {**request_body(self.model, prompt, max_tokens), "kv_transfer_params": handed_over}
        await stream(http, self.decode_url, decode, timeline)


def request_body(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(http: aiohttp.ClientSession, url: str, body: Mapping[str, Any], timeline: Timeline) -> None:
    """
    Raises:
        CompletionFailed: an answer other than 200, or an error in the stream.
    """
    async with http.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise CompletionFailed(f"{answer.status}: {await answer.text():.300}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                take(timeline, orjson.loads(line[6:]), time.monotonic())


def take(timeline: Timeline, chunk: Mapping[str, Any], now_s: float) -> None:
    if "error" in chunk:
        raise CompletionFailed(f"{chunk['error']}"[:300])
    for choice in chunk.get("choices") or ():
        num_tokens = len(choice.get("token_ids") or ()) or bool(choice.get("text"))
        if num_tokens:
            timeline.arrived(num_tokens, now_s)
    if usage := chunk.get("usage"):
        timeline.num_tokens = usage["completion_tokens"]
