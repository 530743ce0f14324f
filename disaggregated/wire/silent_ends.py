"""A host that vanished without closing its connections: the kernel asks after it, and ends what does not answer.

Heartbeats tell the orchestrator within a second. This is for the other direction: a server that keeps sequences for an
orchestrator which is not there any more.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

IDLE_S: Final = 5
PROBE_INTERVAL_S: Final = 2
PROBES: Final = 3
UNANSWERED_MS: Final = 11_000
"""Bytes that were sent and not acknowledged for so long end the connection, too."""


def notice_a_silent_end(transport: asyncio.Transport) -> None:
    connected = transport.get_extra_info("socket")
    if connected is None:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", IDLE_S), ("TCP_KEEPINTVL", PROBE_INTERVAL_S), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
