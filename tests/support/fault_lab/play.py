"""Plays cells: one transfer with one fault, then the questions that every cell must answer the same way.

The outcome is there within a second of the fault (SIGSTOP: of the progress timeout).
What landed is what was sent. What did not land writes nothing any more: its blocks have another owner by now.
The source has every block back. The next transfer between the two succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from disaggregated import rpc
from disaggregated.errors import DisaggregatedError
from disaggregated.v1 import kv_pb2, kv_pb2_grpc
from kvtransfer.transports import mpirun
from tests.support.fault_lab.cells import HARM, NUM_CHUNKS, Cell, Fault, Side, Verdict
from tests.support.fault_lab.control_relay import ControlRelay, ControlTampering, relays
from tests.support.fault_lab.hub import Actor, ActorLost, Hub, hub
from tests.support.fault_lab.tampering import Levers, Tampering
from tests.support.kv_pools import LARGE, eventually

LEASE_S: Final = 2.0
DEADLINE_S: Final = 10.0
BLOCKS_PER_CHUNK: Final = 8
NUM_BLOCKS: Final = NUM_CHUNKS * BLOCKS_PER_CHUNK
TABLE: Final = tuple(range(0, 2 * NUM_BLOCKS, 2))
"""Of the source: every second block, so that a neighbour is never published."""
INTO: Final = tuple(range(100, 100 + NUM_BLOCKS))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a fault may go unnoticed, and how long a frozen process stands still."""

    progress_timeout_s: float = 0.5
    found_within_s: float = 1.25
    """A second, and what two busy cores add to the clock of a test."""
    stopped_s: float = 3.0


AS_PROMISED: Final = Pace()
"""On a machine that does little else."""


