"""One connection to a server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import Any

from disaggregated.errors import DisaggregatedError, ServerLost
from disaggregated.v1 import control_pb2
from orchestrator.server_client import Admitted, PrefillReceiver, TakeBatch
from tests.support.fake_cluster.pipe import Pipe, within
from tests.support.fake_cluster.server import FakeServer


class FakeClient:
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    @contextlib.contextmanager
    def _call(self, work: Callable[[Pipe], Coroutine[Any, Any, None]] | None) -> Iterator[Pipe]:
        if not self._server.is_alive:
            raise ServerLost(f"{self._server.address} refuses connections")
        pipe = Pipe()
        self._server.pipes.add(pipe)
        task = self._server.spawn(work(pipe)) if work is not None else None
        try:
            yield pipe
        finally:
            self._server.pipes.discard(pipe)
            if task is not None:
                task.cancel()

    async def describe(self, *, timeout_s: float) -> control_pb2.ServerDescription:
        with self._call(self._server.describe) as pipe:
            return await within(pipe, timeout_s)  # type: ignore[no-any-return]

    async def watch(self, *, interval_s: float) -> AsyncGenerator[control_pb2.Heartbeat, None]:
        with self._call(lambda pipe: self._server.watch(pipe, interval_s)) as pipe:
            while True:
                yield await pipe.read()

    async def watch_blocks(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        with self._call(None) as pipe:
            cache = self._server.cache
            await self._server.turn()
            cache.watch(pipe.queue)
            try:
                while True:
                    yield await pipe.read()
            finally:
                cache.unwatch(pipe.queue)

    async def drain(self, *, deadline_s: float) -> int:
        return 0

    async def ledger(self, *, timeout_s: float) -> Sequence[control_pb2.LedgerEntry]:
        return [
            control_pb2.LedgerEntry(kind="sequence", owner=owner, count=1) for owner in self._server.admitted.values()
        ]

    async def prefill(
        self, request: control_pb2.PrefillRequest, *, timeout_s: float
    ) -> AsyncGenerator[control_pb2.PrefillProgress, None]:
        server = self._server
        pipe = Pipe()
        if not server.is_alive:
            raise ServerLost(f"{server.address} refuses connections")
        server.pipes.add(pipe)
        task = server.spawn(server.prefill(pipe, request))
        has_outcome = False
        try:
            while (message := await pipe.read()) is not None:
                has_outcome = has_outcome or message.HasField("outcome")
                yield message
        finally:
            server.pipes.discard(pipe)
            if not has_outcome:
                task.cancel()

    async def generate(self, orchestrator_id: str, opened: Callable[[], None], take: TakeBatch) -> None:
        async with contextlib.aclosing(self.step_batches(orchestrator_id, opened)) as batches:
            async for batch in batches:
                take(batch)

    async def step_batches(
        self, orchestrator_id: str, opened: Callable[[], None]
    ) -> AsyncGenerator[control_pb2.StepBatch, None]:
        server, epoch = self._server, self._server.epoch
        with self._call(None) as pipe:
            await server.turn()
            server.links[orchestrator_id] = pipe
            opened()
            try:
                while True:
                    yield await pipe.read()
            finally:
                if server.epoch == epoch:
                    server.links.pop(orchestrator_id, None)
                    server.cancel(orchestrator_id, None)

    async def admit(self, request: control_pb2.AdmitRequest, *, timeout_s: float) -> control_pb2.AdmitReply:
        with self._call(lambda pipe: self._server.admit(pipe, request)) as pipe:
            return await within(pipe, timeout_s)  # type: ignore[no-any-return]

    def begin_prefill(self, request: control_pb2.PrefillRequest, receiver: PrefillReceiver) -> Callable[[], None]:
        async def work() -> None:
            error: DisaggregatedError | None = None
            try:
                async with contextlib.aclosing(self.prefill(request, timeout_s=60.0)) as progresses:
                    async for progress in progresses:
                        receiver.on_progress(progress)
            except DisaggregatedError as failure:
                error = failure
            receiver.on_prefill_over(error)

        task = _owned(work())

        def stop() -> None:
            task.cancel()

        return stop

    def begin_admit(self, request: control_pb2.AdmitRequest, admitted: Admitted) -> None:
        async def work() -> None:
            try:
                outcome: control_pb2.AdmitReply | DisaggregatedError = await self.admit(request, timeout_s=60.0)
            except DisaggregatedError as error:
                outcome = error
            admitted(request.stream_key, outcome)

        _owned(work())

    async def cancel(self, orchestrator_id: str, stream_keys: Sequence[int], *, timeout_s: float) -> None:
        async def work(pipe: Pipe) -> None:
            await self._server.turn()
            self._server.cancel(orchestrator_id, stream_keys)
            pipe.queue.put_nowait(None)

        with self._call(work) as pipe:
            await within(pipe, timeout_s)

    async def abort(self, transfer_ids: Sequence[str], *, timeout_s: float) -> None:
        async def work(pipe: Pipe) -> None:
            await self._server.turn()
            self._server.abort(transfer_ids)
            pipe.queue.put_nowait(None)

        with self._call(work) as pipe:
            await within(pipe, timeout_s)

    async def close(self) -> None:
        pass


_callers: set[asyncio.Task[None]] = set()
"""The orchestrator's ends of calls: they end by themselves, since a server's crash ends every pipe."""


def _owned(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work)
    _callers.add(task)
    task.add_done_callback(_callers.discard)
    return task
