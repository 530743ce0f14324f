"""Several connections for one read: blocks of a large one are divided among them, each with its own thread on each end.

One connection is one flow: one core of each host, one queue of each network card, one congestion window. Reads that run
beside each other are several flows already, so only a read that is alone on its link is divided.

A stripe is an ordinary read with its own deadlines; what holds for a read holds for all of them together: the first to
fail stops the others, and the read has ended when the last of them has.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Final

from kvtransfer.deadline import Deadline
from kvtransfer.transport import BlockRead, LinkCounters, PeerLink, ReadStop, ReadStopped

STREAMS_DEFAULT: Final = 2
STREAMS_MAX: Final = 16
STRIPE_BYTES_MIN: Final = 2 << 20
"""Less is over before a second thread has woken up."""


class StripedLink:
    """A PeerLink that divides reads among the connections of another one, which it owns."""

    def __init__(self, link: PeerLink, *, num_streams: int, block_bytes: int) -> None:
        assert 1 <= num_streams <= STREAMS_MAX, f"{num_streams} streams"
        self._link = link
        self._num_streams = num_streams
        self._block_bytes = block_bytes
        self._threads = concurrent.futures.ThreadPoolExecutor(STREAMS_MAX, thread_name_prefix="kv-stripe")
        self._lock = threading.Lock()
        self._num_running = 0
        self._counters = LinkCounters()

    @property
    def transport(self) -> str:
        return self._link.transport

    @property
    def can_stop(self) -> bool:
        return self._link.can_stop

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        begin_s = time.monotonic()
        num_bytes, num_failures = len(read.source) * len(read.layers) * self._block_bytes, 1
        with self._counted() as is_alone:
            try:
                num_stripes = min(self._num_streams, num_bytes // STRIPE_BYTES_MIN, len(read.source)) if is_alone else 1
                if num_stripes > 1:
                    self._read_stripes(stripes(read, num_stripes), stop, deadline)
                else:
                    self._link.read(read, stop=stop, deadline=deadline)
                num_failures = 0
            finally:
                with self._lock:
                    self._counters.count(num_bytes, time.monotonic() - begin_s, num_failures)

    def drain(self, *, deadline: Deadline) -> None:
        self._link.drain(deadline=deadline)

    def close(self, *, deadline: Deadline) -> None:
        self._link.close(deadline=deadline)
        self._threads.shutdown()  # Nothing runs on them any more.

    def statistics(self) -> LinkCounters:
        return self._counters

    def _read_stripes(self, parts: list[BlockRead], stop: ReadStop, deadline: Deadline) -> None:
        failures: list[BaseException] = []
        stops = [ReadStop() for _ in parts]

        def stop_all() -> None:
            for each in stops:
                each.request()

        def run(number: int) -> None:
            try:
                self._link.read(parts[number], stop=stops[number], deadline=deadline)
            except BaseException as error:  # noqa: BLE001  # Raised again below, in the thread that asked.
                failures.append(error)
                stop_all()

        with stop.waking(stop_all):
            stop.check()
            others = [self._threads.submit(run, number) for number in range(1, len(parts))]
            run(0)
            concurrent.futures.wait(others)  # Each has its deadlines.
        if failures:
            stop.check()
            raise next((error for error in failures if not isinstance(error, ReadStopped)), failures[0])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[bool]:
        """True when no other read runs."""
        with self._lock:
            is_alone = self._num_running == 0
            self._num_running += 1
        try:
            yield is_alone
        finally:
            with self._lock:
                self._num_running -= 1


def stripes(read: BlockRead, count: int) -> list[BlockRead]:
    """`read` as `count` reads of as equal a number of blocks as can be; neighbours stay together."""
    bounds = [len(read.source) * number // count for number in range(count + 1)]
    return [
        dataclasses.replace(
            read,
            source=read.source[begin:end],
            into=read.into[begin:end],
            sums=None if read.sums is None else read.sums.part(begin, end),
        )
        for begin, end in itertools.pairwise(bounds)
    ]
