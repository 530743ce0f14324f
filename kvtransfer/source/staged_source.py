"""A transfer source whose pool lies in a device's memory.

engine thread     publish(), finish(): leave the latest news of a transfer, and go on computing
staging thread    copies new blocks to the staging region, in the order in which transfers were opened, and publishes
                  them there; so checksums are its work too
event loop        all else, through the source of the staging region

A transfer gets staging blocks for its whole prompt or none yet: two that wait for each other's would wait for ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence

import grpc

from disaggregated.errors import DisaggregatedError, TransferError
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.region import Region
from kvtransfer.source.options import SourceOptions
from kvtransfer.source.publisher import News
from kvtransfer.source.service import KVSourceService
from kvtransfer.source.transfer_source import TransferSource
from kvtransfer.staging import DeviceCopier, StagingBlocks
from kvtransfer.transport import EndpointStatistics


@dataclasses.dataclass(slots=True)
class _Transfer:
    num_tokens: int
    """Of its whole prompt, and so are the blocks."""
    num_blocks: int
    host_blocks: list[int] = dataclasses.field(default_factory=list)
    num_copied: int = 0
    news: News | None = None
    is_over: bool = False


class StagedSource:
    """Has the methods of `TransferSource`. `copier` reads blocks that a step has finished, and no other.

    Invariant: staging blocks are free, or of one transfer, which gives them back once, after its release and never
    while they are copied to.
    """

    def __init__(
        self,
        region: Region,
        identity: PoolIdentity,
        copier: DeviceCopier,
        *,
        on_released: Callable[[str], None],
        on_crash: Callable[[BaseException], None],
        options: SourceOptions = SourceOptions(),
    ) -> None:
        """`region` and `identity` are of the staging region; so is its layout."""
        layout = self._layout = identity.layout
        self._copier = copier
        self._on_released = on_released
        self._on_crash = on_crash
        self._blocks = StagingBlocks(layout.num_blocks)
        self._inner = TransferSource(region, identity, on_released=self._released, options=options)
        self._transfers: dict[str, _Transfer] = {}
        """In the order of opening."""
        self._busy: _Transfer | None = None
        """What the staging thread copies now."""
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-staging", daemon=True)

    def add_to(self, server: grpc.aio.Server) -> None:
        self._inner.add_to(server)

    @property
    def service(self) -> KVSourceService:
        return self._inner.service

    async def start(self) -> None:
        await self._inner.start()
        self._thread.start()

    async def close(self, *, deadline_s: float = 5.0) -> None:
        await self._inner.close(deadline_s=deadline_s)
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, deadline_s)

    def open(self, transfer_id: str, *, num_tokens: int, num_readers: int = 1) -> None:
        """Raises TransferError when the id was used before, or the prompt is larger than the staging region."""
        num_blocks = self._layout.num_blocks_for(num_tokens)
        if num_blocks > self._layout.num_blocks:
            raise TransferError(
                f"a prompt of {num_tokens} tokens has {num_blocks} blocks; {self._layout.num_blocks} can be staged"
            )
        self._inner.open(transfer_id, num_tokens=num_tokens, num_readers=num_readers)
        with self._changed:
            self._transfers[transfer_id] = _Transfer(num_tokens, num_blocks)

    def publish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int) -> bool:
        """As TransferSource.publish, soon; the step that wrote the blocks is finished on the device."""
        return self.leave(transfer_id, News(block_ids=tuple(block_ids), num_tokens=num_tokens))

    def finish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, first_token: int) -> bool:
        """As TransferSource.finish, soon."""
        news = News(block_ids=tuple(block_ids), num_tokens=num_tokens, first_token=first_token)
        return self.leave(transfer_id, news)

    def leave(self, transfer_id: str, news: News) -> bool:
        """What is written of a chunk that is being computed is left out: the device has not finished it."""
        with self._changed:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return False
            transfer.news = news
            self._changed.notify()
            return True

    def fail(self, transfer_id: str, reason: str) -> bool:
        return self._inner.fail(transfer_id, reason)

    def why_unwanted(self, transfer_id: str) -> DisaggregatedError:
        return self._inner.why_unwanted(transfer_id)

    def ledger(self) -> list[tuple[str, int, float]]:
        return self._inner.ledger()

    def statistics(self) -> dict[str, EndpointStatistics]:
        return self._inner.statistics()

    def check_integrity(self) -> None:
        self._inner.check_integrity()
        with self._changed:
            held = [block for transfer in self._transfers.values() for block in transfer.host_blocks]
            busy = self._busy.host_blocks if self._busy and self._busy.is_over else []
            assert len(set(held + busy)) == len(held) + len(busy), "a staging block has two owners"
            assert len(held) + len(busy) + self._blocks.num_free == self._blocks.num_blocks, "a staging block is lost"

    def _released(self, transfer_id: str) -> None:
        """On the event loop, once a transfer."""
        with self._changed:
            transfer = self._transfers.pop(transfer_id, None)
            if transfer is not None:
                transfer.is_over = True
                if transfer is not self._busy:
                    self._give_back(transfer)
                self._changed.notify()
        self._on_released(transfer_id)

    def _give_back(self, transfer: _Transfer) -> None:
        self._blocks.give_back(transfer.host_blocks)
        transfer.host_blocks = []

    # On the staging thread.

    def _run(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._stage(*found)
        except BaseException as error:  # noqa: BLE001  # The thread's edge; the owner ends the process.
            self._on_crash(error)

    def _next(self) -> tuple[str, _Transfer, News] | None:
        """Wait for a transfer with news and blocks to stage them in; None at the end."""
        with self._changed:
            while True:
                if self._is_closing:
                    return None
                self._hand_out_blocks()
                for transfer_id, transfer in self._transfers.items():
                    if transfer.news is not None and transfer.host_blocks:
                        news, transfer.news = transfer.news, None
                        self._busy = transfer
                        return transfer_id, transfer, news
                self._changed.wait()

    def _hand_out_blocks(self) -> None:
        """To those who have something to stage, first come, first served: a small one never passes a large one."""
        for transfer in self._transfers.values():
            if transfer.news is None or transfer.host_blocks:
                continue
            taken = self._blocks.try_take(transfer.num_blocks)
            if taken is None:
                return
            transfer.host_blocks = taken

    def _stage(self, transfer_id: str, transfer: _Transfer, news: News) -> None:
        """The prompt's last block is copied as soon as it holds its last token, which may be before the prompt's end is
        told: that is when the inner source publishes it."""
        is_whole = news.first_token is not None or news.num_tokens == transfer.num_tokens
        end = self._layout.num_blocks_for(news.num_tokens) if is_whole else news.num_tokens // self._layout.block_size
        begin = transfer.num_copied
        if end > begin:
            self._copier.to_host(news.block_ids[begin:end], transfer.host_blocks[begin:end])
        with self._changed:
            self._busy = None
            if transfer.is_over:
                self._give_back(transfer)
                return
            transfer.num_copied = max(begin, end)
        if news.first_token is not None:
            self._inner.finish(transfer_id, transfer.host_blocks[:end], news.num_tokens, news.first_token)
        elif end > begin:
            self._inner.publish(transfer_id, transfer.host_blocks[:end], news.num_tokens)
