"""The id that a request has in answers, logs and stories: the client's `x-request-id`, or one made here."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Final

_DRAWN_AT_ONCE: Final = 64


def _unguessable() -> Iterator[str]:
    """Whoever knows an id may read its request's story. Drawn many at a time: each draw is a call of the kernel."""
    while True:
        drawn = secrets.token_hex(12 * _DRAWN_AT_ONCE)
        yield from (drawn[at : at + 24] for at in range(0, len(drawn), 24))


_new_ids: Final = _unguessable()
_SOUND: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id_for(headers: Mapping[str, str]) -> str:
    """An id that would be unsafe in a log line or a header is replaced, not refused."""
    given = headers.get("x-request-id")
    return given if given and _SOUND.fullmatch(given) else next(_new_ids)
