"""The id that a request has in answers, logs and stories: the client's `x-request-id`, or one made here."""

from __future__ import annotations

import itertools
import re
import secrets
from typing import Final

from aiohttp import web

REQUEST_ID_KEY: Final = web.RequestKey("request_id", str)
_OURS: Final = secrets.token_hex(6)
"""In front of every id that this process makes."""
_numbers: Final = itertools.count(secrets.randbits(40))
_SOUND: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def assign_request_id(http: web.Request) -> str:
    """An id that would be unsafe in a log line or a header is replaced, not refused."""
    given = http.headers.get("x-request-id", "")
    request_id = given if given and _SOUND.fullmatch(given) else f"{_OURS}{next(_numbers):012x}"
    http[REQUEST_ID_KEY] = request_id
    return request_id


def request_id_of(http: web.Request) -> str:
    return http[REQUEST_ID_KEY]
