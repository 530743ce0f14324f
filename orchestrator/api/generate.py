"""POST /v1/chat/completions and /v1/completions: from a body to an answer or a stream.

What can be done at once is done in the call that brings the request, and its answer is then a matter of callbacks (see
`single.py`). The rest is awaited: long prompts, grammars, several replies to one request, and what is told beside them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from disaggregated.errors import DisaggregatedError, RequestCancelled
from orchestrator.api.choices import CollectedChoice, PromptOnly
from orchestrator.api.direct import answer
from orchestrator.api.drafts import Draft
from orchestrator.api.fields import Fields
from orchestrator.api.jobs import Job, LateJob, PlainJob, prepare
from orchestrator.api.plain import PlainAnswer
from orchestrator.api.replies import collected_choice, streamed_choice
from orchestrator.api.shapes import Usage
from orchestrator.api.siblings import likeliest, run_many
from orchestrator.api.single import answer_single, stream_single
from orchestrator.api.sse import EventStream
from orchestrator.api.streamed import Streamed
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange, Rest
from orchestrator.request_run import TokenSink


def generate(door: FrontDoor, exchange: Exchange, body: bytes, *, is_chat: bool, arrived_s: float) -> Rest | None:
    """Begin to answer it. What is returned, if anything, has to be awaited for that.

    Raises:
        InvalidRequest: names the field and the limit.
        AdmissionError, QuotaExceeded: not now.
    """
    draft = Draft(door, exchange, Fields.parse(body), arrived_s=arrived_s, is_chat=is_chat)
    job = prepare(draft)
    if isinstance(job, PlainJob):
        door.metrics.request_began(stream=False)
        PlainAnswer(door, exchange, job.draft, job.request).begin()
        return None
    if isinstance(job, Job):
        return start(door, exchange, job)
    return functools.partial(_late, door, exchange, job)


async def _late(door: FrontDoor, exchange: Exchange, job: LateJob) -> None:
    rest = start(door, exchange, await job())
    if rest is not None:
        await rest()


def start(door: FrontDoor, exchange: Exchange, job: Job) -> Rest | None:
    """Run the job; what its client gets, whole or streamed. Returns and raises as `generate`."""
    door.metrics.request_began(stream=job.fields.stream)
    if job.is_single:
        (stream_single if job.fields.stream else answer_single)(door, exchange, job)
        return None
    return functools.partial(_stream if job.fields.stream else _collect, door, exchange, job)


async def _collect(door: FrontDoor, exchange: Exchange, job: Job) -> None:
    choices = [collected_choice(job, index) for index in range(len(job.requests))]
    usage = _with_reasoning(await _run_all(door, job, choices), choices)
    shown = likeliest(choices, job.fields.reply)

    def whole() -> bytes:
        return job.shape.whole([choice.reply() for choice in shown], usage)

    body = await asyncio.to_thread(whole) if any(choice.is_large for choice in shown) else whole()
    answer(exchange, body, job.headers, door.outbox)


async def _stream(door: FrontDoor, exchange: Exchange, job: Job) -> None:
    choices = [streamed_choice(job, index) for index in range(len(job.requests))]
    deadline_s = job.requests[0].deadline_s
    try:
        stream = EventStream(exchange, job.headers, choices, door.outbox)
        async with asyncio.timeout(deadline_s - door.clock() + 1.0):
            last_events = await _last_events(door, job, stream, choices)
            await stream.end(*last_events, job.shape.closing)
    except TimeoutError as error:  # the requests have an earlier deadline of their own: it is the client who is late
        raise RequestCancelled("the client did not read its stream in time") from error
    except ConnectionError as error:
        raise RequestCancelled("the client went away") from error
    exchange.answered()


async def _last_events(door: FrontDoor, job: Job, stream: EventStream, choices: Sequence[Streamed]) -> Sequence[bytes]:
    """Run the job to its end; what its client is told after the last token.

    An error before the first token has a status of its own; afterwards it is the last event.
    """
    try:
        usage = _with_reasoning(await _run_all(door, job, choices), choices)
        stream.gather()
        return [job.shape.usage(usage)] if job.fields.include_usage else []
    except DisaggregatedError as error:
        if not stream.is_open:
            raise
        door.metrics.error_answered(error)
        return [job.shape.failed(error)]


async def _run_all(door: FrontDoor, job: Job, sinks: Sequence[TokenSink]) -> Usage:
    """Every sequence of the job. One that fails ends the others: an answer is whole or it is an error. A prompt counts
    once, however many replies it has."""
    reply = job.fields.reply
    if reply.drops_tokens:
        sinks = [PromptOnly(sink) for sink in sinks]
    run, sequences = door.dispatcher.run, list(zip(job.requests, sinks, strict=True))
    stories = [await run(*sequences[0])] if len(sinks) == 1 else await run_many(run, sequences, num_each=reply.best_of)
    total = Usage(0, 0, 0)
    for index, story in enumerate(stories):
        num_tokens = 0 if reply.drops_tokens else story.num_tokens
        counts = index % reply.best_of == 0
        total += Usage(story.num_prompt_tokens * counts, story.num_cached_tokens * counts, num_tokens)
    return total


def _with_reasoning(usage: Usage, choices: Sequence[CollectedChoice | Streamed]) -> Usage:
    return usage + Usage(0, 0, 0, sum(choice.num_reasoning_tokens for choice in choices))
