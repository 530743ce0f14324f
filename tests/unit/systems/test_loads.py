"""The loads against a server of this process: what a client sees of tokens whose times are known."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.systems.client import CompletionFailed, NixlPair, OneUrl, Timeline, take
from benchmarks.systems.loads import QUICK, beats_of, load_a, load_b, load_c, prompt_of, quantile, warm_up, worst_gaps


class TokenServer:
    """Answers /v1/completions as fast as it can; keeps the bodies, and counts clients that went away."""

    def __init__(self, *, tells_ids: bool = True, fails_after: int | None = None) -> None:
        self.tells_ids = tells_ids
        self.fails_after = fails_after
        self.bodies: list[dict[str, object]] = []
        self.num_left = 0
        self.num_at_once = 0
        self._num_now = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        body = orjson.loads(await http.read())
        self.bodies.append(body)
        if not body["stream"]:
            return web.json_response({"kv_transfer_params": {"remote_block_ids": [len(body["prompt"])]}})
        if self.fails_after == 0:
            return web.json_response({"error": {"message": "full"}}, status=503)
        self._num_now += 1
        self.num_at_once = max(self.num_at_once, self._num_now)
        try:
            return await self._stream(http, body["max_tokens"])
        except (ConnectionError, asyncio.CancelledError):
            self.num_left += 1
            raise
        finally:
            self._num_now -= 1

    async def _stream(self, http: web.Request, num_tokens: int) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(http)
        for index in range(num_tokens):
            if index == self.fails_after:
                await send(answer, {"error": {"message": "lost"}})
                break
            choice = {"text": "x", "token_ids": [index]} if self.tells_ids else {"text": "x"}
            await send(answer, {"choices": [choice]})
        await send(answer, {"choices": [], "usage": {"completion_tokens": num_tokens}})
        await answer.write(b"data: [DONE]\n\n")
        return answer


async def send(answer: web.StreamResponse, chunk: object) -> None:
    await answer.write(b"data: " + orjson.dumps(chunk) + b"\n\n")
    await asyncio.sleep(0)


@pytest.mark.parametrize("tells_ids", [True, False])
async def test_a_client_sees_each_token_and_the_server_s_count(tells_ids: bool) -> None:
    server = TokenServer(tells_ids=tells_ids)
    async with server.running() as url, aiohttp.ClientSession() as http:
        timeline = await OneUrl(url=url, model="m", extra={"cache_prompt": False}).complete(http, [1, 2], 5)
    assert sum(num_tokens for _, num_tokens in timeline.arrivals) == timeline.num_tokens == 5
    assert timeline.has_begun.is_set()
    assert timeline.ttft_s > 0
    assert server.bodies[0]["prompt"] == [1, 2]
    assert server.bodies[0]["ignore_eos"] is True
    assert server.bodies[0]["cache_prompt"] is False


@pytest.mark.parametrize(("fails_after", "says"), [(0, "503"), (2, "lost")])
async def test_a_failure_is_raised_in_the_server_s_words(fails_after: int, says: str) -> None:
    async with TokenServer(fails_after=fails_after).running() as url, aiohttp.ClientSession() as http:
        with pytest.raises(CompletionFailed, match=says):
            await OneUrl(url=url, model="m").complete(http, [1], 5)


async def test_a_nixl_pair_is_asked_for_the_prefill_first() -> None:
    prefill, decode = TokenServer(), TokenServer()
    async with prefill.running() as first, decode.running() as second, aiohttp.ClientSession() as http:
        pair = NixlPair(prefill_url=first, decode_url=second, model="m")
        timeline = await pair.complete(http, [1, 2, 3], 4)
    assert timeline.num_tokens == 4
    assert (prefill.bodies[0]["max_tokens"], prefill.bodies[0]["stream"]) == (1, False)
    assert decode.bodies[0]["kv_transfer_params"] == {"remote_block_ids": [3]}


async def test_each_load_measures_what_its_report_needs() -> None:
    server = TokenServer()
    async with server.running() as url, aiohttp.ClientSession() as http:
        target = OneUrl(url=url, model="m")
        await warm_up(target, http)
        assert {"ttft_p50_ms", "itl_p50_ms", "itl_p99_ms"} <= (await load_a(target, http, QUICK)).keys()
        server.num_at_once = 0
        found = await load_b(target, http, QUICK)
        assert server.num_at_once <= QUICK.num_clients_b
    assert found["num_tokens"] == QUICK.num_requests_b * QUICK.tokens_b[1]
    prompts = [str(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts), "a prompt came twice"


class SlowServer(TokenServer):
    """A token every 5 ms, so that chats last."""

    async def _stream(self, http: web.Request, num_tokens: int) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(http)
        for _ in range(num_tokens):
            await asyncio.sleep(0.005)
            await send(answer, {"choices": [{"text": "x"}]})
        await send(answer, {"choices": [], "usage": {"completion_tokens": num_tokens}})
        return answer


async def test_load_c_compares_the_beat_with_long_prompts_to_the_quiet_around_them() -> None:
    server = SlowServer()
    async with server.running() as url, aiohttp.ClientSession() as http:
        found = await load_c(OneUrl(url=url, model="m"), http, QUICK_C)
        assert QUICK_C.num_chats_c < server.num_at_once <= QUICK_C.num_chats_c + QUICK_C.num_long_prompts_c
    assert found["chats_left"] == QUICK_C.num_chats_c
    assert len(found["long_prompts_at_s"]) == 2
    assert 5 <= found["quiet_itl_p50_ms"] < 1000
    assert 5 <= found["itl_p50_ms"] < 1000
    assert found["series"][-1][0] >= 0.5


QUICK_C = type(QUICK)(
    num_runs_a=1, tokens_a=(1, 1), num_clients_b=1, num_requests_b=1, tokens_b=(1, 1),
    num_chats_c=3, num_long_prompts_c=2, long_prompt_tokens_c=50, long_prompt_every_s=0.2, quiet_s=0.2,
)  # fmt: skip


def chat_of(*arrivals: tuple[float, int]) -> Timeline:
    timeline = Timeline()
    for when_s, num_tokens in arrivals:
        timeline.arrived(num_tokens, when_s)
    return timeline


def test_tokens_of_one_chunk_share_its_gap() -> None:
    assert chat_of((1.0, 1), (2.0, 2), (2.5, 1)).gaps() == [(2.0, 0.5), (2.0, 0.5), (2.5, 0.5)]


def test_gaps_belong_to_the_time_in_which_they_end() -> None:
    chat = chat_of((0.0, 1), (1.0, 1), (2.0, 1), (5.0, 1), (6.0, 1), (7.0, 1))
    found = beats_of([chat], loud=(3.0, 5.5), whole=(0.5, 6.5))
    assert found["itl_max_ms"] == 3000
    assert found["quiet_itl_max_ms"] == 1000
    assert worst_gaps([chat], 0.5, 6.5) == [(0.5, 1000.0), (1.5, 1000.0), (4.5, 3000.0), (5.5, 1000.0)]


def test_chunks_without_tokens_are_not_counted() -> None:
    timeline = Timeline()
    silent: list[dict[str, Any]] = [{"text": ""}, {"text": "", "finish_reason": "length"}]
    for choices in ([], silent[:1], silent[1:]):
        take(timeline, {"choices": choices}, 1.0)
    assert timeline.arrivals == []


@given(values=st.lists(st.floats(0, 1e6), min_size=1), fraction=st.floats(0, 1))
def test_a_quantile_is_a_value_that_was_seen(values: list[float], fraction: float) -> None:
    assert quantile(values, fraction) in values
    assert quantile(values, 0.0) == min(values)
    assert quantile(values, 1.0) == max(values)


def test_prompts_are_the_same_for_everybody_and_different_from_each_other() -> None:
    assert prompt_of("b/0", 256) == prompt_of("b/0", 256)
    assert prompt_of("b/0", 256) != prompt_of("b/1", 256)
    assert len(prompt_of("b/0", 256)) == 256
