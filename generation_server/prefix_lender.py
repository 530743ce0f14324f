"""The way back: blocks that a generation server holds, lent to a context server that would have to compute them.

    KVSource.Follow(block_hashes) ─▶ engine: what is found of them, in the pool or in the host tier, is held
                                     └─▶ transfer source: an ordinary transfer, finished before it is first told of

From there on it is like any other: leased, read under its key, released by its reader or when the lease expires. The
engine answers between two steps; checksums are computed on a worker thread, so that no step waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from disaggregated import logs
from disaggregated.block_hash import BlockHash
from disaggregated.engine.serving.role import LoadedServer
from disaggregated.engine.thread import EngineThread
from disaggregated.v1 import control_pb2
from kvtransfer import Region, TransferSource
from kvtransfer.configured import identity_of, source_options

log = logs.get(__name__)


class PrefixLender:
    """Lives on the event loop; the source of a server whose other transfers all land here.

    Invariant: blocks are held in the engine under `_owner(transfer_id)` at most from the opening of that transfer to
    its release, which always comes.
    """

    def __init__(self, server: LoadedServer[Region], engine: EngineThread) -> None:
        """server: its pool is the memory that transports read."""
        assert server.copier is None, "blocks are lent from a pool in host memory"
        self._engine = engine
        self._block_size = server.memory_layout.block_size
        self._source = TransferSource(
            server.memory,
            identity_of(server),
            on_released=self._released,
            options=source_options(server, lend=self._lend),
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        self._source.add_to(server)

    async def start(self) -> None:
        await self._source.start()

    async def close(self) -> None:
        """Idempotent. Before the engine stops: what is lent goes back to it."""
        await self._source.close()

    def ledger(self) -> list[control_pb2.LedgerEntry]:
        return [
            control_pb2.LedgerEntry(kind="transfer", owner=transfer_id, count=num_blocks, age_s=age_s)
            for transfer_id, num_blocks, age_s in self._source.ledger()
        ]

    async def _lend(self, transfer_id: str, hashes: Sequence[BlockHash]) -> None:
        """Open the transfer, and finish it with the longest run of `hashes` that is here, which may be none.

        Raises:
            TransferError: the id was used before.
            QueueFull, Draining, ServerLost: the engine does not answer; the transfer has failed.
        """
        self._source.open(transfer_id)
        try:
            block_ids = await asyncio.wrap_future(self._engine.lend(_owner(transfer_id), hashes))
            num_tokens = len(block_ids) * self._block_size
            await asyncio.to_thread(self._source.finish, transfer_id, block_ids, num_tokens, 0)
        except BaseException:  # Also when the reader has hung up: the engine may hold the blocks by now.
            self._source.fail(transfer_id, "the blocks could not be lent")
            raise
        log.debug("prefix_lent", transfer_id=transfer_id, asked=len(hashes), lent=len(block_ids))

    def _released(self, transfer_id: str) -> None:
        """Nobody reads these blocks any more."""
        self._engine.release(_owner(transfer_id))


def _owner(transfer_id: str) -> str:
    """The ledger shows what is before the tilde. No request has such a name: after its tilde stands a number."""
    return f"{transfer_id}~lent"
