from __future__ import annotations

import asyncio
from typing import Any

from disaggregated.errors import ServerLost


class Pipe:
    """What one call brings back: messages, then the error or None that ends it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item


async def within(pipe: Pipe, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await pipe.read()
    except TimeoutError as error:
        raise ServerLost(f"no answer within {timeout_s} s") from error
