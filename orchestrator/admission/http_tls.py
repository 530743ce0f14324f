"""HTTPS at the front door, with a certificate that may be renewed while it serves.

The files are looked at when a connection is made, at most once a second: whoever renews a certificate has nobody to
tell. Connections that are open keep the certificate they were made with. New files that cannot be used change nothing
but the log.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from typing import Final

from disaggregated import logs
from disaggregated.config.door import DoorConfig
from disaggregated.errors import ConfigError
from disaggregated.security.tls import server_context

log = logs.get(__name__)

LOOK_EVERY_S: Final = 1.0
CERT_KEY: Final = "http_tls_cert_file"
KEY_KEY: Final = "http_tls_key_file"


def front_door_tls(config: DoorConfig, *, clock: Callable[[], float] = time.monotonic) -> ssl.SSLContext | None:
    """None where the file names no certificate. Raises ConfigError when it cannot be used."""
    if not config.cert_file and not config.key_file:
        return None
    if not config.cert_file or not config.key_file:
        missing, there = (CERT_KEY, KEY_KEY) if config.key_file else (KEY_KEY, CERT_KEY)
        raise ConfigError(f"{missing}: is missing; {there} needs it")
    return _Renewed(config.cert_file, config.key_file, clock=clock).context


class _Renewed:
    """`context` hands each handshake on to a context with the newest certificate."""

    def __init__(self, cert_file: str, key_file: str, *, clock: Callable[[], float]) -> None:
        self._files = cert_file, key_file
        self._clock = clock
        self._looked_s = clock()
        self._stamp = self._stamp_now()
        self.context = self._newest = self._load()
        self.context.sni_callback = self._choose

    def _load(self) -> ssl.SSLContext:
        context = server_context(*self._files, cert_name=CERT_KEY, key_name=KEY_KEY)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self._look()
        connection.context = self._newest

    def _look(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s, stamp = now_s, self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._newest = self._load()
        except ConfigError as error:  # Also between the writing of one file and the other: the next look sees both.
            log.error("certificate_not_renewed", error=str(error), so="the one read before stays in use")
        else:
            log.info("certificate_renewed", cert_file=self._files[0])

    def _stamp_now(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_stamp_of(path) for path in self._files)


def _stamp_of(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
