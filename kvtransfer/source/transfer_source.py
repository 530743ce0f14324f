"""The source of transfers, as its server sees it: open, publish while computing, finish or fail, get blocks back once.

engine thread          publish(), finish(): checksum the new blocks, make them readable
event loop             KVSource service, reaper, on_released
transport's threads    serve reads, after asking the lease book
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Sequence

import grpc

from disaggregated import logs
from disaggregated.errors import DisaggregatedError, LeaseExpired
from disaggregated.kv_layout import KVLayout
from disaggregated.v1 import kv_pb2_grpc
from kvtransfer import registry
from kvtransfer.checksum import block_checksums
from kvtransfer.deadline import Deadline
from kvtransfer.machine import SourcePhase
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.region import Region
from kvtransfer.runs import Run
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.source.lease import Chunk, LeaseBook, Outcome, Published
from kvtransfer.source.options import SourceOptions
from kvtransfer.source.service import KVSourceService
from kvtransfer.source.unpublished import Span, unpublished
from kvtransfer.transport import EndpointStatistics, ReadGate, SourceEndpoint

log = logs.get(__name__)


Checksums = Callable[[Sequence[int], range], tuple[int, ...]]
"""Of blocks of the pool, in some layers."""


class TransferSource:
    """Offers the blocks of `region` to destinations. Start it on the event loop that serves its gRPC calls.

    Invariant: `on_released` is called exactly once for each transfer that was opened, on the event loop: when the
    destination has released it or gone, when it failed, when its lease expired, or when we close.
    """

    def __init__(
        self,
        region: Region | None,
        identity: PoolIdentity,
        *,
        on_released: Callable[[str], None],
        options: SourceOptions = SourceOptions(),
        checksums: Checksums | None = None,
    ) -> None:
        """`checksums` sums up blocks of a pool that is no region of host memory; `options` have its endpoints then."""
        assert region is not None or (checksums and options.endpoints), "a pool that nobody can read"
        self._checksums = checksums or functools.partial(_checksums_of, region, identity.layout)
        self._layout = identity.layout
        self._on_released = on_released
        self._book = LeaseBook(epoch=identity.epoch, lease_s=options.lease_s, num_layers=identity.layout.num_layers)
        self._endpoints = _endpoints(region, identity, options, gate=self)
        self._service = KVSourceService(self._book, identity, self._endpoints, leave=self._leave, lend=options.lend)
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reaper: asyncio.Task[None] | None = None
        self._opened = asyncio.Event()

    @property
    def service(self) -> KVSourceService:
        """For who adds it to a server behind something of his own."""
        return self._service

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the KVSource service, before the server starts."""
        kv_pb2_grpc.add_KVSourceServicer_to_server(self._service, server)

    async def start(self) -> None:
        """Listen. Raises TransferError when an endpoint cannot."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._endpoints.start)  # An MPI world begins when all of its processes are there.
        except BaseException:
            await self.close()
            raise
        self._reaper = asyncio.create_task(self._reap(), name="kv-reaper")

    async def close(self, *, deadline_s: float = 5.0) -> None:
        """End every transfer, then every connection and thread. Idempotent.

        Close it before the gRPC server stops, so that followers hear why.
        """
        if self._closing:
            return
        self._book.shut()
        for transfer_id, _, _ in self._book.live():
            self._end(transfer_id, SourcePhase.FAILED, "the source is shutting down")
        self._closing = True
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
        await asyncio.to_thread(self._endpoints.close, deadline=Deadline.after(deadline_s))

    # Called by the server, from any thread.

    def open(self, transfer_id: str, *, num_tokens: int = 0, num_readers: int = 1) -> None:
        """Begin a lease, before the first publication. A destination may be waiting already.

        `num_tokens` of the whole prompt is what a `StagedSource` needs to know; with it, a last block that is not full
        is published with its last token, and not with `finish` alone.
        `num_readers` destinations will read it, such as the ranks of one server: the blocks go back when all have left.
        Raises TransferError when the id was used before, and once we close.
        """
        self._book.open(transfer_id, num_tokens=num_tokens, num_readers=num_readers, now_s=time.monotonic())
        self._call_soon(self._opened.set)
        self._tell(transfer_id)

    def publish(
        self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, *, num_layers: int | None = None
    ) -> bool:
        """`block_ids` is the whole table so far, with the KV of the first `num_tokens` written.

        It is written in the first `num_layers` layers only, unless that is None; all tokens before the chunk that is
        being computed were published in every layer then. Only full blocks are published, and the prompt's last one.
        False: nobody wants this transfer any more (released, failed, expired, or never opened), and the prefill behind
        it can be cancelled.
        """
        if (published := self._book.published(transfer_id)) is None:
            return False
        num_blocks = num_tokens // self._layout.block_size
        if num_tokens == self._book.num_tokens(transfer_id):
            num_blocks = self._layout.num_blocks_for(num_tokens)
        assert num_blocks <= len(block_ids), f"{transfer_id}: {num_tokens} tokens need {num_blocks} blocks: {block_ids}"
        spans = self._spans(published, num_blocks, num_layers)
        return all(self._make_readable(transfer_id, self._chunk(span, block_ids, num_tokens)) for span in spans)

    def finish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, first_token: int) -> bool:
        """The prompt is computed: publish what is left and the outcome. The blocks stay leased until `on_released`."""
        if (published := self._book.published(transfer_id)) is None:
            return False
        num_blocks = self._layout.num_blocks_for(num_tokens)
        assert num_blocks <= len(block_ids), f"{transfer_id}: {num_tokens} tokens need {num_blocks} blocks: {block_ids}"
        outcome = Outcome(num_tokens=num_tokens, num_blocks=num_blocks, first_token=first_token)
        nothing = Span(num_blocks, num_blocks, range(self._layout.num_layers))
        *earlier, last = self._spans(published, num_blocks, None) or [nothing]
        for span in earlier:
            self._make_readable(transfer_id, self._chunk(span, block_ids, num_tokens))
        return self._make_readable(transfer_id, self._chunk(last, block_ids, num_tokens), outcome)

    def fail(self, transfer_id: str, reason: str) -> bool:
        """The prefill failed or was cancelled, or nobody will pull it. Final, also when it was never opened.

        False when there was nothing to end.
        """
        return self._end(transfer_id, SourcePhase.FAILED, reason)

    def why_unwanted(self, transfer_id: str) -> DisaggregatedError:
        """What whoever computes this prompt is told, once the transfer has ended before its time."""
        ending = self._book.ending(transfer_id)
        if ending is not None and ending.cause is not None:
            return ending.cause
        return LeaseExpired(f"nobody wants the blocks of this prompt any more: {ending.reason if ending else ''}")

    def ledger(self) -> list[tuple[str, int, float]]:
        """Each live transfer: its id, the blocks published so far, its age in seconds."""
        now_s = time.monotonic()
        return [(transfer_id, num_blocks, now_s - opened_s) for transfer_id, num_blocks, opened_s in self._book.live()]

    def num_publications(self, transfer_id: str) -> int:
        """Of a live transfer, so far; 0 when it is over."""
        return self._book.num_publications(transfer_id)

    @property
    def num_followers(self) -> int:
        """Destinations that wait for publications, or have not released what they got."""
        return self._service.num_followers

    def statistics(self) -> dict[str, EndpointStatistics]:
        return self._endpoints.statistics()

    def check_integrity(self) -> None:
        self._book.check_integrity()

    def check_read(self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str) -> None:
        """The gate of our endpoints; see `ReadGate`."""
        self._book.check_read(
            lease_key=lease_key, epoch=epoch, blocks=blocks, layers=layers, peer_id=peer_id, now_s=time.monotonic()
        )

    def _spans(self, published: Published, num_blocks: int, num_layers: int | None) -> list[Span]:
        every = self._layout.num_layers
        written = every if num_layers is None else num_layers
        cuts = self._service.cuts
        return unpublished(published, num_blocks=num_blocks, num_layers=written, of_layers=every, cuts=cuts)

    def _chunk(self, span: Span, block_ids: Sequence[int], num_tokens: int) -> Chunk:
        fresh = tuple(block_ids[span.begin : span.end])
        return Chunk(
            first_block=span.begin,
            block_ids=fresh,
            checksums=self._checksums(fresh, span.layers),
            num_tokens=min(num_tokens, span.end * self._layout.block_size),
            layers=span.layers,
        )

    def _make_readable(self, transfer_id: str, chunk: Chunk, outcome: Outcome | None = None) -> bool:
        published = self._book.publish(transfer_id, chunk, outcome, now_s=time.monotonic())
        self._tell(transfer_id)
        return published

    def _end(self, transfer_id: str, phase: SourcePhase, reason: str) -> bool:
        """True when this call ended it; then its blocks go back, once."""
        ended = self._book.end(transfer_id, phase, reason, now_s=time.monotonic())
        self._left(transfer_id, phase, reason, ended=ended)
        return ended

    def _leave(
        self, transfer_id: str, reader: str, phase: SourcePhase, reason: str, cause: DisaggregatedError | None = None
    ) -> bool:
        """One of its readers does not need it any more. True when the lease held for it until now."""
        leaving = self._book.leave(transfer_id, reader, phase, reason, now_s=time.monotonic(), cause=cause)
        self._left(transfer_id, phase, reason, ended=leaving.ended)
        return leaving.held

    def _left(self, transfer_id: str, phase: SourcePhase, reason: str, *, ended: bool) -> None:
        if ended:
            log.debug("kv_lease_ended", transfer_id=transfer_id, phase=str(phase), reason=reason)
            self._call_soon(self._on_released, transfer_id)
        self._tell(transfer_id)

    def _tell(self, transfer_id: str) -> None:
        self._call_soon(self._service.changed, transfer_id)

    def _call_soon(self, call: Callable[..., object], *args: object) -> None:
        """On the event loop. Once we are closed nobody is left to be told."""
        if self._loop is not None and not self._closing:
            self._loop.call_soon_threadsafe(call, *args)

    async def _reap(self) -> None:
        """Ends leases on time, whether or not anything else ever happens here."""
        while True:
            next_s = self._book.next_expiry_s()
            self._opened.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if next_s is None else max(0.0, next_s - time.monotonic())):
                    await self._opened.wait()
            for transfer_id in self._book.due(now_s=time.monotonic()):
                log.warning("kv_lease_expired", transfer_id=transfer_id, lease_s=self._book.lease_s)
                self._end(transfer_id, SourcePhase.EXPIRED, f"no sign of life for {self._book.lease_s} s")


def _endpoints(
    region: Region | None, identity: PoolIdentity, options: SourceOptions, *, gate: ReadGate
) -> SourceEndpoints:
    """Raises ConfigError when what is preferred cannot be had."""
    preference = options.preference
    preference.check()

    def listen_on(name: str) -> SourceEndpoint:
        assert region is not None, "endpoints were given"
        return registry.load(name).make_endpoint(region, identity.layout, epoch=identity.epoch, host=options.host)

    given = options.endpoints
    return SourceEndpoints(
        [listen_on(name) for name in preference.offered()] if given is None else given,
        gate=gate,
        make=lambda name: listen_on(name) if given is None and preference.may_add(name) else None,
    )


def _checksums_of(region: Region | None, layout: KVLayout, block_ids: Sequence[int], layers: range) -> tuple[int, ...]:
    assert region is not None, "checksums of no region"
    return block_checksums(region.buffer, layout, block_ids, layers)
