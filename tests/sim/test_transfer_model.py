"""Every interleaving of what can happen to a transfer, up to a depth, through the real tables and the real lease book.

Equal worlds are explored once, so the numbers of interleavings are those that end in a world that was checked.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import random
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import pytest

from kvtransfer import machine
from kvtransfer.machine import CancelResult, DestinationPhase, DestinationTransfer, InvalidTransition, SourcePhase
from kvtransfer.source.lease import LeaseBook
from tests.support.transfer_model import Event, World

DEPTH: Final = 8
GOOD: Final = [
    Event.PROGRESS,  # follow
    Event.PROGRESS,  # publish
    Event.PROGRESS,  # begin to read
    Event.READ_DONE,
    Event.PROGRESS,  # ask whether the lease held
    Event.PROGRESS,  # hear that it did
]
GOOD_IN: Final = {1: GOOD, 2: [*GOOD[:4], *GOOD[1:]], 3: [*GOOD[:4], *GOOD[1:4], *GOOD[1:]]}
"""By the number of chunks."""


@dataclasses.dataclass(slots=True)
class Explored:
    """Each world once, with what can happen there."""

    ways: dict[Hashable, list[tuple[Event, Hashable]]] = dataclasses.field(default_factory=dict)
    phases: set[DestinationPhase] = dataclasses.field(default_factory=set)
    results: set[CancelResult | None] = dataclasses.field(default_factory=set)
    num_landed_after_restart: int = 0

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.ways.values()))

    def num_interleavings(self, begin: Hashable, depth: int) -> int:
        """Sequences of exactly `depth` events, or fewer where nothing can happen any more."""
        counts, ended = {begin: 1}, 0
        for _ in range(depth):
            reached: collections.Counter[Hashable] = collections.Counter()
            for world, count in counts.items():
                ended += count if not self.ways[world] else 0
                for _, there in self.ways[world]:
                    reached[there] += count
            counts = reached
        return ended + sum(counts.values())


def on_the_way(num_chunks: int) -> list[list[Event]]:
    """Each beginning of a transfer that goes well."""
    good = GOOD_IN[num_chunks]
    return [good[:end] for end in range(len(good))]


def play(events: Sequence[Event], num_chunks: int) -> World:
    world = World(num_chunks)
    for event in events:
        world.apply(event)
    return world


def explore(begin: Sequence[Sequence[Event]], *, num_chunks: int) -> Explored:
    """Until there is no world left that can be reached, however deep; breadth first.

    A world is made again from the events that led to it, so nothing is shared by mistake.
    """
    found = Explored()
    frontier = {play(events, num_chunks).key: list(events) for events in begin}
    while frontier:
        reached: dict[Hashable, list[Event]] = {}
        for here, path in frontier.items():
            found.ways[here] = []
            for event in play(path, num_chunks).enabled:
                world = play(path, num_chunks)
                world.apply(event)
                world.check()
                found.ways[here].append((event, world.key))
                reached.setdefault(world.key, [*path, event])
                _look_at(world, found)
        frontier = {key: path for key, path in reached.items() if key not in found.ways}
    return found


def _look_at(world: World, found: Explored) -> None:
    found.phases.add(world.transfer.phase)
    found.results.add(world.last_cancel)
    found.num_landed_after_restart += bool(world.admitted) and world.source.epoch > 1
    world.settle()


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_no_interleaving_of_eight_events_breaks_an_invariant(num_chunks: int) -> None:
    """From each point of a transfer that goes well, so that its end is reached with events to spare."""
    begin = on_the_way(num_chunks)
    found = explore(begin, num_chunks=num_chunks)
    num = sum(found.num_interleavings(play(events, num_chunks).key, DEPTH) for events in begin)
    counts = f"{num:,} interleavings of {DEPTH} events, {len(found.ways):,} worlds, {found.num_steps:,} steps"
    sys.stdout.write(f"\n{num_chunks} chunks: {counts}\n")
    happened = {event for ways in found.ways.values() for event, _ in ways}
    assert happened >= set(Event) - {Event.BLOCK_COPIED}
    assert found.phases >= set(DestinationPhase) - {DestinationPhase.RESERVED}
    assert found.num_landed_after_restart


def test_worlds_that_count_as_equal_have_equal_futures() -> None:
    chance = random.Random(1)
    by_key: dict[Hashable, list[list[Event]]] = collections.defaultdict(list)
    for _ in range(400):
        path: list[Event] = []
        while len(path) < 10 and play(path, 1).enabled and chance.random() < 0.9:
            path += chance.sample(play(path, 1).enabled, k=1)
        by_key[play(path, 1).key].append(path)
    same = [paths for paths in by_key.values() if len(paths) > 1]
    assert len(same) > 20
    for first, *others in same:
        for other in others:
            one, two = play(first, 1), play(other, 1)
            while (enabled := one.enabled) and len(one.transfer.story) < 20:
                assert enabled == two.enabled
                event = chance.choice(enabled)
                one.apply(event)
                two.apply(event)
                assert one.key == two.key


# The explorer finds what it is there to find: each of these is a mistake that another project has made.


def frees_while_a_read_runs(patch: pytest.MonkeyPatch) -> None:
    def stop(self: DestinationTransfer, outcome: DestinationPhase, *, now_s: float) -> CancelResult:
        if self.is_over:
            return CancelResult.ALREADY_COMPLETE
        self.phase = outcome
        return CancelResult.CANCELLED_WHILE_QUIET

    patch.setattr(DestinationTransfer, "_stop", stop)


def is_revived_by_a_late_completion(patch: pytest.MonkeyPatch) -> None:
    def read_ended(self: DestinationTransfer, *, now_s: float) -> None:
        self.phase = DestinationPhase.FOLLOWING

    patch.setattr(DestinationTransfer, "read_ended", read_ended)


def lands_though_the_lease_had_ended(patch: pytest.MonkeyPatch) -> None:
    end = LeaseBook.end

    def always_held(self: LeaseBook, *args: Any, **options: Any) -> bool:
        end(self, *args, **options)
        return True

    patch.setattr(LeaseBook, "end", always_held)


def forgets_blocks_that_were_quarantined(patch: pytest.MonkeyPatch) -> None:
    read_ended = DestinationTransfer.read_ended

    def never_ends(self: DestinationTransfer, *, now_s: float) -> None:
        if self.phase is DestinationPhase.READING:
            read_ended(self, now_s=now_s)

    patch.setattr(DestinationTransfer, "read_ended", never_ends)


def calls_a_stopping_read_quiet(patch: pytest.MonkeyPatch) -> None:
    reads = property(lambda self: self.phase is DestinationPhase.READING)
    patch.setattr(DestinationTransfer, "is_writable", reads)


def lets_the_last_outcome_stand(patch: pytest.MonkeyPatch) -> None:
    stop = DestinationTransfer._stop

    def overriding(self: DestinationTransfer, outcome: DestinationPhase, *, now_s: float) -> CancelResult:
        result = stop(self, outcome, now_s=now_s)
        self._decided = outcome
        return result

    patch.setattr(DestinationTransfer, "_stop", overriding)


def says_that_blocks_in_flight_may_be_freed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CancelResult, "may_free", property(lambda self: True))


def never_lets_a_lease_run_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseBook, "due", lambda self, *, now_s: [])


def gives_the_blocks_of_a_source_back_twice(patch: pytest.MonkeyPatch) -> None:
    end = LeaseBook.end

    def again(self: LeaseBook, transfer_id: str, *args: Any, **options: Any) -> bool:
        return end(self, transfer_id, *args, **options) or self.ending(transfer_id) is not None

    patch.setattr(LeaseBook, "end", again)


@pytest.mark.parametrize(
    "mistake",
    [
        calls_a_stopping_read_quiet,
        lets_the_last_outcome_stand,
        says_that_blocks_in_flight_may_be_freed,
        never_lets_a_lease_run_out,
        gives_the_blocks_of_a_source_back_twice,
        frees_while_a_read_runs,
        is_revived_by_a_late_completion,
        lands_though_the_lease_had_ended,
        forgets_blocks_that_were_quarantined,
    ],
)
def test_the_explorer_finds_a_transfer_that(mistake: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            explore(on_the_way(1), num_chunks=1)


EDGES: Final = [
    *((machine.NEXT_SOURCE, here, there) for here, ends in machine.NEXT_SOURCE.items() for there in sorted(ends)),
    *(
        (machine.NEXT_DESTINATION, here, there)
        for here, ends in machine.NEXT_DESTINATION.items()
        for there in sorted(ends)
    ),
]


@pytest.mark.parametrize(("table", "here", "there"), EDGES, ids=[f"{here}-{there}" for _, here, there in EDGES])
def test_every_edge_of_the_tables_is_needed(
    table: Any, here: enum.StrEnum, there: enum.StrEnum, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it some interleaving stops at InvalidTransition: so the tables allow nothing that never happens."""
    monkeypatch.setitem(table, here, table[here] - {there})
    num_chunks = 1 + (here is SourcePhase.PUBLISHING) + (there is SourcePhase.PUBLISHING)
    with pytest.raises(InvalidTransition):
        explore(on_the_way(num_chunks), num_chunks=num_chunks)
