"""Control sockets of transports: both ends prove themselves, and nothing that was recorded opens anything."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from disaggregated.errors import StaleEpoch, TransferError, WrongSecret
from disaggregated.security.secret import OPEN, ClusterSecret
from kvtransfer.region import Region
from kvtransfer.transport import Offer, OurEnd, SourceIdentity
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Hello, Kind, Welcome
from kvtransfer.transports.meeting import EndpointIdentity, Introduction
from tests.support.kv_pools import SMALL

SECRET = ClusterSecret("s" * 32)
OTHER = ClusterSecret("t" * 32)
EPOCH = 7
Change = Callable[[Hello], Hello]


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.allocate(SMALL.pool_bytes) as made:
        yield made


def introduction(
    region: Region, identity: EndpointIdentity, *, secret: ClusterSecret = SECRET, epoch: int = EPOCH
) -> Introduction:
    offer = Offer(name="TCP", address=identity.address("somewhere:1"))
    source = SourceIdentity(instance_id="context-0", epoch=epoch, layout=SMALL)
    us = OurEnd(region=region, layout=SMALL, peer_id="generation-0")
    return Introduction(offer, source, us, secret=secret)


@dataclasses.dataclass(slots=True)
class Met:
    """What came of one meeting."""

    hello: bytes = b""
    source_says: TransferError | None = None
    destination_says: TransferError | None = None
    welcome: Welcome | None = None


def meet(
    identity: EndpointIdentity,
    intro: Introduction,
    *,
    change_welcome: Callable[[Welcome], Welcome] = lambda welcome: welcome,
    challenge: bytes = b"c" * 16,
) -> Met:
    """A destination's real half against a source's, over a socket pair."""
    met = Met()
    ours, theirs = socket.socketpair()

    def destination() -> None:
        connection = FrameSocket(theirs)
        try:
            met.welcome = intro.meet(connection, tail=b"where I am")
        except TransferError as error:
            met.destination_says = error
        finally:
            connection.close()

    thread = threading.Thread(target=destination)
    thread.start()
    connection = FrameSocket(ours)
    try:
        connection.send(frames.pack_challenge(challenge))
        _, met.hello = connection.receive_frame(Kind.HELLO)
        hello = frames.unpack_hello(met.hello)
        identity.check(hello, challenge=challenge)
        welcome = identity.welcome(hello, challenge=challenge, region_bytes=SMALL.pool_bytes, tail=b"where it is")
        connection.send(frames.pack_welcome(change_welcome(welcome)))
    except TransferError as error:
        met.source_says = error
        with contextlib.suppress(TransferError):
            connection.send(frames.pack_refused(error))
    finally:
        thread.join(20)
        connection.close()
    assert not thread.is_alive()
    return met


@pytest.mark.parametrize("secret", [SECRET, OPEN])
def test_two_members_meet_and_exchange_their_tails(region: Region, secret: ClusterSecret) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=secret)
    met = meet(identity, introduction(region, identity, secret=secret))
    assert met.welcome is not None
    assert met.welcome.tail == b"where it is"
    assert frames.unpack_hello(met.hello).tail == b"where I am"
    assert frames.unpack_hello(met.hello).peer_id == "generation-0"


@pytest.mark.parametrize(("ours", "theirs"), [(SECRET, OTHER), (SECRET, OPEN), (OPEN, SECRET)])
def test_a_destination_that_does_not_know_the_secret_is_refused(
    region: Region, ours: ClusterSecret, theirs: ClusterSecret
) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=ours)
    met = meet(identity, introduction(region, identity, secret=theirs))
    assert isinstance(met.source_says, WrongSecret)
    assert isinstance(met.destination_says, WrongSecret)
    assert "cluster_secret_file" in str(met.destination_says)


def test_a_source_that_does_not_know_the_secret_is_found_out(region: Region) -> None:
    """It takes any HELLO, and answers with a proof of its own making."""
    true = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    false = dataclasses.replace(true, key=EndpointIdentity.fresh(EPOCH, secret=OTHER).key)
    met = meet(true, introduction(region, true), change_welcome=lambda welcome: forged(false, welcome))
    assert isinstance(met.destination_says, WrongSecret)


def forged(identity: EndpointIdentity, welcome: Welcome) -> Welcome:
    nobody = Hello(nonce=b"n" * 16, epoch=EPOCH, peer_id="generation-0", proof=b"p" * 32)
    proof = identity.welcome(nobody, challenge=b"c" * 16, region_bytes=SMALL.pool_bytes, tail=b"").proof
    return dataclasses.replace(welcome, proof=proof)


def test_a_recorded_hello_opens_nothing(region: Region) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    recorded = frames.unpack_hello(meet(identity, introduction(region, identity), challenge=b"1" * 16).hello)
    identity.check(recorded, challenge=b"1" * 16)
    with pytest.raises(WrongSecret):
        identity.check(recorded, challenge=b"2" * 16)
    with pytest.raises(WrongSecret):
        EndpointIdentity.fresh(EPOCH, secret=SECRET).check(recorded, challenge=b"1" * 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda hello: dataclasses.replace(hello, peer_id="generation-1"),
        lambda hello: dataclasses.replace(hello, epoch=EPOCH + 1),
        lambda hello: dataclasses.replace(hello, tail=b"elsewhere"),
        lambda hello: dataclasses.replace(hello, nonce=b"n" * 16),
        lambda hello: dataclasses.replace(hello, proof=b"p" * 32),
    ],
)
def test_no_field_of_a_hello_can_be_changed_on_the_way(region: Region, change: Change) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    hello = frames.unpack_hello(meet(identity, introduction(region, identity)).hello)
    with pytest.raises(WrongSecret):
        identity.check(change(hello), challenge=b"c" * 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda welcome: dataclasses.replace(welcome, tail=b"elsewhere"),
        lambda welcome: dataclasses.replace(welcome, region_bytes=1),
        lambda welcome: dataclasses.replace(welcome, epoch=EPOCH + 1),
        lambda welcome: dataclasses.replace(welcome, proof=b"p" * 32),
    ],
)
def test_no_field_of_a_welcome_can_be_changed_on_the_way(region: Region, change: Callable[[Welcome], Welcome]) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    met = meet(identity, introduction(region, identity), change_welcome=change)
    assert isinstance(met.destination_says, WrongSecret)


def test_who_means_another_incarnation_is_told_so(region: Region) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    met = meet(identity, introduction(region, identity, epoch=EPOCH + 1))
    assert isinstance(met.destination_says, StaleEpoch)


def test_no_secret_and_no_key_is_in_an_offer_or_in_a_log(region: Region) -> None:
    identity = EndpointIdentity.fresh(EPOCH, secret=SECRET)
    assert identity.address("here") == f"here/{identity.nonce.hex()}"
    assert repr(identity.key) not in repr(identity)
    assert EndpointIdentity.fresh(EPOCH, secret=SECRET).nonce != identity.nonce


@pytest.mark.parametrize("address", ["here/", "here/00", "here/" + "0" * 34, "here/xyz"])
def test_an_offer_whose_nonce_is_none_is_refused(region: Region, address: str) -> None:
    source = SourceIdentity(instance_id="context-0", epoch=EPOCH, layout=SMALL)
    us = OurEnd(region=region, layout=SMALL, peer_id="generation-0")
    with pytest.raises(TransferError, match="offer's address"):
        Introduction(Offer(name="TCP", address=address), source, us)
