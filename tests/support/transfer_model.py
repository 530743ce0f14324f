"""A model of one source, one destination and what couples them, small enough to be explored exhaustively.

The tables of `kvtransfer.machine` and the real lease book; bytes that say who wrote them; a source that can die, come
back at the same address under a new epoch, and let its leases run out, whereupon the next owner of its blocks writes at
once. The destination gives its blocks back when it may, and their next owner is there at once, too.

`World.enabled` tells which events can happen now, `World.apply` makes one happen, `World.check` holds the invariants.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Hashable
from typing import Final

from kvtransfer.machine import CancelResult, DestinationPhase, DestinationTransfer, SourcePhase
from kvtransfer.runs import Run
from kvtransfer.source.lease import Chunk, Ending, LeaseBook, Outcome, Progress

LEASE_S: Final = 10.0
EPOCH_MAX: Final = 3
REQUESTS_MAX: Final = 2
US: Final = "generation-0"


class Event(enum.StrEnum):
    PROGRESS = "progress"
    """Whatever comes next when nothing goes wrong: follow, publish, begin a read, confirm, hear the answer."""
    BLOCK_COPIED = "block copied"
    READ_DONE = "read done"
    READ_FAILED = "read failed"
    CANCEL = "cancel"
    TIMEOUT = "timeout"
    LEASE_EXPIRY = "lease expiry"
    PEER_DEATH = "peer death"
    LATE_COMPLETION = "late completion"
    """Of a read whose outcome had been decided before: its last bytes land now."""
    RESTART = "restart with same address"
    PREFILL_FAILED = "prefill failed"
    NEXT_REQUEST = "next request"
    """Takes the blocks that came back, from the source that is there now."""


@dataclasses.dataclass(slots=True)
class Incarnation:
    """One process of the source. Its memory outlives it where it is mapped."""

    epoch: int
    book: LeaseBook
    memory: list[str]
    is_alive: bool = True
    releases: int = 0


@dataclasses.dataclass(slots=True)
class Read:
    source: Incarnation
    pending: list[int]
    is_damaged: bool = False


class World:
    """Invariant: see `check`."""

    def __init__(self, num_chunks: int = 1) -> None:
        """One chunk is two blocks, several are one block each."""
        self._num_chunks = num_chunks
        self.num_blocks = max(2, num_chunks)
        self._now_s = 0.0
        self.source = self._incarnation(1)
        self.owner: list[str] = ["request 1"] * self.num_blocks
        """Who our blocks are lent to, or "free"."""
        self.into: list[str] = ["ours"] * self.num_blocks
        self.request = 1
        self.admitted: set[int] = set()
        self.decided: dict[int, DestinationPhase] = {}
        """How a request was decided first, if otherwise than by landing."""
        self.last_cancel: CancelResult | None = None
        self._begin()

    def _incarnation(self, epoch: int) -> Incarnation:
        book = LeaseBook(epoch=epoch, lease_s=LEASE_S, num_layers=1)
        return Incarnation(epoch, book, [f"old {epoch}"] * self.num_blocks)

    def _begin(self) -> None:
        """A request comes to both servers."""
        self.transfer = DestinationTransfer(self.name)
        self.read: Read | None = None
        self.verified: set[int] = set()
        self.following: Incarnation | None = None
        self.ticket = self.source
        if self.source.is_alive:
            self.source.book.open(self.name, now_s=self._now_s)
            self.source.memory = [f"prompt of {self.name}"] * self.num_blocks
            self.source.releases = 0

    @property
    def name(self) -> str:
        return f"request {self.request}"

    # What can happen.

    @property
    def enabled(self) -> list[Event]:
        return [event for event, can, _ in self._table() if can]

    def apply(self, event: Event) -> None:
        self._now_s += 0.001
        next(do for each, can, do in self._table() if each is event and can)()
        self._give_back_when_quiet()

    def _table(self) -> list[tuple[Event, bool, Callable[[], None]]]:
        is_over, reads = self.transfer.is_over, self.read is not None
        stopping = self.transfer.phase is DestinationPhase.STOPPING
        lives = self._lease_lives()
        return [
            (Event.PROGRESS, not is_over and not reads, self._progress),
            (Event.BLOCK_COPIED, reads and len(self.read.pending) > 1 if self.read else False, self._copy),
            (Event.READ_DONE, reads and not stopping, self._read_done),
            (Event.READ_FAILED, reads, self._read_failed),
            (Event.CANCEL, not is_over, self._cancel),
            (Event.TIMEOUT, not is_over, self._timeout),
            (Event.LEASE_EXPIRY, lives, self._lease_expires),
            (Event.PEER_DEATH, self.source.is_alive, self._die),
            (Event.LATE_COMPLETION, reads and stopping, self._read_done),
            (Event.RESTART, not self.source.is_alive and self.source.epoch < EPOCH_MAX, self._restart),
            (Event.PREFILL_FAILED, lives, self._prefill_fails),
            (Event.NEXT_REQUEST, self._can_go_on(), self._next_request),
        ]

    # The source.

    def _lease_lives(self) -> bool:
        return self.ticket.is_alive and isinstance(self.ticket.book.progress(self.name, after=0), Progress)

    def _publish(self) -> None:
        book, published = self.ticket.book, self.ticket.book.published(self.name)
        assert published is not None, "published without a lease"
        begin = published.num_blocks
        end = self.num_blocks if self._num_chunks == 1 else begin + 1
        outcome = (
            Outcome(num_tokens=self.num_blocks, num_blocks=self.num_blocks, first_token=0)
            if end == self.num_blocks
            else None
        )
        ids = tuple(range(begin, end))
        chunk = Chunk(first_block=begin, block_ids=ids, checksums=ids, num_tokens=end)
        book.publish(self.name, chunk, outcome, now_s=self._now_s)

    def _end_lease(self, phase: SourcePhase) -> bool:
        source = self.ticket
        if not source.is_alive or not source.book.end(self.name, phase, "x", now_s=self._now_s):
            return False
        source.releases += 1
        source.memory = ["the next owner's"] * self.num_blocks
        return True

    def _prefill_fails(self) -> None:
        self._end_lease(SourcePhase.FAILED)

    def _lease_expires(self) -> None:
        self._now_s += 2 * LEASE_S
        for name in self.ticket.book.due(now_s=self._now_s):
            assert name == self.name
            self._end_lease(SourcePhase.EXPIRED)

    def _die(self) -> None:
        """Its memory stays as it was for whoever has it mapped; its blocks need not come back any more."""
        self.source.is_alive = False

    def _restart(self) -> None:
        self.source = self._incarnation(self.source.epoch + 1)

    # The destination.

    def _progress(self) -> None:
        if self.transfer.phase is DestinationPhase.RESERVED:
            self._follow()
        elif (lost := self._found_out()) is not None:
            self._fail(lost)
        elif self.transfer.phase is DestinationPhase.CONFIRMING:
            self._hear_the_answer()
        else:
            self._go_on()

    def _follow(self) -> None:
        """Connect finds whoever answers at the address now."""
        if not self.source.is_alive or self.source.epoch != self.ticket.epoch:
            self._fail("nobody, or another incarnation, answers")
            return
        self.transfer.advance(DestinationPhase.FOLLOWING, now_s=self._now_s)
        self.following = self.source

    def _found_out(self) -> str | None:
        """What the Follow stream and the probes tell."""
        assert self.following is not None
        if not self.following.is_alive:
            return "its connection broke"
        if self.transfer.phase is not DestinationPhase.CONFIRMING:
            ending = self.following.book.progress(self.name, after=0)
            return "the lease is over" if isinstance(ending, Ending) else None
        return None

    def _go_on(self) -> None:
        assert self.following is not None
        progress = self.following.book.progress(self.name, after=0)
        assert isinstance(progress, Progress), "a lease that is over is found out before"
        self.following.book.renew(self.name, now_s=self._now_s)
        unread = [block for chunk in progress.chunks for block in chunk.block_ids if block not in self.verified]
        if unread:
            self._begin_read(unread, progress.key)
        elif progress.outcome is None:
            self._publish()
        else:
            self.transfer.advance(DestinationPhase.CONFIRMING, now_s=self._now_s)

    def _begin_read(self, blocks: list[int], key: bytes) -> None:
        assert self.following is not None
        self.transfer.advance(DestinationPhase.READING, now_s=self._now_s)
        self.read = Read(self.following, blocks)
        self.following.book.progress(self.name, after=0, reader=US)
        self.following.book.check_read(
            lease_key=key,
            epoch=self.following.epoch,
            blocks=[Run(block, 1) for block in blocks],
            layers=range(1),
            peer_id=US,
            now_s=self._now_s,
        )

    def _copy(self) -> None:
        """The bytes of one block land: those that are in the source's memory at this moment."""
        assert self.read is not None
        block = self.read.pending.pop(0)
        assert self.transfer.is_writable, "bytes land in blocks that the table calls quiet"
        assert self.owner[block] == self.name, f"bytes of {self.name} land in a block of {self.owner[block]}"
        self.into[block] = self.read.source.memory[block]
        if self.into[block] == f"prompt of {self.name}":
            self.verified.add(block)
        else:
            self.read.is_damaged = True  # Its checksum is another.

    def _read_done(self) -> None:
        assert self.read is not None
        while self.read.pending:
            self._copy()
        is_damaged, self.read = self.read.is_damaged, None
        self.transfer.read_ended(now_s=self._now_s)
        if is_damaged and not self.transfer.is_over:
            self._fail("checksum")

    def _read_failed(self) -> None:
        self.read = None
        self.transfer.read_ended(now_s=self._now_s)
        if not self.transfer.is_over:
            self._fail("the link broke")

    def _hear_the_answer(self) -> None:
        if self._end_lease(SourcePhase.RELEASED):
            self.transfer.advance(DestinationPhase.LANDED, now_s=self._now_s)
            self.admitted.add(self.request)
        else:
            self._fail("the lease had ended before")

    def _fail(self, reason: str) -> None:
        self._decided(self.transfer.fail(now_s=self._now_s), DestinationPhase.FAILED)

    def _cancel(self) -> None:
        self._decided(self.transfer.cancel(now_s=self._now_s), DestinationPhase.CANCELLED)

    def _timeout(self) -> None:
        self._fail("late")

    def _decided(self, result: CancelResult, outcome: DestinationPhase) -> None:
        """Its source is told; that may be lost, and then the lease is the last resort."""
        self.last_cancel = result
        self.decided.setdefault(self.request, outcome)
        assert result.may_free is not self.transfer.is_writable, f"{result} in {self.transfer.phase}"
        if self.following is not None:
            self._end_lease(SourcePhase.GIVEN_UP)

    def _give_back_when_quiet(self) -> None:
        if self.transfer.is_over and self.request not in self.admitted and self.owner[0] == self.name:
            self.owner = ["free"] * self.num_blocks
            self.into = ["somebody else's"] * self.num_blocks

    def _can_go_on(self) -> bool:
        has_room_there = self.source.is_alive and not self.source.book.live()
        return self.owner[0] == "free" and has_room_there and self.request < REQUESTS_MAX

    def _next_request(self) -> None:
        self.request += 1
        self.owner = [self.name] * self.num_blocks
        self._begin()

    # What must hold after each event.

    def check(self) -> None:
        self.source.book.check_integrity()
        assert self.transfer.is_writable is (self.read is not None), "writable is not: a read is running"
        writable = set(self.read.pending) if self.read else set()
        free = {block for block, owner in enumerate(self.owner) if owner == "free"}
        assert not free & writable, "a block is free and writable at once"
        lent = {block for block, owner in enumerate(self.owner) if owner == self.name}
        assert free | lent == set(range(self.num_blocks)), "a block is lost"
        assert not self.admitted & self.decided.keys(), "a late completion revived a decided outcome"
        is_stopped = self.transfer.is_over or self.transfer.phase is DestinationPhase.STOPPING
        assert is_stopped or self.request not in self.decided, "a decided outcome was revived"
        if self.transfer.is_over:
            first = self.decided.get(self.request, DestinationPhase.LANDED)
            assert self.transfer.phase is first, f"{first} was decided first, {self.transfer.phase} stands"
        if self.request in self.admitted:
            assert self.into == [f"prompt of {self.name}"] * self.num_blocks, (
                f"a foreign block was admitted: {self.into}"
            )
            assert self.ticket.book.ending(self.name).phase is SourcePhase.RELEASED  # type: ignore[union-attr]
        if free:
            assert self.into == ["somebody else's"] * self.num_blocks, f"a late write: {self.into}"
        assert self.ticket.releases <= 1, "blocks of the source went back twice"
        assert self._lease_lives() or not self.ticket.is_alive or self.ticket.releases == 1, "blocks of it are lost"

    def settle(self) -> None:
        """Nothing new begins; what runs comes to its end, and leases run out."""
        if self.read is not None:
            self.apply(Event.READ_FAILED)
        if not self.transfer.is_over:
            self.apply(Event.TIMEOUT)
        if self._lease_lives():
            self.apply(Event.LEASE_EXPIRY)
        self.check()
        assert self.owner[0] == "free" or self.request in self.admitted, "blocks of ours never came back"
        assert not self.ticket.is_alive or self.ticket.releases == 1, "blocks of the source never came back"

    @property
    def key(self) -> Hashable:
        """Equal worlds have equal futures: two ways to one are explored once."""
        progress = self.ticket.book.progress(self.name, after=0)
        return (
            self.transfer.phase,
            self.transfer._decided,
            tuple(sorted(self.verified)),
            (self.read.source.epoch, tuple(self.read.pending), self.read.is_damaged) if self.read else None,
            self.following.epoch if self.following else None,
            (self.source.epoch, self.source.is_alive, tuple(self.source.memory)),
            (self.ticket.epoch, self.ticket.is_alive, tuple(self.ticket.memory), self.ticket.releases),
            (len(progress.chunks), progress.outcome is None) if isinstance(progress, Progress) else str(progress),
            tuple(self.owner),
            tuple(self.into),
            self.request,
            tuple(sorted(self.admitted)),
            tuple(sorted(self.decided.items())),
        )
