"""A lease with several readers, in virtual time: each leaves once, the last one ends it, and none keeps it for ever."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import LeaseExpired, TransferError
from kvtransfer.machine import SourcePhase
from kvtransfer.runs import Run
from kvtransfer.source.lease import Chunk, Ending, LeaseBook, Leaving, Outcome, Progress

HELD, ENDED, NOTHING = Leaving(held=True, ended=False), Leaving(held=True, ended=True), Leaving(held=False, ended=False)
LAST = Chunk(first_block=0, block_ids=(5,), checksums=(1,), num_tokens=4)
DONE = Outcome(num_tokens=4, num_blocks=1, first_token=9)


def book(num_readers: int, *, finished: bool = True) -> LeaseBook:
    made = LeaseBook(epoch=1, lease_s=10, num_layers=2)
    made.open("t", num_readers=num_readers, now_s=0)
    if finished:
        assert made.publish("t", LAST, DONE, now_s=0)
    return made


def leave(leases: LeaseBook, reader: str, phase: SourcePhase = SourcePhase.RELEASED) -> Leaving:
    return leases.leave("t", reader, phase, str(phase), now_s=1)


def test_the_last_reader_to_leave_ends_it() -> None:
    leases = book(3)
    assert [leave(leases, reader) for reader in ("a", "b", "c")] == [HELD, HELD, ENDED]
    ending = leases.ending("t")
    assert ending is not None
    assert ending.phase is SourcePhase.RELEASED


def test_nobody_leaves_twice() -> None:
    leases = book(2)
    assert [leave(leases, "a"), leave(leases, "a")] == [HELD, NOTHING]
    assert leases.live() == [("t", 1, 0)]


def test_one_that_gives_up_leaves_the_others_their_blocks_and_is_what_the_end_says() -> None:
    leases = book(2, finished=False)
    assert leave(leases, "a", SourcePhase.GIVEN_UP) == HELD
    assert leases.publish("t", LAST, DONE, now_s=1)
    assert leave(leases, "b") == ENDED
    ending = leases.ending("t")
    assert ending is not None
    assert ending.phase is SourcePhase.GIVEN_UP


def test_a_stranger_cannot_leave_in_the_place_of_a_reader() -> None:
    leases = book(2)
    for reader in ("a", "b"):
        assert isinstance(leases.progress("t", after=0, reader=reader), Progress)
    assert leave(leases, "stranger", SourcePhase.GIVEN_UP) == NOTHING
    with pytest.raises(TransferError, match="followed by another"):
        leases.progress("t", after=0, reader="stranger")
    assert [leave(leases, "a"), leave(leases, "b")] == [HELD, ENDED]


def test_no_reader_has_landed_what_was_not_finished() -> None:
    leases = book(2, finished=False)
    with pytest.raises(TransferError, match="cannot have landed"):
        leave(leases, "a")


def test_a_reader_that_never_comes_is_waited_for_as_long_as_the_lease() -> None:
    leases = book(2)
    assert leave(leases, "a") == HELD
    assert leases.due(now_s=9) == []
    assert leases.due(now_s=10) == ["t"]
    assert leases.end("t", SourcePhase.EXPIRED, "late", now_s=10)
    assert leave(leases, "b") == NOTHING
    assert isinstance(leases.progress("t", after=0, reader="b"), Ending)


def test_each_reader_reads_until_the_last_has_left() -> None:
    leases = book(2)
    progress = leases.progress("t", after=0, reader="a")
    leases.progress("t", after=0, reader="b")
    assert isinstance(progress, Progress)

    def read(peer_id: str) -> None:
        leases.check_read(
            lease_key=progress.key, epoch=1, blocks=[Run(5, 1)], layers=range(2), peer_id=peer_id, now_s=1
        )

    read("a")
    leave(leases, "a")
    read("b")
    with pytest.raises(LeaseExpired):
        read("stranger")
    leave(leases, "b")
    with pytest.raises(LeaseExpired):
        read("b")


@dataclasses.dataclass(frozen=True)
class Leave:
    reader: str
    phase: SourcePhase


leaves = st.builds(
    Leave, st.sampled_from(["a", "b", "c", "d"]), st.sampled_from([SourcePhase.RELEASED, SourcePhase.GIVEN_UP])
)


@given(num_readers=st.integers(1, 4), events=st.lists(leaves, max_size=12))
def test_whatever_the_order_it_ends_once_and_with_its_last_reader(num_readers: int, events: list[Leave]) -> None:
    leases = book(num_readers)
    seen: set[str] = set()
    ends = 0
    for event in events:
        leaving = leave(leases, event.reader, event.phase)
        expected = event.reader not in seen and len(seen) < num_readers
        assert leaving.held == expected
        if expected:
            seen.add(event.reader)
        ends += leaving.ended
        leases.check_integrity()
        assert leaving.ended == (expected and len(seen) == num_readers)
    assert ends == (len(seen) == num_readers)
