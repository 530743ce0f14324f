"""Checksums and publishes on a thread of its own, beside an engine that only says what it has written.

engine thread        written(), finished(): leave the latest news of a transfer, and go on computing
publishing thread    sums up the new blocks and publishes them, transfer by transfer in the order of their news

News of one transfer replace what of them has not been taken yet: a thread that cannot keep up, or a machine that is
busy, makes publications larger and fewer, never more. Nothing waits here for whoever reads.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Protocol


class Publishes(Protocol):
    """A `TransferSource`, or what stands before one."""

    def publish(
        self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, *, num_layers: int | None = None
    ) -> bool: ...

    def finish(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int, first_token: int) -> bool: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What of a prompt is written. Later news cover all that earlier ones did."""

    block_ids: tuple[int, ...]
    """The whole table so far."""
    num_tokens: int
    """In every layer."""
    num_tokens_begun: int = 0
    """In the first `num_layers_begun` layers only; 0: no chunk is being computed."""
    num_layers_begun: int = 0
    first_token: int | None = None
    """The prompt is computed."""


class TakesNews(Protocol):
    """A `Publisher`, or a `StagedSource`, which publishes on a thread anyway."""

    def leave(self, transfer_id: str, news: News) -> object:
        """Published soon, together with what of this transfer still waits. Called from any thread; never waits."""


class Publisher:
    """Its thread lives from `start` to `close`.

    Invariant: at most one piece of news a transfer waits, so no more wait than transfers are computed.
    """

    def __init__(self, source: Publishes, *, on_crash: Callable[[BaseException], None]) -> None:
        """`on_crash` is called on the thread, at most once, with what a publication raised: our own mistake."""
        self._source = source
        self._on_crash = on_crash
        self._changed = threading.Condition()
        self._news: dict[str, News] = {}
        """By transfer id, in the order in which their news came."""
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-publish", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, *, deadline_s: float) -> None:
        """What waits is not published any more. Raises TimeoutError when the thread has not ended in time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
            if self._thread.is_alive():
                raise TimeoutError(f"the publishing thread has not ended within {deadline_s} s")

    def leave(self, transfer_id: str, news: News) -> None:
        with self._changed:
            self._news[transfer_id] = news
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        return len(self._news)

    # On the publishing thread.

    def _run(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._publish(*found)
        except BaseException as error:  # noqa: BLE001  # The thread's edge; the owner ends the process.
            self._on_crash(error)

    def _next(self) -> tuple[str, News] | None:
        with self._changed:
            while not self._news and not self._is_closing:
                self._changed.wait()
            if self._is_closing:
                return None
            transfer_id = next(iter(self._news))
            return transfer_id, self._news.pop(transfer_id)

    def _publish(self, transfer_id: str, news: News) -> None:
        """Of a transfer that has ended meanwhile, nothing is published; the source knows."""
        if news.first_token is not None:
            self._source.finish(transfer_id, news.block_ids, news.num_tokens, news.first_token)
            return
        self._source.publish(transfer_id, news.block_ids, news.num_tokens)
        if news.num_layers_begun:
            self._source.publish(transfer_id, news.block_ids, news.num_tokens_begun, num_layers=news.num_layers_begun)
