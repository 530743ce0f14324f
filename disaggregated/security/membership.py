"""What makes this process a member of its deployment: one secret, and TLS where it is configured.

A process belongs to one deployment for all of its life, so this is told once, at its edge, and looked up wherever a
port is opened or a connection made. What takes a `membership` of its own does so for processes of several deployments,
that is, for tests.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
from collections.abc import MutableMapping
from typing import Final

from disaggregated.errors import ConfigError
from disaggregated.security import secret as secrets_of
from disaggregated.security.secret import ClusterSecret
from disaggregated.security.tls import Tls, TlsFiles, load


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    secret: ClusterSecret = secrets_of.OPEN
    tls: Tls | None = None


NOBODY: Final = Membership()
"""Open to whoever reaches our ports, which therefore are those of loopback."""

_of_this_process: Membership = NOBODY


def join(membership: Membership) -> None:
    """Called once, before the first port is opened."""
    global _of_this_process  # noqa: PLW0603 - as logging and signal handlers, it is the process's own
    _of_this_process = membership


def of_this_process() -> Membership:
    return _of_this_process


def join_as_told(
    *, secret_file: str, key: str = "", tls: TlsFiles, environ: MutableMapping[str, str] = os.environ
) -> Membership:
    """Join as configuration and environment say, from which the secret is taken out.

    Raises ConfigError that names the key, the file or the variable which is wrong.
    """
    secret = secrets_of.find(environ, file=secret_file, key=key)
    secrets_of.forget(environ)
    join(Membership(secret=secret, tls=load(tls)))
    return of_this_process()


def check_may_listen(host: str, membership: Membership) -> None:
    """Without a secret a port is opened on loopback only.

    Raises ConfigError, with what to do, for any other address.
    """
    if membership.secret.is_open and not is_loopback(host):
        raise ConfigError(
            f"host {host!r} can be reached from other machines, and without a secret anybody there could read what is "
            f"asked and answered: set cluster_secret_file or {secrets_of.VARIABLE} ({secrets_of.HOW_TO_MAKE_ONE} "
            "makes one), the same for every process of the deployment, or listen on localhost"
        )


def is_loopback(host: str) -> bool:
    """For a name: every address that it stands for. One that stands for none is no loopback."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        pass
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
