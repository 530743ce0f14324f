"""HTTP over a Unix socket, between processes of one deployment on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import aiohttp

from disaggregated.errors import DisaggregatedError, InvalidRequest

ASK_TIMEOUT_S: Final = 2.0
"""For what a process answers from its own books."""


class NoAnswer(DisaggregatedError):
    """A process of ours that is starting, stopping or busy."""


async def ask(socket: Path, method: str, path: str, body: object = None, *, timeout_s: float = ASK_TIMEOUT_S) -> bytes:
    """
    Raises:
        NoAnswer: nobody answers there in time.
        InvalidRequest: the other one says that it is the caller's mistake.
        DisaggregatedError: it could not do it.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)), timeout=timeout) as http,
            http.request(method, f"http://worker{path}", json=body) as answer,
        ):
            content = await answer.read()
            if answer.status == 200:
                return content
            raise _error_of(answer.status, await answer.json())
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NoAnswer(f"{socket.name} does not answer {path}: {error!r}") from error


def _error_of(status: int, answer: Any) -> DisaggregatedError:
    fields = answer["error"]
    if 400 <= status < 500:
        return InvalidRequest(fields["message"], param=fields["param"])
    return DisaggregatedError(fields["message"])
