"""The process: what it computes, whom it tells, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from disaggregated import rpc
from disaggregated.errors import ChecksumMismatch, PeerLost, PoolExhausted, ServerLost, StaleEpoch
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams
from disaggregated.step_batches import packed
from disaggregated.v1 import control_pb2
from tests.support.fake_cluster.pipe import Pipe
from tests.support.fake_prefix_cache import FakePrefixCache
from tests.support.token_hash import finish_reason_of, logprobs_of, next_token, prompt_logprobs_of

if TYPE_CHECKING:
    from tests.support.fake_cluster.cluster import FakeCluster

LEASE_S = 5.0
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", num_blocks=400)


@dataclasses.dataclass(eq=False)
class Decoding:
    stream_key: int
    link: Pipe
    sequence: list[int]
    num_prompt: int
    sampling: SamplingParams
    times: control_pb2.AdmissionTimes | None


class FakeServer:
    def __init__(self, cluster: FakeCluster, role: str, address: str) -> None:
        self.cluster = cluster
        self.role = role
        self.name = self.address = address
        self.epoch = 1
        self.is_alive = True
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.pipes: set[Pipe] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.links: dict[str, Pipe] = {}
        self.admitted: dict[tuple[str, int], str] = {}
        self.decoding: dict[tuple[str, int], Decoding] = {}
        self.transfers: dict[str, asyncio.Future[int]] = {}
        self.prefills: dict[str, asyncio.Task[None]] = {}
        """By transfer id, until their lease ends."""
        self.fingerprint = "weights-1"
        self.model = "fake"
        self.step_age_s = 0.0
        self.num_prefills = 0
        self.num_admissions = 0
        self.num_steps = 0
        self.num_tokens = 0
        self.slowness = 1.0
        """Everything that it computes takes so many times as long."""
        self.cache = FakePrefixCache(cluster.temper.cache_blocks)
        self.computing = asyncio.Lock()

    # The process.

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def turn(self, seconds: float = 0.0) -> None:
        """Time passes, and more of it while the process is frozen."""
        await asyncio.sleep(seconds + self.cluster.random.uniform(0, self.cluster.temper.latency_s))
        await self.thawed.wait()

    def crash(self) -> None:
        self.is_alive = False
        for task in self.tasks:
            task.cancel()
        for pipe in self.pipes:
            pipe.queue.put_nowait(ServerLost(f"lost {self.address}"))
        for transfer in self.transfers.values():
            if not transfer.done():
                transfer.cancel()
        for books in (self.pipes, self.links, self.admitted, self.decoding, self.transfers, self.prefills):
            books.clear()

    def restart(self) -> None:
        self.is_alive, self.epoch = True, self.epoch + 1
        self.cache = FakePrefixCache(self.cluster.temper.cache_blocks)
        self.thawed.set()

    # What it does for a connection.

    async def describe(self, pipe: Pipe) -> None:
        await self.turn()
        temper = self.cluster.temper
        layout = dataclasses.replace(LAYOUT, num_blocks=temper.num_blocks)
        pipe.queue.put_nowait(
            control_pb2.ServerDescription(
                instance_id=self.name, epoch=self.epoch, role=self.role, model=self.model, fingerprint=self.fingerprint,
                layout=layout.to_proto(), max_num_tokens=64, max_batch_size=temper.max_batch_size,
                max_seq_len=temper.max_seq_len, can_prefill=True,
            )
        )  # fmt: skip

    async def watch(self, pipe: Pipe, interval_s: float) -> None:
        while True:
            await self.turn()
            pipe.queue.put_nowait(
                control_pb2.Heartbeat(
                    epoch=self.epoch, num_running=len(self.decoding), num_blocks=400, step_age_s=self.step_age_s,
                    step=self.num_steps, generation_tokens_total=self.num_tokens,
                    num_blocks_free=max(0, 400 - 20 * len(self.admitted)),
                    draft_tokens_total=8, accepted_draft_tokens_total=5,
                )
            )  # fmt: skip
            await asyncio.sleep(interval_s)

    async def prefill(self, pipe: Pipe, request: control_pb2.PrefillRequest) -> None:
        self.num_prefills += 1
        await self.turn()
        transfer = self.transfers.setdefault(request.transfer_id, asyncio.get_running_loop().create_future())
        this_task = asyncio.current_task()
        assert this_task is not None
        self.prefills[request.transfer_id] = this_task
        try:
            tokens = list(request.token_ids)
            arrived_s = self.now_s()
            async with self.computing if self.cluster.temper.prefills_in_turn else contextlib.nullcontext():
                began_s = self.now_s()
                num_cached = await self.compute(tokens, pipe)
            sampling = SamplingParams.from_proto(request.sampling)
            first = next_token(tokens, sampling.seed)
            reason = finish_reason_of(first, 1, sampling)
            outcome = control_pb2.PrefillOutcome(
                first_token=first, finish_reason=reason, queue_s=began_s - arrived_s, compute_s=self.now_s() - began_s,
                logprobs=logprobs_of([first], sampling), prompt_logprobs=prompt_logprobs_of(tokens, sampling),
            )  # fmt: skip
            pipe.queue.put_nowait(
                control_pb2.PrefillProgress(
                    num_computed_tokens=len(tokens), num_cached_tokens=num_cached, outcome=outcome
                )
            )
            pipe.queue.put_nowait(None)
            if not reason and request.transfer_id and not transfer.done():
                transfer.set_result(first)
                await asyncio.sleep(LEASE_S)
        finally:
            transfer.cancel()
            self.transfers.pop(request.transfer_id, None)
            self.prefills.pop(request.transfer_id, None)

    async def compute(self, tokens: list[int], pipe: Pipe | None = None) -> int:
        """A prompt, chunk by chunk, but for what is cached; how many tokens that was."""
        num_cached = self.cache.num_cached_tokens(tokens)
        for begin in range(num_cached, len(tokens), 64):
            end = min(begin + 64, len(tokens))
            await self.turn((end - begin) * self.cluster.temper.prefill_token_s * self.slowness)
            if pipe is not None:
                pipe.queue.put_nowait(
                    control_pb2.PrefillProgress(num_computed_tokens=end, num_cached_tokens=num_cached)
                )
        self.cache.computed(tokens)
        return num_cached

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def admit(self, pipe: Pipe, request: control_pb2.AdmitRequest) -> None:
        self.num_admissions += 1
        await self.turn()
        link = self.links.get(request.orchestrator_id)
        if link is None or self.cluster.random.random() < self.cluster.temper.refusal:
            pipe.queue.put_nowait(PoolExhausted.of(wanted=9, free=8))
            return
        key = (request.orchestrator_id, request.stream_key)
        assert key not in self.admitted, "a stream key was used twice"
        self.admitted[key] = request.request_id
        self.spawn(self.fill(key, link, request))
        await self.turn()
        pipe.queue.put_nowait(control_pb2.AdmitReply())

    async def fill(self, key: tuple[str, int], link: Pipe, request: control_pb2.AdmitRequest) -> None:
        tokens = list(request.token_ids)
        times = control_pb2.AdmissionTimes(transport="FAKE")
        try:
            if request.HasField("source"):
                tokens.append(await self.pull(request.source))
            else:
                began_s = self.now_s()
                times.num_cached_tokens = await self.compute(tokens)
                times.compute_s = self.now_s() - began_s
        except (PeerLost, StaleEpoch, ChecksumMismatch) as error:
            if self.admitted.pop(key, None) is not None:
                self.tell(link, control_pb2.StreamDelta(stream_key=key[1], error=rpc.to_stream_error(error)))
            return
        if key in self.admitted:
            sampling = SamplingParams.from_proto(request.sampling)
            self.decoding[key] = Decoding(key[1], link, tokens, len(request.token_ids), sampling, times)
            if len(self.decoding) == 1:
                self.spawn(self.decode())

    async def pull(self, ticket: control_pb2.TransferTicket) -> int:
        source = self.cluster.servers[ticket.address]
        await self.turn()
        if not source.is_alive:
            raise PeerLost(f"{ticket.address} is gone")
        if source.epoch != ticket.epoch:
            raise StaleEpoch(f"{ticket.address} was started again")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        transfer = source.transfers.setdefault(ticket.transfer_id, future)
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            first = await asyncio.wait_for(asyncio.shield(transfer), 10.0)
            await self.turn()
            if self.cluster.random.random() < self.cluster.temper.damaged_transfer:
                raise ChecksumMismatch("block 3")
            return first
        if not transfer.done():
            transfer.cancel()  # nobody came to prefill it; whoever comes later finds a new one
            source.transfers.pop(ticket.transfer_id, None)
        raise PeerLost(f"{ticket.address} did not send")

    async def decode(self) -> None:
        while self.decoding:
            await self.turn(self.cluster.temper.step_s * self.slowness)
            self.num_steps += 1
            batches: dict[Pipe, list[control_pb2.StreamDelta]] = {}
            for key, row in list(self.decoding.items()):
                batches.setdefault(row.link, []).append(self.step(key, row))
            for link, deltas in batches.items():
                self.tell(link, *deltas)

    def step(self, key: tuple[str, int], row: Decoding) -> control_pb2.StreamDelta:
        first, reason = len(row.sequence), ""
        num_tokens = self.cluster.random.randint(1, self.cluster.temper.tokens_a_step_max)
        while not reason and len(row.sequence) < first + num_tokens:
            row.sequence.append(next_token(row.sequence, row.sampling.seed))
            reason = finish_reason_of(row.sequence[-1], len(row.sequence) - row.num_prompt, row.sampling)
        self.num_tokens += len(row.sequence) - first
        if reason:
            del self.decoding[key], self.admitted[key]
            self.cache.computed(row.sequence[:-1])
        times, row.times = row.times, None
        told = prompt_logprobs_of(row.sequence[:first], row.sampling) if first == row.num_prompt else None
        return control_pb2.StreamDelta(
            stream_key=row.stream_key, first_position=first, token_ids=row.sequence[first:], finish_reason=reason,
            times=times, logprobs=logprobs_of(row.sequence[first:], row.sampling), prompt_logprobs=told,
        )  # fmt: skip

    def tell(self, link: Pipe, *deltas: control_pb2.StreamDelta) -> None:
        link.queue.put_nowait(packed(0, deltas))

    def cancel(self, orchestrator_id: str, stream_keys: Sequence[int] | None) -> None:
        """None: all of them, because their link broke."""
        for key in list(self.admitted):
            if key[0] == orchestrator_id and (stream_keys is None or key[1] in stream_keys):
                del self.admitted[key]
                self.decoding.pop(key, None)

    def abort(self, transfer_ids: Sequence[str]) -> None:
        for transfer_id in transfer_ids:
            if (prefill := self.prefills.get(transfer_id)) is not None:
                prefill.cancel()
