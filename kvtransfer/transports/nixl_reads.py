"""Reads that share one agent: bounded batches, and one common end when a peer stops in the middle of one.

reading ── every batch is here ──▶ done
   │
   ├── stopped by us ─── what is in flight arrives in time ──▶ over; the agent goes on
   └── peer lost, or it does not arrive ──▶ the agent is doomed: every read of it leaves, the last one ends it,
                                            and only then do they raise
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from disaggregated.errors import PeerLost
from disaggregated.kv_layout import KVLayout
from kvtransfer.region import Region
from kvtransfer.runs import run_pairs
from kvtransfer.transport import BlockRead, OurEnd, ReadStop
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.nixl_agent import Descriptors, NixlAgent

BATCH_BYTES: Final = 1 << 20
"""In one transfer: enough to hide what posting costs, little enough to see a stop between two of them."""
BATCH_DESCRIPTORS_MAX: Final = 256
IN_FLIGHT_BYTES_MAX: Final = 4 << 20
"""Of all reads from one source. What a TCP connection's buffers take; see `nixl_agent`."""
SPIN_S: Final = 100e-6
"""Looked at without pause for that long: a small read over RDMA is over by then."""
LOOK_S: Final = 0.001
"""Between two looks after that, with an eye on the control socket: NIXL has no event for the end of a transfer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerMemory:
    """A source's pool as its agent knows it."""

    name: str
    base_address: int
    layout: KVLayout


