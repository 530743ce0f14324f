"""Several replies to one prompt: the prompt is computed once, and the likeliest replies may be chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from disaggregated.token_logprobs import Told
from orchestrator.api.choices import CollectedChoice
from orchestrator.api.reply_fields import ReplyFields
from orchestrator.request_run import TokenRequest, TokenSink
from orchestrator.story import RequestStory

SHARED_PROMPT_TOKENS_MIN: Final = 64
"""Of a shorter prompt, to compute it again costs less than to wait for it."""

Run = Callable[[TokenRequest, TokenSink], Awaitable[RequestStory]]


async def run_many(
    run: Run, sequences: Sequence[tuple[TokenRequest, TokenSink]], *, num_each: int
) -> list[RequestStory]:
    """All `sequences`, `num_each` for each prompt, next to each other. The first one that fails ends the others.

    Of those with the same prompt the first goes ahead until its prompt is computed: the others find it in the cache.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[RequestStory]] = []
            for begin in range(0, len(sequences), num_each):
                tasks += _start_siblings(group, run, sequences[begin : begin + num_each])
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def _start_siblings(
    group: asyncio.TaskGroup, run: Run, siblings: Sequence[tuple[TokenRequest, TokenSink]]
) -> list[asyncio.Task[RequestStory]]:
    (first, sink), *others = siblings
    if not others or len(first.token_ids) < SHARED_PROMPT_TOKENS_MIN:
        return [group.create_task(_run(run, request, sink, None)) for request, sink in siblings]
    is_computed = asyncio.Event()
    ahead = group.create_task(_run(run, first, _Noticed(sink, is_computed), None))
    return [ahead, *(group.create_task(_run(run, request, other, is_computed)) for request, other in others)]


async def _run(run: Run, request: TokenRequest, sink: TokenSink, after: asyncio.Event | None) -> RequestStory:
    """When the first one fails, whoever waits for `after` is cancelled with the group."""
    if after is not None:
        await after.wait()
    return await run(request, sink)


class _Noticed:
    """Implements `TokenSink`: the first token says that the prompt is computed."""

    def __init__(self, sink: TokenSink, is_computed: asyncio.Event) -> None:
        self._sink = sink
        self._is_computed = is_computed

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        self._is_computed.set()
        return self._sink.push(token_ids, finish_reason, told)


def likeliest(choices: Sequence[CollectedChoice], wanted: ReplyFields) -> list[CollectedChoice]:
    """Of each prompt's choices the `n` whose tokens were the likeliest on average, the best one first."""
    if wanted.best_of == wanted.n:
        return list(choices)
    groups = [choices[begin : begin + wanted.best_of] for begin in range(0, len(choices), wanted.best_of)]
    return [
        choice
        for group in groups
        for choice in sorted(group, key=lambda choice: choice.mean_logprob, reverse=True)[: wanted.n]
    ]
