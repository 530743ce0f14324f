"""The front door under the conditions that clients and servers make: hang-ups, slow readers, lost and full servers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
from typing import Any

import aiohttp
import pytest

from disaggregated.errors import InvalidRequest
from orchestrator import metrics
from orchestrator.server import Role
from tests.support.fake_cluster import Temper
from tests.support.front_door import FAST, Door, front_door, until

TEXT = "/v1/completions"
SLOW = Temper(latency_s=0.0, step_s=0.02, prefill_token_s=0.0)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hello", "max_tokens": 10, "temperature": 0, "seed": 4, **fields}


async def read_events(answer: aiohttp.ClientResponse) -> list[Any]:
    lines = (await answer.text()).split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def stream(door: Door, **fields: Any) -> list[Any]:
    async with door.http.post(door.url + TEXT, json=body(stream=True, **fields)) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        return await read_events(answer)


def text_of(events: list[Any]) -> str:
    return "".join(event["choices"][0]["text"] for event in events)


async def test_a_client_that_hangs_up_mid_stream_frees_its_servers() -> None:
    async with front_door(temper=SLOW) as door:
        answer = await door.http.post(door.url + TEXT, json=body(stream=True, max_tokens=1000))
        await answer.content.readline()
        assert door.cluster.of("generation")[0].admitted
        answer.close()
        await door.wait_idle()
        assert (await door.get("/metrics_of_nothing"))[0] == 404


async def test_a_client_that_hangs_up_before_its_first_token_stops_its_prefill() -> None:
    async with front_door(temper=Temper(latency_s=0.0, prefill_token_s=0.5)) as door:
        context = door.cluster.of("context")[0]
        request = asyncio.create_task(door.post(TEXT, body()))
        await until(lambda: bool(context.transfers))
        request.cancel()
        await asyncio.wait([request])
        await door.wait_idle()
        await until(lambda: not context.transfers)


async def test_a_client_that_reads_slowly_gets_every_token_and_delays_nobody() -> None:
    async with front_door(send_buffer_bytes=4096) as door:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(door.url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 12)
        payload = json.dumps(body(stream=True, max_tokens=900, ignore_eos=True)).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(payload)}\r\n\r\n"
        writer.write(head.encode() + payload)
        await reader.readuntil(b"\r\n\r\n")
        ids = door.model.tokenizer.encode("hello")
        assert text_of(await stream(door, seed=9)) == door.expected(ids, max_tokens=10, seed=9)[0]
        await door.wait_idle()  # every token is generated, though the client has hardly read
        raw = await reader.read(-1)
        writer.close()
        events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
        assert text_of(events) == door.expected(ids, max_tokens=900, seed=4, min_tokens=900)[0]
        assert len(events) < 800, "what the client was too slow for was not joined"


async def test_token_ids_come_with_the_text_when_asked_for() -> None:
    async with front_door() as door:
        _, whole = await door.post(TEXT, body(return_token_ids=True))
        events = await stream(door, return_token_ids=True)
        streamed = [token for event in events for token in event["choices"][0].get("token_ids", [])]
        assert streamed == whole["choices"][0]["token_ids"]
        assert len(streamed) == 10


async def test_http_1_0_gets_its_stream_without_chunks() -> None:
    async with front_door() as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
        payload = json.dumps(body(stream=True)).encode()
        writer.write(f"POST {TEXT} HTTP/1.0\r\ncontent-length: {len(payload)}\r\n\r\n".encode() + payload)
        head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        assert b"chunked" not in head
        assert rest.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")


async def test_request_ids_are_echoed_or_made_and_lead_to_the_story() -> None:
    async with front_door() as door:
        async with door.http.post(door.url + TEXT, json=body(), headers={"x-request-id": "mine-1"}) as answer:
            assert answer.headers["x-request-id"] == "mine-1"
            assert (await answer.json())["id"] == "cmpl-mine-1"
        async with door.http.post(door.url + TEXT, json=body(), headers={"x-request-id": "not sound!"}) as answer:
            assert len(answer.headers["x-request-id"]) == 24
        async with door.http.post(door.url + TEXT, data=b"{") as answer:
            assert answer.headers["x-request-id"]
        status, story = await door.get("/requests/mine-1")
        assert (status, story["outcome"], story["num_tokens"]) == (200, "finished", 10)
        assert sum(story["ttft_parts"].values()) == pytest.approx(story["ttft_s"])
        assert story["attempts"][0]["context_instance"] == "context-0"
        assert (await door.get("/requests/nobody"))[0] == 404


async def test_each_sequence_of_a_request_has_its_story() -> None:
    async with front_door() as door:
        await door.post(TEXT, body(prompt=["a", "b"]), headers={"x-request-id": "two"})
        _, story = await door.get("/requests/two")
        assert [sequence["request_id"] for sequence in story["sequences"]] == ["two.0", "two.1"]


async def test_a_story_is_forgotten_when_newer_ones_fill_the_shelf() -> None:
    async with front_door(perf_metrics_max_requests=1) as door:
        for name in ("one", "two"):
            await door.post(TEXT, body(), headers={"x-request-id": name})
        assert [(await door.get(f"/requests/{name}"))[0] for name in ("one", "two")] == [404, 200]


async def test_health_is_503_with_the_reason_until_requests_can_be_served() -> None:
    async with front_door(is_awaited=False) as door:
        status, answer = await door.get("/health")
        assert status == 503
        assert "no generation server is ready" in answer["error"]["message"]
        await until(lambda: door.door.why_not_serving() is None)
        assert (await door.get("/health"))[0] == 200
        door.cluster.of("generation")[0].crash()
        await until(lambda: door.door.why_not_serving() is not None)
        assert (await door.get("/health"))[0] == 503
        status, info = await door.get("/cluster_info")
        assert info["is_ready"] is False
        assert info["current_workers"]["generation_servers"][0]["times_lost"] == 1


async def test_at_start_health_waits_for_every_server_that_the_file_names() -> None:
    async with front_door(num_context=2, is_awaited=False) as door:
        absent = door.cluster.of("context")[1]
        absent.crash()
        await until(lambda: "waiting for 1 context servers" in (door.door.why_not_serving() or ""))
        absent.restart()
        await until(lambda: door.door.why_not_serving() is None)
        absent.crash()
        await until(lambda: len(door.door.pools.ready(Role.CONTEXT)) == 1)
        assert door.door.why_not_serving() is None, "once started, requests can be served without it"


async def test_without_a_generation_server_a_client_is_told_to_come_back() -> None:
    async with front_door(request_timeout_s=0.5) as door:
        door.cluster.of("generation")[0].crash()
        await until(lambda: door.door.why_not_serving() is not None)
        async with door.http.post(door.url + TEXT, json=body(stream=True)) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await answer.json())["error"]["type"] == "overloaded_error"


async def test_a_full_queue_answers_429_at_once() -> None:
    async with front_door(temper=Temper(step_s=0.02, max_batch_size=1), queue_depth_max=1) as door:
        running = [asyncio.create_task(door.post(TEXT, body(max_tokens=1000))) for _ in range(2)]
        await until(lambda: len(door.door.dispatcher.queue) == 1)
        async with door.http.post(door.url + TEXT, json=body()) as answer:
            assert answer.status == 429
            assert int(answer.headers["Retry-After"]) >= 1
        for request in running:
            request.cancel()
        await asyncio.wait(running)
        await door.wait_idle()


async def test_a_killed_generation_server_costs_a_pause_and_not_a_token() -> None:
    async with front_door(temper=SLOW, num_generation=2) as door:
        work = asyncio.create_task(stream(door, max_tokens=60))
        pool = door.cluster.of("generation")
        await until(lambda: any(server.decoding for server in pool))
        next(server for server in pool if server.decoding).crash()
        events = await work
        assert text_of(events) == door.expected(door.model.tokenizer.encode("hello"), max_tokens=60, seed=4)[0]
        await door.wait_idle()


async def test_an_error_after_the_first_token_is_the_last_event() -> None:
    async with front_door(temper=SLOW, request_timeout_s=1.5) as door:
        events = await stream(door, max_tokens=1000)
        assert events[-1]["error"]["type"] == "timeout_error"
        assert re.match(r"not finished after (1\.[5-9]|[2-9]\.\d) s, \d+ tokens were", events[-1]["error"]["message"])
        await door.wait_idle()


async def test_metrics_count_what_happened() -> None:
    async with front_door() as door:
        await door.post(TEXT, body())
        await door.post(TEXT, body(n=500))
        async with door.http.get(door.url + "/metrics") as answer:
            lines = dict(line.rsplit(" ", 1) for line in (await answer.text()).splitlines() if not line.startswith("#"))
        assert lines['disagg_requests_total{outcome="finished"}'] == "1.0"
        assert lines["disagg_generation_tokens_total"] == "10.0"
        assert lines['disagg_errors_answered_total{status="400"}'] == "1.0"
        assert lines['disagg_server_up{instance="generation-0",role="generation"}'] == "1.0"
        assert lines['disagg_blocks_leaked{instance="generation-0",role="generation"}'] == "0.0"
        of_server = '{instance="generation-0",role="generation"}'
        assert lines[f"disagg_spec_decode_num_draft_tokens_total{of_server}"] == "8.0"
        assert lines[f"disagg_spec_decode_num_accepted_tokens_total{of_server}"] == "5.0"
        assert lines["validation_exceptions_total"] == "1.0"
        assert door.door.metrics.totals()["disagg_generation_tokens_total"] == 10.0


@pytest.mark.parametrize("uncounted_max", [1, 2, 100])
async def test_each_request_is_counted_once_whoever_reads_when(
    monkeypatch: pytest.MonkeyPatch, uncounted_max: int
) -> None:
    monkeypatch.setattr(metrics, "UNCOUNTED_MAX", uncounted_max)
    async with front_door() as door:
        for number in range(1, 6):
            await door.post(TEXT, body())
            if number != 2:
                assert door.door.metrics.totals()["disagg_generation_tokens_total"] == 10.0 * number
        assert 'disagg_requests_total{outcome="finished"} 5.0' in door.door.metrics.render().decode()


async def test_an_answer_is_the_same_when_a_step_brings_several_tokens() -> None:
    """Text, ids and usage; also where a stop string ends it in the midst of them."""
    answers = []
    for tokens_a_step_max in (1, 7):
        async with front_door(temper=dataclasses.replace(FAST, tokens_a_step_max=tokens_a_step_max)) as door:
            whole = (await door.post(TEXT, body(max_tokens=40, return_token_ids=True)))[1]
            text = whole["choices"][0]["text"]
            _, stopped = await door.post(TEXT, body(max_tokens=40, return_token_ids=True, stop=text[10:13]))
            events = await stream(door, max_tokens=40, stop=text[10:13], stream_options={"include_usage": True})
            answers.append(
                (whole["choices"], whole["usage"], stopped["choices"], stopped["usage"], events[-1]["usage"])
            )
            assert text_of(events[:-1]) == stopped["choices"][0]["text"]
    assert answers[0] == answers[1]
    assert answers[0][3]["completion_tokens"] < 40


async def test_the_ledger_names_who_holds_what_on_every_server() -> None:
    async with front_door(temper=SLOW) as door:
        answer = await door.http.post(
            door.url + TEXT, json=body(stream=True, max_tokens=1000), headers={"x-request-id": "holder"}
        )
        await answer.content.readline()
        _, ledger = await door.get("/ledger")
        owners = [entry["owner"] for server in ledger["servers"] for entry in server["entries"]]
        assert [owner.partition(".")[0] for owner in owners] == ["holder"]
        answer.close()
        await door.wait_idle()


class RecordingScaler:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    async def scale(self, role: str, count: int) -> None:
        if count > 5:
            raise InvalidRequest(f"{role}: must be at most 5, is {count}", param=role)
        self.calls.append((role, count))

    def describe(self) -> list[dict[str, object]]:
        return []


async def test_scaling_is_checked_and_passed_on() -> None:
    scaler = RecordingScaler()
    async with front_door(scaler=scaler) as door:
        assert await door.post("/cluster/scale", {"generation": 2, "context": 0}) == (
            200,
            {"generation": 2, "context": 0},
        )
        assert scaler.calls == [("generation", 2), ("context", 0)]
        for wrong, message in (
            ({"generation": 9}, "must be at most 5"),
            ({"generation": "two"}, "must be an integer"),
            ({"generation": -1}, "must be at least 0"),
            ({"decoder": 1}, "there is no role 'decoder'"),
            ({}, "name a role and a count"),
        ):
            status, answer = await door.post("/cluster/scale", wrong)
            assert status == 400
            assert message in answer["error"]["message"]
    async with front_door() as door:
        status, answer = await door.post("/cluster/scale", {"generation": 2})
        assert status == 400
        assert "run by somebody else" in answer["error"]["message"]


async def test_a_busy_front_door_serves_many_streams_at_once() -> None:
    temper = Temper(latency_s=0.0, step_s=0.002, prefill_token_s=0.0, max_batch_size=64)
    async with front_door(temper=temper, num_generation=2) as door:
        streams = await asyncio.gather(*(stream(door, seed=seed, max_tokens=30) for seed in range(50)))
        ids = door.model.tokenizer.encode("hello")
        assert [text_of(events) for events in streams] == [
            door.expected(ids, max_tokens=30, seed=seed)[0] for seed in range(50)
        ]
        await door.wait_idle()


async def test_the_version_is_told() -> None:
    async with front_door(temper=FAST, is_awaited=False) as door:
        assert (await door.get("/version"))[0] == 200
