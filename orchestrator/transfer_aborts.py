"""Tells one context server about prompts whose blocks nobody will pull, so that they need not wait for their lease."""

from __future__ import annotations

import asyncio
from typing import Final

from orchestrator.server_client import ServerClient

ABORT_TIMEOUT_S: Final = 5.0
WAITING_MAX: Final = 4096
"""Transfers whose abort waits for the call before it. One more is left to its lease."""


class TransferAborts:
    """Lives as long as one connection to one context server; whoever runs `run()` owns it."""

    def __init__(self, client: ServerClient) -> None:
        self._client = client
        self._waiting: dict[str, None] = {}
        self._has_some = asyncio.Event()

    def add(self, transfer_id: str) -> None:
        """Also for a transfer of which it is not known whether it has begun or is over: such a one is left alone."""
        if len(self._waiting) < WAITING_MAX:
            self._waiting[transfer_id] = None
            self._has_some.set()

    async def run(self) -> None:
        """Those that pile up while one call is under way go together in the next. Never returns.

        Raises:
            DisaggregatedError: the server did not take it.
        """
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            transfer_ids, self._waiting = list(self._waiting), {}
            await self._client.abort(transfer_ids, timeout_s=ABORT_TIMEOUT_S)