def chunk_of(blocks: frozenset[int]) -> set[int]:
    return {TABLE.index(block) // BLOCKS_PER_CHUNK for block in blocks if block in TABLE}


class Lab:
    """Both actors of one transport and the relays between them. Starts again whoever was killed.

    Nobody comes back into an MPI world. There whoever is started again stays outside of it, both ends have
    `fallback: true`, and the next transfer must land by what is left; the next cell has a new world.
    """

    def __init__(self, transport: str, meeting: Hub, pace: Pace = AS_PROMISED) -> None:
        self._transport = transport
        self._pace = pace
        self._hub = meeting
        self._stack = contextlib.AsyncExitStack()
        self._epoch = 0
        self._number = 0
        self._port = 0
        self._source: Actor | None = None
        self._destination: Actor | None = None
        self._control: ControlRelay | None = None
        self._data_seen: set[int] = set()
        self._seen = asyncio.Event()
        self._watched: int | None = None
        self._loop = asyncio.get_running_loop()
        self._left_world = False
        """One of our two actors is not in the other's MPI world."""

    @property
    def source(self) -> Actor:
        assert self._source is not None
        return self._source

    @property
    def destination(self) -> Actor:
        assert self._destination is not None
        return self._destination

    @property
    def control(self) -> ControlRelay:
        assert self._control is not None
        return self._control

    async def play(self, cell: Cell) -> Verdict:
        await self._have_transport()
        tampering = Tampering(cell, self._levers(cell))
        self._watched = cell.chunk
        self.control.tampering = tampering.of_control()
        self.control.data.tamper_with(tampering.on_frame if cell.chunk is not None else None)
        thaw = asyncio.create_task(self._thaw_after(cell, tampering))
        outcome, found_s, complaints = await self._one_transfer(cell, tampering)
        await thaw
        self.control.tampering = ControlTampering()
        self.control.data.tamper_with(None)
        await self._mend(cell, tampering)
        complaints += await self._aftermath(cell)
        return Verdict(cell, outcome, found_s, tuple(complaints))

    async def succeed(self) -> list[str]:
        """One transfer without a fault; what was wrong with it."""
        await self._have_transport()
        return await self._the_next_one()

    async def held(self) -> dict[str, dict[str, int]]:
        """Descriptors, threads and mapped bytes of each process, and the transfers that hold blocks at the source."""
        live = {"transfers": await self.source.call("num_live")}
        return {
            "source": await self.source.call("held") | live,
            "destination": await self.destination.call("held"),
        }

    async def close(self) -> None:
        for actor in (self._source, self._destination):
            if actor is not None:
                actor.close()
        await self._stack.aclose()

    # One transfer.

    async def _one_transfer(self, cell: Cell, tampering: Tampering) -> tuple[str, float, list[str]]:
        transfer_id = self._next_id()
        pulling = asyncio.create_task(self._pull(transfer_id))
        is_read = cell.fault is not Fault.REORDERED  # One that is held back for another cannot be.
        publishing = asyncio.create_task(self._publish(transfer_id, self._until_read if is_read else self._until_told))
        told = await pulling
        ended_s = told["ended_s"]
        publishing.cancel()
        with contextlib.suppress(asyncio.CancelledError, ActorLost, TimeoutError):
            await publishing
        outcome = told["outcome"]
        if cell.fault is Fault.KILL and cell.side is Side.RECEIVER:
            await self._source_is_empty()
            ended_s = time.monotonic()
        if tampering.struck_s is None:
            return outcome, 0.0, [f"the fault never struck: {told}"]
        found_s = ended_s - tampering.struck_s
        return outcome, found_s, [*self._complaints(cell, told, found_s), *self._wrong_way(told)]

    def _wrong_way(self, told: dict[str, Any]) -> list[str]:
        """What landed came by the transport that is played, unless there is none between the two any more."""
        if told["outcome"] != "landed" or self._left_world or told["says"] == self._transport:
            return []
        return [f"it landed by {told['says']}"]

    def _complaints(self, cell: Cell, told: dict[str, Any], found_s: float) -> list[str]:
        complaints = []
        landed = told["outcome"] == "landed"
        allowed_s = self._pace.found_within_s
        if cell.fault is Fault.STOP:
            allowed_s += self._pace.progress_timeout_s if cell.side is Side.SENDER else self._pace.stopped_s
        if told.get("num_wrong"):
            complaints.append(f"{HARM}it {told['outcome']}")
        if found_s > allowed_s:
            complaints.append(f"found after {found_s:.2f} s, {allowed_s:.2f} s are allowed: {told}")
        if told["outcome"] in ("TimeoutError", "TransferTimeout") and cell.fault is not Fault.STOP:
            complaints.append(f"only the deadline ended it: {told}")
        if cell.fault is Fault.DELAYED and not landed:
            complaints.append(f"a delay ended it: {told}")
        return complaints

    async def _pull(self, transfer_id: str) -> dict[str, Any]:
        ticket = self._ticket(transfer_id)
        try:
            told: dict[str, Any] = await self.destination.call("pull", ticket, INTO, DEADLINE_S)
        except ActorLost:
            return {"outcome": "killed", "ended_s": time.monotonic()}
        told["ended_s"] = time.monotonic()
        if told["outcome"] == "landed":
            told["num_wrong"] = await self.destination.call("num_wrong", TABLE, INTO)
            if told["num_wrong"]:
                told["outcome"] = f"landed with {told['num_wrong']} wrong bytes"
        return told

    async def _publish(self, transfer_id: str, until: Callable[[int], Awaitable[None]]) -> None:
        """Chunk after chunk, the next one when `until` has returned for the last."""
        num_tokens = NUM_BLOCKS * LARGE.block_size
        self._data_seen.clear()
        self.control.num_publications = 0
        await self.source.call("open", transfer_id, num_tokens)
        for chunk in range(NUM_CHUNKS - 1):
            await self.source.call("publish", transfer_id, TABLE, (chunk + 1) * num_tokens // NUM_CHUNKS)
            async with asyncio.timeout(20):
                await until(chunk)
        await self.source.call("finish", transfer_id, TABLE, num_tokens)

    async def _until_read(self, chunk: int) -> None:
        while chunk not in self._data_seen:
            self._seen.clear()
            await self._seen.wait()

    async def _until_told(self, chunk: int) -> None:
        while self.control.num_publications <= chunk:
            self.control.came.clear()
            await self.control.came.wait()

    def _is_of_chunk(self, blocks: frozenset[int]) -> bool:
        """On a relay's thread."""
        chunks = chunk_of(blocks)
        self._data_seen |= chunks
        self._loop.call_soon_threadsafe(self._seen.set)
        return self._watched in chunks

    # What comes after.

    async def _thaw_after(self, cell: Cell, tampering: Tampering) -> None:
        if cell.fault is not Fault.STOP:
            return
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: tampering.struck_s is not None)
        await asyncio.sleep(self._pace.stopped_s)
        (self.source if cell.side is Side.SENDER else self.destination).signal(signal.SIGCONT)

    async def _mend(self, cell: Cell, tampering: Tampering) -> None:
        if cell.fault is Fault.KILL and tampering.struck_s is not None:
            self._forget(cell.side)
            await self._have_both()
        if self._damaged is not None:
            await self.source.call("flip", self._damaged)
            self._damaged = None

    _damaged: int | None = None

    async def _aftermath(self, cell: Cell) -> list[str]:
        complaints = []
        await self.destination.call("give_away", INTO)
        try:
            await self._source_is_empty()
        except TimeoutError:
            complaints.append(f"{await self.source.call('num_live')} transfers still hold blocks at the source")
        try:
            complaints += await self._the_next_one()
        except (TimeoutError, ActorLost) as error:
            complaints.append(f"the next transfer: {type(error).__name__}")
        if overwritten := await self.destination.call("num_overwritten", INTO):
            complaints.append(f"{HARM}{overwritten} bytes were written into blocks that had another owner")
        return complaints

    async def _the_next_one(self) -> list[str]:
        into = [block - NUM_BLOCKS for block in INTO]
        transfer_id = self._next_id()
        self._watched = None
        publishing = asyncio.create_task(self._publish(transfer_id, self._until_read))
        told = await self.destination.call("pull", self._ticket(transfer_id), into, DEADLINE_S)
        try:
            await publishing
        except TimeoutError:
            return [f"the next transfer was not read in time: chunks {sorted(self._data_seen)} were, {told}"]
        if told["outcome"] != "landed":
            return [f"the next transfer did not land: {told}"]
        wrong = await self.destination.call("num_wrong", TABLE, into)
        wrong_bytes = [f"{HARM}{wrong} wrong bytes in the next transfer"] if wrong else []
        return [*wrong_bytes, *self._wrong_way(told)]

    async def _source_is_empty(self) -> None:
        async with asyncio.timeout(LEASE_S + 2.0):
            while await self.source.call("num_live"):  # noqa: ASYNC110 - another process's books make no event here
                await asyncio.sleep(0.02)

    # Levers and processes.

    def _levers(self, cell: Cell) -> Levers:
        def signal_process(side: Side, number: signal.Signals) -> None:
            (self.source if side is Side.SENDER else self.destination).signal(number)

        def cut(side: Side) -> None:
            if side is Side.SENDER:
                self.control.data.cut()
            else:
                self._loop.call_soon_threadsafe(self.control.cut)

        async def damage_block() -> None:
            self._damaged = TABLE[(cell.chunk or 0) * BLOCKS_PER_CHUNK]
            await self.source.call("flip", self._damaged)

        return Levers(
            loop=self._loop,
            signal_process=signal_process,
            cut=cut,
            damage_block=damage_block,
            give_up=lambda: self._say(landed=False),
            renew=lambda: self._say(landed=None),
        )

    async def _say(self, *, landed: bool | None) -> None:
        """A message that the destination never sent at this moment; an answer that refuses is fine, too."""
        name, us = self._id(), "generation-0"
        async with rpc.open_channel(self.source.told["address"]) as channel:
            stub = kv_pb2_grpc.KVSourceStub(channel)
            with contextlib.suppress(DisaggregatedError), rpc.errors_from("source"):
                if landed is None:
                    renewal = kv_pb2.RenewRequest(transfer_id=name, epoch=self._epoch)
                    await stub.Renew(renewal, timeout=20)
                else:
                    giving_up = kv_pb2.ReleaseRequest(transfer_id=name, epoch=self._epoch, landed=landed, peer_id=us)
                    await stub.Release(giving_up, timeout=20)

    def _next_id(self) -> str:
        self._number += 1
        return self._id()

    def _id(self) -> str:
        return f"transfer-{self._epoch}-{self._number}"

    def _ticket(self, transfer_id: str) -> dict[str, Any]:
        address = self.control.address
        return {"address": address, "transfer_id": transfer_id, "instance_id": "context-0", "epoch": self._epoch}

    def _forget(self, side: Side) -> None:
        actor = self.source if side is Side.SENDER else self.destination
        actor.close()
        with contextlib.suppress(ProcessLookupError):
            actor.signal(signal.SIGKILL)
        if side is Side.SENDER:
            self._source = None
        else:
            self._destination = None
        self._left_world = self._transport == "MPI"

    async def _have_transport(self) -> None:
        """Both actors are there, and the transport is between them."""
        if self._left_world:
            for side in Side:
                if (self._source if side is Side.SENDER else self._destination) is not None:
                    self._forget(side)
            self._left_world = False
        await self._have_both()

    async def _have_both(self) -> None:
        """A source that starts again has the same port and a higher epoch, and the destination is not told."""
        commands: list[Sequence[str]] = []
        names = []
        layout = dataclasses.asdict(LARGE)
        if self._source is None:
            self._epoch += 1
            settings = {"role": "source", "transport": self._transport, "layout": layout, "lease_s": LEASE_S}
            settings |= {"epoch": self._epoch, "port": self._port}
            names.append(f"source-{self._epoch}")
            commands.append(self._hub.command(names[-1], settings))
        if self._destination is None:
            self._number += 1
            settings = {"role": "destination", "transport": self._transport, "layout": layout}
            settings |= {"progress_timeout_s": self._pace.progress_timeout_s}
            names.append(f"destination-{self._number}")
            commands.append(self._hub.command(names[-1], settings))
        await self._run(commands)
        for name in names:
            actor = await self._hub.actor(name)
            if name.startswith("source"):
                self._source = actor
            else:
                self._destination = actor
        if names and names[0].startswith("source"):
            await self._relay_to(self.source.told["address"])

    async def _run(self, commands: Sequence[Sequence[str]]) -> None:
        if self._transport == "MPI" and len(commands) == len(Side):
            commands = [mpirun.command(*commands)]
        for command in commands:
            await self._hub.run(command)

    async def _relay_to(self, address: str) -> None:
        if self._control is None:
            self._port = int(address.rpartition(":")[2])
            self._control = await self._stack.enter_async_context(
                relays(address, self._is_of_chunk, carries_blocks=self._transport == "TCP")
            )
        else:
            await self._control.source_began()


@contextlib.asynccontextmanager
async def lab(transport: str, pace: Pace = AS_PROMISED) -> AsyncIterator[Lab]:
    async with hub() as meeting:
        made = Lab(transport, meeting, pace)
        try:
            yield made
        finally:
            await made.close()
