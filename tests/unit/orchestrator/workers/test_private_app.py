"""What workers and their supervisor say to each other, over real Unix sockets, with a real front door behind them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from disaggregated.errors import InvalidRequest
from orchestrator.server import Standing
from orchestrator.workers.asking import AskedSiblings
from orchestrator.workers.private_app import PrivateApp, RemoteScaler, errors_answered
from orchestrator.workers.private_calls import NoAnswer, ask
from tests.support.front_door import Door, front_door

TEXT = "/v1/completions"
RESPONSES = "/v1/responses"


@contextlib.asynccontextmanager
async def at(path: Path, app: web.Application) -> AsyncIterator[Path]:
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, path).start()
        yield path
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def worker(folder: Path, index: int = 1) -> AsyncIterator[tuple[Door, Path, RemoteScaler]]:
    scaler = RemoteScaler(folder / "supervisor", timeout_s=5.0)
    async with front_door() as door, at(folder / f"worker-{index}", PrivateApp(door.door, scaler).make()) as path:
        yield door, path, scaler


async def test_a_worker_takes_up_and_lets_go_of_the_servers_that_its_supervisor_names(tmp_path: Path) -> None:
    async with worker(tmp_path) as (door, path, scaler):
        here = {server.address for server in door.door.pools}
        told = {"servers": [["generation", "127.0.0.1:1"]], "processes": [{"name": "g-1", "phase": "ready"}]}
        for _ in range(2):
            await ask(path, "PUT", "/servers", told)
            assert {server.address for server in door.door.pools} == here | {"127.0.0.1:1"}
        assert scaler.describe() == [{"name": "g-1", "phase": "ready"}]
        await ask(path, "PUT", "/servers", {"servers": [], "processes": []})
        assert {server.address for server in door.door.pools} == here, "those of the file stay"


async def test_a_server_that_is_drained_gets_no_more_requests(tmp_path: Path) -> None:
    async with worker(tmp_path) as (door, path, _):
        (server,) = (server for server in door.door.pools if server.role == "generation")
        body = {"role": "generation", "address": server.address, "deadline_s": 1.0}
        assert orjson.loads(await ask(path, "POST", "/drain", body)) == {"num_left": 0}
        assert server.standing is Standing.DRAINING
        with pytest.raises(InvalidRequest, match="there is no context server at nowhere:1"):
            await ask(path, "POST", "/drain", {"role": "context", "address": "nowhere:1", "deadline_s": 1.0})


async def test_what_is_asked_of_one_worker_is_answered_for_all_that_answer(tmp_path: Path) -> None:
    async with worker(tmp_path) as (door, path, _):
        siblings = AskedSiblings(0, [path, tmp_path / "worker-2"])
        status, answer = await door.post(TEXT, {"model": "fake", "prompt": "hello", "max_tokens": 3})
        assert status == 200
        story = await siblings.story(answer["id"].removeprefix("cmpl-"))
        assert story is not None
        assert orjson.loads(story)["num_tokens"] >= 1
        assert await siblings.story("nobody's/ä?") is None
        assert b'disagg_requests_total{outcome="finished"} 1.0' in await siblings.metrics(b"")
        counts = await siblings.counts({"queue_depth": 5, "running": 1, "shares": 0})
        assert (counts["queue_depth"], counts["running"]) == (5, 1)
        assert counts["workers"]["worker-2"] is None, "it does not answer, and that is said"


async def test_a_response_is_found_on_whichever_worker_answered_it_by_its_owner_alone(tmp_path: Path) -> None:
    body = {"model": "fake", "input": "Hi", "max_output_tokens": 2}
    async with worker(tmp_path) as (door, path, _), front_door() as other:
        other.door.siblings = AskedSiblings(0, [path, tmp_path / "worker-2"])
        _, first = await door.post(RESPONSES, body)
        status, second = await other.post(RESPONSES, {**body, "previous_response_id": first["id"]})
        assert (status, second["previous_response_id"]) == (200, first["id"])
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
        assert await other.get(f"{RESPONSES}/{first['id']}") == (200, first)
        assert await other.door.siblings.response(first["id"], tenant="another") is None
        async with other.http.delete(f"{other.url}{RESPONSES}/{first['id']}") as answer:
            assert answer.status == 200
        assert (await other.get(f"{RESPONSES}/{first['id']}"))[0] == 404
        assert (await door.get(f"{RESPONSES}/{first['id']}"))[0] == 404


async def test_a_worker_asks_its_supervisor_to_scale_and_passes_on_what_it_says(tmp_path: Path) -> None:
    asked: list[object] = []

    async def scale(http: web.Request) -> web.Response:
        asked.append(await http.json())
        if len(asked) > 1:
            raise InvalidRequest("context: must be between 0 and 256, is 999", param="context")
        return web.json_response({})

    app = web.Application(middlewares=[errors_answered])
    app.router.add_post("/scale", scale)
    scaler = RemoteScaler(tmp_path / "supervisor", timeout_s=5.0)
    with pytest.raises(NoAnswer):
        await scaler.scale("generation", 2)
    async with at(tmp_path / "supervisor", app):
        await scaler.scale("generation", 2)
        with pytest.raises(InvalidRequest, match="is 999") as caught:
            await scaler.scale("context", 999)
    assert asked == [{"role": "generation", "count": 2}, {"role": "context", "count": 999}]
    assert caught.value.param == "context"
