"""The orchestrator's port, taken before anything else is started: a port conflict costs no model load."""

from __future__ import annotations

import errno
import socket

import psutil

from disaggregated.errors import ConfigError, PortTaken

BACKLOG = 4096
"""Connections the kernel holds while a burst of clients is being accepted."""


def listen(hostname: str, port: int, *, shared: bool = False, accepts: bool = True) -> socket.socket:
    """A listening socket; the caller closes it.

    shared: with other sockets of this user that are made so; the kernel deals connections out among those that listen.
    accepts: False only takes the port.

    Raises:
        PortTaken: somebody else listens there; the message says who, if we may know.
        ConfigError: this machine has no such address, or we may not listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"hostname: {hostname} is no address of this machine: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Every connection that is accepted has it from here: a client that vanished is found in the end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        if accepts:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"port {port} of {hostname} is taken{_by_whom(port)}; choose another one") from error
        at = "port" if error.errno == errno.EACCES else "hostname"
        raise ConfigError(f"{at}: cannot listen on {hostname}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _by_whom(port: int) -> str:
    try:
        listening = [link for link in psutil.net_connections("tcp") if link.status == "LISTEN" and link.pid]
        owners = [link.pid for link in listening if link.laddr and link.laddr.port == port]
        return f" by process {owners[0]} ({psutil.Process(owners[0]).name()})" if owners else ""
    except (psutil.Error, OSError):
        return ""
