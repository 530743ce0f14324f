"""A context server's work: prompts in, first tokens out, blocks offered until somebody has read them.

Three sides share a request: its Prefill call (event loop), the engine (its own thread), and the transfer source (any
thread). The engine's thread says itself what it has written, layers by layers, to a thread that publishes it; so a
destination never waits for our event loop. The blocks go back when the source says `released`, whatever became of the
call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from context_server.prefill_call import PrefillCall
from context_server.prefix_puller import PrefixPuller
from context_server.step_meter import StepMeter
from context_server.streaming import PrefillStream
from disaggregated.compute_cost import ComputeCost, StepCost, prior
from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    RequestFailed,
    RequestKind,
    TokensSampled,
)
from disaggregated.engine.serving.live_requests import LiveRequests
from disaggregated.engine.serving.role import ENGINE_STOP_S, LoadedServer, as_our_error
from disaggregated.engine.thread import EngineThread
from disaggregated.peer_input import checked_name, checked_seconds
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2, control_pb2_grpc
from kvtransfer import DeviceSource, Publisher, Region, StagedSource, TakesNews, TransferSource
from kvtransfer.configured import identity_of, source_options
from kvtransfer.transports import cuda_runtime

PUBLISHER_STOP_S: Final = 5.0


class ContextRole(control_pb2_grpc.ContextServicer):
    """Invariant: a request is live until the engine was told to release its blocks."""

    can_prefill = True

    def __init__(self, server: LoadedServer[Region]) -> None:
        self.live_requests = LiveRequests(num_requests_max=server.num_requests_max)
        self.engine = EngineThread(server.loaded.engine, on_events=self._on_step, on_crash=server.on_crash)
        self._loop = asyncio.get_running_loop()
        self._prefills: dict[str, PrefillCall] = {}
        """By engine id, while the call lasts."""
        self._transfers: dict[str, str] = {}
        """Engine id to transfer id, from open to released. Read by the engine's thread."""
        self._engine_ids: dict[str, str] = {}
        """The other way round."""
        transceiver, pool = server.config.cache_transceiver_config, server.device_pool
        region, identity, layout = server.memory, identity_of(server), server.memory_layout
        options = source_options(server)
        self._source: TransferSource | StagedSource | DeviceSource
        self._publisher: Publisher | None = None
        publisher: TakesNews
        over, on_crash = self._transfer_over, server.on_crash
        if server.copier is None:
            self._source = TransferSource(region, identity, on_released=over, options=options)
            publisher = self._publisher = Publisher(self._source, on_crash=on_crash)
        elif (shared := cuda_runtime.shared(pool, options.preference, is_wanted=transceiver.cuda_ipc)) is None:
            publisher = self._source = StagedSource(
                region, identity, server.copier, on_released=over, on_crash=on_crash, options=options
            )
        else:
            publisher = self._source = DeviceSource(
                region, identity, server.copier, shared, on_released=over, on_crash=on_crash, options=options
            )
        group_bytes = transceiver.layer_group_bytes
        self._stream = PrefillStream(self._transfers, publisher, layout, layer_group_bytes=group_bytes)
        if server.copier is None:
            self.engine.watch_layers(self._stream)

        pulls = transceiver.pull_back and server.config.kv_cache_config.enable_block_reuse and server.copier is None
        loaded, num_threads = server.loaded, server.config.num_threads
        self._compute = ComputeCost(prior(loaded.num_parameters, device=loaded.device, num_threads=num_threads))
        self._meter = StepMeter()
        self._puller = PrefixPuller(server, self.engine, self._compute) if pulls else None

    def add_services(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_ContextServicer_to_server(self, server)
        self._source.add_to(server)

    async def __aenter__(self) -> Self:
        await self._source.start()
        if self._publisher is not None:
            self._publisher.start()
        self.engine.start()
        if self._puller is not None:
            await self._puller.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._source.close()
        if self._puller is not None:
            await self._puller.__aexit__(kind, error, trace)
        await asyncio.to_thread(self.engine.stop, ENGINE_STOP_S)
        if self._publisher is not None:
            await asyncio.to_thread(self._publisher.close, deadline_s=PUBLISHER_STOP_S)

    async def end_streams(self) -> None:
        await self._source.close()

    @property
    def transports(self) -> Sequence[str]:
        return tuple(self._source.statistics())

    @property
    def unhealthy(self) -> str:
        return self._puller.unhealthy if self._puller else ""

    def step_cost(self) -> StepCost | None:
        return self._compute.fit() if self._compute.num_steps else None

    def links(self) -> Sequence[control_pb2.LinkStatistics]:
        """What was read from us, by transport: a source does not tell its readers apart."""
        return [
            control_pb2.LinkStatistics(
                transport=name,
                bytes_total=endpoint.bytes_total,
                transfers_total=endpoint.reads_total,
                failures_total=endpoint.reads_refused,
            )
            for name, endpoint in self._source.statistics().items()
        ]

    def transfers(self) -> Sequence[control_pb2.LedgerEntry]:
        return [
            control_pb2.LedgerEntry(kind="transfer", owner=transfer_id, count=num_blocks, age_s=age_s)
            for transfer_id, num_blocks, age_s in self._source.ledger()
        ]

    # The Prefill call.

    async def Prefill(
        self, request: control_pb2.PrefillRequest, call: Any
    ) -> AsyncIterator[control_pb2.PrefillProgress]:
        deadline_s = checked_seconds(request.deadline_s, "deadline_s")
        transfer_id = checked_name(request.transfer_id, "transfer_id")
        engine_id = self.live_requests.add(checked_name(request.request_id, "request_id"))
        prefill = PrefillCall(engine_id, transfer_id, deadline_s=deadline_s)
        self._prefills[engine_id] = prefill
        try:
            self._open(prefill, request)
            if self._puller is not None and request.HasField("reuse_from"):
                owner = f"{engine_id}p"
                prefill.reuse = await self._puller.bring(
                    owner, request.token_ids, request.reuse_from, salt=request.cache_salt
                )
            self._submit(prefill, request)
            async for progress in prefill.progress():
                yield progress
        finally:
            del self._prefills[engine_id]
            if not prefill.is_told:
                self._abandon(prefill)

    def _open(self, prefill: PrefillCall, request: control_pb2.PrefillRequest) -> None:
        if prefill.transfer_id:
            self._source.open(prefill.transfer_id, num_tokens=len(request.token_ids))
            self._transfers[prefill.engine_id] = prefill.transfer_id
            self._engine_ids[prefill.transfer_id] = prefill.engine_id

    def _submit(self, prefill: PrefillCall, request: control_pb2.PrefillRequest) -> None:
        if prefill.has_failed:
            return  # Whoever was to read its blocks has given up meanwhile.
        self.engine.submit(
            EngineRequest(
                request_id=prefill.engine_id,
                kind=RequestKind.PREFILL_ONLY,
                token_ids=request.token_ids,
                sampling=SamplingParams.from_proto(request.sampling),
                priority=request.priority,
                cache_salt=checked_name(request.cache_salt, "cache_salt"),
            )
        )

    def _abandon(self, prefill: PrefillCall) -> None:
        """The caller left, the deadline passed, or the engine refused: stop computing, and fail whoever follows."""
        self.engine.cancel(prefill.engine_id)
        if prefill.engine_id in self._transfers:
            self._source.fail(prefill.transfer_id, "the prefill was stopped")
        else:
            self._give_back(prefill.engine_id)

    async def Abort(self, request: control_pb2.AbortRequest, call: Any) -> control_pb2.AbortReply:
        reason = request.reason or "nobody wants these blocks"
        ended = [self._source.fail(transfer_id, reason) for transfer_id in request.transfer_ids]
        return control_pb2.AbortReply(num_ended=sum(ended))

    # Events of the engine.

    def _on_step(self, events: Sequence[EngineEvent]) -> None:
        """On the engine's thread, once a step. The event loop hears first: whoever releases at once finds the prefill
        computed."""
        self._loop.call_soon_threadsafe(self._deliver, events)
        self._stream.step_is_over(events)
        for event in events:
            if isinstance(event, RequestFailed) and (transfer_id := self._transfers.get(event.request_id)):
                self._source.fail(transfer_id, str(event.error))

    def _deliver(self, events: Sequence[EngineEvent]) -> None:
        """On the event loop. The call of an event may be gone; its blocks are seen to in `_abandon`."""
        for step in self._meter.measure(events):
            self._compute.observe(step)
        for event in events:
            prefill = self._prefills.get(event.request_id)
            match event:
                case ChunkComputed() if prefill:
                    prefill.chunk_computed(event)
                case TokensSampled():
                    if prefill:
                        prefill.first_token_sampled(event)
                    if event.request_id not in self._transfers:
                        self._give_back(event.request_id)
                case RequestFailed() if prefill:
                    prefill.fail(as_our_error(event.error))

    # Blocks on their way back.

    def _transfer_over(self, transfer_id: str) -> None:
        """Nobody reads these blocks any more. Called by the source, once for each transfer that was opened."""
        engine_id = self._engine_ids.pop(transfer_id)
        del self._transfers[engine_id]
        prefill = self._prefills.get(engine_id)
        if prefill and not prefill.is_computed:
            prefill.fail(self._source.why_unwanted(transfer_id))
        self._give_back(engine_id)

    def _give_back(self, engine_id: str) -> None:
        self.engine.release(engine_id)
        self.live_requests.discard(engine_id)
