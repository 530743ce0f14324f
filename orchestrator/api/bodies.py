"""Reading a request's body, for as long and as much as is reasonable."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_parts import UNCOUNTED_BYTES_MAX, check_num_parts
from orchestrator.api.error_body import first_words

BODY_TIMEOUT_S: Final = 60.0
"""From its head to its last byte; a prompt of a hundred thousand token ids is a megabyte."""
_CODING: Final = "content-encoding"
_WINDOWS: Final[Mapping[str, int]] = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}
"""What zlib calls them."""


async def received_body(http: web.Request) -> bytes:
    """One that can be parsed in a time that is bounded.

    Raises:
        InvalidRequest: there is too much in it, or it is not packed as its head says.
        web.HTTPRequestEntityTooLarge: it is, or says that it is going to be.
        web.HTTPRequestTimeout: the client does not go on.
        web.HTTPBadRequest: what comes is no HTTP.
    """
    body = await _whole_body(http)
    coding = http.headers.get(_CODING, "identity").strip().lower()
    if coding != "identity":
        body = await asyncio.to_thread(unpacked, body, coding, http.client_max_size)
    if len(body) > UNCOUNTED_BYTES_MAX:
        await asyncio.to_thread(check_num_parts, body, "the body")
    return body


def unpacked(body: bytes, coding: str, num_bytes_max: int) -> bytes:
    """No more is unpacked than is allowed, however much there is.

    Raises:
        InvalidRequest: it is not of this coding, or nobody here knows the coding.
        web.HTTPRequestEntityTooLarge: there is more.
    """
    window = _WINDOWS.get(coding)
    if window is None:
        raise InvalidRequest(f"{_CODING} must be gzip or deflate, is {coding[:80]!r}", param=_CODING)
    unpacking = zlib.decompressobj(window)
    try:
        whole = unpacking.decompress(body, num_bytes_max + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {coding}: {error}", param=_CODING) from error
    if len(whole) > num_bytes_max:
        raise web.HTTPRequestEntityTooLarge(max_size=num_bytes_max, actual_size=len(whole))
    if not unpacking.eof or unpacking.unused_data:
        raise InvalidRequest(f"the body is not {coding}: it does not end where it should", param=_CODING)
    return whole


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
    except (HttpProcessingError, web.RequestPayloadError) as error:
        reason = f"the body is not framed as HTTP wants it: {first_words(str(error))}"
        raise web.HTTPBadRequest(reason=reason) from error
