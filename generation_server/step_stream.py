"""What one orchestrator has not been sent yet: one message a decode step, for all of its requests together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from disaggregated.step_batches import packed
from disaggregated.v1 import control_pb2


class StepStream:
    """Filled once a step by the engine's events, emptied by the one Generate call it belongs to.

    An orchestrator that reads slowly gets several steps in one message: what waits for the same request is joined. So
    the bound is the tokens that its live requests may still generate, and a request counts as live until its last
    token was handed over. Used on the event loop alone.

    Invariant: `last_sent` of a finish or an error that was put is called once it was sent, unless it was dropped or the
    stream broke before.
    """

    def __init__(self) -> None:
        self._last_sent: dict[int, Callable[[], None]] = {}
        """By the keys in `_waiting` that end: the key may be another request's by the time that they have been sent."""
        self._waiting: dict[int, control_pb2.StreamDelta] = {}
        self._step = 0
        self._news = asyncio.Event()
        self._ended = False

    def put(self, delta: control_pb2.StreamDelta, *, last_sent: Callable[[], None] | None = None) -> None:
        """Queue what a step brought for one request; `send` makes it leave. `last_sent` is for one that ends it."""
        if last_sent is not None and (delta.finish_reason or delta.HasField("error")):
            self._last_sent[delta.stream_key] = last_sent
        waiting = self._waiting.get(delta.stream_key)
        if waiting is None:
            self._waiting[delta.stream_key] = delta
            return
        due = waiting.first_position + len(waiting.token_ids)
        assert not delta.token_ids or delta.first_position == due, f"position {delta.first_position}, {due} was due"
        waiting.token_ids.extend(delta.token_ids)
        if delta.HasField("logprobs"):
            waiting.logprobs.MergeFrom(delta.logprobs)
        if delta.HasField("times"):
            waiting.times.CopyFrom(delta.times)
        waiting.finish_reason = delta.finish_reason
        if delta.HasField("error"):
            waiting.error.CopyFrom(delta.error)

    def send(self, step: int) -> None:
        """Everything that `step` brought has been put."""
        self._step = step
        self._news.set()

    def drop(self, stream_key: int) -> None:
        """The request was cancelled: what waits of it does not leave."""
        self._waiting.pop(stream_key, None)
        self._last_sent.pop(stream_key, None)

    def end(self) -> None:
        """Let the reader come to the end once it has everything."""
        self._ended = True
        self._news.set()

    async def batches(self) -> AsyncIterator[control_pb2.StepBatch]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._waiting:
                deltas, self._waiting = self._waiting, {}
                last_sent, self._last_sent = self._last_sent, {}
                yield packed(self._step, deltas.values())
                for sent in last_sent.values():
                    sent()
            if self._ended and not self._waiting:
                return
