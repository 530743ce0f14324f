"""The real pull beside the pure machine: the same events in the same order, and after each the same answers.

The machine is told what happened; the pull finds out by itself, through its stream, its calls, its reads and its
deadline. Seeds draw the order; a seed replays it.
"""

from __future__ import annotations

import collections
import random
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Final

import pytest

from disaggregated.errors import DisaggregatedError, PeerLost
from disaggregated.v1 import kv_pb2
from kvtransfer.destination.pending import PendingTransfer, Strand
from kvtransfer.destination.pull import Pull
from kvtransfer.machine import DestinationPhase, DestinationTransfer
from tests.support.scripted_source import DAMAGED, NUM_BLOCKS, Scene
from tests.support.virtual_time import run_in_virtual_time

READING: Final = DestinationPhase.READING
FOLLOWING: Final = DestinationPhase.FOLLOWING
CONFIRMING: Final = DestinationPhase.CONFIRMING
DEPTH: Final = 8


class Model:
    """What the tables say, event by event; `published` and `read` count blocks."""

    def __init__(self) -> None:
        self.transfer = DestinationTransfer("t")
        self.transfer.advance(FOLLOWING, now_s=0.0)
        self.published = self.read = 0
        self.reading = 0
        """The last block of the read that is running, or 0."""
        self.is_decided = False
        self.lease_holds = True

    def go_on(self) -> None:
        """What follows without a further event: a read of all that is published, or the confirmation."""
        if self.transfer.phase is not FOLLOWING:
            return
        if self.published > self.read:
            self.transfer.advance(READING, now_s=0.0)
            self.reading = self.published
        elif self.read == NUM_BLOCKS:
            self.transfer.advance(CONFIRMING, now_s=0.0)

    def fail(self) -> None:
        if not self.transfer.is_over:
            self.transfer.fail(now_s=0.0)
            self.is_decided = True

    def read_ended(self, *, well: bool) -> None:
        stopped = self.transfer.phase is DestinationPhase.STOPPING
        self.transfer.read_ended(now_s=0.0)
        if well:
            self.read = self.reading
        elif not stopped:
            self.fail()
        self.reading = 0

    def answered(self) -> None:
        if self.transfer.phase is CONFIRMING:
            if self.lease_holds:
                self.transfer.advance(DestinationPhase.LANDED, now_s=0.0)
                self.is_decided = True
            else:
                self.fail()

    @property
    def is_quiet(self) -> bool:
        return self.is_decided and not self.transfer.is_writable


