"""Who is being served, and whether anybody new may come."""

from __future__ import annotations

import asyncio
import itertools

from disaggregated.errors import AdmissionError, Draining


class LiveRequests:
    """The ids of the requests that a server works for, from admission until nothing of them is left on it.

    Queueing happens in the orchestrator; the bound here only keeps a broken caller from filling our memory. Used on
    the event loop alone.

    Invariant: `wait_idle` returns exactly when there is no id.
    """

    def __init__(self, *, num_requests_max: int) -> None:
        self._num_requests_max = num_requests_max
        self._ids: set[str] = set()
        self._numbers = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, request_id: str) -> str:
        """Take a request in; returns the id by which our own engine knows it.

        That id is new each time: a caller may come back with a request whose first attempt still holds blocks here.

        Raises:
            Draining: nothing new is taken.
            AdmissionError: as many requests as we keep are here.
        """
        if self.is_draining:
            raise Draining("this server finishes what it has and takes nothing new")
        if len(self._ids) >= self._num_requests_max:
            raise AdmissionError(f"{len(self._ids)} requests are here already, as many as this server takes")
        engine_id = f"{request_id}~{next(self._numbers)}"
        self._ids.add(engine_id)
        self._idle.clear()
        return engine_id

    def discard(self, engine_id: str) -> None:
        """Nothing of this request is left. Also for one that is gone already: two sides may end a request at once."""
        self._ids.discard(engine_id)
        if not self._ids:
            self._idle.set()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    def begin_draining(self) -> None:
        self._draining.set()

    async def wait_draining(self) -> None:
        await self._draining.wait()

    async def wait_idle(self) -> None:
        await self._idle.wait()


def request_id_of(engine_id: str) -> str:
    """The caller's own id of a request, for ledgers and logs."""
    return engine_id.rpartition("~")[0]
