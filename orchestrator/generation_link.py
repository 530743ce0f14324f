"""The one stream on which a generation server tells all tokens of our requests: one message a decode step.

A message is taken apart here and each delta goes straight to the request it belongs to: no queue, no task and no copy
in between. When the stream breaks, every request on it learns so at once.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from disaggregated.errors import AdmissionError, DisaggregatedError, ServerLost
from disaggregated.step_batches import columns_of
from disaggregated.v1 import control_pb2
from orchestrator.fan_out import FanOut, Lane, Terminal
from orchestrator.overdue import Overdue
from orchestrator.server_client import ServerClient

ADMIT_TIMEOUT_S: Final = 10.0
"""An admission is answered at once; a server that is silent altogether is found by its missing heartbeats before."""
CANCEL_TIMEOUT_S: Final = 5.0

_stream_keys = itertools.count(1)
"""Never used twice in one process, so a late delta of an abandoned attempt belongs to nobody."""


class DeltaReceiver(Protocol):
    """Called on the event loop; must not block."""

    def on_delta(self, delta: control_pb2.StreamDelta, now_s: float) -> None: ...

    def on_token(self, position: int, token_id: int, now_s: float) -> None:
        """As `on_delta` of one token and nothing else: nearly every token comes here."""

    def on_refused(self, error: DisaggregatedError) -> None:
        """The admission came to nothing; no delta follows."""

    def on_lost(self, error: ServerLost) -> None: ...


class GenerationLink:
    """Lives as long as one connection to one generation server. `run()` is its reader; whoever runs it owns the link.

    Invariant: a stream key is in `_receivers` from `open()` to `close()`; an admission that was sent is either answered
    or the link is broken before its cancellation is sent, so that a cancellation can never overtake it.
    """

    def __init__(
        self, client: ServerClient, link_id: str, *, clock: Callable[[], float], fan_out: FanOut | None = None
    ) -> None:
        """`fan_out`: delivers what it can of each step; the receivers get the rest. None: they get all."""
        self.link_id = link_id
        self._client = client
        self._clock = clock
        self._fan_out = fan_out
        self._receivers: dict[int, DeltaReceiver] = {}
        self._admitting: Overdue[int] = Overdue(ADMIT_TIMEOUT_S, self._not_answered)
        """Admissions that are not answered."""
        self._abandoned: set[int] = set()
        self._to_cancel: list[int] = []
        self._has_to_cancel = asyncio.Event()
        self._broken: ServerLost | None = None

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    async def run(self, opened: Callable[[], None]) -> None:
        """Read and cancel until the link breaks, then tell everybody on it. Never returns.

        Raises:
            ServerLost: everybody on the link has been told.
        """
        try:
            async with asyncio.TaskGroup() as calls:
                calls.create_task(self._breaking(self._read(opened)))
                calls.create_task(self._breaking(self._send_cancellations()))
                try:
                    await asyncio.get_running_loop().create_future()
                finally:  # Before the group ends, which takes a while.
                    self._break(ServerLost("the connection was closed"))
        except ExceptionGroup as failures:
            error = failures.exceptions[0]
            if not isinstance(error, DisaggregatedError):
                raise error from failures
            raise self._break(error) from error

    async def _breaking(self, work: Coroutine[Any, Any, None]) -> None:
        """What ends `work` breaks the link at that moment, not when everything else on it has ended."""
        try:
            await work
        except Exception as error:
            self._break(error)
            raise

    async def _read(self, opened: Callable[[], None]) -> None:
        await self._client.generate(self.link_id, opened, self._take_apart)
        raise ServerLost("it ended its stream of tokens")

    def _take_apart(self, batch: control_pb2.StepBatch) -> None:
        now_s = self._clock()
        receivers = self._receivers
        stream_keys, positions, token_ids = columns_of(batch)
        if self._fan_out is not None:
            left = self._fan_out.deliver(stream_keys, positions, token_ids, now_s)
            if len(left) < len(token_ids):
                stream_keys, positions, token_ids = (
                    [column[index] for index in left] for column in (stream_keys, positions, token_ids)
                )
        # Looked up as they are called, and not before: a token may end the request that the next one is for.
        for receiver, position, token_id in zip(map(receivers.get, stream_keys), positions, token_ids, strict=True):
            if receiver is not None:
                receiver.on_token(position, token_id, now_s)
        for delta in batch.deltas:
            receiver = receivers.get(delta.stream_key)
            if receiver is not None:
                receiver.on_delta(delta, now_s)

    def open(self, receiver: DeltaReceiver) -> int:
        """A key under which `receiver` gets what comes; it must be given back with `close()`.

        Raises:
            ServerLost: the link is broken already.
        """
        if self._broken is not None:
            raise self._broken
        stream_key = next(_stream_keys)
        self._receivers[stream_key] = receiver
        return stream_key

    def open_lane(self, stream_key: int, terminal: Terminal) -> Lane | None:
        """For the tokens that come under this key; closed before the key is given back. None: there are no lanes."""
        return None if self._fan_out is None else self._fan_out.open(stream_key, terminal)

    def admit(self, request: control_pb2.AdmitRequest) -> None:
        """Its receiver is told when it is refused (AdmissionError: nothing to undo) or not answered (ServerLost).

        The call runs to its end even when the request is given up: only then is it known what there is to undo.

        Raises:
            ServerLost: the link is broken; nothing was sent.
        """
        if self._broken is not None:
            raise self._broken
        key = request.stream_key
        self._admitting.expect(key)
        try:
            self._client.begin_admit(request, self._answered)
        except ServerLost:
            self._admitting.came(key)
            raise

    def _not_answered(self, key: int) -> None:
        self._became(key, ServerLost(f"it did not answer an admission in {ADMIT_TIMEOUT_S:g} s"))

    def _answered(self, key: int, outcome: control_pb2.AdmitReply | DisaggregatedError) -> None:
        if self._admitting.came(key):  # Else it was given up by now.
            self._became(key, outcome)

    def _became(self, key: int, outcome: control_pb2.AdmitReply | DisaggregatedError) -> None:
        is_abandoned = key in self._abandoned
        self._abandoned.discard(key)
        if is_abandoned and not isinstance(outcome, AdmissionError):
            self._cancel(key)
        receiver = self._receivers.get(key)
        if receiver is not None and isinstance(outcome, DisaggregatedError):
            receiver.on_refused(outcome)

    def close(self, stream_key: int, *, is_over: bool) -> None:
        """Nothing that still comes under this key matters. `is_over`: the server knows that it ended."""
        del self._receivers[stream_key]
        if is_over:
            return
        if stream_key in self._admitting:
            self._abandoned.add(stream_key)
        else:
            self._cancel(stream_key)

    def _cancel(self, stream_key: int) -> None:
        self._to_cancel.append(stream_key)
        self._has_to_cancel.set()

    async def _send_cancellations(self) -> None:
        """Those that pile up while one call is under way go together in the next."""
        while True:
            await self._has_to_cancel.wait()
            self._has_to_cancel.clear()
            keys, self._to_cancel = self._to_cancel, []
            await self._client.cancel(self.link_id, keys, timeout_s=CANCEL_TIMEOUT_S)

    def _break(self, error: BaseException) -> ServerLost:
        if self._broken is None:
            lost = error if isinstance(error, ServerLost) else ServerLost(f"its stream of tokens broke: {error}")
            self._broken = lost
            self._admitting.close()
            for receiver in list(self._receivers.values()):
                receiver.on_lost(lost)
        return self._broken
