"""One request from its admission to its last token, and the truth about where its time went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from disaggregated import token_logprobs
from disaggregated.engine.api import ChunkComputed, TokensSampled
from disaggregated.v1 import control_pb2
from generation_server.step_stream import StepStream
from kvtransfer import Landed, PendingTransfer


class Caller:
    """One orchestrator: the stream that its tokens leave on, and its requests by their stream key."""

    def __init__(self) -> None:
        self.admissions: dict[int, Admission] = {}
        self.stream = StepStream()


class Admission:
    """The books of one admitted request. Used on the event loop alone.

    Invariant: once `is_over`, no delta of it is made any more.
    """

    def __init__(
        self,
        engine_id: str,
        request: control_pb2.AdmitRequest,
        caller: Caller,
        *,
        told: Callable[[Admission], None],
    ) -> None:
        """`told` is called once its last delta was sent."""
        self._told = told
        self.engine_id = engine_id
        self.caller = caller
        self.stream_key = request.stream_key
        self.num_prompt_tokens = len(request.token_ids)
        self.is_reserving = False
        """The engine was asked for blocks and has not answered."""
        self.transfer: PendingTransfer | None = None
        """Brings its blocks; None before and once nothing can land in them any more."""
        self.has_landed = False
        self.is_over = False
        self.is_cancelled = False
        """Over, and nobody is told."""
        self.is_told = False
        """Over, and its last delta was sent."""
        self.timer: asyncio.TimerHandle | None = None
        """Until its first token: of a local prefill its deadline, else when to say that its blocks have landed."""
        self._arrived_s = time.monotonic()
        self._started_s: float | None = None
        self._landed_s = 0.0
        self._times: control_pb2.AdmissionTimes | None = control_pb2.AdmissionTimes()
        """Until they leave with the first delta."""

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._arrived_s

    @property
    def has_blocks_to_come(self) -> bool:
        """Blocks are reserved, or may be, for a transfer that has not ended."""
        return self.is_reserving or self.transfer is not None

    def reserved(self, num_cached_tokens: int, *, token_bytes: int) -> None:
        """token_bytes: the KV of one token. What is here already does not travel."""
        assert self._times is not None, f"{self.engine_id}: reserved after its first delta"
        self._times.num_cached_tokens = num_cached_tokens
        self._times.saved_bytes = num_cached_tokens * token_bytes

    def landed(self, landed: Landed) -> None:
        assert self._times is not None, f"{self.engine_id}: landed after its first delta"
        self.has_landed = True
        self._landed_s = time.monotonic()
        self._times.transfer_s = landed.transfer_s
        self._times.exposed_s = landed.exposed_s
        self._times.transfer_bytes = landed.num_bytes
        self._times.transport = landed.transport
        self._times.num_publications = landed.num_publications
        self._times.hidden_bytes = landed.hidden_bytes

    def chunk_computed(self, event: ChunkComputed) -> None:
        """A part of a local prefill; the first one tells how long the prompt has waited."""
        if self._times is None or self._started_s is not None:
            return
        self._started_s = event.started_s
        self._times.num_cached_tokens = event.num_cached_tokens
        self._times.queue_s = max(0.0, event.started_s - self._arrived_s)

    def waits_for_its_turn(self) -> control_pb2.StreamDelta:
        """No token yet. What the times are is told again with the first one."""
        due = self.num_prompt_tokens + 1  # The first one came from the context server.
        return control_pb2.StreamDelta(stream_key=self.stream_key, first_position=due, times=self._times)

    def tokens_sampled(self, event: TokensSampled) -> control_pb2.StreamDelta:
        self.is_over = event.finish_reason is not None
        self._stop_timer()
        return control_pb2.StreamDelta(
            stream_key=self.stream_key,
            first_position=event.first_position,
            token_ids=event.token_ids,
            finish_reason=event.finish_reason or "",
            logprobs=token_logprobs.to_proto(event.logprobs),
            prompt_logprobs=token_logprobs.to_proto(event.prompt_logprobs),
            times=self._take_times(),
        )

    def failed(self, error: control_pb2.StreamError) -> control_pb2.StreamDelta:
        self.is_over = True
        self._stop_timer()
        return control_pb2.StreamDelta(stream_key=self.stream_key, error=error)

    def cancel(self) -> None:
        """Whatever of it waits to be sent is dropped, and its transfer is stopped."""
        self.is_over = self.is_cancelled = True
        self._stop_timer()
        self.caller.stream.drop(self.stream_key)
        if self.transfer is not None:
            self.transfer.cancel()

    def last_sent(self) -> None:
        self._told(self)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _take_times(self) -> control_pb2.AdmissionTimes | None:
        times, self._times = self._times, None
        if times is None:
            return None
        now_s = time.monotonic()
        if self.has_landed:
            times.landed_to_step_s = now_s - self._landed_s
        elif self._started_s is not None:
            times.compute_s = now_s - self._started_s
        return times
