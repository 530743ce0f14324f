"""The engine's own thread: forward passes on it, everything else on the event loop.

Commands come in through one queue and are carried out between two steps, in the order in which they were given; events
go out through `on_events`. Without work the thread sleeps until a command comes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from disaggregated.block_hash import BlockHash
from disaggregated.engine.api import EngineEvent, EngineRequest, EngineStatistics, RequestFailed, Reservation
from disaggregated.engine.block_events import BlockSnapshot
from disaggregated.engine.block_feed import BlockFeed
from disaggregated.engine.block_pool import LedgerEntry
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.layer_watch import LayerWatcher
from disaggregated.engine.prefix_holdings import PrefixReservation
from disaggregated.errors import AdmissionError, DisaggregatedError, Draining, InvalidRequest, QueueFull, ServerLost

Answer = TypeVar("Answer")


class EngineThread:
    """Owns `engine` from start() on; every method may be called from any thread and none of them waits but stop().

    `on_events` is called on this thread with what a step, or a refused submit(), brought. `on_crash` is called on it
    at most once, when anything is raised that is not an answer to a request: the engine is lost then, and whoever
    waits for an answer gets ServerLost.

    The queue holds `num_commands_max` commands. When it is full, submit() and reserve() refuse with QueueFull; admit(),
    release() and cancel() are taken all the same, since they end what was accepted and are few for each request.
    """

    def __init__(
        self,
        engine: LLMEngine,
        on_events: Callable[[Sequence[EngineEvent]], None],
        on_crash: Callable[[BaseException], None],
        *,
        num_commands_max: int = 4096,
    ) -> None:
        self._engine = engine
        engine.call_between_steps_by(self._put)
        self.block_feed = BlockFeed(engine.event_buffer_max_size)
        """Tells watchers on other threads what the prefix cache gains and loses."""
        engine.call_before_computing(self._publish_block_events)
        self._on_events = on_events
        self._on_crash = on_crash
        self._num_commands_max = num_commands_max
        self._commands: deque[Callable[[], object]] = deque()
        self._unanswered: set[Future[Any]] = set()
        self._changed = threading.Condition()
        self._closed_because: Callable[[], DisaggregatedError] | None = None
        """Makes the error for whoever comes now; None while new work is taken."""
        self._statistics = engine.statistics()
        self._busy_since_s: float | None = None
        """When the step that is under way began; None while there is nothing to do."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def watch_layers(self, watcher: LayerWatcher) -> bool:
        """Before start(). The watcher is called on this thread; False: the engine tells of whole steps only."""
        return self._engine.watch_layers(watcher)

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float) -> None:
        """Finish the current step, carry out the commands given so far, and end. Requests still there are left.

        Raises:
            TimeoutError: the step was not over within `deadline_s` from now; the thread dies with the process.
        """
        self._close(lambda: Draining("the engine is stopping"))
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's current step has not ended within {deadline_s} s")

    def submit(self, request: EngineRequest) -> None:
        """Queue a FULL or PREFILL_ONLY request; if the engine refuses it, a RequestFailed event says why.

        Raises:
            QueueFull, Draining, ServerLost: nothing was taken.
        """
        self._put_bounded(lambda: self._submit(request))

    def reserve(self, request: EngineRequest) -> Future[Reservation]:
        """Answered between two steps, with a Reservation or the error of `LLMEngine.reserve`.

        Who stops waiting for the answer calls release(), which is carried out after it: nothing stays reserved.

        Raises:
            QueueFull, Draining, ServerLost: nothing was taken.
        """
        return self._ask(lambda: self._engine.reserve(request))

    def admit(self, request_id: str, first_token: int) -> None:
        self._put(lambda: self._engine.admit(request_id, first_token))

    def lend(self, owner: str, hashes: Sequence[BlockHash]) -> Future[tuple[int, ...]]:
        """Answered between two steps, as of `LLMEngine.lend`. Who stops waiting calls release(), as after reserve().

        Raises as reserve() does.
        """
        return self._ask(lambda: self._engine.lend(owner, hashes))

    def reserve_prefix(
        self, owner: str, hashes: Sequence[BlockHash], num_wanted: Callable[[int], int]
    ) -> Future[PrefixReservation]:
        """As of `LLMEngine.reserve_prefix`; the same holds as for lend()."""
        return self._ask(lambda: self._engine.reserve_prefix(owner, hashes, num_wanted))

    def land_prefix(self, owner: str, num_blocks: int) -> None:
        self._put(lambda: self._engine.land_prefix(owner, num_blocks))

    def release(self, request_id: str) -> None:
        self._put(lambda: self._engine.release(request_id))

    def cancel(self, request_id: str) -> None:
        self._put(lambda: self._engine.cancel(request_id))

    def statistics(self) -> EngineStatistics:
        """As of the last step or command, but for `step_age_s`, which is of now. Takes no lock."""
        busy_since_s = self._busy_since_s
        step_age_s = 0.0 if busy_since_s is None else time.monotonic() - busy_since_s
        return dataclasses.replace(self._statistics, step_age_s=step_age_s)

    def ledger(self) -> Future[list[LedgerEntry]]:
        """Who holds blocks, as of the end of the current step. Raises as reserve() does."""
        return self._ask(self._engine.ledger)

    def block_snapshot(self) -> Future[BlockSnapshot]:
        """What can be found; the feed's later events come on top of it. Raises as reserve() does."""
        return self._ask(self._block_snapshot)

    def check_integrity(self) -> Future[None]:
        """Answered between two steps; a broken invariant is a crash, as anywhere else. Raises as reserve() does."""
        return self._ask(self._engine.check_integrity)

    # On the caller's thread.

    def _put(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _put_bounded(self, command: Callable[[], object]) -> None:
        with self._changed:
            if self._closed_because is not None:
                raise self._closed_because()
            if len(self._commands) >= self._num_commands_max:
                raise QueueFull(f"{len(self._commands)} commands wait for the engine's current step, that is the limit")
            self._commands.append(command)
            self._changed.notify()

    def _ask(self, question: Callable[[], Answer]) -> Future[Answer]:
        answer: Future[Answer] = Future()
        self._unanswered.add(answer)
        try:
            self._put_bounded(lambda: self._answer(question, answer))
        except DisaggregatedError:
            self._unanswered.discard(answer)
            raise
        return answer

    def _close(self, reason: Callable[[], DisaggregatedError]) -> None:
        with self._changed:
            self._closed_because = self._closed_because or reason
            self._changed.notify()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            while True:
                commands, is_last = self._take_commands()
                for command in commands:
                    command()
                if commands:  # Otherwise nothing has changed since the step before.
                    self._publish_statistics()
                    self._publish_block_events()
                if is_last:
                    return
                if self._engine.has_work:
                    events = self._engine.step()
                    self._publish_statistics()
                    self._publish_block_events()
                    if events:
                        self._on_events(events)
        except BaseException as error:  # noqa: BLE001  # The thread's edge; the owner is told, and ends the process.
            self._crash(error)

    def _take_commands(self) -> tuple[list[Callable[[], object]], bool]:
        """Sleep until there is something to do; the commands given so far, and whether they are the last."""
        with self._changed:
            while not (self._commands or self._engine.has_work or self._closed_because is not None):
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
            return commands, self._closed_because is not None

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except (AdmissionError, InvalidRequest) as error:
            self._on_events([RequestFailed(request_id=request.request_id, error=error)])

    def _answer(self, question: Callable[[], Answer], answer: Future[Answer]) -> None:
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(question())
            except (AdmissionError, InvalidRequest) as error:
                answer.set_exception(error)
        self._unanswered.discard(answer)

    def _publish_block_events(self) -> None:
        self.block_feed.publish(self._engine.take_block_events())

    def _block_snapshot(self) -> BlockSnapshot:
        """What is in it is told before it, so that every event after it is news."""
        self._publish_block_events()
        return self._engine.block_snapshot()

    def _publish_statistics(self) -> None:
        self._statistics = self._engine.statistics()
        self._busy_since_s = time.monotonic() if self._engine.has_work else None

    def _crash(self, error: BaseException) -> None:
        def reason() -> ServerLost:
            return ServerLost(f"the engine crashed: {error!r}")

        self._close(reason)
        for answer in list(self._unanswered):
            if answer.running() or answer.set_running_or_notify_cancel():
                answer.set_exception(reason())
        self._on_crash(error)
