"""A backend that does not end what it began: for what a library may do that a socket of ours does not."""

from __future__ import annotations

import threading
from typing import Any, cast

from kvtransfer.deadline import Deadline
from kvtransfer.transport import BlockRead, DestinationTransport, Offer, PeerLink, ReadStop, SourceIdentity


class StuckLink:
    """A real link whose reads do nothing until they may go on, and then move everything; deaf to stops."""

    def __init__(self, link: PeerLink, may_return: threading.Event) -> None:
        self._link = link
        self._may_return = may_return
        self.is_reading = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def read(self, read: BlockRead, *, stop: ReadStop, deadline: Deadline) -> None:
        self.is_reading.set()
        assert self._may_return.wait(20), "the test forgot to let it return"
        self._link.read(read, stop=ReadStop(), deadline=Deadline.after(20))


class StuckTransport:
    def __init__(self, transport: DestinationTransport) -> None:
        self._transport = transport
        self.name = transport.name
        self.may_return = threading.Event()
        self.links: list[StuckLink] = []

    def connect(self, offer: Offer, source: SourceIdentity, *, deadline: Deadline) -> PeerLink:
        self.links.append(StuckLink(self._transport.connect(offer, source, deadline=deadline), self.may_return))
        return cast(PeerLink, self.links[-1])
