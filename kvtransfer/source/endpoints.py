"""The ways into a source's pool: those it listens on from the start, and those that a destination asks for later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from disaggregated import logs
from disaggregated.errors import TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate, SourceEndpoint

log = logs.get(__name__)

ENDPOINTS_MAX: Final = 8
"""There are fewer transports than that."""
LATE_CLOSE_S: Final = 5.0


class SourceEndpoints:
    """Thread-safe. Owns its endpoints from `start` to `close`.

    Invariant: at most one endpoint of a name.
    """

    def __init__(
        self,
        endpoints: Sequence[SourceEndpoint],
        *,
        gate: ReadGate,
        make: Callable[[str], SourceEndpoint | None],
    ) -> None:
        """`make` gives an endpoint that may be added, or None where configuration or this machine forbid it."""
        self._gate = gate
        self._make = make
        self._adding = threading.Lock()
        """Held while one starts, which may take seconds; whoever only looks does not wait for that."""
        self._lock = threading.Lock()
        self._endpoints = {endpoint.name: endpoint for endpoint in endpoints}
        self._is_closed = False

    def start(self) -> None:
        """Raises TransferError when one cannot listen."""
        for endpoint in self._endpoints.values():
            endpoint.start(self._gate)

    def offers(self, speakable: Sequence[str]) -> list[Offer]:
        """Those that a peer can use, who names what it speaks, best first. May start one: not for the event loop.

        What the peer wants most is added where it may be: a destination that is configured for UCX finds it at a
        source that was left to decide.
        """
        if speakable:
            self._add(speakable[0])
        with self._lock:
            return [self._endpoints[name].describe() for name in speakable if name in self._endpoints]

    def statistics(self) -> dict[str, EndpointStatistics]:
        with self._lock:
            return {name: endpoint.statistics() for name, endpoint in self._endpoints.items()}

    def close(self, *, deadline: Deadline) -> None:
        """End every connection and thread of each. Idempotent."""
        with self._lock:
            self._is_closed = True
            endpoints = tuple(self._endpoints.values())
        for endpoint in endpoints:
            endpoint.close(deadline=deadline)

    def _add(self, name: str) -> None:
        with self._adding:
            if not self._has_room_for(name):
                return
            try:
                if (endpoint := self._make(name)) is None:
                    return
                endpoint.start(self._gate)
            except TransferError as error:
                log.warning("kv_endpoint_not_added", transport=name, reason=str(error))
                return
            with self._lock:
                if not self._is_closed:
                    self._endpoints[name] = endpoint
        if name not in self._endpoints:
            endpoint.close(deadline=Deadline.after(LATE_CLOSE_S))  # We were closed while it started.
            return
        log.info("kv_endpoint_added", transport=name, because="a destination asked for it")

    def _has_room_for(self, name: str) -> bool:
        with self._lock:
            return not self._is_closed and name not in self._endpoints and len(self._endpoints) < ENDPOINTS_MAX
