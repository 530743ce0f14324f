"""Several orchestrator processes on one port: real workers, real connections, and servers that make tokens up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.support.deployment import Deployment, deployed
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.fake_servers import fake_servers
from tests.support.processes import descendants

MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEY: Final = "sk-workers-0123456789"
FREE_KEY: Final = "sk-without-a-quota-0123456789"
NUM_CHOICES: Final = 8
QUOTA: Final = 70
"""Requests a minute, of one key."""
TEMPER: Final = Temper(latency_s=0.0, step_s=0.002, prefill_token_s=0.0, max_batch_size=64)


@contextlib.asynccontextmanager
async def two_workers(folder: Path) -> AsyncIterator[tuple[Deployment, FakeCluster]]:
    keys = folder / "keys.yml"
    limited = f"{{name: k, key: {KEY}, operator: true, requests_per_minute: {QUOTA}}}"
    keys.write_text(f"keys: [{limited}, {{name: free, key: {FREE_KEY}, operator: true}}]")
    keys.chmod(0o600)
    async with fake_servers(num_context=1, num_generation=1, temper=TEMPER) as cluster:
        urls: dict[str, list[str]] = {"context": [], "generation": []}
        for server in cluster.servers.values():
            server.model = MODEL
            urls[server.role].append(server.address)
        document = {
            "num_workers": 2, "model": MODEL, "api_keys_file": str(keys),
            **{f"{role}_servers": {"urls": addresses} for role, addresses in urls.items()},
        }  # fmt: skip
        async with deployed(folder, document) as deployment:
            yield deployment, cluster


class Client:
    """Makes a connection of its own for each request, so that the kernel deals them out."""

    def __init__(self, url: str, *, key: str = KEY) -> None:
        self.url = url
        self._key = key

    async def get(self, path: str) -> tuple[int, bytes]:
        return await self._call("GET", path, None)

    async def complete(self, **fields: Any) -> tuple[int, bytes]:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True, **fields}
        return await self._call("POST", "/v1/completions", body)

    async def _call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        headers = {"authorization": f"Bearer {self._key}", "x-request-id": f"r{id(body)}"}
        connector = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as http,
            http.request(method, self.url + path, json=body) as answer,
        ):
            return answer.status, await answer.read()

    async def counts(self) -> dict[str, Any]:
        status, content = await self.get("/cluster_info")
        assert status == 200
        return dict(orjson.loads(content))

    async def finished(self) -> float:
        _, content = await self.get("/metrics")
        samples = [s for f in text_string_to_metric_families(content.decode()) for s in f.samples]
        return sum(s.value for s in samples if s.name == "disagg_requests_total")


def workers_of(deployment: Deployment) -> list[psutil.Process]:
    return descendants("orchestrator.workers.worker", of=deployment.process.pid)


@contextlib.contextmanager
def slowed(cluster: FakeCluster) -> Iterator[None]:
    """What is decoded takes as long as this block: half a second a step, and then its usual time again."""
    servers = cluster.of("generation")
    for server in servers:
        server.slowness = 250.0
    try:
        yield
    finally:
        for server in servers:
            server.slowness = 1.0


async def test_workers_share_a_port_their_quotas_and_their_numbers_and_one_may_die(tmp_path: Path) -> None:
    async with two_workers(tmp_path) as (deployment, cluster):
        client = Client(deployment.url)
        assert len(workers_of(deployment)) == 2
        begin_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(client.complete()) for _ in range(40)]
        assert {task.result()[0] for task in answers} == {200}
        assert await client.finished() == 40, "whoever is asked, it is about all"
        info = await client.counts()
        assert set(info["workers"]) == {"worker-0", "worker-1"}
        assert info["running"] == 0

        status, story = await client.get(f"/requests/{answer_id(answers[0].result()[1])}")
        assert status == 200, "from whichever worker served it"
        assert b'"tenant":"k"' in story

        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(client.complete()) for _ in range(40)]
        statuses = [task.result()[0] for task in answers]
        num_back = (time.monotonic() - begin_s) * QUOTA / 60
        assert 30 <= statuses.count(200) <= QUOTA - 40 + num_back + 1, "of both together; some come back meanwhile"
        assert statuses.count(429) == 40 - statuses.count(200)

        victim = workers_of(deployment)[0]
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(20)
        status, health = await client.get("/health")
        assert status == 200, "the other one answers"
        assert b"does not answer" in health
        while None in (await client.counts())["workers"].values():  # noqa: ASYNC110 - it tells nobody that it is back
            await asyncio.sleep(0.1)
        assert victim.pid not in [worker.pid for worker in workers_of(deployment)]
        pids = [worker.pid for worker in workers_of(deployment)]
        free = Client(deployment.url, key=FREE_KEY)
        await check_a_burst_is_seen_by_both(free, cluster)
        await check_what_is_under_way_ends_when_all_are_told_to_stop(free, deployment, cluster)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


async def check_a_burst_is_seen_by_both(client: Client, cluster: FakeCluster) -> None:
    """One request of many sequences is one worker's; the other one learns of it from the server's heartbeats alone."""
    async with asyncio.TaskGroup() as group:
        seen: set[tuple[int, int]] = set()
        with slowed(cluster):
            burst = group.create_task(client.complete(n=NUM_CHOICES, max_tokens=200))
            while not {(NUM_CHOICES, 0), (0, NUM_CHOICES)} <= seen:
                [server] = (await client.counts())["current_workers"]["generation_servers"]
                seen.add((server["requests"], server["requests_elsewhere"]))
    assert burst.result()[0] == 200


async def check_what_is_under_way_ends_when_all_are_told_to_stop(
    client: Client, deployment: Deployment, cluster: FakeCluster
) -> None:
    async with asyncio.TaskGroup() as group:
        with slowed(cluster):
            last = group.create_task(client.complete(max_tokens=200))
            while not (await client.counts())["running"]:
                pass
            deployment.process.send_signal(signal.SIGTERM)
    status, content = last.result()
    assert (status, orjson.loads(content)["choices"][0]["finish_reason"]) == (200, "length")
    assert await asyncio.wait_for(deployment.process.wait(), 30.0) == 0


def answer_id(content: bytes) -> str:
    return str(orjson.loads(content)["id"]).removeprefix("cmpl-")
