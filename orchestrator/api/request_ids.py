"""The id that a request has in answers, logs and stories: the client's `x-request-id`, or one made here."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Final

from aiohttp import web

REQUEST_ID_KEY: Final = web.RequestKey("request_id", str)
_DRAWN_AT_ONCE: Final = 64


def _unguessable() -> Iterator[str]:
    """Whoever knows an id may read its request's story. Drawn many at a time: each draw is a call of the kernel."""
    while True:
        drawn = secrets.token_hex(12 * _DRAWN_AT_ONCE)
        yield from (drawn[at : at + 24] for at in range(0, len(drawn), 24))


_new_ids: Final = _unguessable()
_SOUND: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def assign_request_id(http: web.Request) -> str:
    """An id that would be unsafe in a log line or a header is replaced, not refused."""
    given = http.headers.get("x-request-id", "")
    request_id = given if given and _SOUND.fullmatch(given) else next(_new_ids)
    http[REQUEST_ID_KEY] = request_id
    return request_id


def request_id_of(http: web.Request) -> str:
    return http[REQUEST_ID_KEY]
