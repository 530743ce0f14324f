"""A generation server's work: requests admitted, their blocks pulled or computed, their tokens streamed.

    Admit ─▶ reserve ─▶ pull ─▶ admit ─┐                        prompt's KV comes from a context server
      └────▶ submit ──────────────────┴▶ decode ─▶ StepStream   or is computed here

Whatever ends a request early (its caller, its deadline, a broken Generate stream, a failed pull), its reserved blocks
go back only when its pull has ended, because until then bytes may still land in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from disaggregated import logs, rpc
from disaggregated.compute_cost import StepCost
from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    RequestFailed,
    RequestKind,
    Reservation,
    TokensSampled,
)
from disaggregated.engine.serving.live_requests import LiveRequests
from disaggregated.engine.serving.role import ENGINE_STOP_S, LoadedServer, as_our_error
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import (
    AdmissionError,
    DeadlineExceeded,
    DisaggregatedError,
    InvalidRequest,
    TransferError,
)
from disaggregated.peer_input import checked_name, checked_seconds
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2, control_pb2_grpc
from generation_server import reports
from generation_server.admission import Admission, Caller
from generation_server.prefix_lender import PrefixLender
from generation_server.step_stream import StepStream
from kvtransfer import PendingTransfer, Region, TransferDestination
from kvtransfer.configured import destination_options, identity_of
from kvtransfer.transports import cuda_runtime

log = logs.get(__name__)

LANDED_TOLD_AFTER_S: Final = 1.0
"""Most first tokens come sooner and tell so by themselves."""
NO_OVERLAP_VARIABLE: Final = "TRTLLM_DISABLE_KV_CACHE_TRANSFER_OVERLAP"
"""At 1, blocks are pulled only after the whole prompt is computed: for measuring what overlap hides."""


class GenerationRole(control_pb2_grpc.GenerationServicer):
    """Invariant: an admission is in the books, and live, until its last delta was sent or, when it was cancelled, until
    its blocks went back."""

    can_prefill = True

    def __init__(self, server: LoadedServer[Region]) -> None:
        self.live_requests = LiveRequests(num_requests_max=server.num_requests_max)
        self.engine = EngineThread(server.loaded.engine, on_events=self._on_step, on_crash=server.on_crash)
        self._block_size = server.loaded.layout.block_size
        self._token_bytes = server.loaded.layout.token_bytes
        self._loop = asyncio.get_running_loop()
        self._callers: dict[str, Caller] = {}
        """By orchestrator id."""
        self._admissions: dict[str, Admission] = {}
        """By engine id."""
        self._overlap = os.environ.get(NO_OVERLAP_VARIABLE) != "1"
        transceiver = server.config.cache_transceiver_config
        options = destination_options(server)
        shared = cuda_runtime.shared(server.device_pool, options.preference, is_wanted=transceiver.cuda_ipc)
        self._destination = TransferDestination(
            server.memory,
            identity_of(server),
            options,
            copier=server.copier,
            device_pool=shared,
        )
        lends = transceiver.pull_back and server.copier is None
        self._lender = PrefixLender(server, self.engine) if lends else None
        self._pulls = asyncio.TaskGroup()
        self._parts = contextlib.AsyncExitStack()

    def add_services(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_GenerationServicer_to_server(self, server)
        if self._lender is not None:
            self._lender.add_to(server)

    async def __aenter__(self) -> Self:
        self.engine.start()
        self._parts.push_async_callback(asyncio.to_thread, self.engine.stop, ENGINE_STOP_S)
        self._parts.push_async_callback(self._destination.close)
        if self._lender is not None:
            self._parts.push_async_callback(self._lender.close)
            await self._lender.start()
        await self._parts.enter_async_context(self._pulls)
        self._parts.callback(self._cancel_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._parts.__aexit__(kind, error, trace)

    async def end_streams(self) -> None:
        for caller in self._callers.values():
            caller.stream.end()
        if self._lender is not None:
            await self._lender.close()

    @property
    def transports(self) -> Sequence[str]:
        return self._destination.transports

    @property
    def unhealthy(self) -> str:
        return self._destination.quarantine().unhealthy

    def step_cost(self) -> StepCost | None:
        """Its steps decode and prefill at once, which one fit cannot tell apart: the orchestrator looks at prompts."""
        return None

    def links(self) -> Sequence[control_pb2.LinkStatistics]:
        return [reports.link(peer) for peer in self._destination.statistics()]

    def transfers(self) -> Sequence[control_pb2.LedgerEntry]:
        landing = [admission for admission in self._admissions.values() if admission.transfer is not None]
        lent = self._lender.ledger() if self._lender is not None else []
        return [*(reports.landing(admission, self._block_size) for admission in landing), *lent]

    # The Generate stream.

    async def Generate(self, request: control_pb2.GenerateRequest, call: Any) -> AsyncIterator[control_pb2.StepBatch]:
        """Its initial metadata comes at once: from then on this orchestrator's requests can be admitted.

        A second stream of the same orchestrator takes the place of the first, which may be a connection that broke
        without our seeing it.
        """
        checked_name(request.orchestrator_id, "orchestrator_id")
        if earlier := self._callers.get(request.orchestrator_id):
            self._hang_up(earlier)
        caller = self._callers[request.orchestrator_id] = Caller()
        await call.send_initial_metadata(())
        try:
            async for batch in caller.stream.batches():
                yield batch
        finally:
            self._hang_up(caller)
            if self._callers.get(request.orchestrator_id) is caller:
                del self._callers[request.orchestrator_id]

    def _hang_up(self, caller: Caller) -> None:
        if caller.admissions:
            log.warning("generate_stream_lost", requests_cancelled=len(caller.admissions))
        for admission in list(caller.admissions.values()):
            self._cancel(admission)
        caller.stream.end()

    # Admission.

    async def Admit(self, request: control_pb2.AdmitRequest, call: Any) -> control_pb2.AdmitReply:
        try:
            return await self._admit(request)
        except BaseException as error:
            if request.HasField("source"):
                self._destination.decline(request.source, error)
            raise

    async def _admit(self, request: control_pb2.AdmitRequest) -> control_pb2.AdmitReply:
        checked_seconds(request.deadline_s, "deadline_s")
        checked_name(request.request_id, "request_id")
        caller = self._callers.get(request.orchestrator_id)
        if caller is None:
            raise AdmissionError(f"orchestrator {request.orchestrator_id!r} has no Generate stream open here")
        if request.stream_key in caller.admissions:
            raise InvalidRequest(f"stream_key {request.stream_key} is in use", param="stream_key")
        engine_id = self.live_requests.add(request.request_id)
        admission = Admission(engine_id, request, caller, told=self._told)
        caller.admissions[request.stream_key] = self._admissions[engine_id] = admission
        if not request.HasField("source"):
            self._prefill_here(admission, request)
            return control_pb2.AdmitReply()
        try:
            reservation = await self._reserve(admission, request)
        except BaseException:  # Also when the call is cancelled: the engine may have reserved by now.
            self.engine.release(engine_id)
            self.forget(admission)
            raise
        self._pull_in_background(admission, request, reservation)
        return control_pb2.AdmitReply(num_cached_tokens=reservation.num_cached_blocks * self._block_size)

    def _prefill_here(self, admission: Admission, request: control_pb2.AdmitRequest) -> None:
        try:
            self.engine.submit(_engine_request(request, admission.engine_id, RequestKind.FULL))
        except DisaggregatedError:
            self.forget(admission)
            raise
        admission.timer = self._loop.call_later(request.deadline_s, self._expire, admission)

    async def _reserve(self, admission: Admission, request: control_pb2.AdmitRequest) -> Reservation:
        """The engine answers between two steps. However this fails, the caller releases."""
        admission.is_reserving = True
        try:
            reserving = self.engine.reserve(_engine_request(request, admission.engine_id, RequestKind.FROM_REMOTE))
            reservation = await asyncio.wrap_future(reserving)
        finally:
            admission.is_reserving = False
        if admission.is_cancelled:
            raise AdmissionError(
                f"request {request.request_id} was cancelled, or its stream broke, while it was admitted"
            )
        return reservation

    def _pull_in_background(
        self, admission: Admission, request: control_pb2.AdmitRequest, reservation: Reservation
    ) -> None:
        admission.reserved(reservation.num_cached_blocks * self._block_size, token_bytes=self._token_bytes)
        transfer = self._destination.start(
            request.source,
            reservation.block_ids,
            skip_blocks=reservation.num_cached_blocks,
            deadline_s=request.deadline_s,
            overlap=self._overlap,
            num_tokens=admission.num_prompt_tokens,
        )
        admission.transfer = transfer
        self._pulls.create_task(self._follow(admission, transfer), name=f"follow-{admission.engine_id}")

    async def _follow(self, admission: Admission, transfer: PendingTransfer) -> None:
        """The outcome is told as soon as it stands; the blocks come back when nothing can land in them any more."""
        try:
            landed = await transfer.outcome()
            if landed.num_tokens != admission.num_prompt_tokens:
                raise TransferError(
                    f"the KV of {landed.num_tokens} tokens landed, the prompt has {admission.num_prompt_tokens}"
                )
        except DisaggregatedError as error:
            self._not_landed(admission, error)
            await transfer.quiet()
        else:
            log.debug("transfer_done", request_id=transfer.transfer_id, bytes=landed.num_bytes)
            admission.landed(landed)
            self.engine.admit(admission.engine_id, landed.first_token)
            admission.timer = self._loop.call_later(LANDED_TOLD_AFTER_S, self._tell_landed, admission)
        admission.transfer = None
        if not admission.has_landed:
            self.engine.release(admission.engine_id)
        if admission.is_told or admission.is_cancelled:
            self.forget(admission)

    def _not_landed(self, admission: Admission, error: DisaggregatedError) -> None:
        self.engine.cancel(admission.engine_id)  # Its blocks are in quarantine until they are released.
        if not admission.is_over:
            log.warning("transfer_failed", request_id=admission.engine_id, kind=type(error).__name__, error=error)
        self._fail(admission, error)

    # Endings.

    async def Cancel(self, request: control_pb2.CancelRequest, call: Any) -> control_pb2.CancelReply:
        caller = self._callers.get(request.orchestrator_id)
        found = [caller.admissions.get(stream_key) for stream_key in request.stream_keys] if caller else []
        live = [admission for admission in found if admission is not None and not admission.is_over]
        for admission in live:
            self._cancel(admission)
        return control_pb2.CancelReply(num_cancelled=len(live))

    def _cancel(self, admission: Admission) -> None:
        """No delta of it leaves any more. It stays live while it is admitted or pulled: its blocks are not back."""
        self.engine.cancel(admission.engine_id)
        admission.cancel()
        if not admission.has_blocks_to_come:
            self.forget(admission)

    def _cancel_all(self) -> None:
        for admission in list(self._admissions.values()):
            self._cancel(admission)

    def _expire(self, admission: Admission) -> None:
        """A local prefill whose first token is late."""
        self.engine.cancel(admission.engine_id)
        self._fail(admission, DeadlineExceeded("the prompt was not computed in time"))

    def _tell_landed(self, admission: Admission) -> None:
        """Its first token is long in coming, because it waits for its turn in the batch; the transfer is over."""
        if not admission.is_over:
            admission.caller.stream.put(admission.waits_for_its_turn(), last_sent=admission.last_sent)
            admission.caller.stream.send(self.engine.statistics().step)

    def _fail(self, admission: Admission, error: DisaggregatedError) -> None:
        if admission.is_over:
            return
        stream = admission.caller.stream
        stream.put(admission.failed(rpc.to_stream_error(error)), last_sent=admission.last_sent)
        stream.send(self.engine.statistics().step)

    def _told(self, admission: Admission) -> None:
        """Its last delta was sent. It stays live while its blocks can be written into."""
        admission.is_told = True
        if not admission.has_blocks_to_come:
            self.forget(admission)

    def forget(self, admission: Admission) -> None:
        """Nothing of it is left here. Also for one that is forgotten already."""
        self._admissions.pop(admission.engine_id, None)
        if admission.caller.admissions.get(admission.stream_key) is admission:
            del admission.caller.admissions[admission.stream_key]
        self.live_requests.discard(admission.engine_id)

    # Events of the engine.

    def _on_step(self, events: Sequence[EngineEvent]) -> None:
        """On the engine's thread: one hop to the event loop a step, however many sequences it was."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[EngineEvent]) -> None:
        reached: set[StepStream] = set()
        for event in events:
            admission = self._admissions.get(event.request_id)
            if admission is None or admission.is_over:
                continue
            stream = admission.caller.stream
            match event:
                case TokensSampled():
                    stream.put(admission.tokens_sampled(event), last_sent=admission.last_sent)
                case ChunkComputed():
                    admission.chunk_computed(event)
                case RequestFailed():
                    error = rpc.to_stream_error(as_our_error(event.error))
                    stream.put(admission.failed(error), last_sent=admission.last_sent)
            reached.add(stream)
        step = self.engine.statistics().step
        for stream in reached:
            stream.send(step)


def _engine_request(request: control_pb2.AdmitRequest, engine_id: str, kind: RequestKind) -> EngineRequest:
    return EngineRequest(
        request_id=engine_id,
        kind=kind,
        token_ids=request.token_ids,
        sampling=SamplingParams.from_proto(request.sampling),
        priority=request.priority,
        cache_salt=checked_name(request.cache_salt, "cache_salt"),
    )
