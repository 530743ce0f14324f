"""The outcome of a transfer and its quiet are two moments; what is decided stays; blocks come back only when quiet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from disaggregated.errors import (
    ChecksumMismatch,
    DisaggregatedError,
    PeerLost,
    RequestCancelled,
    SourceFailed,
    TransferTimeout,
)
from disaggregated.v1 import kv_pb2
from kvtransfer.destination.landed import Landed
from kvtransfer.destination.options import STALL_TIMEOUT_S
from kvtransfer.destination.pending import PendingTransfer
from kvtransfer.machine import STUCK_AFTER_S, CancelResult, DestinationPhase
from tests.support.scripted_source import DAMAGED, Scene
from tests.support.virtual_time import run_in_virtual_time

Play = Callable[[Scene], Coroutine[Any, Any, None]]


def played(play: Play, **options: Any) -> None:
    async def run() -> None:
        scene = Scene(**options)
        await scene.settle()
        try:
            await play(scene)
        finally:
            await scene.close()
        assert scene.num_decided == scene.num_ended == 1

    run_in_virtual_time(run())


async def reading(scene: Scene) -> None:
    scene.source.publish()
    await scene.settle()
    assert scene.strand.transfer.phase is DestinationPhase.READING


async def outcome_of(scene: Scene) -> Landed | DisaggregatedError:
    try:
        return await scene.pending.outcome()
    except DisaggregatedError as error:
        return error


def test_a_transfer_that_lands_is_quiet_at_once() -> None:
    async def play(scene: Scene) -> None:
        for _ in range(2):
            await reading(scene)
            scene.reads.end()
            await scene.settle()
        scene.source.may_answer.set()
        landed = await scene.pending.outcome()
        assert (landed.first_token, landed.num_tokens) == (7, 8)
        await scene.pending.quiet()
        assert scene.source.released == [True]
        assert scene.pending.cancel() is CancelResult.ALREADY_COMPLETE
        assert scene.pending.error is None

    played(play)


def lose_the_source(scene: Scene) -> None:
    scene.strand.lost(PeerLost("it does not answer"))


def fail_the_prefill(scene: Scene) -> None:
    scene.source.follow.send(kv_pb2.Publication(epoch=1, failure="out of memory"))


def cancel(scene: Scene) -> None:
    assert scene.pending.cancel() is CancelResult.REQUESTED_IN_FLIGHT


@pytest.mark.parametrize(
    ("decide", "expected"),
    [(lose_the_source, PeerLost), (fail_the_prefill, SourceFailed), (cancel, RequestCancelled)],
)
@pytest.mark.parametrize("end", [None, PeerLost("at last")], ids=["ends well", "fails"])
def test_the_outcome_is_told_at_once_and_the_blocks_come_back_when_the_read_has_ended(
    decide: Callable[[Scene], None], expected: type[DisaggregatedError], end: Exception | None
) -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        decide(scene)
        assert isinstance(await outcome_of(scene), expected)
        await scene.settle()
        assert (scene.pending.is_quarantined, scene.pending.is_quiet) == (True, False)
        scene.reads.end(end)
        await scene.pending.quiet()
        assert (scene.pending.is_quarantined, scene.pending.is_quiet) == (False, True)
        assert isinstance(await outcome_of(scene), expected), "a late completion revived it"
        assert scene.reads.num_begun == 1

    played(play)


def test_the_deadline_decides_though_the_read_goes_on() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        begin_s = asyncio.get_running_loop().time()
        assert isinstance(await outcome_of(scene), TransferTimeout)
        assert asyncio.get_running_loop().time() - begin_s <= 3.0
        assert scene.pending.is_quarantined

    played(play, deadline_s=3.0)


def test_a_source_that_answers_and_brings_nothing_more_is_given_up() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        await asyncio.sleep(3 * STALL_TIMEOUT_S)
        assert not scene.pending.is_decided, "a read that is running is not silence"
        begin_s = asyncio.get_running_loop().time()
        scene.reads.end()
        with pytest.raises(TransferTimeout, match="source has brought nothing for 60"):
            await scene.pending.outcome()
        assert STALL_TIMEOUT_S <= asyncio.get_running_loop().time() - begin_s <= 2 * STALL_TIMEOUT_S

    played(play)


def test_a_prompt_may_wait_for_its_turn_as_long_as_its_deadline_lets_it() -> None:
    async def play(scene: Scene) -> None:
        await asyncio.sleep(10 * STALL_TIMEOUT_S)
        assert not scene.pending.is_decided

    played(play)


def test_whoever_stops_waiting_for_the_outcome_cancels_nothing() -> None:
    async def play(scene: Scene) -> None:
        waiting = asyncio.create_task(scene.pending.outcome())
        await scene.settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not scene.pending.is_decided

    played(play)


def test_waiting_for_the_end_goes_on_through_cancellations() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        scene.pending.cancel()
        waiting = asyncio.create_task(scene.pending.ended())
        for _ in range(3):
            await scene.settle()
            waiting.cancel()
        await scene.settle()
        assert not waiting.done()
        scene.reads.end()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert scene.pending.is_quiet

    played(play)


def test_what_a_cancel_finds_tells_whether_the_blocks_may_be_freed() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        found = [scene.pending.cancel(), scene.pending.cancel()]
        scene.reads.end()
        await scene.pending.quiet()
        found.append(scene.pending.cancel())
        assert [each.name for each in found] == ["REQUESTED_IN_FLIGHT", "REQUESTED_IN_FLIGHT", "ALREADY_COMPLETE"]
        assert [each.may_free for each in found] == [False, False, True]

    played(play)


def test_between_two_reads_the_blocks_may_be_freed_at_once() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        scene.reads.end()
        await scene.settle()
        assert scene.pending.cancel() is CancelResult.CANCELLED_WHILE_QUIET
        assert scene.pending.is_quiet

    played(play)


def test_a_transfer_that_has_not_asked_for_anything_may_be_freed_at_once() -> None:
    async def run() -> None:
        pending = PendingTransfer("t", [0], on_decided=lambda _: None, on_ended=lambda _: None)

        async def connecting() -> Landed:
            await asyncio.sleep(1000.0)
            raise AssertionError("it was cancelled")

        pending.begin(connecting(), deadline_s=2000.0, late=lambda: TransferTimeout("late"))
        await asyncio.sleep(0)
        assert pending.cancel() is CancelResult.CANCELLED_BEFORE_ADVERTISE
        assert pending.is_quiet
        with pytest.raises(RequestCancelled):
            await pending.outcome()
        await pending.ended()

    run_in_virtual_time(run())


def test_a_read_that_cannot_be_stopped_is_said_to_be_so() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        assert scene.pending.cancel() is CancelResult.NOT_CANCELLABLE

    played(play, can_stop=False)


def test_a_read_that_does_not_stop_makes_its_backend_unhealthy() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        transfer = scene.strand.transfer
        assert transfer.cancel(now_s=100.0) is CancelResult.REQUESTED_IN_FLIGHT
        assert transfer.cancel(now_s=100.0 + STUCK_AFTER_S) is CancelResult.REQUESTED_IN_FLIGHT
        assert transfer.cancel(now_s=100.1 + STUCK_AFTER_S) is CancelResult.BACKEND_UNHEALTHY
        assert transfer.stuck_s(110.0) == 10.0

    played(play)


def test_damage_is_told_as_damage_though_the_source_hangs_up_when_it_hears_of_it() -> None:
    async def play(scene: Scene) -> None:
        await reading(scene)
        scene.reads.end(DAMAGED)
        with pytest.raises(ChecksumMismatch):
            await scene.pending.outcome()
        assert scene.source.released == [False]

    played(play)


def test_one_that_is_cancelled_before_its_first_step_is_decided_too() -> None:
    async def run() -> None:
        pending = PendingTransfer("t", [0], on_decided=lambda _: None, on_ended=lambda _: None)

        async def work() -> Landed:
            raise AssertionError("it never begins")

        pending.begin(work(), deadline_s=1000.0, late=lambda: TransferTimeout("late"))
        (task,) = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(pending.outcome(), 1.0)
        await pending.ended()
        assert pending.is_quiet

    run_in_virtual_time(run())


def test_one_source_of_several_that_fails_fails_the_transfer_and_all_must_be_quiet() -> None:
    async def run() -> None:
        pending = PendingTransfer("t", [0, 1], on_decided=lambda _: None, on_ended=lambda _: None)
        never: asyncio.Future[Landed] = asyncio.get_running_loop().create_future()

        async def work() -> Landed:
            return await never

        first, second = pending.strand("first"), pending.strand("second")
        pending.begin(work(), deadline_s=10.0, late=lambda: TransferTimeout("late"))
        for strand in (first, second):
            strand.advance(DestinationPhase.FOLLOWING)
            strand.advance(DestinationPhase.READING)
        first.read_ended()
        first.fail(PeerLost("the first"))
        assert pending.is_quarantined
        with pytest.raises(PeerLost, match="the first"):
            first.advance(DestinationPhase.READING)
        second.fail(PeerLost("the second"))
        with pytest.raises(PeerLost, match="the first"):
            await pending.outcome()
        second.read_ended()
        assert pending.is_quiet
        await pending.ended()

    run_in_virtual_time(run())


def test_a_mistake_of_ours_reaches_whoever_waits() -> None:
    async def run() -> None:
        pending = PendingTransfer("t", [0], on_decided=lambda _: None, on_ended=lambda _: None)

        async def work() -> Landed:
            raise AssertionError("a mistake")

        pending.begin(work(), deadline_s=10.0, late=lambda: TransferTimeout("late"))
        with pytest.raises(AssertionError, match="a mistake"):
            await pending.outcome()
        await pending.ended()
        assert pending.is_quiet

    run_in_virtual_time(run())
