"""What a client is told of an error, whichever way its request came. The only place where errors become HTTP."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from disaggregated import logs
from disaggregated.errors import DisaggregatedError
from orchestrator.api import bodies
from orchestrator.api.error_body import error_fields, error_headers, plain_fields
from orchestrator.front_door import FrontDoor

log = logs.get(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    fields: Mapping[str, Any]
    """The body, as JSON."""
    headers: Mapping[str, str]


def refusal_of(door: FrontDoor, error: Exception, *, method: str, path: str) -> Refusal:
    """Counts it. What is no error of a request, of the world or of HTTP is a mistake of ours: one 500, and a traceback
    in the log."""
    if isinstance(error, DisaggregatedError):
        door.metrics.error_answered(error)
        headers = error_headers(error, retry_after_s=door.dispatcher.retry_after_s())
        return Refusal(error.http_status, error_fields(error), headers)
    if isinstance(error, web.HTTPException):
        return _refused_by_http(door, error, method=method, path=path)
    log.traceback("handler_crashed", error)
    door.metrics.crash_answered()
    return Refusal(500, plain_fields("internal error", kind="internal_error"), {})


def _refused_by_http(door: FrontDoor, error: web.HTTPException, *, method: str, path: str) -> Refusal:
    headers: dict[str, str] = {}
    match error:
        case web.HTTPRequestEntityTooLarge():
            message = f"the body is larger than the limit of {door.config.door.body_bytes_max} bytes"
        case web.HTTPRequestTimeout():
            message = f"the body did not come in {bodies.BODY_TIMEOUT_S:g} s"
            headers["Connection"] = "close"
        case web.HTTPBadRequest():
            message = error.reason
            headers["Connection"] = "close"
        case web.HTTPNotFound():
            message = f"there is no {method} {_shown(path)}"
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            headers["Allow"] = allowed
            message = f"{_shown(path)} takes {allowed}, not {_shown(method)}"
        case _:
            message = error.reason
    return Refusal(error.status, plain_fields(message), headers)


def _shown(path: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", path)[:200]
