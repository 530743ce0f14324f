from __future__ import annotations

import asyncio
import random

from tests.support.fake_cluster.client import FakeClient
from tests.support.fake_cluster.server import FakeServer
from tests.support.fake_cluster.temper import Temper


class FakeCluster:
    def __init__(self, seed: int, *, num_context: int, num_generation: int, temper: Temper | None = None) -> None:
        self.random = random.Random(seed)
        self.temper = temper or Temper()
        self.servers: dict[str, FakeServer] = {}
        for role, count in (("context", num_context), ("generation", num_generation)):
            for number in range(count):
                address = f"{role}-{number}"
                self.servers[address] = FakeServer(self, role, address)

    def connect(self, address: str) -> FakeClient:
        return FakeClient(self.servers[address])

    def of(self, role: str) -> list[FakeServer]:
        return [server for server in self.servers.values() if server.role == role]

    async def close(self) -> None:
        """The machines are switched off; every call must have been ended by its caller before."""
        tasks = [task for server in self.servers.values() for task in server.tasks]
        for server in self.servers.values():
            server.crash()
        if tasks:
            await asyncio.wait(tasks)
