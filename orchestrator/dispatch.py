"""From the queue to the servers, and to other servers when those are lost, until each request has its one outcome.

Every request has one coroutine, `run()`: it waits in the queue for a placement, goes through an attempt, and when the
attempt fails goes back to the queue with what it has so far. Cancelling it reaches every server at once. The queue is
looked at whenever something may have changed: a request came or ended, a server joined, was lost or has room again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from disaggregated import logs
from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import (
    AdmissionError,
    DeadlineExceeded,
    DisaggregatedError,
    Draining,
    NoServerAvailable,
    RequestCancelled,
    TransferError,
)
from disaggregated.request_life import Phase
from orchestrator.admission.tenant_turns import Waiting
from orchestrator.admission.ticket import Settle
from orchestrator.admission.waiting_room import Visitor, WaitingRoom
from orchestrator.attempt import Attempt
from orchestrator.request_run import RequestRun, TokenRequest, TokenSink
from orchestrator.retries import TRANSFER_FAILURES_MAX, RetryRule
from orchestrator.routing.make import make_placer
from orchestrator.routing.placement import Needs, NotYet
from orchestrator.routing.prefix_hints import prefix_hint
from orchestrator.server import Role
from orchestrator.server_pools import ServerPools
from orchestrator.story import RequestStory, StoryShelf

log = logs.get(__name__)

HASHED_AT_ONCE_MAX: Final = 8192
"""Tokens; half a millisecond."""
CUT_TIMEOUT_S: Final = 0.5
"""From ending a request by force to its being over: its servers are only told, not waited for."""


class RequestObserver(Protocol):
    """Counts what happens. Called on the event loop."""

    def attempt_failed(self, error: DisaggregatedError, *, goes_on: bool) -> None: ...

    def request_ended(self, story: RequestStory) -> None: ...


class Dispatcher:
    """Invariant: a request is in the queue, or has one attempt that holds shares of its servers, or is over."""

    def __init__(
        self,
        config: DeploymentConfig,
        pools: ServerPools,
        *,
        observer: RequestObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.room: WaitingRoom[RequestRun] = WaitingRoom(
            config.queue_depth_max, tenant_depth_max=config.door.tenant_queue_depth_max, turn_away=_turn_away
        )
        self.queue = self.room.queue
        self.stories = StoryShelf(config.perf_metrics_max_requests)
        self._pools = pools
        self._placer = make_placer(config)
        pools.follows_blocks = pools.follows_blocks or self._placer.wants_blocks
        self._retry_rule = RetryRule(config.max_retries)
        self._observer = observer
        self._clock = clock
        self._attempt_keys = itertools.count(secrets.randbits(48) << 24)
        self._patience: set[asyncio.Timeout] = set()
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._is_stopping = False
        pools.on_change = self.serve_queue

    async def run(self, request: TokenRequest, sink: TokenSink) -> RequestStory:
        """Generate one sequence into `sink`. Cancel this to cancel the request.

        Raises:
            QueueFull, Overloaded, QuotaExceeded, Draining: nothing was begun.
            NoServerAvailable: no generation server until the deadline.
            DeadlineExceeded: not finished by the deadline.
            DisaggregatedError: it cannot be served, or its servers were lost too often.
        """
        if self._is_stopping:
            raise _stopping()
        num_answer = self.room.times.num_tokens(request.sampling.max_tokens)
        settle = request.ticket.charge(len(request.token_ids) + num_answer)
        run = RequestRun(request, sink, now_s=self._clock())
        self.stories.began(run.story)
        self._nothing_runs.clear()
        patience = asyncio.timeout(max(0.0, request.deadline_s - self._clock()))
        try:
            async with patience:
                self._patience.add(patience)
                run.block_hashes = await self._hashes(request)
                await self._until_over(run)
        except TimeoutError as timeout:
            error = self._too_late(run)
            run.end(Phase.FAILED, error, now_s=self._clock())
            raise error from timeout
        except DisaggregatedError as error:
            run.end(Phase.FAILED, error, now_s=self._clock())
            raise
        except asyncio.CancelledError:
            run.end(Phase.CANCELLED, RequestCancelled("the client went away"), now_s=self._clock())
            raise
        finally:
            self._patience.discard(patience)
            self.stories.ended(run.story)
            self._settle(run, settle)
            self._observer.request_ended(run.story)
            if not self.stories.num_running:
                self._nothing_runs.set()
        return run.story

    def _settle(self, run: RequestRun, settle: Settle) -> None:
        self.room.over(run.waiting, run.story)
        settle(run.story.num_prompt_tokens + run.story.num_tokens if run.story.attempts else 0)

    async def stop(self, *, timeout_s: float) -> None:
        """Refuse requests from now on. Those under way may end; after `timeout_s` the rest is failed with Draining."""
        self._is_stopping = True
        if await self._wait_nothing_runs(timeout_s):
            return
        for patience in self._patience:
            if not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())
        await self._wait_nothing_runs(CUT_TIMEOUT_S)

    async def _wait_nothing_runs(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nothing_runs.wait()
        return self._nothing_runs.is_set()

    async def _hashes(self, request: TokenRequest) -> Sequence[BlockHash]:
        """Once for a request, where somebody wants to know them. Long prompts take milliseconds, on a thread."""
        block_size = self._pools.block_size
        is_wanted = self._placer.wants_blocks or any(len(server.known_blocks) for server in self._pools)
        if not block_size or not is_wanted or request.sampling.prompt_logprobs is not None:  # Then all is computed.
            return ()
        if len(request.token_ids) <= HASHED_AT_ONCE_MAX:
            return list(block_hashes(request.token_ids, block_size, salt=request.cache_salt))
        return await asyncio.to_thread(
            lambda: list(block_hashes(request.token_ids, block_size, salt=request.cache_salt))
        )

    async def _until_over(self, run: RequestRun) -> None:
        while True:
            attempt = await self._placed(run)
            try:
                await attempt.go()
                attempt.story.result = run.story.finish_reason
                return
            except DisaggregatedError as error:
                attempt.story.result = f"{type(error).__name__}: {error}"
                if not self._goes_on(run, attempt, error):
                    raise
            finally:
                attempt.story.ended_s = self._clock()
                attempt.give_back()
                self.serve_queue()
            run.life.advance(Phase.QUEUED, now_s=self._clock())

    def _goes_on(self, run: RequestRun, attempt: Attempt, error: DisaggregatedError) -> bool:
        run.avoid = frozenset(attempt.culprits)
        if not isinstance(error, AdmissionError):
            run.num_losses_in_a_row += 1
        if isinstance(error, TransferError):
            run.num_transfer_failures += 1
        goes_on = self._retry_rule.goes_on(error, num_losses_in_a_row=run.num_losses_in_a_row)
        self._observer.attempt_failed(error, goes_on=goes_on)
        log.debug("attempt_failed", request_id=run.request.request_id, error=repr(error), goes_on=goes_on)
        return goes_on

    # The queue.

    async def _placed(self, run: RequestRun) -> Attempt:
        """Wait for servers. The attempt that comes holds their shares already."""
        placed: asyncio.Future[Attempt] = asyncio.get_running_loop().create_future()
        run.placed = placed
        if run.waiting is None:
            run.waiting = self._enter(run)
        else:
            deadline_s = run.request.deadline_s
            run.waiting = self.room.come_back(run.waiting, deadline_s=deadline_s, now_s=self._clock())
        self.serve_queue()
        try:
            return await placed
        except asyncio.CancelledError:
            self.queue.remove(run.waiting)
            if placed.done() and not placed.cancelled() and placed.exception() is None:
                placed.result().give_back()
            self.serve_queue()
            raise

    def _enter(self, run: RequestRun) -> Waiting[RequestRun]:
        request = run.request
        visitor = Visitor(
            item=run,
            ticket=request.ticket,
            num_prompt=len(request.token_ids),
            max_tokens=request.sampling.max_tokens,
            priority=request.priority,
            arrived_s=request.arrived_s,
            deadline_s=request.deadline_s,
        )
        return self.room.enter(visitor, now_s=self._clock(), is_idle=self.stories.num_running == 1)

    def serve_queue(self) -> None:
        """Place whoever stands first while there is room. The first one is never overtaken: it would starve."""
        while (first := self.room.first(now_s=self._clock())) is not None:
            run = first.item
            assert run.placed is not None, "it stands in the queue without waiting"
            if run.placed.done():  # It was cancelled, and has not run since to leave the queue by itself.
                self.queue.remove(first)
                continue
            placement = self._placer.place(
                self._needs(run), self._pools.of(Role.CONTEXT), self._pools.of(Role.GENERATION)
            )
            if isinstance(placement, NotYet):
                run.not_yet = placement
                return
            self.room.take(first, now_s=self._clock())
            attempt = Attempt(run, placement, next(self._attempt_keys), clock=self._clock, on_room=self._room_came)
            if placement.context is not None and placement.context.pulls_back:
                attempt.hint = prefix_hint(run.block_hashes, placement.context, self._pools.ready(Role.GENERATION))
            run.placed.set_result(attempt)

    def _room_came(self) -> None:
        """In the middle of what somebody else is told: whoever waits is placed after that."""
        if len(self.queue):
            asyncio.get_running_loop().call_soon(self.serve_queue)

    def _needs(self, run: RequestRun) -> Needs:
        failures = run.num_transfer_failures
        return Needs(
            num_prompt_tokens=len(run.request.token_ids) + len(run.emitted),
            num_tokens_left=run.num_tokens_left,
            avoid=run.avoid,
            must_be_local=f"{failures} transfers failed" if failures >= TRANSFER_FAILURES_MAX else "",
            session=run.request.session,
            context_session=run.request.context_session,
            block_hashes=run.block_hashes,
            now_s=self._clock(),
        )

    def _too_late(self, run: RequestRun) -> DisaggregatedError:
        if self._clock() < run.request.deadline_s and self._is_stopping:
            return _stopping()
        waited_s = self._clock() - run.request.arrived_s
        if run.life.phase is not Phase.QUEUED:
            return DeadlineExceeded(f"not finished after {waited_s:.1f} s, {len(run.emitted)} tokens were generated")
        not_yet = run.not_yet or NotYet("others stand before it")
        if not self._pools.ready(Role.GENERATION):
            return NoServerAvailable(f"no generation server is ready; waited {waited_s:.1f} s")
        if not_yet.is_for_want_of_servers:
            return NoServerAvailable(f"{not_yet.reason}; waited {waited_s:.1f} s")
        return DeadlineExceeded(f"waited {waited_s:.1f} s in the queue: {not_yet.reason}")

    def retry_after_s(self) -> int:
        return self.room.retry_after_s(now_s=self._clock())

    def check_idle(self) -> None:
        """Nothing is queued, running or held; for tests and for `/ledger`."""
        self.queue.check_integrity()
        assert len(self.queue) == 0, "somebody still waits"
        assert self.stories.num_running == 0, "somebody still runs"
        held = {server.instance_id: list(server.shares) for server in self._pools if server.shares}
        assert not held, f"shares are still held: {held}"


def _turn_away(run: RequestRun, error: DisaggregatedError) -> None:
    assert run.placed is not None, "it stands in the queue without waiting"
    if not run.placed.done():
        run.placed.set_exception(error)


def _stopping() -> Draining:
    return Draining("the orchestrator is stopping")
