import dataclasses
import random

import pytest

from disaggregated.errors import FingerprintMismatch, LeaseExpired, StaleEpoch, TransferError
from kvtransfer.machine import SourcePhase
from kvtransfer.runs import Run
from kvtransfer.source.lease import ENDED_REMEMBERED, Chunk, Ending, LeaseBook, Outcome, Progress, Published

NUM_LAYERS = 3
EVERY_LAYER = range(NUM_LAYERS)


def book(lease_s: float = 10.0) -> LeaseBook:
    return LeaseBook(epoch=3, lease_s=lease_s, num_layers=NUM_LAYERS)


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
    leases.check_read(lease_key=key, epoch=3, blocks=[Run(4, 2), Run(9, 1)], layers=EVERY_LAYER, peer_id="g", now_s=1.0)
    with pytest.raises(TransferError, match="blocks 5 to 6 in layers 0 to 2 are not published by t"):
        leases.check_read(lease_key=key, epoch=3, blocks=[Run(5, 2)], layers=EVERY_LAYER, peer_id="g", now_s=1.0)
    with pytest.raises(StaleEpoch):
        leases.check_read(lease_key=key, epoch=2, blocks=[Run(4, 1)], layers=EVERY_LAYER, peer_id="g", now_s=1.0)
    with pytest.raises(LeaseExpired):
        leases.check_read(lease_key=b"?" * 16, epoch=3, blocks=[Run(4, 1)], layers=EVERY_LAYER, peer_id="g", now_s=1.0)


def test_a_layer_that_is_not_published_may_not_be_read() -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4, 5), None, now_s=0.0)
    leases.publish("t", dataclasses.replace(chunk(2, 9), layers=range(2)), None, now_s=0.0)
    key = key_of(leases, "t")

    def read(layers: range, *blocks: Run) -> None:
        leases.check_read(lease_key=key, epoch=3, blocks=blocks, layers=layers, peer_id="g", now_s=1.0)

    read(range(2), Run(4, 2), Run(9, 1))
    read(range(2, 3), Run(4, 2))
    for layers in (range(2, 3), range(3), range(1, 3)):
        with pytest.raises(TransferError, match="blocks 9 to 9 in layers"):
            read(layers, Run(4, 2), Run(9, 1))
    assert leases.published("t") == Published(num_blocks=2, begun=(9,), num_layers_begun=2)
    leases.publish("t", dataclasses.replace(chunk(2, 9), layers=range(2, 3)), outcome(3), now_s=0.0)
    read(range(3), Run(4, 2), Run(9, 1))
    leases.check_integrity()


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(chunk(0, 4), layers=range(1, 3)),
        dataclasses.replace(chunk(0, 4, 5), layers=range(2)),
        dataclasses.replace(chunk(0, 4, 5), layers=range(2, 4)),
        dataclasses.replace(chunk(0, 4, 6), layers=range(2, 3)),
        chunk(0, 4, 5),
        chunk(2, 6),
    ],
)
def test_a_publication_that_does_not_continue_the_one_before_is_our_own_mistake(wrong: Chunk) -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    leases.publish("t", dataclasses.replace(chunk(0, 4, 5), layers=range(2)), None, now_s=0.0)
    with pytest.raises(AssertionError):
        leases.publish("t", wrong, None, now_s=0.0)


def test_no_transfer_is_finished_within_the_layers_of_a_block() -> None:
    leases = book()
    leases.open("t", now_s=0.0)
    with pytest.raises(AssertionError, match="finished within"):
        leases.publish("t", dataclasses.replace(chunk(0, 4), layers=range(2)), outcome(1), now_s=0.0)


def test_a_lease_that_ran_out_lets_nobody_read_even_before_it_is_reaped() -> None:
    leases = book(lease_s=10.0)
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4), None, now_s=5.0)
    with pytest.raises(LeaseExpired):
        leases.check_read(
            lease_key=key_of(leases, "t"), epoch=3, blocks=[Run(4, 1)], layers=EVERY_LAYER, peer_id="g", now_s=10.0
        )
    assert leases.due(now_s=10.0) == ["t"]


def test_a_read_and_a_renewal_keep_a_lease_and_a_publication_does_not() -> None:
    leases = book(lease_s=10.0)
    leases.open("t", now_s=0.0)
    leases.publish("t", chunk(0, 4), None, now_s=5.0)
    assert leases.next_expiry_s() == 10.0
    leases.check_read(
        lease_key=key_of(leases, "t"), epoch=3, blocks=[Run(4, 1)], layers=EVERY_LAYER, peer_id="g", now_s=6.0
    )
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
    assert leases.published("t") == Published(num_blocks=1)


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
            case 1 if (published := leases.published(name)) is not None:
                progress = leases.progress(name, after=0)
                if isinstance(progress, Progress) and progress.outcome is None:
                    last = outcome(published.num_blocks + 1) if chance.random() < 0.3 else None
                    leases.publish(name, chunk(published.num_blocks, chance.randrange(99)), last, now_s=now_s)
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


def test_a_transfer_that_was_refused_before_it_began_fails_with_what_it_was_refused_for() -> None:
    leases = book()
    refusal = FingerprintMismatch("other weights")
    assert not leases.end("t", SourcePhase.GIVEN_UP, "refused", now_s=0.0, cause=refusal)
    with pytest.raises(FingerprintMismatch, match="other weights"):
        leases.open("t", now_s=1.0)
    assert leases.ending("t") == Ending(phase=SourcePhase.GIVEN_UP, reason="refused", cause=refusal)
    leases.check_integrity()
