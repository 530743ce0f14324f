"""A dispatcher and its pools before fake servers in virtual time, and clients that know every token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.errors import DisaggregatedError
from disaggregated.sampling_params import SamplingParams
from disaggregated.token_logprobs import Told
from orchestrator.dispatch import Dispatcher
from orchestrator.request_run import TokenRequest
from orchestrator.server_pools import ServerPools
from orchestrator.story import RequestStory
from tests.support.fake_cluster import LEASE_S, FakeCluster
from tests.support.token_hash import oracle, told_of


class Client:
    """Takes tokens, and checks each against the oracle as it comes."""

    def __init__(self, request: TokenRequest, *, wants: int | None = None) -> None:
        self.expected, self.expected_reason = oracle(request.token_ids, request.sampling)
        self.wants = wants
        self.logprobs = request.sampling.logprobs
        self.tokens: list[int] = []
        self.reason = ""

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        assert not self.reason, "tokens after the end"
        if self.logprobs is not None and token_ids:
            assert told is not None, "tokens without logprobs"
            assert list(told.tokens) == [told_of(token, self.logprobs) for token in token_ids]
        self.tokens += token_ids
        assert self.tokens == self.expected[: len(self.tokens)], "a token differs from the undisturbed run"
        self.reason = finish_reason
        return self.wants is None or len(self.tokens) < self.wants


class Observer:
    def __init__(self) -> None:
        self.failures: list[DisaggregatedError] = []
        self.stories: list[RequestStory] = []

    def attempt_failed(self, error: DisaggregatedError, *, goes_on: bool) -> None:
        self.failures.append(error)

    def request_ended(self, story: RequestStory) -> None:
        story.life.check_integrity()
        self.stories.append(story)


@dataclasses.dataclass
class Scene:
    cluster: FakeCluster
    pools: ServerPools
    dispatcher: Dispatcher
    observer: Observer

    def request(
        self, number: int = 0, *, num_prompt: int = 40, timeout_s: float = 180.0, **sampling: Any
    ) -> TokenRequest:
        now_s = asyncio.get_running_loop().time()
        prompt = [(number * 31 + position) % 997 for position in range(num_prompt)]
        params = SamplingParams(**{"max_tokens": 20, "seed": number, **sampling})
        return TokenRequest(
            request_id=f"r{number}", token_ids=prompt, sampling=params, arrived_s=now_s, deadline_s=now_s + timeout_s
        )

    async def serve(self, request: TokenRequest) -> tuple[Client, RequestStory]:
        client = Client(request)
        story = await self.dispatcher.run(request, client)
        assert client.tokens == client.expected
        assert client.reason == client.expected_reason
        return client, story

    async def ready(self, num_servers: int) -> None:
        while sum(server.is_ready for server in self.pools) < num_servers:  # noqa: ASYNC110 - time is virtual
            await asyncio.sleep(0.05)

    async def check_nothing_left(self) -> None:
        self.dispatcher.check_idle()
        await asyncio.sleep(LEASE_S + 15.0)
        for server in self.cluster.servers.values():
            assert not server.admitted, f"{server.address} still holds {server.admitted}"
            assert not server.decoding
            assert not server.transfers, f"{server.address} still offers {list(server.transfers)}"


def config(cluster: FakeCluster, **fields: object) -> DeploymentConfig:
    pools = {
        role: PoolConfig(
            num_instances=len(cluster.of(role)),
            urls=tuple(server.address for server in cluster.of(role)),
            server=ServerConfig(model="fake", role=role),
        )
        for role in ("context", "generation")
    }
    return DeploymentConfig(**{**pools, **fields})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def scene(cluster: FakeCluster, **fields: object) -> AsyncIterator[Scene]:
    clock = asyncio.get_running_loop().time
    settings = config(cluster, **fields)
    crashes: list[BaseException] = []
    pools = ServerPools(settings, connect=cluster.connect, clock=clock, on_crash=crashes.append)
    observer = Observer()
    dispatcher = Dispatcher(settings, pools, observer=observer, clock=clock)
    pools.start()
    try:
        stage = Scene(cluster, pools, dispatcher, observer)
        await stage.ready(sum(server.is_alive for server in cluster.servers.values()))
        yield stage
    finally:
        await pools.close()
        await cluster.close()
    assert not crashes, crashes
