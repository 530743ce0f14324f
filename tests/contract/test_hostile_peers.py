"""Bytes that are not ours, on either side: refused, bounded, and nobody else suffers."""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from disaggregated.errors import PeerLost, TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.runs import Run
from kvtransfer.transport import Offer
from kvtransfer.transports import frames, listener
from kvtransfer.transports.frames import HEADER, Kind, ReadRequest, Welcome
from kvtransfer.transports.meeting import EndpointIdentity
from kvtransfer.transports.unix_port import host_key
from tests.support import kv_wire
from tests.support.kv_endpoints import PATIENT_S, PROGRESS_TIMEOUT_S, SLACK_S, Pair, connected_pair
from tests.support.kv_pools import EPOCH, SMALL, blocks_of
from tests.support.kv_wire import read_to_the_end


@pytest.fixture
def pair(transport_name: str) -> Iterator[Pair]:
    with connected_pair(transport_name) as made:
        yield made
        made.read(made.order([3, 5], [3, 5]))  # Whatever the test did, good peers are still served.
        assert (blocks_of(made.into, SMALL, [3, 5]) == blocks_of(made.source, SMALL, [3, 5])).all()


def dial(pair: Pair) -> socket.socket:
    return kv_wire.dial(pair.endpoint.describe())


def introduced(pair: Pair) -> socket.socket:
    return kv_wire.introduced(pair.endpoint.describe(), epoch=EPOCH)


def hello(pair: Pair, sock: socket.socket) -> bytes:
    return kv_wire.proven_hello(sock, pair.endpoint.describe(), epoch=EPOCH)


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_answered_by_closing(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    with dial(pair) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(chance.randbytes(chance.choice([16, 17, 1000, 100_000])))
        assert len(read_to_the_end(sock)) < 2048


@pytest.mark.parametrize("seed", range(10))
def test_noise_after_a_good_greeting_is_answered_by_closing(pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    good = frames.pack_read(ReadRequest(lease_key=b"k" * 16, epoch=EPOCH, layers=range(3), blocks=(Run(1, 1),)))
    damaged = bytearray(good)
    damaged[chance.randrange(8)] ^= 1 << chance.randrange(8)  # Magic, version or kind.
    with introduced(pair) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(damaged)
        assert len(read_to_the_end(sock)) < 2048


def test_a_length_of_a_terabyte_costs_nothing(pair: Pair) -> None:
    with introduced(pair) as sock:
        sock.sendall(HEADER.pack(frames.MAGIC, frames.VERSION, Kind.READ, 1 << 40))
        read_to_the_end(sock)


def test_a_read_of_blocks_that_do_not_exist_closes_the_connection(pair: Pair) -> None:
    with introduced(pair) as sock:
        body = struct.pack("<16sQIII", pair.gate.key, EPOCH, 0, 3, 1) + struct.pack("<II", 2**32 - 1, 2**32 - 1)
        sock.sendall(frames.pack(Kind.READ, body))
        read_to_the_end(sock)
    assert pair.endpoint.statistics().bytes_total == 0


@pytest.mark.parametrize("length", range(0, 200, 25))
def test_a_greeting_that_breaks_off_leaves_no_connection(pair: Pair, length: int) -> None:
    with dial(pair) as sock:
        sock.sendall(hello(pair, sock)[:length])
        sock.shutdown(socket.SHUT_WR)
        assert read_to_the_end(sock) == b""


def test_who_never_greets_is_closed_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "GREETING_TIMEOUT_S", 0.1)
    with dial(pair) as sock:
        kv_wire.receive_frame(sock)
        assert read_to_the_end(sock) == b""


def test_who_greets_a_byte_at_a_time_is_closed_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "GREETING_TIMEOUT_S", 0.1)
    with dial(pair) as sock, contextlib.suppress(ConnectionError):
        for byte in hello(pair, sock):
            sock.sendall(bytes([byte]))
            if wait_for_close(sock, 0.02):
                break
        else:
            raise AssertionError("it was never closed")


def wait_for_close(sock: socket.socket, timeout_s: float) -> bool:
    sock.settimeout(timeout_s)
    with contextlib.suppress(TimeoutError):
        return sock.recv(1) == b""
    return False


def test_connections_beyond_the_bound_are_closed_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 3)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(introduced(pair))
        with dial(pair) as refused:
            assert read_to_the_end(refused) == b""
        assert pair.endpoint.statistics().connections_open == 3


# A source that is not one of ours.


class HostileSource:
    """Accepts one connection after another and plays `script` on each. It has learnt the cluster's secret."""

    def __init__(self, name: str, script: "Script") -> None:
        family = socket.AF_UNIX if name == "SHM" else socket.AF_INET
        self._listening = socket.socket(family, socket.SOCK_STREAM)
        self._listening.bind("" if name == "SHM" else ("127.0.0.1", 0))
        self._listening.listen()
        self._script = script
        self._thread = threading.Thread(target=self._run)
        own = self._listening.getsockname()
        place = own[1:].decode() if name == "SHM" else f"127.0.0.1:{own[1]}"
        self._identity = EndpointIdentity.fresh(EPOCH)
        self.offer = Offer(name=name, address=self._identity.address(place), host_key=host_key())

    def __enter__(self) -> "HostileSource":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listening.accept()
                with accepted, contextlib.suppress(OSError):
                    accepted.settimeout(kv_wire.WAIT_S)
                    self._script(accepted, self._identity)


