"""The engine behind its thread. Nothing here sleeps: each wait is for an event, with a deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from disaggregated.engine.api import (
    EngineEvent,
    EngineRequest,
    RequestFailed,
    RequestKind,
    ScheduledSequence,
    TokensSampled,
)
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import Draining, PoolExhausted, PromptTooLong, QueueFull, ServerLost
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_runner import FakeModelRunner, oracle

WAIT_S = 10.0


def request(
    request_id: str,
    *,
    first_token: int = 0,
    num_tokens: int = 5,
    max_tokens: int = 4,
    kind: RequestKind = RequestKind.FULL,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        kind=kind,
        token_ids=tuple(range(first_token, first_token + num_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


class GatedRunner(FakeModelRunner):
    """A step that has begun ends when the test lets it, or raises what the test gives it."""

    def __init__(self) -> None:
        super().__init__(num_blocks=16, block_size=4)
        self.begun = threading.Semaphore(0)
        self.is_open = threading.Event()
        self.is_open.set()
        self.error: BaseException | None = None

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        self.begun.release()
        assert self.is_open.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return super().execute(batch)


class CountingEngine(LLMEngine):
    num_calls = 0

    def step(self) -> list[EngineEvent]:
        self.num_calls += 1
        return super().step()


class Server:
    """What a server makes of its engine thread: events in one queue, crashes in another."""

    def __init__(self, *, num_commands_max: int = 100) -> None:
        self.runner = GatedRunner()
        limits = EngineLimits(num_blocks=16, block_size=4, max_num_tokens=8, max_batch_size=4, max_seq_len=60)
        self.engine = CountingEngine(self.runner, limits, EngineOptions(event_buffer_max_size=100))
        self.events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        self.crashes: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.thread = EngineThread(self.engine, self.hear, self.crashes.put, num_commands_max=num_commands_max)

    def hear(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            self.events.put(event)

    def tokens(self, request_id: str) -> list[int]:
        """Wait until the request has ended."""
        token_ids: list[int] = []
        while True:
            event = self.events.get(timeout=WAIT_S)
            if isinstance(event, TokensSampled) and event.request_id == request_id:
                token_ids += event.token_ids
                if event.finish_reason is not None:
                    return token_ids

    def hold_in_a_step(self) -> None:
        """Afterwards the engine thread is inside a step, and stays there until `runner.is_open` is set."""
        self.runner.is_open.clear()
        self.thread.submit(request("holder", max_tokens=50))
        assert self.runner.begun.acquire(timeout=WAIT_S)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    yield server
    server.runner.is_open.set()
    server.thread.stop(WAIT_S)
    assert "engine" not in {thread.name for thread in threading.enumerate()}


def test_a_submitted_request_is_computed_and_its_events_arrive(server: Server) -> None:
    server.thread.submit(request("one"))
    assert server.tokens("one") == oracle(range(5), SamplingParams(max_tokens=4), max_seq_len=60)[0]
    assert server.thread.ledger().result(WAIT_S) == []


def test_a_request_that_the_engine_refuses_is_told_by_an_event(server: Server) -> None:
    server.thread.submit(request("long", num_tokens=60))
    event = server.events.get(timeout=WAIT_S)
    assert isinstance(event, RequestFailed)
    assert isinstance(event.error, PromptTooLong)
    server.thread.submit(request("one"))
    assert len(server.tokens("one")) == 4


def test_a_reservation_is_answered_and_goes_on_once_admitted(server: Server) -> None:
    remote = request("one", kind=RequestKind.FROM_REMOTE)
    tokens = oracle(remote.token_ids, remote.sampling, max_seq_len=60)[0]
    reservation = server.thread.reserve(remote).result(WAIT_S)
    server.runner.fill(reservation.block_ids, remote.token_ids)
    server.thread.admit("one", tokens[0])
    assert server.tokens("one") == tokens[1:]


def test_a_refused_reservation_raises_where_it_is_awaited(server: Server) -> None:
    held = server.thread.reserve(request("one", num_tokens=50, kind=RequestKind.FROM_REMOTE))
    assert len(held.result(WAIT_S).block_ids) == 13
    with pytest.raises(PoolExhausted):
        server.thread.reserve(request("two", num_tokens=50, kind=RequestKind.FROM_REMOTE)).result(WAIT_S)
    server.thread.release("one")
    assert server.thread.ledger().result(WAIT_S) == []


def test_a_reservation_given_up_before_its_answer_holds_nothing(server: Server) -> None:
    server.hold_in_a_step()
    answer = server.thread.reserve(request("one", kind=RequestKind.FROM_REMOTE))
    assert answer.cancel()
    with pytest.raises(CancelledError):
        answer.result(WAIT_S)
    server.thread.release("one")
    server.thread.cancel("holder")
    server.runner.is_open.set()
    assert server.thread.ledger().result(WAIT_S) == []


def test_commands_are_carried_out_in_their_order_after_the_current_step(server: Server) -> None:
    server.hold_in_a_step()
    server.thread.submit(request("one"))
    server.thread.cancel("one")
    server.thread.submit(request("one", max_tokens=2))
    server.runner.is_open.set()
    assert len(server.tokens("one")) == 2


def test_a_cancelled_request_falls_silent_within_the_current_step(server: Server) -> None:
    server.hold_in_a_step()
    server.thread.cancel("holder")
    server.runner.is_open.set()
    server.thread.check_integrity().result(WAIT_S)
    heard = server.events.qsize()
    server.thread.submit(request("one"))
    server.tokens("one")
    assert heard <= 2  # The chunk and the token of the step that was under way.
    assert server.thread.ledger().result(WAIT_S) == []


def test_a_full_queue_refuses_new_work_but_never_the_end_of_old() -> None:
    server = Server(num_commands_max=2)
    server.thread.start()
    server.hold_in_a_step()
    server.thread.submit(request("a"))
    server.thread.submit(request("b"))
    with pytest.raises(QueueFull, match="that is the limit"):
        server.thread.submit(request("c"))
    with pytest.raises(QueueFull):
        server.thread.reserve(request("c", kind=RequestKind.FROM_REMOTE))
    for request_id in ("a", "b", "holder"):
        server.thread.cancel(request_id)
    server.runner.is_open.set()
    server.thread.stop(WAIT_S)
    assert server.engine.ledger() == []


def test_the_age_of_a_step_grows_while_it_hangs_and_is_zero_when_idle(server: Server) -> None:
    assert server.thread.statistics().step_age_s == 0.0
    server.hold_in_a_step()
    ages = [server.thread.statistics().step_age_s for _ in range(1000)]
    assert ages == sorted(ages)
    assert ages[-1] > 0.0
    assert server.thread.statistics().step == 0
    server.runner.is_open.set()
    server.tokens("holder")
    server.thread.check_integrity().result(WAIT_S)  # So that the last step's statistics are out.
    assert server.thread.statistics().step == 50
    assert server.thread.statistics().step_age_s == 0.0


def test_what_is_evicted_for_a_step_is_told_before_the_step_ends(server: Server) -> None:
    """It may take seconds, in which somebody might still be sent here for those blocks."""
    for number in range(3):
        server.thread.submit(request(f"r{number}", first_token=100 * number + 100, num_tokens=20, max_tokens=1))
        server.tokens(f"r{number}")
    while server.runner.begun.acquire(blocking=False):
        """Steps that are over."""
    with server.thread.block_feed.watching(lambda: None) as watcher:
        watcher.collect()
        server.hold_in_a_step()
        assert [event.is_added for event in watcher.take() or ()] == [False]


def test_a_crash_is_told_once_and_whoever_waits_or_comes_later_gets_an_error() -> None:
    server = Server()
    server.thread.start()
    server.hold_in_a_step()
    waiting = server.thread.reserve(request("one", kind=RequestKind.FROM_REMOTE))
    given_up = server.thread.reserve(request("two", kind=RequestKind.FROM_REMOTE))
    given_up.cancel()
    server.runner.error = RuntimeError("device lost")
    server.runner.is_open.set()
    assert server.crashes.get(timeout=WAIT_S) is server.runner.error
    with pytest.raises(ServerLost, match="device lost"):
        waiting.result(WAIT_S)
    with pytest.raises(ServerLost, match="device lost"):
        server.thread.submit(request("three"))
    server.thread.cancel("holder")  # Nothing listens any more; nothing breaks.
    server.thread.stop(WAIT_S)
    assert server.crashes.empty()


def test_what_the_listener_raises_is_a_crash_too() -> None:
    server = Server()
    error = KeyError("nobody listens")

    def hear(events: Sequence[EngineEvent]) -> None:
        raise error

    thread = EngineThread(server.engine, hear, server.crashes.put)
    thread.start()
    thread.submit(request("one"))
    assert server.crashes.get(timeout=WAIT_S) is error
    thread.stop(WAIT_S)


def test_stopping_lets_the_current_step_end_and_takes_nothing_new() -> None:
    server = Server()
    server.thread.start()
    server.hold_in_a_step()
    answer = server.thread.reserve(request("one", kind=RequestKind.FROM_REMOTE))
    with pytest.raises(TimeoutError, match=r"has not ended within 0\.01 s"):
        server.thread.stop(0.01)
    with pytest.raises(Draining):
        server.thread.submit(request("two"))
    server.runner.is_open.set()
    server.thread.stop(WAIT_S)
    assert answer.result(0).request_id == "one"  # It came before the stop.
    assert server.thread.statistics().step == 1
    assert server.crashes.empty()


def test_the_thread_sleeps_while_all_that_is_left_waits_for_a_lease(server: Server) -> None:
    server.thread.submit(request("leased", kind=RequestKind.PREFILL_ONLY, num_tokens=50))
    server.thread.submit(request("blocked", first_token=500, num_tokens=50, max_tokens=2))
    while not isinstance(server.events.get(timeout=WAIT_S), TokensSampled):
        pass
    for _ in range(100):
        server.thread.check_integrity().result(WAIT_S)
    assert server.engine.num_calls <= 7 + 2  # Seven chunks, and at most two looks at what can't start.
    server.thread.release("leased")
    assert len(server.tokens("blocked")) == 2
    server.thread.check_integrity().result(WAIT_S)
    assert server.thread.statistics().step_age_s == 0.0
