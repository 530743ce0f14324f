"""Answers that are written to the connection as they are: one status line, a few headers, and the body behind them.

What an HTTP library does for one answer (header objects, a writer, a payload) costs more than all else that a streamed
token costs.
"""

from __future__ import annotations

import asyncio
import email.utils
import http
import time
from collections.abc import Mapping

from orchestrator.api.outbox import Outbox, Outlet
from orchestrator.http.exchange import Exchange

JSON = "application/json; charset=utf-8"


class _Clock:
    """The second that it is, as HTTP writes it: made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._date = ""

    def date(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._date = second, email.utils.formatdate(second, usegmt=True)
        return self._date


_date = _Clock().date


def head_of(exchange: Exchange, lines: str, headers: Mapping[str, str], *, status: int = 200) -> bytes:
    """Status line and headers of an answer, with the empty line after them. `lines`: the first headers, as they are."""
    reason = "OK" if status == 200 else _reason(status)
    head = f"HTTP/1.{1 if exchange.is_http_11 else 0} {status} {reason}\r\nDate: {_date()}\r\n{lines}"
    for name, value in headers.items():
        head += f"{name}: {value}\r\n"
    if not exchange.keep_alive:
        head += "Connection: close\r\n"
    elif not exchange.is_http_11:
        head += "Connection: keep-alive\r\n"
    return (head + "\r\n").encode()


def _reason(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:  # A status that is ours, or another server's.
        return "Error"


def answer(
    exchange: Exchange, body: bytes, headers: Mapping[str, str], outbox: Outbox, *, status: int = 200, kind: str = JSON
) -> None:
    """The whole answer in one write, at the end of this turn of the event loop. To a client that left: nothing."""
    transport = exchange.transport
    if transport is not None:
        exchange.has_begun = True
        lines = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        put(exchange, transport, head_of(exchange, lines, headers, status=status) + body, outbox)
    exchange.answered()


def put(outlet: Outlet, transport: asyncio.Transport, message: bytes, outbox: Outbox) -> None:
    """After everything that was put for it before. `transport`: the outlet's."""
    if outlet.descriptor >= 0 and not transport.get_write_buffer_size():
        outbox.put(outlet, message)
    elif not transport.is_closing():
        outbox.flush()
        transport.write(message)


def plain_descriptor(transport: asyncio.Transport) -> int:
    """Of the socket, where bytes go to it as they are, else -1. Valid while the transport is not closing."""
    connected = transport.get_extra_info("socket")
    return -1 if connected is None or transport.get_extra_info("sslcontext") is not None else int(connected.fileno())
