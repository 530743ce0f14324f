"""What an orchestrator says to servers, in a few lines, for tests that talk to servers without one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Self

from disaggregated import rpc
from disaggregated.errors import DisaggregatedError, ServerLost
from disaggregated.sampling_params import SamplingParams
from disaggregated.step_batches import deltas_of
from disaggregated.v1 import control_pb2, control_pb2_grpc

CALL_TIMEOUT_S: Final = 100.0


@dataclasses.dataclass(slots=True)
class Completion:
    """What came back of one request."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    first_position: int | None = None
    finish_reason: str = ""
    times: control_pb2.AdmissionTimes | None = None
    num_messages: int = 0

    def add(self, delta: control_pb2.StreamDelta) -> None:
        """Raises the error that ends the stream. Checks that positions continue each other."""
        if delta.HasField("error"):
            raise rpc.from_stream_error(delta.error)
        if self.first_position is None:
            self.first_position = delta.first_position
            assert delta.HasField("times"), "the first delta carries the times"
            self.times = delta.times
        else:
            assert not delta.HasField("times"), "the times come once"
        assert delta.first_position == self.first_position + len(self.token_ids), "a token is missing or came twice"
        self.token_ids.extend(delta.token_ids)
        self.finish_reason = delta.finish_reason
        self.num_messages += 1


