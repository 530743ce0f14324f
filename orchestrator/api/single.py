"""The answer with one reply, whole or streamed, from its first call to its last byte without a task.

The dispatcher gives the reply's tokens to a choice and says when it is over; the answer is written there and then. Only
who reads the end of a stream too slowly is waited for, by a task.
"""

from __future__ import annotations

import asyncio

from disaggregated.errors import DisaggregatedError, RequestCancelled
from orchestrator.api.answering import Answering
from orchestrator.api.choices import CollectedChoice
from orchestrator.api.direct import answer
from orchestrator.api.jobs import Job
from orchestrator.api.replies import collected_choice, streamed_choice
from orchestrator.api.shapes import Usage
from orchestrator.api.sse import EventStream
from orchestrator.api.streamed import Streamed
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange
from orchestrator.story import RequestStory


def answer_single(door: FrontDoor, exchange: Exchange, job: Job) -> None:
    _Whole(door, exchange, job).begin()


def stream_single(door: FrontDoor, exchange: Exchange, job: Job) -> None:
    _Streamed(door, exchange, job).begin()


class _Single(Answering):
    """What both have in common."""

    __slots__ = ("_job",)

    def __init__(self, door: FrontDoor, exchange: Exchange, job: Job) -> None:
        super().__init__(door, exchange, job.requests[0])
        self._job = job

    def _usage(self, story: RequestStory, choice: CollectedChoice | Streamed) -> Usage:
        return Usage(story.num_prompt_tokens, story.num_cached_tokens, story.num_tokens, choice.num_reasoning_tokens)


class _Whole(_Single):
    __slots__ = ("_choice",)

    def begin(self) -> None:
        self._choice = collected_choice(self._job, 0)
        self._begin(self._choice)

    def _end(self, story: RequestStory, error: DisaggregatedError | None) -> None:
        if error is not None:
            self._exchange.refuse(error)
            return
        body = self._job.shape.whole([self._choice.reply()], self._usage(story, self._choice))
        answer(self._exchange, body, self._job.headers, self._door.outbox)


class _Streamed(_Single):
    __slots__ = ("_choice", "_ending", "_stream")

    def begin(self) -> None:
        """Raises RequestCancelled when the client has gone already."""
        job = self._job
        self._choice = choice = streamed_choice(job, 0)
        try:
            self._stream = EventStream(self._exchange, job.headers, (choice,), self._door.outbox)
        except ConnectionError as error:
            raise RequestCancelled("the client went away") from error
        self._begin(choice)
        if self._exchange.is_told_at_once and self._run is not None:
            self._run.terminal = choice.terminal

    def _end(self, story: RequestStory, error: DisaggregatedError | None) -> None:
        """An error before the first token has a status of its own; afterwards it is the last event."""
        shape = self._job.shape
        if error is None:
            self._stream.gather()
            last = shape.usage(self._usage(story, self._choice)) if self._job.fields.include_usage else b""
        elif self._stream.is_open:
            self._door.metrics.error_answered(error)
            last = shape.failed(error)
        else:
            self._exchange.refuse(error)
            return
        if self._stream.try_end(last, shape.closing):
            self._exchange.answered()
            return
        self._ending = asyncio.get_running_loop().create_task(self._end_late(last + shape.closing))
        self._exchange.on_gone = self._ending.cancel

    async def _end_late(self, last: bytes) -> None:
        """The request had an earlier deadline of its own: now it is the client who is late."""
        try:
            async with asyncio.timeout(self._request.deadline_s - self._door.clock() + 1.0):
                await self._stream.end(last)
        except (TimeoutError, ConnectionError) as error:
            refused = RequestCancelled("the client did not read its stream in time")
            refused.__cause__ = error
            self._exchange.refuse(refused)
        else:
            self._exchange.answered()
