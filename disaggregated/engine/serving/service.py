"""What every server answers about itself: Describe, Watch, Drain, GetLedger, WatchBlocks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Final

from disaggregated import __version__
from disaggregated.engine.serving.block_stream import block_messages
from disaggregated.engine.serving.live_requests import request_id_of
from disaggregated.engine.serving.role import LoadedServer, Role
from disaggregated.errors import DeadlineExceeded
from disaggregated.peer_input import checked_seconds
from disaggregated.v1 import control_pb2, control_pb2_grpc
from disaggregated.wire import WireServer

HEARTBEAT_INTERVAL_MIN_S: Final = 0.02
LEDGER_TIMEOUT_S: Final = 10.0
"""The engine answers between two steps, and a step on a slow machine takes seconds."""


class ServerService(control_pb2_grpc.ServerServicer):
    """Heartbeats come from the event loop while the engine computes: they stop when the process is gone or frozen."""

    def __init__(self, role: Role, server: LoadedServer[Any], wire: WireServer) -> None:
        self._role = role
        self._server = server
        self._wire = wire
        self._ending = asyncio.Event()

    def end_watches(self) -> None:
        self._ending.set()

    async def Describe(self, request: control_pb2.DescribeRequest, call: Any) -> control_pb2.ServerDescription:
        config, loaded, identity = self._server.config, self._server.loaded, self._server.identity
        return control_pb2.ServerDescription(
            instance_id=identity.instance_id,
            epoch=identity.epoch,
            role=config.role,
            model=loaded.files.name,
            fingerprint=loaded.fingerprint,
            layout=loaded.layout.to_proto(),
            max_num_tokens=config.max_num_tokens,
            max_batch_size=config.max_batch_size,
            max_seq_len=loaded.engine.max_seq_len,
            pid=os.getpid(),
            device=loaded.device,
            dtype=loaded.dtype,
            version=__version__,
            can_prefill=self._role.can_prefill,
            transports=self._role.transports,
            wire_port=self._wire.port,
        )

    async def Watch(self, request: control_pb2.WatchRequest, call: Any) -> AsyncIterator[control_pb2.Heartbeat]:
        interval_s = max(checked_seconds(request.interval_s, "interval_s"), HEARTBEAT_INTERVAL_MIN_S)
        while not self._ending.is_set():
            yield self.heartbeat()
            await self._wait_for_news(interval_s)

    async def _wait_for_news(self, interval_s: float) -> None:
        """Until the next heartbeat is due: after the interval, when draining begins, or when watches end."""
        live_requests = self._role.live_requests
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(self._ending.wait())]
        if not live_requests.is_draining:
            waits.append(asyncio.ensure_future(live_requests.wait_draining()))
        try:
            await asyncio.wait(waits, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def heartbeat(self) -> control_pb2.Heartbeat:
        statistics = self._role.engine.statistics()
        cost = self._role.step_cost()
        return control_pb2.Heartbeat(
            epoch=self._server.identity.epoch,
            draining=self._role.live_requests.is_draining,
            links=self._role.links(),
            unhealthy=self._role.unhealthy,
            step=statistics.step,
            step_age_s=statistics.step_age_s,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            num_waiting_tokens=statistics.num_waiting_tokens,
            num_blocks=statistics.num_blocks,
            num_blocks_free=statistics.num_blocks_free,
            num_blocks_leased=statistics.num_blocks_leased,
            num_blocks_quarantined=statistics.num_blocks_quarantined,
            prompt_tokens_total=statistics.prompt_tokens_total,
            prompt_cached_tokens_total=statistics.prompt_cached_tokens_total,
            generation_tokens_total=statistics.generation_tokens_total,
            preemptions_total=statistics.preemptions_total,
            num_host_slots=statistics.num_host_slots,
            num_host_slots_used=statistics.num_host_slots_used,
            num_host_slots_claimed=statistics.num_host_slots_claimed,
            offloaded_blocks_total=statistics.offloaded_blocks_total,
            onboarded_blocks_total=statistics.onboarded_blocks_total,
            swapped_sequences_total=statistics.swapped_sequences_total,
            draft_tokens_total=statistics.draft_tokens_total,
            accepted_draft_tokens_total=statistics.accepted_draft_tokens_total,
            has_step_cost=cost is not None,
            step_fixed_s=cost.fixed_s if cost else 0.0,
            step_token_s=cost.token_s if cost else 0.0,
            step_pair_s=cost.pair_s if cost else 0.0,
        )

    async def Drain(self, request: control_pb2.DrainRequest, call: Any) -> control_pb2.DrainReply:
        deadline_s = checked_seconds(request.deadline_s, "deadline_s")
        live_requests = self._role.live_requests
        live_requests.begin_draining()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await live_requests.wait_idle()
        return control_pb2.DrainReply(num_left=len(live_requests))

    async def GetLedger(self, request: control_pb2.LedgerRequest, call: Any) -> control_pb2.Ledger:
        try:
            async with asyncio.timeout(LEDGER_TIMEOUT_S):
                blocks = await asyncio.wrap_future(self._role.engine.ledger())
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine has not ended its step for {LEDGER_TIMEOUT_S:g} s") from error
        entries = [
            control_pb2.LedgerEntry(
                kind=entry.kind, owner=request_id_of(entry.owner), count=entry.num_blocks, age_s=entry.age_s
            )
            for entry in blocks
        ]
        return control_pb2.Ledger(entries=[*entries, *self._role.transfers()])

    async def WatchBlocks(
        self, request: control_pb2.WatchBlocksRequest, call: Any
    ) -> AsyncIterator[control_pb2.BlockEvents]:
        async with contextlib.aclosing(block_messages(self._role.engine, self._ending)) as messages:
            async for message in messages:
                yield message
