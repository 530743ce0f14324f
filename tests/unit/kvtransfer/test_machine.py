import itertools

import pytest

from kvtransfer.machine import (
    NEXT_DESTINATION,
    NEXT_SOURCE,
    CancelResult,
    DestinationPhase,
    DestinationTransfer,
    InvalidTransition,
    SourcePhase,
    SourceTransfer,
)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SourcePhase, SourcePhase)))
def test_a_source_moves_as_its_table_says_and_not_otherwise(before: SourcePhase, after: SourcePhase) -> None:
    transfer = SourceTransfer("t", phase=before)
    if after in NEXT_SOURCE[before]:
        transfer.advance(after, now_s=1.0)
        assert (transfer.phase, transfer.story) == (after, [(1.0, after)])
    else:
        with pytest.raises(InvalidTransition, match="t: "):
            transfer.advance(after, now_s=1.0)
        assert (transfer.phase, transfer.story) == (before, [])


@pytest.mark.parametrize(("before", "after"), list(itertools.product(DestinationPhase, DestinationPhase)))
def test_a_destination_moves_as_its_table_says_and_not_otherwise(
    before: DestinationPhase, after: DestinationPhase
) -> None:
    transfer = DestinationTransfer("t", phase=before)
    if after in NEXT_DESTINATION[before]:
        transfer.advance(after, now_s=1.0)
        assert transfer.phase is after
    else:
        with pytest.raises(InvalidTransition, match="t: "):
            transfer.advance(after, now_s=1.0)
        assert transfer.phase is before


def test_every_phase_has_a_row_and_is_reached() -> None:
    for table, first in ((NEXT_SOURCE, SourcePhase.OPENED), (NEXT_DESTINATION, DestinationPhase.RESERVED)):
        assert {first}.union(*table.values()) == set(type(first)) == set(table)


@pytest.mark.parametrize("phase", list(SourcePhase))
def test_a_source_transfer_ends_once(phase: SourcePhase) -> None:
    transfer = SourceTransfer("t", phase=phase)
    over = transfer.is_over
    assert transfer.end(SourcePhase.EXPIRED, now_s=1.0) is not over
    assert transfer.end(SourcePhase.FAILED, now_s=2.0) is False
    assert transfer.phase is (phase if over else SourcePhase.EXPIRED)


CANCELS = {
    DestinationPhase.RESERVED: CancelResult.CANCELLED_BEFORE_ADVERTISE,
    DestinationPhase.FOLLOWING: CancelResult.CANCELLED_WHILE_QUIET,
    DestinationPhase.READING: CancelResult.REQUESTED_IN_FLIGHT,
    DestinationPhase.CONFIRMING: CancelResult.CANCELLED_WHILE_QUIET,
    DestinationPhase.STOPPING: CancelResult.REQUESTED_IN_FLIGHT,
    DestinationPhase.LANDED: CancelResult.ALREADY_COMPLETE,
    DestinationPhase.CANCELLED: CancelResult.ALREADY_COMPLETE,
    DestinationPhase.FAILED: CancelResult.ALREADY_COMPLETE,
}


@pytest.mark.parametrize("phase", list(DestinationPhase))
def test_a_cancel_says_whether_the_blocks_may_be_freed(phase: DestinationPhase) -> None:
    transfer = DestinationTransfer("t", phase=phase)
    result = transfer.cancel(now_s=1.0)
    assert result is CANCELS[phase]
    assert result.may_free is not transfer.is_writable


@pytest.mark.parametrize("decided", [DestinationPhase.CANCELLED, DestinationPhase.FAILED])
def test_a_late_completion_revives_nothing(decided: DestinationPhase) -> None:
    transfer = DestinationTransfer("t", phase=DestinationPhase.READING)
    stop, other = transfer.cancel, transfer.fail
    if decided is DestinationPhase.FAILED:
        stop, other = other, stop
    assert stop(now_s=1.0) is CancelResult.REQUESTED_IN_FLIGHT
    assert other(now_s=2.0) is CancelResult.REQUESTED_IN_FLIGHT
    transfer.read_ended(now_s=3.0)
    assert transfer.phase is decided
    assert other(now_s=4.0) is CancelResult.ALREADY_COMPLETE
    assert transfer.phase is decided
