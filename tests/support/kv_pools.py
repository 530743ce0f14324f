"""Pools, sources and destinations for the transfer tests: small layouts, bytes that tell where they came from."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from disaggregated import rpc
from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding, KVShard
from kvtransfer import (
    DestinationOptions,
    PoolIdentity,
    Preference,
    Region,
    SourceOptions,
    TransferDestination,
    TransferSource,
)
from kvtransfer.transport import SourceEndpoint

SMALL = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", num_blocks=32)
"""512 bytes a block and layer."""
LARGE = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=32, dtype="float32", num_blocks=192)
"""64 KiB a block and layer, 48 MiB in all: a read of it fills every socket buffer."""
FINGERPRINT = "a-model"
EPOCH = 7

Blocks = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class SomeTicket:
    address: str
    transfer_id: str
    instance_id: str = "context-0"
    epoch: int = EPOCH


def fill(region: Region, seed: int) -> None:
    region.buffer[:] = _noise(region.nbytes, seed)


@functools.cache
def _noise(num_bytes: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


def has_landed(into: Region, layout: KVLayout, block_id: int) -> bool:
    """In a pool that was all zeroes: its last layer is written last, and noise is never all zeroes."""
    return bool(blocks_of(into, layout, [block_id])[-1].any())


async def eventually(holds: Callable[[], object], *, within_s: float = 10.0) -> None:
    """For what makes no event: bytes in memory, another process's socket."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def blocks_of(region: Region, layout: KVLayout, block_ids: Sequence[int]) -> Blocks:
    """A copy, shaped (num_layers, len(block_ids), block_bytes)."""
    pool = np.frombuffer(region.buffer, dtype=np.uint8).reshape(layout.num_layers, layout.num_blocks, -1)
    return pool[:, list(block_ids)].copy()


def flip_bit(region: Region, layout: KVLayout, *, layer: int, block_id: int) -> None:
    region.buffer[layout.offset(layer, block_id) + layout.block_bytes // 2] ^= 0x10


@contextlib.contextmanager
def regions(layout: KVLayout, count: int = 2) -> Iterator[list[Region]]:
    """The first is filled with noise, the others are zero."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Region.allocate(layout.pool_bytes)) for _ in range(count)]
        fill(made[0], seed=1)
        yield made


@dataclasses.dataclass(slots=True)
class ServedSource:
    """A TransferSource behind a real gRPC server in this process."""

    source: TransferSource
    region: Region
    layout: KVLayout
    address: str
    server: grpc.aio.Server
    released: asyncio.Queue[str]
    """What `on_released` said and nobody has taken yet."""
    instance_id: str = "context-0"

    def ticket(self, transfer_id: str) -> SomeTicket:
        return SomeTicket(self.address, transfer_id, instance_id=self.instance_id)

    async def wait_released(self, *transfer_ids: str) -> None:
        """These, each once, and nothing else."""
        async with asyncio.timeout(20):
            ended = [await self.released.get() for _ in transfer_ids]
        assert sorted(ended) == sorted(transfer_ids)
        assert self.released.empty(), f"{self.released.get_nowait()} was released as well"

    def offer(
        self,
        transfer_id: str,
        block_ids: Sequence[int],
        num_tokens: int,
        *,
        first_token: int = 42,
        num_readers: int = 1,
    ) -> SomeTicket:
        """A transfer whose prefill is over already."""
        self.source.open(transfer_id, num_readers=num_readers)
        assert self.source.finish(transfer_id, block_ids, num_tokens, first_token)
        return self.ticket(transfer_id)


def identity(
    layout: KVLayout,
    instance_id: str = "generation-0",
    *,
    epoch: int = 1,
    shard: KVShard | None = None,
    fingerprint: str = FINGERPRINT,
) -> PoolIdentity:
    """Of a pool that holds the whole model, unless `shard` says otherwise."""
    holding = KVHolding(layout=layout, shard=shard or KVShard.whole(layout))
    return PoolIdentity(instance_id=instance_id, epoch=epoch, fingerprint=fingerprint, holding=holding)


@contextlib.asynccontextmanager
async def served_source(
    region: Region,
    layout: KVLayout,
    *,
    lease_s: float = 30.0,
    epoch: int = EPOCH,
    port: int = 0,
    fingerprint: str = FINGERPRINT,
    preference: Preference = Preference(),
    endpoints: Sequence[SourceEndpoint] | None = None,
    instance_id: str = "context-0",
    shard: KVShard | None = None,
) -> AsyncIterator[ServedSource]:
    released: asyncio.Queue[str] = asyncio.Queue()
    source = TransferSource(
        region,
        identity(layout, instance_id, epoch=epoch, shard=shard, fingerprint=fingerprint),
        on_released=released.put_nowait,
        options=SourceOptions(lease_s=lease_s, preference=preference, endpoints=endpoints),
    )
    server = rpc.make_server()
    source.add_to(server)
    address = rpc.bind(server, "127.0.0.1", port)
    await source.start()
    await server.start()
    try:
        yield ServedSource(source, region, layout, address, server, released, instance_id)
    finally:
        source.check_integrity()
        await source.close()
        await server.stop(grace=None)


@contextlib.asynccontextmanager
async def destination(
    region: Region,
    layout: KVLayout,
    *,
    backend: str = "DEFAULT",
    preference: Preference | None = None,
    fingerprint: str = FINGERPRINT,
    instance_id: str = "generation-0",
    progress_timeout_s: float = 10.0,
    shard: KVShard | None = None,
    **options: Any,
) -> AsyncIterator[TransferDestination]:
    """`preference`, when given, stands for `backend`. `options` are further ones of DestinationOptions."""
    made = TransferDestination(
        region,
        identity(layout, instance_id, shard=shard, fingerprint=fingerprint),
        DestinationOptions(
            preference=preference or Preference(backend), progress_timeout_s=progress_timeout_s, **options
        ),
    )
    try:
        yield made
    finally:
        await made.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Traces:
    """What a transfer could leave behind in this process."""

    descriptors: frozenset[str]
    threads: frozenset[str]
    mappings: int

    def added_to(self, before: Traces) -> list[str]:
        """What is here and was not there before. What an earlier test left, and has gone meanwhile, is no fault."""
        more = [f"{self.mappings - before.mappings} mappings"] if self.mappings > before.mappings else []
        return sorted((self.descriptors - before.descriptors) | (self.threads - before.threads)) + more


def memory_of_others() -> tuple[int, int]:
    """Mappings of pools, and descriptors of them, in this process."""
    found = traces()
    return found.mappings, len(found.descriptors)


def traces() -> Traces:
    """Memfds, unix sockets of ours, threads of ours, and mappings of pools."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mappings = sum("disaggregated-kv" in line for line in maps)
    threads = frozenset(thread.name for thread in threading.enumerate() if thread.name.startswith("kv-"))
    return Traces(descriptors=frozenset(_memfds()), threads=threads, mappings=mappings)


def _memfds() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if "disaggregated-kv" in target:
                yield f"{fd} -> {target}"
