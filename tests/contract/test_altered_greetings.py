"""What an end tells of its library travels in the greeting, and is proven: a bit that flips on the way is found."""

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator

import pytest

from disaggregated.errors import TransferError, WrongSecret
from kvtransfer.transport import Offer
from kvtransfer.transports.frames import HEADER, NONCE_BYTES, Kind
from tests.support import kv_wire
from tests.support.kv_endpoints import Pair, connected_pair

CHALLENGE_BYTES = HEADER.size + NONCE_BYTES


@pytest.fixture
def pair(transport_name: str) -> Iterator[Pair]:
    if transport_name == "SHM":
        pytest.skip("nobody stands between the ends of a unix socket")
    with connected_pair(transport_name) as made:
        yield made


class Meddler:
    """Stands between the two ends of one connection, and flips one bit of what the source says."""

    def __init__(self, offer: Offer, *, at_byte: int) -> None:
        place, nonce = offer.address.rsplit("/", 1)
        host, _, port = place.rpartition(":")
        self._to = (host, int(port))
        self._at_byte = at_byte
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.offer = dataclasses.replace(offer, address=f"127.0.0.1:{self._listening.getsockname()[1]}/{nonce}")
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Meddler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._listening.close()

    def _serve(self) -> None:
        destination, _ = self._listening.accept()
        source = socket.create_connection(self._to)
        hello = threading.Thread(target=_forward, args=[destination, source, -1])
        hello.start()
        _forward(source, destination, self._at_byte)
        hello.join(20)
        source.close()
        destination.close()


def _forward(one: socket.socket, other: socket.socket, flip_at: int) -> None:
    """Until the first of them ends; both are shut then."""
    num_bytes = 0
    with contextlib.suppress(OSError):
        while said := bytearray(one.recv(65536)):
            if num_bytes <= flip_at < num_bytes + len(said):
                said[flip_at - num_bytes] ^= 0x04
            num_bytes += len(said)
            other.sendall(said)
    for each in (one, other):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def welcome_bytes(pair: Pair) -> int:
    """How long this endpoint's WELCOME is, without its header."""
    offer = pair.endpoint.describe()
    with kv_wire.dial(offer) as sock:
        sock.sendall(kv_wire.proven_hello(sock, offer, epoch=pair.identity.epoch))
        kind, body = kv_wire.receive_frame(sock)
        assert kind is Kind.WELCOME
        return len(body)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 1.0])
def test_a_bit_that_flips_in_what_the_source_tells_of_itself_is_refused(pair: Pair, part: float) -> None:
    """Libraries take altered addresses and keys without a word, and read from elsewhere, or crash."""
    at_byte = CHALLENGE_BYTES + HEADER.size + int((welcome_bytes(pair) - 1) * part)
    with Meddler(pair.endpoint.describe(), at_byte=at_byte) as meddler, pytest.raises(WrongSecret):
        pair.connect(offer=meddler.offer)
    pair.read(pair.order([1], [1]))


def test_a_connection_that_breaks_off_in_the_greeting_is_an_error_and_leaves_nothing(pair: Pair) -> None:
    at_byte = CHALLENGE_BYTES  # The magic of the WELCOME.
    with Meddler(pair.endpoint.describe(), at_byte=at_byte) as meddler, pytest.raises(TransferError):
        pair.connect(offer=meddler.offer)
