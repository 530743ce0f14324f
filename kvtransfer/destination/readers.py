"""Threads for blocking reads, shared by sources so that a slow one holds up no other.

A source may have as many jobs running as threads are idle, and no more: alone it gets half of the threads, two get a
third each, and there is always one left for the next. Jobs beyond wait; the sources that wait are served in turn.
(Choudhury, Hahne: Dynamic Queue Length Thresholds for Shared-Memory Packet Switches, 1998, with alpha = 1.)
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    future: concurrent.futures.Future[Any]
    call: Callable[[], Any]


class FairReaders:
    """Used from any thread.

    Jobs that wait are as many as their callers let wait: a pull has one at a time.
    Invariant: a source's jobs begin in the order in which they came; jobs running are never more than threads.
    """

    def __init__(self, num_threads: int, *, thread_name_prefix: str) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix=thread_name_prefix)
        self._num_threads = num_threads
        self._lock = threading.RLock()  # A future that is cancelled calls us back, wherever that happens.
        self._running: collections.Counter[str] = collections.Counter()
        self._waiting: dict[str, collections.deque[_Job]] = {}
        """By source, the one whose turn it is first; no empty ones."""

    def of(self, source: str) -> concurrent.futures.Executor:
        """An executor for jobs that wait for `source`. Many may be made for one; closing it closes nothing."""
        return _ReadersOfOne(self, source)

    def submit(self, source: str, call: Callable[[], Result]) -> concurrent.futures.Future[Result]:
        job = _Job(concurrent.futures.Future(), call)
        job.future.add_done_callback(functools.partial(self._forget_cancelled, source, job))
        with self._lock:
            self._waiting.setdefault(source, collections.deque()).append(job)
            self._begin()
        return job.future

    def num_running(self, source: str) -> int:
        return self._running[source]

    def num_waiting(self, source: str) -> int:
        return len(self._waiting.get(source, ()))

    def shutdown(self) -> None:
        """What waits is cancelled, what runs is waited for. Idempotent; nothing may be submitted any more."""
        with self._lock:
            waiting = [job for jobs in self._waiting.values() for job in jobs]
        for job in waiting:
            job.future.cancel()
        self._threads.shutdown()

    def _begin(self) -> None:
        """Give threads to those who may have one. Under the lock."""
        while (source := self._next()) is not None:
            jobs = self._waiting.pop(source)
            job = jobs.popleft()
            if jobs:
                self._waiting[source] = jobs  # Behind the others.
            self._running[source] += 1
            self._threads.submit(self._run, source, job)

    def _next(self) -> str | None:
        num_idle = self._num_threads - self._running.total()
        return next((source for source in self._waiting if self._running[source] < num_idle), None)

    def _run(self, source: str, job: _Job) -> None:
        try:
            if job.future.set_running_or_notify_cancel():
                try:
                    job.future.set_result(job.call())
                except BaseException as error:  # noqa: BLE001  # It is the future's: raised where that is awaited.
                    job.future.set_exception(error)
        finally:
            with self._lock:
                self._running[source] -= 1
                if not self._running[source]:
                    del self._running[source]
                self._begin()

    def _forget_cancelled(self, source: str, job: _Job, future: concurrent.futures.Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            jobs = self._waiting.get(source)
            if jobs is None or job not in jobs:
                return  # Its turn has come: the thread finds it cancelled.
            jobs.remove(job)
            if not jobs:
                del self._waiting[source]
        future.set_running_or_notify_cancel()


class _ReadersOfOne(concurrent.futures.Executor):
    def __init__(self, readers: FairReaders, source: str) -> None:
        self._readers = readers
        self._source = source

    def submit(
        self, fn: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> concurrent.futures.Future[Result]:
        return self._readers.submit(self._source, functools.partial(fn, *args, **kwargs))