class ServerClient:
    """One server, and what both roles answer."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = rpc.open_channel(address)
        self._server = control_pb2_grpc.ServerStub(self._channel)
        self.description = control_pb2.ServerDescription()

    async def __aenter__(self) -> Self:
        self.description = await self.describe()
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self._channel.close()

    async def describe(self) -> control_pb2.ServerDescription:
        with rpc.errors_from(self.address):
            return await self._server.Describe(control_pb2.DescribeRequest(), timeout=CALL_TIMEOUT_S)

    async def drain(self, deadline_s: float) -> int:
        request = control_pb2.DrainRequest(deadline_s=deadline_s)
        with rpc.errors_from(self.address):
            return (await self._server.Drain(request, timeout=CALL_TIMEOUT_S + deadline_s)).num_left

    async def ledger(self) -> list[control_pb2.LedgerEntry]:
        with rpc.errors_from(self.address):
            return list((await self._server.GetLedger(control_pb2.LedgerRequest(), timeout=CALL_TIMEOUT_S)).entries)

    async def heartbeats(self, interval_s: float = 0.02) -> AsyncGenerator[control_pb2.Heartbeat, None]:
        call = self._server.Watch(control_pb2.WatchRequest(interval_s=interval_s))
        try:
            with rpc.errors_from(self.address):
                async for heartbeat in call:
                    yield heartbeat
        finally:
            call.cancel()

    async def block_events(self) -> AsyncGenerator[control_pb2.BlockEvents, None]:
        call = self._server.WatchBlocks(control_pb2.WatchBlocksRequest())
        try:
            with rpc.errors_from(self.address):
                async for message in call:
                    yield message
        finally:
            call.cancel()

    async def wait_idle(self, timeout_s: float = CALL_TIMEOUT_S) -> control_pb2.Heartbeat:
        """Until every block is back and nothing runs or waits; the ledger is empty then."""
        async with asyncio.timeout(timeout_s), contextlib.aclosing(self.heartbeats()) as heartbeats:
            async for beat in heartbeats:
                if beat.num_blocks_free == beat.num_blocks and not beat.num_running and not beat.num_waiting:
                    assert await self.ledger() == []
                    return beat
        raise AssertionError("the heartbeats ended")


class ContextClient(ServerClient):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._context = control_pb2_grpc.ContextStub(self._channel)

    async def prefill(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str = "prompt",
        transfer_id: str = "",
        deadline_s: float = CALL_TIMEOUT_S,
        reuse_from: control_pb2.PrefixHint | None = None,
    ) -> AsyncGenerator[control_pb2.PrefillProgress, None]:
        """Closing this cancels the call."""
        call = self._context.Prefill(
            control_pb2.PrefillRequest(
                request_id=request_id,
                transfer_id=transfer_id,
                token_ids=token_ids,
                sampling=sampling.to_proto(),
                deadline_s=deadline_s,
                reuse_from=reuse_from,
            )
        )
        try:
            with rpc.errors_from(self.address):
                async for progress in call:
                    yield progress
        finally:
            call.cancel()

    async def first_token(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        transfer_id: str = "",
        request_id: str = "prompt",
        reuse_from: control_pb2.PrefixHint | None = None,
    ) -> control_pb2.PrefillOutcome:
        prefill = self.prefill(
            token_ids, sampling, request_id=request_id, transfer_id=transfer_id, reuse_from=reuse_from
        )
        messages = [progress async for progress in prefill]
        assert [progress.HasField("outcome") for progress in messages] == [False] * (len(messages) - 1) + [True]
        return messages[-1].outcome

    async def abort(self, *transfer_ids: str, reason: str = "") -> int:
        request = control_pb2.AbortRequest(transfer_ids=transfer_ids, reason=reason)
        with rpc.errors_from(self.address):
            return (await self._context.Abort(request, timeout=CALL_TIMEOUT_S)).num_ended

    def ticket(self, transfer_id: str) -> control_pb2.TransferTicket:
        return control_pb2.TransferTicket(
            address=self.address,
            instance_id=self.description.instance_id,
            epoch=self.description.epoch,
            transfer_id=transfer_id,
        )


class GenerationClient(ServerClient):
    """Holds the Generate stream of one orchestrator; deltas wait here for whoever asks for their request."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.orchestrator_id = f"test-{uuid.uuid4()}"
        self.num_batches = 0
        self._generation = control_pb2_grpc.GenerationStub(self._channel)
        self._deltas: dict[int, asyncio.Queue[control_pb2.StreamDelta | Exception]] = {}
        self._completions: dict[int, Completion] = {}
        self._keys = itertools.count(1)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._call = self._generation.Generate(control_pb2.GenerateRequest(orchestrator_id=self.orchestrator_id))
        await self._call.initial_metadata()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *unused: object) -> None:
        await self.hang_up()
        await super().__aexit__()

    async def hang_up(self) -> None:
        self._call.cancel()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        end: Exception = ServerLost("the Generate stream ended")
        try:
            with rpc.errors_from(self.address):
                async for batch in self._call:
                    self.num_batches += 1
                    for delta in deltas_of(batch):
                        self._deltas[delta.stream_key].put_nowait(delta)
        except DisaggregatedError as error:
            end = error
        finally:
            for queue in self._deltas.values():
                queue.put_nowait(end)

    async def admit(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str = "prompt",
        source: control_pb2.TransferTicket | None = None,
        deadline_s: float = CALL_TIMEOUT_S,
    ) -> int:
        """The key by which `completion` finds it."""
        key = next(self._keys)
        self._deltas[key], self._completions[key] = asyncio.Queue(), Completion()
        request = control_pb2.AdmitRequest(
            orchestrator_id=self.orchestrator_id,
            stream_key=key,
            request_id=request_id,
            token_ids=token_ids,
            sampling=sampling.to_proto(),
            source=source,
            deadline_s=deadline_s,
        )
        with rpc.errors_from(self.address):
            await self._generation.Admit(request, timeout=CALL_TIMEOUT_S)
        return key

    async def cancel(self, *keys: int) -> int:
        request = control_pb2.CancelRequest(orchestrator_id=self.orchestrator_id, stream_keys=keys)
        with rpc.errors_from(self.address):
            return (await self._generation.Cancel(request, timeout=CALL_TIMEOUT_S)).num_cancelled

    async def delta(self, key: int) -> control_pb2.StreamDelta:
        """The next one; raises the error that ends the request."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            found = await self._deltas[key].get()
        if isinstance(found, Exception):
            raise found
        self._completions[key].add(found)
        return found

    async def completion(self, key: int) -> Completion:
        """All of it, once it finishes; raises the error that ends it."""
        completion = self._completions[key]
        while not completion.finish_reason:
            await self.delta(key)
        return completion

    def hint(self, num_tokens: int) -> control_pb2.PrefixHint:
        """That this server holds so many of a prompt's first tokens."""
        return control_pb2.PrefixHint(
            address=self.address,
            instance_id=self.description.instance_id,
            epoch=self.description.epoch,
            num_tokens=num_tokens,
        )

    def has_news(self, key: int) -> bool:
        return not self._deltas[key].empty()

    async def complete(self, token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """With a local prefill."""
        return await self.completion(await self.admit(token_ids, sampling))


async def complete_disaggregated(
    context: ContextClient, generation: GenerationClient, token_ids: Sequence[int], sampling: SamplingParams
) -> Completion:
    """Prefill there, decode here, as an orchestrator does it: both are told at the same time."""
    transfer_id = str(uuid.uuid4())
    try:
        async with asyncio.TaskGroup() as group:
            prefill = group.create_task(context.first_token(token_ids, sampling, transfer_id=transfer_id))
            admit = group.create_task(generation.admit(token_ids, sampling, source=context.ticket(transfer_id)))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    completion = await generation.completion(admit.result())
    assert completion.first_position == len(token_ids) + 1
    completion.token_ids.insert(0, prefill.result().first_token)
    return completion
