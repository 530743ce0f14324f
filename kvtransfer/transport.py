"""What a transport is: how bytes of published blocks get from a source's pool into ours.

    source process                               destination process
    SourceEndpoint ── describe() → Offer ─────▶  DestinationTransport.connect(offer) → PeerLink
        │  asks its ReadGate about each read        │  read(): blocking, called on a worker thread
        ▼                                           ▼
    blocks of the pool ══════════ bytes ═════════▶ blocks of our own pool

Control (what is ready, checksums, leases) goes over gRPC and knows no transport. A transport moves bytes, names the
lease on each read, and makes one promise that everything else rests on:

    *when `PeerLink.read` has returned or raised, no byte of that read can land any more.*
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import Run

if TYPE_CHECKING:
    from kvtransfer.checksum import BlockSums

LEASE_KEY_BYTES: Final = 16
PROGRESS_TIMEOUT_S: Final = 2.0
"""No byte for that long means the peer is lost, however long the transfer as a whole may take."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """How to reach one endpoint. `address` is opaque and no secret: who uses it proves that it knows the cluster's."""

    name: str
    address: str
    host_key: str = ""
    """Equal on both ends when they can share memory; "" where that does not matter."""

    def split(self) -> tuple[str, bytes]:
        """The place and the nonce of an address that is written `place/hex`. Raises TransferError when it is not."""
        place, _, nonce = self.address.rpartition("/")
        try:
            return place, bytes.fromhex(nonce)
        except ValueError as error:
            raise TransferError(f"the {self.name} offer's address is not one: {place!r}") from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceIdentity:
    """Whom we expect behind an offer, as its Connect reply told."""

    instance_id: str
    epoch: int
    layout: KVLayout


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OurEnd:
    """What a destination's transports land in. `region` stays open as long as they are used."""

    region: Region
    layout: KVLayout
    peer_id: str
    """Who we are to the source: the leases that we follow are for this name alone."""
    progress_timeout_s: float = PROGRESS_TIMEOUT_S


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockRead:
    """`source[i]` lands in our block `into[i]`, for each of `layers`."""

    lease_key: bytes
    epoch: int
    source: Sequence[int]
    into: Sequence[int]
    layers: range
    sums: BlockSums | None = None
    """A running checksum for each block, which a transport may feed with what it puts into our pool. One that does
    feeds it every byte; one that cannot see the bytes leaves it alone, and our memory is verified afterwards."""


class ReadGate(Protocol):
    """Asked by an endpoint, on its own threads, before it serves a byte."""

    def check_read(self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str) -> None:
        """Returns when each of `blocks` is published, in `layers`, under a live lease. `peer_id` is who asks, proven.

        Raises StaleEpoch, LeaseExpired (or never was), or TransferError for blocks the lease does not hold, and for a
        lease that another peer follows.
        """


@dataclasses.dataclass(slots=True)
class EndpointStatistics:
    """Counters since start. A snapshot may lag by one read."""

    connections_open: int = 0
    connections_refused: int = 0
    """Too many, wrong user, no proof of the secret, or bytes that are not our protocol."""
    reads_total: int = 0
    reads_refused: int = 0
    bytes_total: int = 0


class SourceEndpoint(Protocol):
    """One way into a source's pool. Owns its socket and threads from `start` to `close`."""

    @property
    def name(self) -> str: ...

    def start(self, gate: ReadGate) -> None:
        """Listen. Raises TransferError when it cannot."""

    def describe(self) -> Offer:
        """Valid from `start` on."""

    def close(self, *, deadline: Deadline) -> None:
        """End every connection and wait for every thread. Idempotent."""

    def statistics(self) -> EndpointStatistics: ...


