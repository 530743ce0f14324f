"""What a handler needs of one HTTP request and its answer, whoever reads the connection.

A handler may answer in the call that it is given the exchange in, or much later from a callback: the exchange is over
when one of `answered()` and `refuse()` was called, or when its client has gone.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from orchestrator.admission.gate import ANYBODY, Caller

Rest = Callable[[], Coroutine[Any, Any, None]]
"""What is left to do for an exchange and has to wait for something: somebody awaits it, in a task."""


class Exchange(ABC):
    """Also an `Outlet`: what is put into an outbox for it goes to its client."""

    is_told_at_once: ClassVar[bool] = False
    """`on_gone` is called before the descriptor can become that of another connection."""

    __slots__ = (
        "caller",
        "descriptor",
        "has_begun",
        "headers",
        "is_http_11",
        "keep_alive",
        "on_gone",
        "path",
        "request_id",
    )

    def __init__(
        self, path: str, headers: Mapping[str, str], *, keep_alive: bool, descriptor: int, is_http_11: bool = True
    ) -> None:
        """`headers`: found by their names in lower case. `descriptor`: of the socket, where bytes go to it as they are,
        else -1; valid while the transport is not closing."""
        self.path = path
        self.headers = headers
        self.descriptor = descriptor
        self.keep_alive = keep_alive
        self.is_http_11 = is_http_11
        self.request_id = ""
        self.caller: Caller = ANYBODY
        self.has_begun = False
        """Something of an answer has been written, or is about to be."""
        self.on_gone: Callable[[], object] | None = None
        """Called at most once, if the client goes before it is answered; whoever works for it sets this."""

    @property
    @abstractmethod
    def remote(self) -> str | None:
        """The address at the other end."""

    @property
    @abstractmethod
    def transport(self) -> asyncio.Transport | None:
        """None: the client has gone."""

    @property
    @abstractmethod
    def writing_paused(self) -> bool:
        """More is waiting to be written than the transport's limit allows."""

    @abstractmethod
    async def drain(self) -> None:
        """Until writing is not paused. Raises ConnectionError when the client goes."""

    @abstractmethod
    def answered(self) -> None:
        """All of the answer was given to the outbox or to the transport; the connection goes on by itself."""

    @abstractmethod
    def refuse(self, error: Exception) -> None:
        """This is the answer, if nothing of another one has been written; else there is no way to tell it."""

    def write_rest(self, rest: bytes) -> None:
        if self.transport is not None:
            self.transport.write(rest)

    def gone(self) -> None:
        """Tell whoever works for it."""
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()
