"""A request that aiohttp has read, for handlers that want an `Exchange`."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import HttpVersion11, web

from disaggregated.errors import RequestCancelled
from orchestrator.admission.make import CALLER_KEY
from orchestrator.api.direct import plain_descriptor
from orchestrator.api.outbox import Outbox
from orchestrator.http.exchange import Exchange, Rest

REQUEST_ID_KEY: Final = web.RequestKey("request_id", str)
"""The edge sets it, and the caller."""
TAKE_TIMEOUT_S: Final = 60.0
"""For a client to read the end of its answer."""


class AlreadySent(web.StreamResponse):
    """There is nothing left to do for this answer. Sets two private fields of aiohttp's class, as a test sees."""

    def __init__(self, http: web.Request, *, keep_alive: bool) -> None:
        super().__init__()
        self._eof_sent = True
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """It was."""

    async def write_eof(self, data: bytes = b"") -> None:
        """It was."""


class AdaptedRequest(Exchange):
    """What aiohttp calls a handler for is over when that returns, so there is something to wait for here."""

    __slots__ = ("_http", "_over")

    def __init__(self, http: web.Request) -> None:
        transport = http.transport
        super().__init__(
            http.path,
            http.headers,
            keep_alive=http.keep_alive,
            descriptor=-1 if transport is None else plain_descriptor(transport),
            is_http_11=http.version >= HttpVersion11,
        )
        self.caller = http[CALLER_KEY]
        self.request_id = http[REQUEST_ID_KEY]
        self._http = http
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if transport is not None:
            # "Writing is paused" then means that anything is left over. At 0, TLS would count nothing as something.
            transport.set_write_buffer_limits(high=0 if self.descriptor >= 0 else 1, low=0)

    @property
    def remote(self) -> str | None:
        return self._http.remote

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._http.transport

    @property
    def writing_paused(self) -> bool:
        return self._http.protocol.writing_paused

    async def drain(self) -> None:
        await self._http.writer.drain()

    def answered(self) -> None:
        self.on_gone = None
        if not self._over.done():
            self._over.set_result(None)

    def refuse(self, error: Exception) -> None:
        self.on_gone = None
        if self.has_begun:
            self._abort()
        if not self._over.done():
            self._over.set_exception(error)

    async def finish(self, rest: Rest | None, outbox: Outbox) -> web.StreamResponse:
        """Run what is left to do for it, and wait for its answer. Cancelled when the client hangs up.

        Raises whatever it is refused with before anything was written.
        """
        try:
            if rest is not None:
                await rest()
            await self._over
            outbox.flush()
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                await self.drain()
        except asyncio.CancelledError:
            self.gone()
            raise
        except TimeoutError as error:
            self._abort()
            raise RequestCancelled("the client did not read its answer in time") from error
        except ConnectionError as error:
            raise RequestCancelled("the client went away") from error
        if (transport := self.transport) is not None:
            transport.set_write_buffer_limits()
        return AlreadySent(self._http, keep_alive=self.keep_alive)

    def _abort(self) -> None:
        if (transport := self.transport) is not None:
            transport.abort()