class ReadStop:
    """Ends a blocking read soon, from any thread: by a flag between copies, by shutting its socket inside them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = ctypes.c_int32(0)
        self._socket: socket.socket | None = None
        self._waker: Callable[[], None] | None = None

    @property
    def flag_address(self) -> int:
        """Of an int32 that is not 0 from the request on: for native code, while this object lives."""
        return ctypes.addressof(self._requested)

    def request(self) -> None:
        """Idempotent. The read raises; until it has, its blocks are writable."""
        with self._lock:
            self._requested.value = 1
            if self._socket is not None:
                _shut(self._socket)
            if self._waker is not None:
                self._waker()

    @property
    def is_requested(self) -> bool:
        return bool(self._requested.value)

    @contextlib.contextmanager
    def waking(self, waker: Callable[[], None]) -> Iterator[None]:
        """While inside, `request` calls `waker`, for whoever waits for something of this process: it then looks at
        `check`. One at a time; `waker` must not use this object."""
        with self._lock:
            assert self._waker is None, "one read waits for two things"
            self._waker = waker
        try:
            yield
        finally:
            with self._lock:
                self._waker = None

    def check(self) -> None:
        """Raises ReadStopped once a stop was requested."""
        if self._requested.value:
            raise ReadStopped("the read was stopped")

    def shuts(self, blocking: socket.socket) -> contextlib.AbstractContextManager[None]:
        """While inside, `request` shuts `blocking`, so that whoever waits in it returns at once.

        Raises ReadStopped on the way out, too: a stop may come when the last byte has, and the socket is shut then,
        however well the read went.
        """
        return _Shutting(self, blocking)

    def _enter(self, blocking: socket.socket) -> None:
        with self._lock:
            self.check()
            self._socket = blocking

    def _leave(self) -> bool:
        """True when the socket was shut."""
        with self._lock:
            self._socket = None
            return bool(self._requested.value)


class _Shutting:
    """Of one read; a plain object, because this lies on the way of every small read."""

    def __init__(self, stop: ReadStop, blocking: socket.socket) -> None:
        self._stop = stop
        self._blocking = blocking

    def __enter__(self) -> None:
        self._stop._enter(self._blocking)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._stop._leave() and kind is None:
            raise ReadStopped("the read was stopped")


class ReadStopped(TransferError):
    """We ended this read ourselves; never seen outside of a pull."""


class PeerLink(Protocol):
    """Our side of one source: sockets, mapped memory. Thread-safe; each read uses a connection of its own."""

    @property
    def transport(self) -> str: ...

    @property
    def can_stop(self) -> bool:
        """Whether a `ReadStop` ends a running read soon; where not, a read ends when its library lets it."""

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        """Copy blocks into our pool. Blocks the calling thread; terminal when it returns or raises.

        Raises:
            PeerLost: the link broke, or nothing came for the progress timeout.
            TransferTimeout: the deadline passed.
            LeaseExpired, StaleEpoch, TransferError: the source refused.
            ReadStopped: `stop` was requested.
        """

    def drain(self, *, deadline: Deadline) -> None:
        """Stop every running read and return once none can write any more. Raises TransferTimeout."""

    def close(self, *, deadline: Deadline) -> None:
        """Drain, then give sockets and mappings back. Idempotent."""

    def statistics(self) -> LinkCounters: ...


@dataclasses.dataclass(slots=True)
class LinkCounters:
    bytes_total: int = 0
    seconds_total: float = 0.0
    """Spent inside `read`; two reads at once count twice."""
    reads_total: int = 0
    failures_total: int = 0

    def count(self, num_bytes: int, seconds: float, num_failures: int) -> None:
        """One read that has ended; a failed one is neither a read nor bytes."""
        self.failures_total += num_failures
        if num_failures == 0:
            self.reads_total += 1
            self.bytes_total += num_bytes
            self.seconds_total += seconds


class DestinationTransport(Protocol):
    """Makes links of one kind into our own pool."""

    @property
    def name(self) -> str: ...

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        """Blocking. Raises PeerLost, TransferTimeout, StaleEpoch, or TransferError with the reason of a refusal."""


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # The peer may have closed it already.
        sock.shutdown(socket.SHUT_RDWR)
