"""An error as OpenAI's clients expect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from aiohttp import web

from disaggregated.errors import DisaggregatedError

MESSAGE_CHARACTERS_MAX: Final = 200
"""Of one that is not ours."""


def error_fields(error: DisaggregatedError) -> dict[str, Any]:
    return {
        "error": {
            "message": str(error),
            "type": error.openai_type,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def error_headers(error: DisaggregatedError, *, retry_after_s: int) -> dict[str, str]:
    """Who is refused for want of room is told when to come back: by the error, if it knows, else `retry_after_s`."""
    headers = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s or retry_after_s)
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def plain_fields(message: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """What HTTP itself refuses: no such path, a body that is too large."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def first_words(message: str) -> str:
    """What a parser of HTTP says, without the picture of the bytes that it draws below."""
    said, _, _ = message.partition("\n\n")
    return " ".join(said.split()).rstrip(":")[:MESSAGE_CHARACTERS_MAX]


def error_response(error: DisaggregatedError, *, retry_after_s: int) -> web.Response:
    headers = error_headers(error, retry_after_s=retry_after_s)
    return json_response(error_fields(error), status=error.http_status, headers=headers)


def plain_error_response(message: str, *, status: int) -> web.Response:
    return json_response(plain_fields(message), status=status)


def json_response(fields: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(fields), status=status, content_type="application/json", headers=headers or {}
    )
