"""A request and its answer without a connection, for what only looks at the request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from orchestrator.http.exchange import Exchange


class FakeExchange(Exchange):
    """Implements `Exchange`: its client has gone."""

    def __init__(self, headers: Mapping[str, str] | None = None, *, remote: str | None = None) -> None:
        lower = {name.lower(): value for name, value in (headers or {}).items()}
        super().__init__("/v1/chat/completions", lower, keep_alive=True, descriptor=-1)
        self._remote = remote
        self.errors: list[Exception] = []

    @property
    def remote(self) -> str | None:
        return self._remote

    @property
    def transport(self) -> asyncio.Transport | None:
        return None

    @property
    def writing_paused(self) -> bool:
        return False

    async def drain(self) -> None:
        raise ConnectionResetError("the client went away")

    def answered(self) -> None:
        self.on_gone = None

    def refuse(self, error: Exception) -> None:
        self.errors.append(error)
