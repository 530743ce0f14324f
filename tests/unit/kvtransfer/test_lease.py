import random

import pytest

from disaggregated.errors import LeaseExpired, StaleEpoch, TransferError
from kvtransfer.machine import SourcePhase
from kvtransfer.runs import Run
from kvtransfer.source.lease import ENDED_REMEMBERED, Chunk, Ending, LeaseBook, Outcome, Progress


def book(lease_s: float = 10.0) -> LeaseBook:
    return LeaseBook(epoch=3, lease_s=lease_s)


def chunk(first: int, *block_ids: int) -> Chunk:
    return Chunk(first_block=first, block_ids=block_ids, checksums=block_ids, num_tokens=4 * (first + len(block_ids)))


def outcome(num_blocks: int) -> Outcome:
    return Outcome(num_tokens=4 * num_blocks, num_blocks=num_blocks, first_token=1)


def key_of(leases: LeaseBook, transfer_id: str) -> bytes:
    progress = leases.progress(transfer_id, after=0)
    assert isinstance(progress, Progress)
    return progress.key


def test_only_published_blocks_of_a_live_lease_may_be_read() -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4, 5, 9), None, now_s=0.0)
    key = key_of(leases, "t")
    leases.check_read(lease_key=key, epoch=3, blocks=[Run(4, 2), Run(9, 1)], now_s=1.0)
    with pytest.raises(TransferError, match="blocks 5 to 6 are not published"):
        leases.check_read(lease_key=key, epoch=3, blocks=[Run(5, 2)], now_s=1.0)
    with pytest.raises(StaleEpoch):
        leases.check_read(lease_key=key, epoch=2, blocks=[Run(4, 1)], now_s=1.0)
    with pytest.raises(LeaseExpired):
        leases.check_read(lease_key=b"?" * 16, epoch=3, blocks=[Run(4, 1)], now_s=1.0)


def test_a_lease_that_ran_out_lets_nobody_read_even_before_it_is_reaped() -> None:
    leases = book(lease_s=10.0)
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4), None, now_s=5.0)
    with pytest.raises(LeaseExpired):
        leases.check_read(lease_key=key_of(leases, "t"), epoch=3, blocks=[Run(4, 1)], now_s=10.0)
    assert leases.due(now_s=10.0) == ["t"]


def test_a_read_and_a_renewal_keep_a_lease_and_a_publication_does_not() -> None:
    leases = book(lease_s=10.0)
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4), None, now_s=5.0)
    assert leases.next_expiry_s() == 10.0
    leases.check_read(lease_key=key_of(leases, "t"), epoch=3, blocks=[Run(4, 1)], now_s=6.0)
    assert leases.next_expiry_s() == 16.0
    assert leases.renew("t", now_s=7.0)
    assert leases.next_expiry_s() == 17.0


def test_an_id_is_used_once() -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    with pytest.raises(TransferError, match="used once"):
        leases.open("t", now_s=0.0)
    leases.end("t", SourcePhase.FAILED, "x", now_s=1.0)
    with pytest.raises(TransferError, match="used once"):
        leases.open("t", now_s=2.0)


def test_a_failure_before_the_opening_is_final() -> None:
    leases = book()
    assert not leases.end("t", SourcePhase.FAILED, "cancelled", now_s=0.0)
    assert leases.progress("t", after=0) == Ending(phase=SourcePhase.FAILED, reason="cancelled")
    with pytest.raises(TransferError):
        leases.open("t", now_s=1.0)


def test_what_was_not_finished_cannot_have_landed() -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4), None, now_s=0.0)
    with pytest.raises(TransferError, match="cannot have landed"):
        leases.end("t", SourcePhase.RELEASED, "landed", now_s=1.0)
    assert leases.num_published_blocks("t") == 1


def test_endings_are_remembered_up_to_a_bound() -> None:
    leases = book()
    for number in range(ENDED_REMEMBERED + 1):
        leases.end(str(number), SourcePhase.FAILED, "x", now_s=0.0)
    assert leases.progress("0", after=0) is None
    assert leases.progress("1", after=0) is not None


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_opened_transfer_ends_at_most_once(seed: int) -> None:
    chance = random.Random(seed)
    leases = book(lease_s=5.0)
    opened: set[str] = set()
    ended: list[str] = []
    for now_s in range(200):
        name = str(chance.randrange(6)) + str(now_s // 40)
        match chance.randrange(5):
            case 0 if name not in opened and leases.progress(name, after=0) is None:
                leases.open(name, now_s=now_s)
                opened.add(name)
            case 1 if (count := leases.num_published_blocks(name)) is not None:
                progress = leases.progress(name, after=0)
                if isinstance(progress, Progress) and progress.outcome is None:
                    last = outcome(count + 1) if chance.random() < 0.3 else None
                    leases.publish(name, chunk(count, chance.randrange(99)), last, now_s=now_s)
            case 2:
                phase = chance.choice([SourcePhase.FAILED, SourcePhase.GIVEN_UP, SourcePhase.EXPIRED])
                ended.extend([name] if leases.end(name, phase, "x", now_s=now_s) else [])
            case 3:
                leases.renew(name, now_s=now_s)
            case _:
                late = leases.due(now_s=now_s)
                ended.extend(each for each in late if leases.end(each, SourcePhase.EXPIRED, "x", now_s=now_s))
        leases.check_integrity()
    assert len(ended) == len(set(ended))
    assert set(ended) | {name for name, _, _ in leases.live()} == opened
