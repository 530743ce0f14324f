"""Follows which blocks a server holds while it is connected. Only hints depend on it, and those may be wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final, Protocol

from disaggregated import logs
from disaggregated.errors import AdmissionError, DisaggregatedError, InvalidRequest
from disaggregated.v1 import control_pb2
from orchestrator.routing.known_blocks import KnownBlocks

log = logs.get(__name__)

RETRY_S: Final = 1.0
"""From a broken stream to the next one. A server that is lost ends the whole connection long before."""


class BlockWatcher(Protocol):
    """The part of a ServerClient that matters here."""

    def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]: ...


async def follow_blocks(client: BlockWatcher, known: KnownBlocks, *, name: str) -> None:
    """Keep `known` up to date until cancelled. Returns when the server tells nobody, or nobody more."""
    while True:
        try:
            await _follow(client, known)
        except (InvalidRequest, AdmissionError) as error:
            log.info("blocks_not_followed", server=name, reason=str(error))
            return
        except DisaggregatedError as error:
            log.debug("blocks_lost", server=name, reason=str(error))
        finally:
            known.clear()
        await asyncio.sleep(RETRY_S)


async def _follow(client: BlockWatcher, known: KnownBlocks) -> None:
    """Until the stream ends, or has a gap."""
    async with contextlib.aclosing(client.watch_blocks()) as messages:
        async for message in messages:
            if not known.apply(message):
                return
