"""One source as a destination holds it: its control channel, the agreed transport, and what went over it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import grpc

from disaggregated import logs, rpc
from disaggregated.errors import (
    DeadlineExceeded,
    DisaggregatedError,
    PeerLost,
    ServerLost,
    TransferError,
    TransferTimeout,
)
from disaggregated.kv_shard import KVHolding
from disaggregated.v1 import kv_pb2_grpc
from kvtransfer.deadline import Deadline
from kvtransfer.destination.foreign import ForeignPools, StagingRegion
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.transport import LinkCounters, PeerLink, SourceIdentity

log = logs.get(__name__)

_TELLING_BYTES: Final = 1 << 16
"""A smaller transfer says more of latency than of the link."""
_NEWEST_COUNTS: Final = 0.25


FailPull = Callable[[TransferError], None]


class Ticket(Protocol):
    """Where the blocks of one transfer are; `control_pb2.TransferTicket` is one."""

    @property
    def address(self) -> str: ...
    @property
    def instance_id(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def transfer_id(self) -> str: ...


@dataclasses.dataclass(slots=True)
class PeerStatistics:
    """What the metrics, the log and the dashboard say about one link."""

    peer_id: str
    transport: str
    why: str
    """Why this transport, in words; names every better one that failed."""
    fallbacks: int = 0
    """Better transports that failed at connect time."""
    devices: str = ""
    """Whose memory the bytes come from and go to: `cpu -> cuda:0`."""
    recent_bytes_per_s: float = 0.0
    """While bytes moved, in the last transfers, the last one counting most; 0 until enough have moved to tell."""
    bytes_total: int = 0
    seconds_total: float = 0.0
    transfers_total: int = 0
    failures_total: int = 0
    _bytes_seen: int = 0
    _seconds_seen: float = 0.0

    def landed(self, *, num_bytes: int, seconds: float, read: LinkCounters) -> None:
        """`read` counts what the link has read so far: a transfer's own time is mostly waiting for the prefill."""
        self.transfers_total += 1
        self.bytes_total += num_bytes
        self.seconds_total += seconds
        if (moved := read.bytes_total - self._bytes_seen) >= _TELLING_BYTES:
            rate = moved / max(read.seconds_total - self._seconds_seen, 1e-9)
            before = self.recent_bytes_per_s or rate
            self.recent_bytes_per_s = before + _NEWEST_COUNTS * (rate - before)
            self._bytes_seen, self._seconds_seen = read.bytes_total, read.seconds_total

    def reconnected(self, fresh: PeerStatistics) -> None:
        """The same source, by a new connection: totals go on, and the transport may be another."""
        self.transport, self.why, self.devices = fresh.transport, fresh.why, fresh.devices
        self._bytes_seen, self._seconds_seen = 0, 0.0  # A new link counts from the start.
        self.fallbacks += fresh.fallbacks


@dataclasses.dataclass(frozen=True, slots=True)
class Into:
    """What we can read into: our own pool, and staging regions for pools unlike it."""

    pool: OurTransports
    foreign: ForeignPools
    device: OurTransports | None = None
    """Into the pool itself, where it lies in a device's memory and `pool` is a staging region."""


@dataclasses.dataclass(slots=True, kw_only=True)
class SourcePeer:
    """Owns the channel and the link. Closed by `TransferDestination`, once nobody pulls through it."""

    address: str
    our_id: str
    """What the source calls us."""
    identity: SourceIdentity
    holding: KVHolding
    staging: StagingRegion | None
    """Where it is unlike us: what `link` reads into. None: our pool."""
    lease_s: float
    channel: grpc.aio.Channel
    stub: kv_pb2_grpc.KVSourceAsyncStub
    link: PeerLink
    statistics: PeerStatistics
    in_device_memory: bool = False
    """What `link` reads, and what it reads into: pools on a device, and no region of host memory."""
    pulls: set[FailPull] = dataclasses.field(default_factory=set)
    """Those that go on, each told when the source is found to be lost."""
    pulse: asyncio.Task[None] | None = None
    """Asks it whether it is there, as long as there are pulls."""
    used_s: float = dataclasses.field(default_factory=time.monotonic)
    """When a pull last began or ended."""
    is_forgotten: bool = False
    """No new pull uses it; the last one to end closes it."""


@contextlib.contextmanager
def source_errors(address: str) -> Iterator[None]:
    """Around a call to a source: every error it may raise is a TransferError.

    A missing server is PeerLost, a missing answer TransferTimeout; a TransferError of the source keeps its class.
    """
    try:
        with rpc.errors_from(address):
            yield
    except ServerLost as error:
        raise PeerLost(str(error)) from error
    except DeadlineExceeded as error:
        raise TransferTimeout(str(error)) from error
    except TransferError:
        raise
    except DisaggregatedError as error:  # It has no room for one more, or made a mistake of its own.
        raise TransferError(f"{address}: {error}") from error


async def close_peer(peer: SourcePeer, *, deadline_s: float = 5.0) -> None:
    """End its reads, unmap its memory, close its sockets and its channel."""
    try:
        await asyncio.to_thread(peer.link.close, deadline=Deadline.after(deadline_s))
    finally:
        await peer.channel.close()
