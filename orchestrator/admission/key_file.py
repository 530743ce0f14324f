"""The key file as it is now: looked at when requests come, and read anew on a thread when it has changed.

A file that is wrong changes nothing: the keys that were read before stay good, and the log says what is wrong with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from disaggregated import logs
from disaggregated.errors import ConfigError
from orchestrator.admission.api_keys import KeyRing, read_keys

log = logs.get(__name__)

LOOK_EVERY_S: Final = 1.0
"""A key that was struck out is good for so long at most, and for as long as reading the file takes."""

_Stamp = tuple[int, int, int]


class KeyFile:
    def __init__(
        self, path: Path, *, clock: Callable[[], float], start: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        """Reads the file at once. `start` runs a coroutine in the background, and its owner awaits it.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._path = path
        self._clock = clock
        self._start = start
        self._stamp = _stamp_of(path)
        self._looked_s = clock()
        self.ring = KeyRing(read_keys(path))
        self.problem = ""
        """What is wrong with the file as it is now; "" while its keys are the ones in force."""

    def look(self) -> None:
        """Begin to read it anew if it has changed. Cheap: one stat a second."""
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        stamp = _stamp_of(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            self._start(self._read_anew())

    async def _read_anew(self) -> None:
        try:
            keys = await asyncio.to_thread(read_keys, self._path)
        except ConfigError as error:
            self.problem = str(error)
            log.error("api_keys_not_reloaded", error=self.problem, so="the keys read before stay in force")
            return
        self.ring, self.problem = KeyRing(keys), ""
        log.info("api_keys_reloaded", keys=len(keys))


def _stamp_of(path: Path) -> _Stamp | None:
    """Differs when the file was written, replaced, or reached through another link; None: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
