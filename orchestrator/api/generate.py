"""POST /v1/chat/completions and /v1/completions: from a checked job to an answer or a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from disaggregated.errors import DisaggregatedError, RequestCancelled
from orchestrator.api.choices import CollectedChoice, PromptOnly, StreamedChoice
from orchestrator.api.counted import CountedChoice
from orchestrator.api.direct import send_json
from orchestrator.api.jobs import Job, chat_job, completion_job
from orchestrator.api.reply_fields import ReplyFields
from orchestrator.api.shapes import Usage
from orchestrator.api.siblings import likeliest, run_many
from orchestrator.api.sse import EventStream
from orchestrator.front_door import FrontDoor
from orchestrator.request_run import TokenRequest, TokenSink
from orchestrator.story import RequestStory


async def chat_completions(door: FrontDoor, http: web.Request) -> web.StreamResponse:
    return await answer(door, http, await chat_job(door, http))


async def completions(door: FrontDoor, http: web.Request) -> web.StreamResponse:
    return await answer(door, http, await completion_job(door, http))


async def answer(door: FrontDoor, http: web.Request, job: Job) -> web.StreamResponse:
    """Run the job; what its client gets, whole or streamed."""
    door.metrics.request_began(stream=job.fields.stream)
    return await (_stream(door, http, job) if job.fields.stream else _collect(door, http, job))


async def _collect(door: FrontDoor, http: web.Request, job: Job) -> web.StreamResponse:
    choices = [
        CollectedChoice(job.text_of(request), job.parser(), job.beside_of(request), echoed=job.echoed_to(index))
        for index, request in enumerate(job.requests)
    ]
    usage = _with_reasoning(await _run_all(door, job, choices), choices)
    shown = likeliest(choices, job.fields.reply)

    def whole() -> bytes:
        return job.shape.whole([choice.reply() for choice in shown], usage)

    body = await asyncio.to_thread(whole) if any(choice.is_large for choice in shown) else whole()
    return await send_json(http, body, job.headers, door.outbox)


async def _stream(door: FrontDoor, http: web.Request, job: Job) -> web.StreamResponse:
    choices = [_streamed(job, index, request) for index, request in enumerate(job.requests)]

    def flush() -> None:
        for choice in choices:
            choice.flush()

    deadline_s = job.requests[0].deadline_s
    try:
        stream = EventStream(http, job.headers, flush, door.outbox)
        for choice in choices:
            choice.stream = stream
        async with asyncio.timeout(deadline_s - door.clock() + 1.0):
            last_events = await _last_events(door, job, stream, choices)
            return await stream.end(*last_events, job.shape.closing)
    except TimeoutError as error:  # the requests have an earlier deadline of their own: it is the client who is late
        stream.abort()
        raise RequestCancelled("the client did not read its stream in time") from error
    except ConnectionError as error:
        raise RequestCancelled("the client went away") from error


def _streamed(job: Job, index: int, request: TokenRequest) -> StreamedChoice:
    made = (index, job.shape, job.text_of(request), job.parser(), job.beside_of(request))
    if job.fields.counts_always:
        return CountedChoice(*made, echoed=job.echoed_to(index), num_prompt_tokens=len(request.token_ids))
    return StreamedChoice(*made, echoed=job.echoed_to(index))


async def _last_events(
    door: FrontDoor, job: Job, stream: EventStream, choices: Sequence[StreamedChoice]
) -> Sequence[bytes]:
    """Run the job to its end; what its client is told after the last token.

    An error before the first token has a status of its own; afterwards it is the last event.
    """
    try:
        usage = _with_reasoning(await _run_all(door, job, choices), choices)
        return [job.shape.usage(usage)] if job.fields.include_usage else []
    except DisaggregatedError as error:
        if not stream.is_open:
            raise
        door.metrics.error_answered(error)
        return [job.shape.failed(error)]


async def _run_all(door: FrontDoor, job: Job, sinks: Sequence[TokenSink]) -> Usage:
    """Every sequence of the job. One that fails ends the others: an answer is whole or it is an error."""
    reply = job.fields.reply
    if reply.drops_tokens:
        sinks = [PromptOnly(sink) for sink in sinks]
    run = door.dispatcher.run
    if len(sinks) == 1:
        stories = [await run(job.requests[0], sinks[0])]
    else:
        stories = await run_many(run, list(zip(job.requests, sinks, strict=True)), num_each=reply.best_of)
    return _usage(stories, reply)


def _with_reasoning(usage: Usage, choices: Sequence[CollectedChoice | StreamedChoice]) -> Usage:
    return usage + Usage(0, 0, 0, sum(choice.num_reasoning_tokens for choice in choices))


def _usage(stories: Sequence[RequestStory], reply: ReplyFields) -> Usage:
    """A prompt counts once, however many replies it has."""
    total = Usage(0, 0, 0)
    for index, story in enumerate(stories):
        num_tokens = 0 if reply.drops_tokens else story.num_tokens
        counts = index % reply.best_of == 0
        total += Usage(story.num_prompt_tokens * counts, story.num_cached_tokens * counts, num_tokens)
    return total