class SharedAgent:
    """An agent and the reads that use it. Thread-safe.

    Invariant: the agent is closed exactly when it is doomed and no read is inside; a read raises only after all that it
    posted has ended, or after the agent has.
    """

    def __init__(self, agent: NixlAgent, peer: PeerMemory, us: OurEnd) -> None:
        self._agent = agent
        self._peer = peer
        self._us = us
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_bytes_in_flight = 0
        self._is_doomed = False
        self._has_ended = False

    @property
    def is_doomed(self) -> bool:
        """No new read may use it; it ends when the last one has left."""
        return self._is_doomed

    def read(self, read: BlockRead, control: FrameSocket, *, stop: ReadStop) -> None:
        """Raises what `PeerLink.read` does; terminal when it returns or raises."""
        flight = _Flight(self, control)
        with self._inside():
            try:
                for source, into in batches(read, self._us.region, self._us.layout, self._peer):
                    stop.check()
                    flight.post(source, into)
                flight.land_all()
            except BaseException:
                if not flight.settles():
                    self._doom()
                raise
            finally:
                flight.forget()

    def end(self) -> None:
        """Doom it, and wait until the last read has left."""
        self._doom()
        with self._changed:
            if self._num_inside == 0:
                self._end_agent()
            self._changed.wait_for(lambda: self._has_ended)

    # For the flights of this agent.

    def begin(self, source: Descriptors, into: Descriptors) -> Any:
        return self._agent.read(self._peer.name, source, into)

    def is_here(self, transfer: Any) -> bool:
        """Raises PeerLost when the transfer failed, or somebody else's did."""
        if self._is_doomed or transfer is None:
            raise PeerLost("the peer was lost to another read")
        return self._agent.has_ended(transfer)

    def try_hold(self, num_bytes: int) -> bool:
        """A share of what may be in flight; one batch always fits when nothing else is."""
        with self._changed:
            if self._num_bytes_in_flight and self._num_bytes_in_flight + num_bytes > IN_FLIGHT_BYTES_MAX:
                return False
            self._num_bytes_in_flight += num_bytes
            return True

    def abandon(self, transfer: Any, num_bytes: int) -> None:
        """Of a doomed agent, before it ends."""
        if transfer is not None:
            self._agent.forget(transfer)
        self.give_back(num_bytes)

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._num_bytes_in_flight -= num_bytes

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Leaving a doomed agent takes until it has ended."""
        with self._changed:
            if self._is_doomed:
                raise PeerLost("the peer was lost to another read")
            self._num_inside += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._num_inside -= 1
            if self._is_doomed:
                if self._num_inside == 0:
                    self._end_agent()
                self._changed.wait_for(lambda: self._has_ended)

    def _doom(self) -> None:
        with self._changed:
            self._is_doomed = True

    def _end_agent(self) -> None:
        if not self._has_ended:
            self._agent.close()
            self._has_ended = True
            self._changed.notify_all()


class _Flight:
    """What one read has posted and does not have yet."""

    def __init__(self, shared: SharedAgent, control: FrameSocket) -> None:
        self._shared = shared
        self._control = control
        self._posted: deque[tuple[Any, int]] = deque()
        self._progress_s = time.monotonic()

    def post(self, source: Descriptors, into: Descriptors) -> None:
        """Begin one batch, once there is room for it in flight."""
        num_bytes = int(into[:, 1].sum())
        while not self._shared.try_hold(num_bytes):
            self._wait()
        self._posted.append((None, num_bytes))  # From here on it may have begun, whatever the library says.
        self._posted[-1] = (self._shared.begin(source, into), num_bytes)

    def land_all(self) -> None:
        while self._posted:
            self._wait()

    def settles(self) -> bool:
        """After a failure: True when all of it arrives soon, so that nothing is left that could write."""
        deadline_s = time.monotonic() + self._control.progress_timeout_s
        try:
            while self._posted and time.monotonic() < deadline_s:
                if not self._reap():
                    time.sleep(LOOK_S)  # The control socket has nothing more to say, and NIXL has no event.
        except PeerLost:
            return False
        return not self._posted

    def forget(self) -> None:
        for transfer, num_bytes in self._posted:
            self._shared.abandon(transfer, num_bytes)
        self._posted.clear()

    def _wait(self) -> None:
        """Until a batch of ours is here, or a moment has passed in which others may have made room."""
        begin_s = time.monotonic()
        while not self._reap():
            if time.monotonic() - begin_s < SPIN_S:
                continue
            if self._control.watch(within_s=LOOK_S):
                self._control.receive_frame()  # Whatever it is, it is not what belongs here: raises.
            self._control.deadline.check("bytes of a peer")
            if not self._posted:
                return
            if time.monotonic() - self._progress_s > self._control.progress_timeout_s:
                raise PeerLost(f"the peer moved no byte for {self._control.progress_timeout_s} s")

    def _reap(self) -> bool:
        """True when the oldest batch has arrived."""
        if not self._posted:
            return False
        transfer, num_bytes = self._posted[0]
        if not self._shared.is_here(transfer):
            return False
        self._posted.popleft()
        self._shared.give_back(num_bytes)
        self._progress_s = time.monotonic()
        return True


def batches(
    read: BlockRead, region: Region, layout: KVLayout, peer: PeerMemory
) -> Iterator[tuple[Descriptors, Descriptors]]:
    """The spans of a read, source and destination, in the order of the layers; each batch is bounded."""
    pieces = np.array(list(_pieces(read, blocks_max=max(1, BATCH_BYTES // layout.block_bytes))), dtype=np.uint64)
    source = _descriptors(peer.base_address, peer.layout, pieces[:, 0], pieces[:, 2], read.layers)
    into = _descriptors(region.base_address, layout, pieces[:, 1], pieces[:, 2], read.layers)
    ends = np.cumsum(into[:, 1])
    begin = 0
    while begin < len(into):
        full = int(ends[begin - 1] if begin else 0) + BATCH_BYTES
        end = max(begin + 1, int(np.searchsorted(ends, full, side="right")))
        end = min(end, begin + BATCH_DESCRIPTORS_MAX)
        yield source[begin:end], into[begin:end]
        begin = end


def _pieces(read: BlockRead, *, blocks_max: int) -> Iterator[tuple[int, int, int]]:
    """Neighbours on both sides, as source, into and count; no piece is more than a batch."""
    for pair in run_pairs(read.source, read.into):
        for at in range(0, pair.count, blocks_max):
            yield pair.source + at, pair.into + at, min(blocks_max, pair.count - at)


def _descriptors(
    base_address: int, layout: KVLayout, first: npt.NDArray[np.uint64], count: npt.NDArray[np.uint64], layers: range
) -> Descriptors:
    """One row a layer and piece."""
    starts = np.array([base_address + layout.offset(layer, 0) for layer in layers], dtype=np.uint64)
    block_bytes = np.uint64(layout.block_bytes)
    rows = np.zeros((len(layers), len(first), 3), dtype=np.uint64)
    rows[:, :, 0] = starts[:, None] + (first * block_bytes)[None, :]
    rows[:, :, 1] = count * block_bytes
    return rows.reshape(-1, 3)