Script = Callable[[socket.socket, EndpointIdentity], None]


def says(answer: bytes) -> Script:
    return lambda sock, _: sock.sendall(answer)


def says_to_a_hello(answer: bytes) -> Script:
    def script(sock: socket.socket, _: EndpointIdentity) -> None:
        sock.sendall(frames.pack_challenge(b"c" * 16))
        kv_wire.receive_frame(sock)
        sock.sendall(answer)

    return script


def hands_over(*fds: int) -> Script:
    return lambda sock, identity: kv_wire.greet(sock, identity, region_bytes=SMALL.pool_bytes, fds=fds)


def says_to_a_read(answer: bytes) -> Script:
    def script(sock: socket.socket, identity: EndpointIdentity) -> None:
        kv_wire.greet(sock, identity, region_bytes=SMALL.pool_bytes)
        sock.recv(4096)
        sock.sendall(answer)

    return script


def void(_: object) -> None:
    """For a lambda that is called for what it does."""


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frames.pack(Kind.REFUSED, b"no"),
        HEADER.pack(frames.MAGIC, frames.VERSION, Kind.WELCOME, 1 << 50),
        HEADER.pack(frames.MAGIC, frames.VERSION, Kind.WELCOME, 16),
        frames.pack_welcome(Welcome(epoch=EPOCH, region_bytes=1 << 62, proof=b"p" * 32)),
        frames.pack_challenge(b"c" * 16),
        frames.pack_blocks_header(1 << 62),
    ],
)
@pytest.mark.parametrize("to", [says, says_to_a_hello])
def test_a_source_that_greets_wrongly_is_refused(pair: Pair, answer: bytes, to: Callable[[bytes], Script]) -> None:
    with HostileSource(pair.name, to(answer)) as hostile, pytest.raises(TransferError):
        pair.connect(offer=hostile.offer)


def test_a_source_that_never_greets_is_given_up(transport_name: str) -> None:
    leave = threading.Event()
    with (
        connected_pair(transport_name, progress_timeout_s=PROGRESS_TIMEOUT_S) as pair,
        HostileSource(pair.name, lambda *_: void(leave.wait(PATIENT_S))) as hostile,
    ):
        begin_s = time.monotonic()
        with pytest.raises(PeerLost):
            pair.connect(offer=hostile.offer)
        assert time.monotonic() - begin_s < PROGRESS_TIMEOUT_S + SLACK_S
        leave.set()


@pytest.mark.parametrize("num_bytes", [0, 1, SMALL.block_bytes * 3 - 1, SMALL.block_bytes * 3 + 1, 1 << 62])
def test_blocks_of_another_length_than_asked_for_are_refused_before_they_land(num_bytes: int) -> None:
    answer = frames.pack_blocks_header(num_bytes) + b"?" * 1000
    with connected_pair("TCP") as pair, HostileSource("TCP", says_to_a_read(answer)) as hostile:
        link = pair.connect(offer=hostile.offer)
        pair.link, good = link, pair.link
        with pytest.raises(TransferError, match="bytes of blocks where"):
            pair.read(pair.order([1], [1]))
        link.close(deadline=Deadline.after(20))
        pair.link = good
        assert not any(pair.into.buffer)


@pytest.mark.parametrize("sent", [0, 1, 700, SMALL.block_bytes * 3 - 1])
def test_blocks_that_break_off_are_an_error(sent: int) -> None:
    answer = frames.pack_blocks_header(SMALL.block_bytes * 3) + b"?" * sent
    with connected_pair("TCP") as pair, HostileSource("TCP", says_to_a_read(answer)) as hostile:
        link = pair.connect(offer=hostile.offer)
        pair.link, good = link, pair.link
        with pytest.raises(PeerLost):
            pair.read(pair.order([1], [1]))
        link.close(deadline=Deadline.after(20))
        pair.link = good


def descriptors_of(name: str) -> int:
    targets = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(name in os.readlink(target) for target in targets if os.path.lexists(target))


@pytest.mark.parametrize(("count", "sentence"), [(1, "seal"), (0, "0 descriptors"), (3, "3 descriptors")])
def test_descriptors_that_are_not_one_sealed_region_are_closed_and_refused(count: int, sentence: str) -> None:
    fd = os.memfd_create("not-a-pool")
    os.ftruncate(fd, SMALL.pool_bytes)
    with (
        connected_pair("SHM") as pair,
        HostileSource("SHM", hands_over(*[fd] * count)) as hostile,
        pytest.raises(TransferError, match=sentence),
    ):
        pair.connect(offer=hostile.offer)
    assert descriptors_of("not-a-pool") == 1
    os.close(fd)
