"""Reading a request's body, for as long and as much as is reasonable."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from disaggregated.structured.json_parts import UNCOUNTED_BYTES_MAX, check_num_parts

BODY_TIMEOUT_S: Final = 60.0
"""From its head to its last byte; a prompt of a hundred thousand token ids is a megabyte."""


async def received_body(http: web.Request) -> bytes:
    """One that can be parsed in a time that is bounded.

    Raises:
        InvalidRequest: there is too much in it.
        web.HTTPRequestEntityTooLarge: it is, or says that it is going to be.
        web.HTTPRequestTimeout: the client does not go on.
    """
    body = await _whole_body(http)
    if len(body) > UNCOUNTED_BYTES_MAX:
        await asyncio.to_thread(check_num_parts, body, "the body")
    return body


async def _whole_body(http: web.Request) -> bytes:
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
