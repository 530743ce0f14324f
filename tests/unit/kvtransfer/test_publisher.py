from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from kvtransfer.source.publisher import News, Publisher

Call = tuple[str, str, int, int | None]
"""Which method, of which transfer, with how many tokens, and how many layers or which first token."""


class HeldSource:
    """Implements `Publishes`; each call waits until `go` is set."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.go = threading.Event()
        self.is_held = threading.Event()
        self.saw_last = threading.Event()
        self.fails_with: Exception | None = None

    def publish(
        self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, *, num_layers: int | None = None
    ) -> bool:
        return self._note(("publish", transfer_id, num_tokens, num_layers))

    def finish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, first_token: int) -> bool:
        return self._note(("finish", transfer_id, num_tokens, first_token))

    def _note(self, call: Call) -> bool:
        self.is_held.set()
        assert self.go.wait(10), "the test forgot to let the source go on"
        if self.fails_with is not None:
            raise self.fails_with
        self.calls.append(call)
        if call[1] == "last":
            self.saw_last.set()
        return True


class Running:
    def __init__(self) -> None:
        self.source = HeldSource()
        self.crashes: list[BaseException] = []
        self.crashed = threading.Event()
        self.publisher = Publisher(self.source, on_crash=self._crash)
        self.publisher.start()

    def _crash(self, error: BaseException) -> None:
        self.crashes.append(error)
        self.crashed.set()

    def finish(self) -> list[Call]:
        """Everything left so far is published, and the thread has ended."""
        self.publisher.leave("last", News(block_ids=(), num_tokens=0, first_token=0))
        self.source.go.set()
        assert self.source.saw_last.wait(10)
        self.publisher.close(deadline_s=20)
        return self.source.calls[:-1]


@pytest.fixture
def running() -> Running:
    return Running()


def whole(num_tokens: int) -> News:
    return News(block_ids=(1, 2), num_tokens=num_tokens)


def begun(num_tokens: int, num_tokens_begun: int, num_layers: int) -> News:
    return News(block_ids=(1, 2), num_tokens=num_tokens, num_tokens_begun=num_tokens_begun, num_layers_begun=num_layers)


def test_news_are_published_in_their_order_and_a_chunk_after_what_is_before_it(running: Running) -> None:
    running.source.go.set()
    running.publisher.leave("a", begun(4, 8, 2))
    assert running.source.is_held.wait(20)
    running.publisher.leave("b", News(block_ids=(1,), num_tokens=7, first_token=42))
    assert running.finish() == [("publish", "a", 4, None), ("publish", "a", 8, 2), ("finish", "b", 7, 42)]


def test_what_was_not_taken_yet_is_replaced_and_keeps_its_place(running: Running) -> None:
    running.publisher.leave("busy", whole(1))
    assert running.source.is_held.wait(20)
    for num_layers in range(1, 100):
        running.publisher.leave("a", begun(4, 8, num_layers))
        running.publisher.leave("b", whole(num_layers))
        assert running.publisher.num_waiting == 2
    calls = running.finish()
    assert calls[1:] == [("publish", "a", 4, None), ("publish", "a", 8, 99), ("publish", "b", 99, None)]


def test_the_last_news_cover_what_was_begun(running: Running) -> None:
    running.publisher.leave("busy", whole(1))
    assert running.source.is_held.wait(20)
    running.publisher.leave("a", begun(4, 8, 3))
    running.publisher.leave("a", News(block_ids=(1, 2), num_tokens=8, first_token=5))
    assert running.finish()[1:] == [("finish", "a", 8, 5)]


def test_our_own_mistake_ends_the_thread_and_is_told_once(running: Running) -> None:
    running.source.fails_with = AssertionError("a publication that does not continue the one before")
    running.source.go.set()
    running.publisher.leave("a", whole(4))
    assert running.crashed.wait(20)
    running.publisher.leave("b", whole(4))
    running.publisher.close(deadline_s=20)
    assert running.crashes == [running.source.fails_with]


def test_what_waits_at_the_end_is_not_published(running: Running) -> None:
    running.publisher.leave("busy", whole(1))
    assert running.source.is_held.wait(20)
    running.publisher.leave("a", whole(4))
    with pytest.raises(TimeoutError):
        running.publisher.close(deadline_s=0)
    running.source.go.set()
    running.publisher.close(deadline_s=20)
    assert running.source.calls == [("publish", "busy", 1, None)]


def test_a_publisher_that_never_started_closes() -> None:
    Publisher(HeldSource(), on_crash=lambda _: None).close(deadline_s=0)


def test_a_publication_that_hangs_is_told_at_the_end(running: Running) -> None:
    running.publisher.leave("busy", whole(1))
    assert running.source.is_held.wait(20)
    with pytest.raises(TimeoutError, match="has not ended"):
        running.publisher.close(deadline_s=0.01)
    running.source.go.set()
    running.publisher.close(deadline_s=20)
