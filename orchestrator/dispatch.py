"""From the queue to the servers, and to other servers when those are lost, until each request has its one outcome.

A request waits in the queue for a placement, goes through an attempt, and when the attempt fails goes back to the
queue with what it has so far. Cancelling it reaches every server at once. The queue is looked at whenever something may
have changed: a request came or ended, a server joined, was lost or has room again.

All of this is calls, from whoever brings the news to whoever waits for it: no request has a task of its own, and none
waits for a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable
from typing import Final, Protocol

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import (
    AdmissionError,
    DisaggregatedError,
    Draining,
    RequestCancelled,
    TransferError,
)
from disaggregated.request_life import Phase
from orchestrator.admission.tenant_turns import Waiting
from orchestrator.admission.ticket import Settle, settle_nothing
from orchestrator.admission.waiting_room import WaitingRoom
from orchestrator.attempt import TRANSFER_TIMEOUT_S, Attempt
from orchestrator.overdue import Overdue
from orchestrator.placing import RunPlacer
from orchestrator.request_run import RequestOver, RequestRun, TokenRequest, TokenSink
from orchestrator.retries import RetryRule
from orchestrator.routing.placement import Placement
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
            config.queue_depth_max, tenant_depth_max=config.door.tenant_queue_depth_max, turn_away=self._fail
        )
        self.queue = self.room.queue
        self.stories = StoryShelf(config.perf_metrics_max_requests)
        self._pools = pools
        self._placer = RunPlacer(config, pools)
        self._retry_rule = RetryRule(config.max_retries)
        self._observer = observer
        self.clock = clock
        self.landings: Overdue[Attempt] = Overdue(TRANSFER_TIMEOUT_S, Attempt.not_landed)
        self._deadlines: Overdue[RequestRun] = Overdue(config.request_timeout_s, self._deadline_passed)
        self._attempt_keys = itertools.count(secrets.randbits(48) << 24)
        self._running: dict[RequestRun, None] = {}
        """Those that are not over, in the order in which they began."""
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._is_stopping = False
        self._is_serving = False
        pools.on_change = self.serve_queue

    # In.

    async def run(self, request: TokenRequest, sink: TokenSink) -> RequestStory:
        """Generate one sequence into `sink`. Cancel this to cancel the request.

        Raises:
            DisaggregatedError: what `begin()` raises, or tells when it is over.
        """
        outcome: asyncio.Future[RequestStory] = asyncio.get_running_loop().create_future()

        def over(story: RequestStory, error: DisaggregatedError | None) -> None:
            if outcome.cancelled():
                return
            if error is None:
                outcome.set_result(story)
            else:
                outcome.set_exception(error)

        run = self.begin(request, sink, over)
        try:
            return await outcome
        except asyncio.CancelledError:
            self.cancel(run)
            raise

    def begin(self, request: TokenRequest, sink: TokenSink, over: RequestOver) -> RequestRun:
        """Generate one sequence into `sink`; `over` is called when it is, which may be before this returns.

        `over` is told of:
            NoServerAvailable: no generation server until the deadline.
            DeadlineExceeded: not finished by the deadline.
            Overloaded, QueueFull: others went before it.
            DisaggregatedError: it cannot be served, or its servers were lost too often.

        Raises:
            QueueFull, Overloaded, QuotaExceeded, Draining: it was not let in, and `over` is not called.
        """
        if self._is_stopping:
            raise _stopping()
        ticket, now_s = request.ticket, self.clock()
        settle: Settle = settle_nothing
        if ticket.charge is not None:
            num_answer = self.room.times.num_tokens(request.sampling.max_tokens)
            settle = ticket.charge(len(request.token_ids) + num_answer)
        run = RequestRun(request, sink, over, settle, now_s=now_s)
        self.stories.began(run.story)
        self._running[run] = None
        self._nothing_runs.clear()
        self._deadlines.expect(run, max(0.0, request.deadline_s - now_s))
        if not self._placer.wants_hashes(request):
            self._enter(run)
        elif len(request.token_ids) <= HASHED_AT_ONCE_MAX:
            run.block_hashes = self._placer.hashes(request)
            self._enter(run)
        else:
            run.hashing = asyncio.get_running_loop().create_task(self._hash_and_enter(run))
        return run

    async def _hash_and_enter(self, run: RequestRun) -> None:
        """Long prompts take milliseconds, so they are hashed on a thread."""
        run.block_hashes = await asyncio.to_thread(self._placer.hashes, run.request)
        run.hashing = None
        try:
            self._enter(run)
        except DisaggregatedError as error:
            run.over(run.story, error)

    def _enter(self, run: RequestRun) -> None:
        """Where nobody waits it goes to its servers as it comes. Raises what refuses it; it is over then."""
        request, now_s, is_idle = run.request, self.clock(), self.stories.num_running == 1
        placement = None
        try:
            passes = not self._is_serving and self.room.may_pass(request, now_s=now_s, is_idle=is_idle)
            if passes:
                placement = self._placer.place(run, now_s=now_s)
            if placement is None:
                run.waiting = self.room.enter(run, request, now_s=now_s, is_idle=is_idle)
        except DisaggregatedError as error:
            self._close(run, Phase.FAILED, error)
            raise
        if placement is not None:
            run.cost = self.room.passed(request, now_s=now_s)
            self._begin_alone(run, placement)
        elif not passes:
            self.serve_queue()

    # Out.

    def cancel(self, run: RequestRun) -> None:
        """Every server hears of it at once; `over` is not called any more. Of a request that is over: nothing."""
        if run in self._running:
            self._close(run, Phase.CANCELLED, RequestCancelled("the client went away"))

    def _deadline_passed(self, run: RequestRun) -> None:
        self._fail(run, self._too_late(run))

    def _fail(self, run: RequestRun, error: DisaggregatedError) -> None:
        self._close(run, Phase.FAILED, error)
        run.over(run.story, error)

    def _close(self, run: RequestRun, phase: Phase, error: DisaggregatedError | None) -> None:
        """Whatever it holds and wherever it stands is given back, and whoever waits for that is served."""
        now_s = self.clock()
        del self._running[run]
        self._deadlines.came(run)
        if run.hashing is not None:
            run.hashing.cancel()
        attempt, run.attempt = run.attempt, None
        if attempt is not None:
            attempt.stop()
            attempt.story.ended_s = now_s
        elif run.waiting is not None:
            self.queue.remove(run.waiting)
        run.end(phase, error, now_s=now_s)
        self.stories.ended(run.story)
        self.room.over(run.request, run.cost, run.story)
        run.waiting = None  # It would keep the run, and the run it.
        run.settle(run.story.num_prompt_tokens + run.story.num_tokens if run.story.attempts else 0)
        self._observer.request_ended(run.story)
        if not self._running:
            self._nothing_runs.set()
        if len(self.queue):
            self.serve_queue()

    async def stop(self, *, timeout_s: float) -> None:
        """Refuse requests from now on. Those under way may end; after `timeout_s` the rest is failed with Draining."""
        self._is_stopping = True
        if await self._wait_nothing_runs(timeout_s):
            return
        for run in list(self._running):
            if run in self._running:
                self._fail(run, self._too_late(run))
        await self._wait_nothing_runs(CUT_TIMEOUT_S)

    async def _wait_nothing_runs(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nothing_runs.wait()
        return self._nothing_runs.is_set()

    # AttemptOwner.

    def attempt_over(self, attempt: Attempt, error: DisaggregatedError | None) -> None:
        run = attempt.run
        attempt.story.ended_s = self.clock()
        if error is None:
            attempt.story.result = run.story.finish_reason
            self._close(run, Phase.FINISHED, None)
            run.over(run.story, None)
            return
        attempt.story.result = f"{type(error).__name__}: {error}"
        run.attempt = None
        if not self._goes_on(run, attempt, error):
            self._fail(run, error)
            return
        if len(self.queue):
            self.serve_queue()  # Before this one comes back, for whoever has waited for the room that it leaves.
        now_s = self.clock()
        run.life.advance(Phase.QUEUED, now_s=now_s)
        run.waiting = self.room.come_back(run, run.request, run.cost, now_s=now_s)
        self.serve_queue()

    def room_came(self) -> None:
        """In the middle of what somebody else is told: whoever waits is placed after that."""
        if len(self.queue):
            asyncio.get_running_loop().call_soon(self.serve_queue)

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

    def serve_queue(self) -> None:
        """Place whoever stands first while there is room. The first one is never overtaken: it would starve.

        An attempt may fail as it begins, which ends in a call of this: whoever is at it already sees what has changed.
        """
        if self._is_serving:
            return
        self._is_serving = True
        try:
            while len(self.queue) and (first := self.room.first(now_s=self.clock())) and self._place(first):
                pass
        finally:
            self._is_serving = False

    def _place(self, first: Waiting[RequestRun]) -> bool:
        """Whether there was room for it."""
        run = first.item
        placement = self._placer.place(run, now_s=self.clock())
        if placement is None:
            return False
        self.room.take(first, now_s=self.clock())
        run.cost = first.cost
        self._begin(run, placement)
        return True

    def _begin(self, run: RequestRun, placement: Placement) -> None:
        run.attempt = attempt = Attempt(run, placement, next(self._attempt_keys), self)
        attempt.hint = self._placer.hint(run, placement)
        attempt.begin()

    def _begin_alone(self, run: RequestRun, placement: Placement) -> None:
        """Nobody waited. If it fails as it begins it is looked at when this is over, as in `serve_queue()`."""
        self._is_serving = True
        try:
            self._begin(run, placement)
        finally:
            self._is_serving = False
        if self.queue.length:
            self.serve_queue()

    def _too_late(self, run: RequestRun) -> DisaggregatedError:
        now_s = self.clock()
        if self._is_stopping and now_s < run.request.deadline_s:
            return _stopping()
        return self._placer.too_late(run, now_s=now_s)

    def retry_after_s(self) -> int:
        return self.room.retry_after_s(now_s=self.clock())

    def check_idle(self) -> None:
        """Nothing is queued, running or held; for tests and for `/ledger`."""
        self.queue.check_integrity()
        assert len(self.queue) == 0, "somebody still waits"
        assert self.stories.num_running == 0, "somebody still runs"
        for server in self._pools:
            server.load.check_integrity()
        held = {server.instance_id: list(server.shares) for server in self._pools if server.shares}
        assert not held, f"shares are still held: {held}"


def _stopping() -> Draining:
    return Draining("the orchestrator is stopping")
