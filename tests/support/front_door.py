"""An orchestrator in this process, on a real port, before fake servers that speak real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.sampling_params import SamplingParams
from orchestrator.admission.http_tls import front_door_tls
from orchestrator.app import DOOR, make_app
from orchestrator.front_door import FrontDoor
from orchestrator.http.port import PublicPort
from orchestrator.scaler import Scaler
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from tests.support.byte_model import byte_model
from tests.support.fake_cluster import FakeCluster, Temper
from tests.support.fake_servers import fake_servers
from tests.support.token_hash import oracle

FAST = Temper(latency_s=0.0, step_s=0.001, prefill_token_s=0.0)


async def until(condition: Callable[[], bool]) -> None:
    """The test's own timeout bounds this."""
    while not condition():  # noqa: ASYNC110 - whatever is waited for here has no event of its own
        await asyncio.sleep(0.005)


@dataclasses.dataclass
class Door:
    url: str
    http: aiohttp.ClientSession
    cluster: FakeCluster
    door: FrontDoor
    model: ServedModel
    port: PublicPort

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        if isinstance(body, (bytes, io.IOBase)):
            options["data"] = body
        else:
            options["json"] = body
        async with self.http.post(self.url + path, **options) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as answer:
            return answer.status, await answer.json()

    def expected(self, prompt: Sequence[int], **sampling: Any) -> tuple[str, str]:
        """Text and finish reason of an undisturbed run."""
        tokens, reason = oracle(prompt, SamplingParams(stop_token_ids=frozenset({256}), **sampling))
        return self.model.tokenizer.decode(tokens[:-1] if reason == "stop" else tokens), reason

    async def wait_idle(self) -> None:
        """Nothing is held on any server, and nothing runs."""
        servers, dispatcher = self.cluster.servers.values(), self.door.dispatcher
        await until(lambda: not (any(server.admitted for server in servers) or dispatcher.stories.num_running))
        self.door.dispatcher.check_idle()


@contextlib.asynccontextmanager
async def front_door(
    *,
    num_context: int = 1,
    num_generation: int = 1,
    num_tokens_max: int = 1024,
    temper: Temper = FAST,
    scaler: Scaler | None = None,
    is_awaited: bool = True,
    send_buffer_bytes: int | None = None,
    **config: Any,
) -> AsyncIterator[Door]:
    async with (
        fake_servers(num_context=num_context, num_generation=num_generation, temper=temper) as cluster,
        aiohttp.ClientSession() as http,
    ):
        crashes: list[BaseException] = []
        settings = DeploymentConfig(
            context=_pool(cluster, "context"), generation=_pool(cluster, "generation"), **config
        )
        model = byte_model(num_tokens_max=num_tokens_max)
        app = make_app(settings, ServerPools(settings, on_crash=crashes.append), model=model, scaler=scaler)
        port = PublicPort(app, app[DOOR])
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        tls = front_door_tls(settings.door)
        await port.open(listener, tls=tls)
        scheme = "https" if tls else "http"
        door = Door(f"{scheme}://127.0.0.1:{port.address[1]}", http, cluster, app[DOOR], model, port)
        try:
            if is_awaited:
                await until(lambda: app[DOOR].why_not_serving() is None)
            yield door
        finally:
            await http.close()
            await port.close()
        assert not crashes, crashes


def _pool(cluster: FakeCluster, role: str) -> PoolConfig:
    urls = tuple(server.address for server in cluster.of(role))
    return PoolConfig(num_instances=len(urls), urls=urls, server=ServerConfig(model="fake", role=role))
