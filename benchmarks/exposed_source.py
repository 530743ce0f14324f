"""The context server's half of `benchmarks.exposed`: a real engine, or one that sleeps, behind a real transfer source.

    python -m benchmarks.exposed_source int8

Commands and answers are lines of JSON: `offer PORT` (peers are sent to that port; 0: to ours), `publish ID` (a prompt
that is computed already), `prefill ID GROUP_BYTES SEED` (answered when it is computed, with the seconds it took).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from benchmarks.engines.ours import requests
from benchmarks.wire.shapes import SMOLLM2
from context_server.streaming import PrefillStream, layers_at_a_time
from disaggregated import rpc
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import RequestKind
from disaggregated.engine.load import load_engine
from disaggregated.kv_layout import KVLayout
from kvtransfer import News, PoolIdentity, Publisher, Region, SourceOptions, TransferSource, registry
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate, SourceEndpoint

MODEL: Final = "smollm2-135m-instruct"
NUM_TOKENS: Final = 2000
CHUNK_SIZE: Final = 256
SLEPT: Final = "slept"
SLEPT_TOKENS_PER_S: Final = 1000.0
EPOCH: Final = 1


class RedirectedEndpoint:
    """A real endpoint whose offer names another port of this host, that of a relay before it."""

    def __init__(self, endpoint: SourceEndpoint) -> None:
        self._endpoint = endpoint
        self.name = endpoint.name
        self.port = 0

    def start(self, gate: ReadGate) -> None:
        self._endpoint.start(gate)

    def describe(self) -> Offer:
        offer = self._endpoint.describe()
        if not self.port:
            return offer
        nonce = offer.address.rpartition("/")[2]
        return Offer(name=offer.name, address=f"127.0.0.1:{self.port}/{nonce}", host_key=offer.host_key)

    def close(self, *, deadline: Deadline) -> None:
        self._endpoint.close(deadline=deadline)

    def statistics(self) -> EndpointStatistics:
        return self._endpoint.statistics()


class Prefill(Protocol):
    layout: KVLayout
    region: Region

    def run(self, transfer_id: str, group_bytes: int, seed: int, publisher: Publisher) -> None:
        """Blocks until the prompt is computed, and published but for what the publisher still holds."""


class RealPrefill:
    """One thread: on a host of two cores the destination has one for itself, as it has a host elsewhere."""

    def __init__(self, precision: str) -> None:
        self._regions: list[Region] = []
        config = ServerConfig(
            model=MODEL,
            role="context",
            dtype=precision,
            device="cpu",
            num_threads=1,
            max_num_tokens=CHUNK_SIZE,
            kv_cache_config=KVCacheConfig(max_tokens=2 * NUM_TOKENS, enable_block_reuse=False),
        )
        loaded = load_engine(config, allocate=self._allocate)
        self._engine = loaded.engine
        self.layout, self.region = loaded.layout, self._regions[0]

    def _allocate(self, layout: KVLayout) -> memoryview:
        self._regions.append(Region.allocate(layout.pool_bytes, populate=True))
        return self._regions[0].buffer

    def run(self, transfer_id: str, group_bytes: int, seed: int, publisher: Publisher) -> None:
        (request,) = requests(RequestKind.PREFILL_ONLY, 1, NUM_TOKENS, 1, seed)
        transfers = {request.request_id: transfer_id}
        stream = PrefillStream(transfers, publisher, self.layout, layer_group_bytes=group_bytes)
        self._engine.watch_layers(stream)
        self._engine.submit(request)
        while self._engine.has_work:
            stream.step_is_over(self._engine.step())
        self._engine.release(request.request_id)  # Nothing is computed into its blocks before the next prompt.


class SleptPrefill:
    """Takes its time, and leaves the cores to the transfer."""

    def __init__(self) -> None:
        self.layout = SMOLLM2
        self.region = Region.allocate(self.layout.pool_bytes, populate=True)

    def run(self, transfer_id: str, group_bytes: int, seed: int, publisher: Publisher) -> None:
        table = tuple(range(self.layout.num_blocks_for(NUM_TOKENS)))
        begin_s, num_layers = time.monotonic(), self.layout.num_layers
        for first in range(0, NUM_TOKENS, CHUNK_SIZE):
            end = min(first + CHUNK_SIZE, NUM_TOKENS)
            every = layers_at_a_time(self.layout, end - first, layer_group_bytes=group_bytes) or num_layers
            for layers in range(every, num_layers, every):
                _sleep_until(begin_s + (first + (end - first) * layers / num_layers) / SLEPT_TOKENS_PER_S)
                news = News(block_ids=table, num_tokens=first, num_tokens_begun=end, num_layers_begun=layers)
                publisher.leave(transfer_id, news)
            _sleep_until(begin_s + end / SLEPT_TOKENS_PER_S)
            first_token = 1 if end == NUM_TOKENS else None
            publisher.leave(transfer_id, News(block_ids=table, num_tokens=end, first_token=first_token))


def _sleep_until(when_s: float) -> None:
    time.sleep(max(0.0, when_s - time.monotonic()))


class Commands:
    def __init__(
        self, prefill: Prefill, source: TransferSource, publisher: Publisher, port: RedirectedEndpoint
    ) -> None:
        self._prefill = prefill
        self._source = source
        self._publisher = publisher
        self._endpoint = port

    async def offer(self, port: int) -> None:
        self._endpoint.port = port

    async def publish(self, transfer_id: str) -> None:
        table = range(self._prefill.layout.num_blocks_for(NUM_TOKENS))
        self._source.open(transfer_id, num_tokens=NUM_TOKENS)
        await asyncio.to_thread(self._source.finish, transfer_id, table, NUM_TOKENS, 1)

    async def prefill(self, transfer_id: str, group_bytes: int, seed: int) -> float:
        self._source.open(transfer_id, num_tokens=NUM_TOKENS)
        begin_s = time.monotonic()
        await asyncio.to_thread(self._prefill.run, transfer_id, group_bytes, seed, self._publisher)
        return time.monotonic() - begin_s


async def serve(kind: str) -> None:
    prefill: Prefill = SleptPrefill() if kind == SLEPT else RealPrefill(kind)
    tcp = registry.load("TCP").make_endpoint(prefill.region, prefill.layout, epoch=EPOCH, host="127.0.0.1")
    endpoint = RedirectedEndpoint(tcp)
    source = TransferSource(
        prefill.region,
        PoolIdentity.whole(prefill.layout, instance_id=kind, epoch=EPOCH, fingerprint=kind),
        on_released=lambda _: None,
        options=SourceOptions(endpoints=[endpoint]),
    )
    server = rpc.make_server()
    source.add_to(server)
    address = rpc.bind(server, "127.0.0.1", 0)
    await source.start()
    await server.start()
    publisher = Publisher(source, on_crash=lambda error: os._exit(1))
    publisher.start()
    place = endpoint.describe().address.rpartition("/")[0]
    answer(
        {
            "address": address,
            "port": int(place.rpartition(":")[2]),
            "layout": prefill.layout.to_proto().SerializeToString().hex(),
        }
    )
    commands = Commands(prefill, source, publisher, endpoint)
    read: Callable[[], str] = sys.stdin.readline
    while line := await asyncio.to_thread(read):
        name, *arguments = json.loads(line)
        answer(await getattr(commands, name)(*arguments))


def answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
