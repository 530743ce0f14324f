"""Tells a source that we do not want a transfer (any more), so that its blocks need not wait for their lease to end."""

from __future__ import annotations

import asyncio
from typing import Final

from disaggregated import logs, rpc
from disaggregated.errors import DisaggregatedError
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer.destination.peer import Ticket

log = logs.get(__name__)

FAREWELLS_MAX: Final = 64
"""Calls at once. One more is not made: its source has the lease as a last resort."""
FAREWELL_TIMEOUT_S: Final = 1.0


class Farewells:
    """Lives on one event loop, and owns the calls under way until `close`.

    A farewell is a courtesy: nobody waits for it and nothing depends on it. It takes a connection of its own, because
    the usual one may have been refused, or be closed by the end of the very pull that is given up.
    """

    def __init__(self, peer_id: str) -> None:
        self._peer_id = peer_id
        self._calls: set[asyncio.Task[None]] = set()

    def say(self, ticket: Ticket, why: BaseException | None = None) -> None:
        """Soon. Harmless for a transfer that is over, has not begun, or is followed by another destination.

        `why`, when it is an error of ours, is what the prefill behind the transfer fails with, if it still runs.
        """
        if len(self._calls) >= FAREWELLS_MAX:
            log.warning("kv_farewell_dropped", transfer_id=ticket.transfer_id, under_way=len(self._calls))
            return
        call = asyncio.get_running_loop().create_task(self._say(ticket, why), name=f"kv-farewell-{ticket.transfer_id}")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        """Wait for the calls under way, each within its own deadline."""
        while self._calls:
            await asyncio.wait(self._calls)

    async def _say(self, ticket: Ticket, why: BaseException | None) -> None:
        error = rpc.to_stream_error(why) if isinstance(why, DisaggregatedError) else None
        request = kv_pb2.ReleaseRequest(
            transfer_id=ticket.transfer_id,
            epoch=ticket.epoch,
            landed=False,
            peer_id=self._peer_id,
            error_kind=error.kind if error else "",
            error_message=error.message if error else "",
        )
        channel = rpc.open_channel(ticket.address)
        try:
            with rpc.errors_from(ticket.address):
                await kv_pb2_grpc.KVSourceStub(channel).Release(request, timeout=FAREWELL_TIMEOUT_S)
        except DisaggregatedError as error:
            log.debug("kv_farewell_lost", transfer_id=ticket.transfer_id, reason=str(error))
        finally:
            await channel.close()
