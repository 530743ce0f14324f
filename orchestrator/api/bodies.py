"""Reading a request's body, for as long and as much as is reasonable."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

BODY_TIMEOUT_S: Final = 60.0
"""From its head to its last byte; a prompt of a hundred thousand token ids is a megabyte."""


async def received_body(http: web.Request) -> bytes:
    """
    Raises:
        web.HTTPRequestEntityTooLarge: it is, or says that it is going to be.
        web.HTTPRequestTimeout: the client does not go on.
    """
    limit = http.client_max_size
    if limit and (http.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=http.content_length or 0)
    if http.content.is_eof():  # All of it came with the head, as nearly always.
        body = http.content.read_nowait()
        if limit and len(body) > limit:  # Of one in chunks, which says no length.
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(body))
        return body
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await http.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout from error
