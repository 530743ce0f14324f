"""The orchestrator's own half of the model, loaded while it answers already."""

from __future__ import annotations

import socket
import threading

import aiohttp
import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.errors import ModelUnavailable
from orchestrator import front_door
from orchestrator.app import DOOR, make_app
from orchestrator.http.port import PublicPort
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from tests.support.byte_model import byte_model
from tests.support.fake_servers import fake_servers
from tests.support.front_door import FAST, until


async def test_a_tokenizer_that_could_not_be_had_is_tried_again_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = threading.Event()

    def load(name: str) -> ServedModel:
        if not is_there.is_set():
            raise ModelUnavailable(f"{name} is not downloaded, and the network is gone")
        return byte_model()

    monkeypatch.setattr(ServedModel, "load", load)
    monkeypatch.setattr(front_door, "MODEL_RETRY_S_MIN", 0.01)
    async with fake_servers(num_context=1, num_generation=1, temper=FAST) as cluster:
        pools = {
            role: PoolConfig(
                urls=tuple(server.address for server in cluster.of(role)), server=ServerConfig(model="fake", role=role)
            )
            for role in ("context", "generation")
        }
        config = DeploymentConfig(model="fake", context=pools["context"], generation=pools["generation"])
        app = make_app(config, ServerPools(config))
        port = PublicPort(app, app[DOOR])
        try:
            await port.open(socket.create_server(("127.0.0.1", 0)))
            await until(lambda: "the network is gone" in (app[DOOR].why_not_serving() or ""))
            is_there.set()
            await until(lambda: app[DOOR].why_not_serving() is None)
            url = f"http://127.0.0.1:{port.address[1]}/health"
            async with aiohttp.ClientSession() as http, http.get(url) as answer:
                assert answer.status == 200
        finally:
            await port.close()