class Play:
    """Each method is an event: it happens to both. What cannot happen now is not offered."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.model = Model()
        self.may_answer = False

    def offered(self) -> list[str]:
        model, source = self.model, self.scene.source
        reads = self.scene.reads.running is not None
        events = ["cancel", "deadline", "peer_death"]
        if not model.is_decided or reads:
            events += ["publish"] * (3 if model.published < NUM_BLOCKS and source.lease_holds else 0)
            events += ["read_done", "read_done", "read_failed", "read_damaged"] if reads else []
            events += ["prefill_failed", "lease_expiry"] if source.lease_holds else []
        return events + ([] if self.may_answer else ["answer"])

    def publish(self) -> None:
        self.scene.source.publish()
        if not self.model.is_decided:
            self.model.published += 1

    def read_done(self) -> None:
        self.scene.reads.end()
        self.model.read_ended(well=True)

    def read_failed(self) -> None:
        self.scene.reads.end(PeerLost("the link broke"))
        self.model.read_ended(well=False)

    def read_damaged(self) -> None:
        self.scene.reads.end(DAMAGED)
        self.model.read_ended(well=False)

    def cancel(self) -> None:
        result = self.scene.pending.cancel()
        assert result is self.model.transfer.cancel(now_s=0.0)
        self.model.is_decided = True
        assert result.may_free is self.scene.pending.is_quiet

    def deadline(self) -> None:
        self.scene.pending.fail(self.scene.late())
        self.model.fail()

    def peer_death(self) -> None:
        self.scene.source.is_alive = False
        self.scene.strand.lost(PeerLost("its pings are not answered"))
        self.model.fail()

    def prefill_failed(self) -> None:
        self.scene.source.lease_holds = False
        self.scene.source.follow.send(kv_pb2.Publication(epoch=1, failure="out of memory"))
        self._told_of_the_end()

    def lease_expiry(self) -> None:
        self.scene.source.lease_holds = False
        self.scene.source.follow.send(None)
        self._told_of_the_end()

    def _told_of_the_end(self) -> None:
        """Once the last publication has come nobody listens: the confirmation finds out."""
        self.model.lease_holds = False
        if self.model.published < NUM_BLOCKS:
            self.model.fail()

    def answer(self) -> None:
        self.may_answer = True
        self.scene.source.may_answer.set()

    @property
    def key(self) -> Hashable:
        """Equal plays have equal futures."""
        model, source = self.model, self.scene.source
        books = (model.published, model.read, model.reading, model.is_decided, model.lease_holds)
        return (model.transfer.phase, model.transfer._decided, *books, self.may_answer, source.is_alive)

    async def step(self, event: str) -> None:
        getattr(self, event)()
        await self.scene.settle()
        self.model.go_on()
        if self.may_answer:
            self.model.answered()
        self.compare(event)

    def compare(self, event: str) -> None:
        pending, model = self.scene.pending, self.model
        real = (self.scene.strand.transfer.phase, pending.is_decided, pending.is_quiet)
        assert real == (model.transfer.phase, model.is_decided, model.is_quiet), f"after {event}"
        assert (self.scene.reads.running is not None) is model.transfer.is_writable, f"after {event}"


async def _play(seed: int, ends: collections.Counter[str]) -> None:
    chance = random.Random(seed)
    scene = Scene()
    play = Play(scene)
    await scene.settle()
    told: str | None = None
    try:
        for _ in range(chance.randint(1, 12)):
            gentle = [event for event in play.offered() if event in ("publish", "read_done", "answer")]
            await play.step(chance.choice(gentle if gentle and chance.random() < 0.7 else play.offered()))
            if scene.pending.is_decided:
                now = await _outcome(scene)
                assert told in (None, now), f"{told} became {now}"
                told = now
    finally:
        await scene.close()
    assert scene.num_decided == scene.num_ended == 1
    assert scene.source.released.count(True) <= 1
    ends[await _outcome(scene)] += 1


async def _replay(path: Sequence[str]) -> tuple[Hashable, list[str]]:
    """Where these events lead, compared after each, and what can happen there."""
    scene = Scene()
    play = Play(scene)
    await scene.settle()
    try:
        for event in path:
            await play.step(event)
        return play.key, sorted(set(play.offered()))
    finally:
        await scene.close()


async def _outcome(scene: Scene) -> str:
    try:
        await scene.pending.outcome()
        return "landed"
    except DisaggregatedError as error:
        return type(error).__name__


@pytest.mark.parametrize("first_seed", range(0, 3000, 500))
def test_the_real_pull_is_where_the_machine_says_after_each_event(first_seed: int) -> None:
    ends: collections.Counter[str] = collections.Counter()
    for seed in range(first_seed, first_seed + 500):
        run_in_virtual_time(_play(seed, ends))
    assert set(ends) >= {"landed", "PeerLost", "RequestCancelled", "TransferTimeout", "SourceFailed"}


def test_the_real_pull_follows_every_interleaving_of_eight_events() -> None:
    """Plays that are alike are gone on with once. Each is played again from its beginning, so none spoils another."""
    seen: set[Hashable] = set()
    frontier: list[list[str]] = [[]]
    num_steps = 0
    for _ in range(DEPTH + 1):
        reached: list[list[str]] = []
        for path in frontier:
            key, offered = run_in_virtual_time(_replay(path))
            if key not in seen:
                seen.add(key)
                reached += [[*path, event] for event in offered]
        frontier = reached
        num_steps += len(reached)
    sys.stdout.write(f"\n{len(seen)} plays that are unlike, {num_steps} steps\n")
    assert len(seen) > 50


# The comparison finds what it is there to find.


def is_quiet_while_a_read_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingTransfer, "writing_sources", [])


def lands_though_the_lease_had_ended(patch: pytest.MonkeyPatch) -> None:
    async def always_held(self: Pull, *, landed: bool) -> bool:
        return True

    patch.setattr(Pull, "_release", always_held)


def tells_of_a_failure_only_when_the_read_has_ended(patch: pytest.MonkeyPatch) -> None:
    fail = Strand.fail

    def late(self: Strand, error: DisaggregatedError) -> None:
        if not self.transfer.is_writable:
            fail(self, error)

    patch.setattr(Strand, "fail", late)


@pytest.mark.parametrize(
    "mistake",
    [
        is_quiet_while_a_read_runs,
        lands_though_the_lease_had_ended,
        tells_of_a_failure_only_when_the_read_has_ended,
    ],
)
def test_the_comparison_finds_a_pull_that(mistake: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            test_the_real_pull_follows_every_interleaving_of_eight_events()
