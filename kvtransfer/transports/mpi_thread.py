"""The thread that makes every MPI call of a process; others hand it buffers and are told when a message is through.

    post(...) ──▶ Isend, Irecv ──▶ Test, again and again ──▶ Transit.end: is_done, and its Doorbell rings

One thread, because then any threading level that an MPI offers is enough, and because somebody has to go on calling
Test for messages that nobody waits for any more: MPI has no descriptor to wait on, and moves bytes only inside its
calls. While something is under way the thread asks with growing pauses, while nothing is it sleeps.

A request cannot be taken back. A cancelled receive may have been matched before, and its sender writes on; a send is
not cancelled at all. So a message's buffer belongs to MPI until its transit is done, whoever still wants it.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from kvtransfer.transports.transit import Transit

ABANDONED_S: Final = 5.0
"""How long a receive stays posted after the read that wanted it has ended: its sender needs it to end the send."""
_EAGER_TESTS: Final = 50
"""Rounds without a pause since the last message: about as long as one takes between two busy processes."""
_PAUSES_S: Final = (20e-6, 1e-3)
"""The first pause, and the longest; each is twice the one before."""


class Request(Protocol):
    """The part of `mpi4py.MPI.Request` that is used."""

    def Test(self) -> bool: ...
    def Cancel(self) -> None: ...


class Communicator(Protocol):
    """The part of `mpi4py.MPI.Comm` that is used; its errors are RuntimeErrors."""

    def Isend(self, buf: Any, dest: int, tag: int) -> Request: ...
    def Irecv(self, buf: Any, source: int, tag: int) -> Request: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """`peer` and `tag` are where `buffer` goes to, or comes from."""

    buffer: memoryview
    is_send: bool
    peer: int
    tag: int
    transit: Transit


@dataclasses.dataclass(slots=True, eq=False)
class _UnderWay:
    message: Message
    request: Request
    cancel_at_s: float | None = None


class MpiThread:
    """Thread-safe, but for `run`, which is the thread.

    Invariant: a message that was posted is in `_posted`, in `_under_way`, or its transit is done.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._posted: collections.deque[Message] = collections.deque()
        self._abandoned: set[Transit] = set()
        self._news = False
        self._ending = False
        self._under_way: list[_UnderWay] = []

    def post(self, *messages: Message) -> None:
        with self._changed:
            self._posted.extend(messages)
            self._tell()

    def abandon(self, transits: Sequence[Transit]) -> None:
        """Nobody waits for these any more."""
        with self._changed:
            self._abandoned.update(transit for transit in transits if not transit.is_done)
            self._tell()

    @property
    def num_abandoned(self) -> int:
        """Messages that nobody waits for and MPI has not let go of."""
        with self._changed:
            self._abandoned = {transit for transit in self._abandoned if not transit.is_done}
            return len(self._abandoned)

    def end(self) -> None:
        """`run` returns soon, whatever is under way."""
        with self._changed:
            self._ending = True
            self._tell()

    def _tell(self) -> None:
        self._news = True
        self._changed.notify()

    def run(self, world: Communicator, *, clock: Callable[[], float] = time.monotonic) -> None:
        num_idle = 0
        while self._take_news(world, pause_s=_pause_s(num_idle), now_s=clock()):
            progressed = [self._test(each, now_s=clock()) for each in self._under_way]
            self._under_way = [each for each in self._under_way if not each.message.transit.is_done]
            num_idle = 0 if any(progressed) else num_idle + 1

    def _take_news(self, world: Communicator, *, pause_s: float, now_s: float) -> bool:
        """Begin what was posted; wait for that while there is nothing else to do. False at the end."""
        with self._changed:
            if not self._news and (pause_s or not self._under_way):
                self._changed.wait(pause_s if self._under_way else None)
            if not self._news:
                return True
            self._news = False
            posted, abandoned = list(self._posted), set(self._abandoned)
            self._posted.clear()
            if self._ending:
                return False
        for message in posted:
            self._begin(world, message)
        for each in self._under_way:
            if each.message.transit in abandoned and not each.message.is_send and each.cancel_at_s is None:
                each.cancel_at_s = now_s + ABANDONED_S
        return True

    def _begin(self, world: Communicator, message: Message) -> None:
        try:
            call = world.Isend if message.is_send else world.Irecv
            self._under_way.append(_UnderWay(message, call(message.buffer, message.peer, message.tag)))
        except RuntimeError as error:  # What MPI says of a peer that it knows to be dead.
            message.transit.end(str(error))

    def _test(self, each: _UnderWay, *, now_s: float) -> bool:
        """True when this message is done, well or not."""
        try:
            if each.cancel_at_s is not None and now_s >= each.cancel_at_s:
                each.cancel_at_s = float("inf")
                each.request.Cancel()
            if not each.request.Test():
                return False
        except RuntimeError as error:
            each.message.transit.end(str(error))
            return True
        each.message.transit.end("cancelled" if each.cancel_at_s == float("inf") else None)
        return True


def _pause_s(num_idle: int) -> float:
    """After `num_idle` rounds in which nothing arrived."""
    if num_idle < _EAGER_TESTS:
        return 0.0
    return min(_PAUSES_S[1], _PAUSES_S[0] * 2.0 ** min(num_idle - _EAGER_TESTS, 16))
