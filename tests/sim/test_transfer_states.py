"""A model of one source, one destination and their two pools, driven through every short sequence of events.

The real tables, the real lease book, bytes that say who wrote them. Reads copy block by block, and anything may happen
between two copies. Whatever happens:

    an outcome that was decided is never revived
    a block is never given back while a read may write into it
    what landed is what was published, never what a later owner of the source's block wrote
    each opened transfer's blocks go back once, at the source and at the destination
"""

import dataclasses
import itertools
import random

import pytest

from disaggregated.errors import LeaseExpired, TransferError
from kvtransfer.machine import CancelResult, DestinationPhase, DestinationTransfer, SourcePhase
from kvtransfer.runs import Run
from kvtransfer.source.lease import Chunk, Ending, LeaseBook, Outcome, Progress

NUM_BLOCKS = 2
LEASE_S = 2.0
FREE = "free"


@dataclasses.dataclass
class Read:
    """Our own copy, on its way. `stopped` is heeded before each block, as the worker thread does."""

    pending: list[int]
    stopped: bool = False
    failed: bool = False


class World:
    """The source's blocks are 0 and 1, and so are the destination's. A block's content is the name of its writer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.book = LeaseBook(epoch=1, lease_s=LEASE_S, num_layers=1)
        self.book.open("t", now_s=0.0)
        self.source = ["prompt"] * NUM_BLOCKS
        self.releases = 0
        self.into = ["ours"] * NUM_BLOCKS
        self.given_back = False
        self.transfer = DestinationTransfer("t")
        self.read: Read | None = None
        self.verified: set[int] = set()
        self.admitted = False
        self.decided = False
        """It was cancelled or failed before it landed, though perhaps while a read was running."""

    # What the source does.

    def publish(self) -> None:
        published = self.book.published("t")
        progress = self.book.progress("t", after=0)
        if published is None or not isinstance(progress, Progress) or progress.outcome is not None:
            return
        count = published.num_blocks
        block_ids = (count,) if count < NUM_BLOCKS else ()
        last = count + 1 >= NUM_BLOCKS
        outcome = Outcome(num_tokens=NUM_BLOCKS, num_blocks=NUM_BLOCKS, first_token=0) if last else None
        chunk = Chunk(first_block=count, block_ids=block_ids, checksums=block_ids, num_tokens=count + 1)
        self.book.publish("t", chunk, outcome, now_s=self.now_s)

    def fail_prefill(self) -> None:
        self._end(SourcePhase.FAILED)

    def pass_time(self) -> None:
        self.now_s += 1.0
        for _ in self.book.due(now_s=self.now_s):
            self._end(SourcePhase.EXPIRED)

    def _end(self, phase: SourcePhase) -> bool:
        if not self.book.end("t", phase, "x", now_s=self.now_s):
            return False
        self.releases += 1
        self.source = ["somebody else"] * NUM_BLOCKS  # The next owner writes at once.
        return True

    # What the destination does.

    def follow(self) -> None:
        if self.transfer.phase is DestinationPhase.RESERVED:
            self._advance(DestinationPhase.FOLLOWING)
            self.book.renew("t", now_s=self.now_s)

    def start_read(self) -> None:
        progress = self.book.progress("t", after=0)
        if self.transfer.phase is not DestinationPhase.FOLLOWING or not isinstance(progress, Progress):
            return
        wanted = [block for chunk in progress.chunks for block in chunk.block_ids if block not in self.verified]
        if not wanted:
            return
        self._advance(DestinationPhase.READING)
        self.read = Read(wanted)
        try:
            blocks = [Run(block, 1) for block in wanted]
            self.book.check_read(
                lease_key=progress.key, epoch=1, blocks=blocks, layers=range(1), peer_id="g", now_s=self.now_s
            )
        except LeaseExpired:
            self.read.failed = True
            self.read.pending.clear()

    def copy_block(self) -> None:
        """One step of the read; after its last the thread verifies and reports that it has ended."""
        if self.read is None:
            return
        if self.read.pending and not self.read.stopped:
            block = self.read.pending.pop(0)
            assert self.transfer.is_writable, "a copy into blocks that the table calls quiet"
            assert not self.given_back, "a copy into somebody else's block"
            self.into[block] = self.source[block]
            if self.into[block] == "prompt":
                self.verified.add(block)
            else:
                self.read.failed = True  # Its checksum is another.
        if not self.read.pending or self.read.stopped or self.read.failed:
            failed, self.read = self.read.failed, None
            self.transfer.read_ended(now_s=self.now_s)
            if failed and not self.transfer.is_over:
                self.transfer.fail(now_s=self.now_s)
            self._give_back_if_over()

    def confirm(self) -> None:
        progress = self.book.progress("t", after=0)
        all_here = len(self.verified) == NUM_BLOCKS
        if self.transfer.phase is not DestinationPhase.FOLLOWING or not all_here:
            return
        if isinstance(progress, Progress) and progress.outcome is None:
            return
        self._advance(DestinationPhase.CONFIRMING)
        if self._end(SourcePhase.RELEASED):
            self._advance(DestinationPhase.LANDED)
            assert self.into == ["prompt"] * NUM_BLOCKS, f"foreign blocks landed: {self.into}"
            self.admitted = True
        else:
            self.transfer.fail(now_s=self.now_s)
        self._give_back_if_over()

    def cancel(self) -> None:
        result = self.transfer.cancel(now_s=self.now_s)
        self.decided |= result is not CancelResult.ALREADY_COMPLETE
        assert result.may_free is not self.transfer.is_writable
        if result is CancelResult.REQUESTED_IN_FLIGHT:
            assert self.read is not None
            self.read.stopped = True
        self._give_back_if_over()

    def notice_ending(self) -> None:
        """The Follow stream tells how the source ended it, whenever that gets through."""
        if isinstance(self.book.progress("t", after=0), Ending) and not self.transfer.is_over:
            result = self.transfer.fail(now_s=self.now_s)
            self.decided = True
            if self.read is not None and not result.may_free:
                self.read.stopped = True
            self._give_back_if_over()

    def _advance(self, to: DestinationPhase) -> None:
        self.transfer.advance(to, now_s=self.now_s)

    def _give_back_if_over(self) -> None:
        if self.transfer.is_over and not self.admitted and not self.given_back:
            assert self.read is None, "blocks go back while a read is running"
            self.given_back = True
            self.into = ["next owner"] * NUM_BLOCKS

    def check(self) -> None:
        self.book.check_integrity()
        assert self.releases <= 1
        assert not (self.decided and self.admitted), "a late completion revived a decided outcome"
        assert not self.decided or self.transfer.is_writable or self.transfer.is_over
        assert self.transfer.is_writable is (self.read is not None)
        if self.given_back:
            assert self.into == ["next owner"] * NUM_BLOCKS, f"a late write: {self.into}"
            assert not self.admitted


EVENTS = [
    "publish",
    "fail_prefill",
    "pass_time",
    "follow",
    "start_read",
    "copy_block",
    "confirm",
    "cancel",
    "notice_ending",
]


def play(events: list[str]) -> World:
    world = World()
    for event in events:
        getattr(world, event)()
        world.check()
    return world


def settle(world: World) -> None:
    """Nothing new happens; what runs comes to its end."""
    for _ in range(NUM_BLOCKS + 1):
        world.copy_block()
    world.cancel()
    for _ in range(int(LEASE_S) + 1):
        world.copy_block()
        world.pass_time()
        world.check()


@pytest.mark.parametrize("first", EVENTS)
def test_no_short_sequence_of_events_breaks_an_invariant(first: str) -> None:
    landed = 0
    for rest in itertools.product(EVENTS, repeat=4):
        world = play([first, *rest])
        settle(world)
        assert world.releases == 1, f"{first}, {rest}: the source's blocks never came back"
        assert world.transfer.is_over
        assert world.read is None
        landed += world.admitted
    assert landed == 0  # A landing takes seven events: the next test has them.


@pytest.mark.parametrize("seed", range(40))
def test_no_long_sequence_of_events_breaks_an_invariant(seed: int) -> None:
    chance = random.Random(seed)
    weights = [4, 0.2, 1, 2, 3, 4, 3, 0.2, 1]
    outcomes = []
    for _ in range(200):
        world = play(chance.choices(EVENTS, weights, k=chance.randint(1, 40)))
        settle(world)
        assert world.releases == 1
        assert world.admitted is not world.given_back
        outcomes.append(world.transfer.phase)
    assert {DestinationPhase.LANDED, DestinationPhase.CANCELLED, DestinationPhase.FAILED} <= set(outcomes)


def test_the_good_case_lands() -> None:
    good = ["follow", "publish", "start_read", "copy_block", "publish", "start_read", "copy_block", "confirm"]
    world = play(good)
    assert world.admitted
    assert world.releases == 1


@pytest.mark.parametrize("intruder", EVENTS)
@pytest.mark.parametrize("where", range(8))
def test_the_good_case_with_anything_in_between_lands_rightly_or_not_at_all(where: int, intruder: str) -> None:
    good = ["follow", "publish", "start_read", "copy_block", "publish", "start_read", "copy_block", "confirm"]
    for times in (1, 2, 3):
        world = play([*good[:where], *[intruder] * times, *good[where:]])
        settle(world)
        assert world.releases == 1
        assert world.admitted is not world.given_back


def test_a_destination_cannot_claim_what_was_never_finished() -> None:
    world = play(["follow", "publish"])
    with pytest.raises(TransferError):
        world.book.end("t", SourcePhase.RELEASED, "x", now_s=0.0)
