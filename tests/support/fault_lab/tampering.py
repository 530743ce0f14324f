"""What each fault does, at its moment, to the messages that pass the relays."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError

from disaggregated.errors import PeerLost
from disaggregated.v1 import kv_pb2
from kvtransfer.transports.frames import HEADER, Kind
from tests.support.fault_lab.cells import NUM_CHUNKS, Cell, Fault, Moment, Side
from tests.support.fault_lab.control_relay import ControlTampering, Publications, Release
from tests.support.fault_lab.data_relay import DELAY_S, Passing

M = TypeVar("M", kv_pb2.ReleaseReply, kv_pb2.ReleaseRequest)

_FIRST_RUN_AT: Final = 36
"""Where a READ's body names its first block."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What a fault may pull. All but `signal_process` and `cut` are coroutines of the lab's event loop."""

    loop: asyncio.AbstractEventLoop
    signal_process: Callable[[Side, signal.Signals], None]
    cut: Callable[[Side], None]
    damage_block: Callable[[], Coroutine[Any, Any, None]]
    """One bit of the chunk, in the source's memory, after it was published."""
    give_up: Callable[[], Coroutine[Any, Any, None]]
    """A Release that overtakes what was sent before it."""
    renew: Callable[[], Coroutine[Any, Any, None]]


class Tampering:
    """One cell's fault. It strikes once."""

    def __init__(self, cell: Cell, levers: Levers) -> None:
        self.cell = cell
        self.struck_s: float | None = None
        self._levers = levers

    def strike(self) -> bool:
        """True the first time."""
        if self.struck_s is not None:
            return False
        self.struck_s = time.monotonic()
        return True

    # Frames. On a relay's thread, for the READ of our chunk and its answer.

    def on_frame(self, passing: Passing) -> None:
        is_ours = passing.is_from_source == (self.cell.side is Side.SENDER)
        match self.cell.fault:
            case Fault.KILL | Fault.STOP | Fault.CUT if passing.kind is Kind.READ and self.strike():
                self._hit()
            case Fault.CORRUPT if self.cell.side is Side.RECEIVER and is_ours and self.strike():
                passing.body[_FIRST_RUN_AT] ^= 1
            case Fault.CORRUPT if self.cell.side is Side.SENDER:
                self._corrupt_blocks(passing)
            case Fault.TRUNCATED if is_ours and self.strike():
                passing.keep_bytes = (HEADER.size + len(passing.body)) // 2
            case Fault.DELAYED if is_ours and self.strike():
                passing.delay_s = DELAY_S
            case Fault.DUPLICATED if self.cell.side is Side.RECEIVER and is_ours and self.strike():
                passing.copies = 2
            case Fault.REORDERED if self.cell.side is Side.RECEIVER and is_ours and self.strike():
                self._wait(self._levers.give_up())

    def _corrupt_blocks(self, passing: Passing) -> None:
        """On the way where bytes pass the relay, else where they are."""
        if passing.kind is Kind.BLOCKS and passing.body and self.strike():
            passing.body[len(passing.body) // 2] ^= 4
        elif passing.kind is Kind.READ and self.cell.transport != "TCP" and self.strike():
            self._wait(self._levers.damage_block())

    def _hit(self) -> None:
        match self.cell.fault:
            case Fault.KILL:
                self._levers.signal_process(self.cell.side, signal.SIGKILL)
            case Fault.STOP:
                self._levers.signal_process(self.cell.side, signal.SIGSTOP)
            case Fault.CUT:
                self._levers.cut(self.cell.side)

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._levers.loop).result(10)

    # Messages of the control plane. On the event loop.

    def of_control(self) -> ControlTampering:
        if self.cell.fault in (Fault.DUPLICATED, Fault.REORDERED) and self.cell.side is Side.SENDER:
            return ControlTampering(publications=self._publications)
        if self.cell.moment is Moment.BEFORE_ACK:
            return ControlTampering(release=self._release)
        return ControlTampering()

    async def _publications(self, stream: Publications) -> Publications:
        """Doubles the publication of our chunk, or lets the next one go before it."""
        number = self.cell.chunk if self.cell.chunk is not None else NUM_CHUNKS - 1
        is_doubled = self.cell.fault is Fault.DUPLICATED
        if not is_doubled and number == NUM_CHUNKS - 1:
            number -= 1  # Nothing comes after the last one: it overtakes the one before.
        held: list[kv_pb2.Publication] = []
        at = 0
        async for publication in stream:
            if at == number:
                self.strike()
                held.append(publication)
                if is_doubled:
                    yield publication
            else:
                yield publication
            if held and (is_doubled or at == number + 1):
                yield held.pop()
            at += 1

    async def _release(self, release: Release, request: kv_pb2.ReleaseRequest) -> kv_pb2.ReleaseReply:
        if not request.landed or not self.strike():
            return await release(request)
        if self.cell.fault in (Fault.KILL, Fault.STOP):
            self._hit()
            return await release(request)
        if self.cell.side is Side.SENDER:
            return await self._tamper_with_reply(await release(request))
        return await self._tamper_with_request(release, request)

    async def _tamper_with_reply(self, reply: kv_pb2.ReleaseReply) -> kv_pb2.ReleaseReply:
        match self.cell.fault:
            case Fault.CUT:
                raise PeerLost("the lab has lost this answer")
            case Fault.CORRUPT:
                reply.lease_was_valid ^= True
            case Fault.TRUNCATED:
                reply = _half(kv_pb2.ReleaseReply, reply)
            case Fault.DELAYED:
                await asyncio.sleep(DELAY_S)
        return reply

    async def _tamper_with_request(self, release: Release, request: kv_pb2.ReleaseRequest) -> kv_pb2.ReleaseReply:
        match self.cell.fault:
            case Fault.CUT:
                raise PeerLost("the lab has lost this request")
            case Fault.CORRUPT:
                request.epoch ^= 1
            case Fault.TRUNCATED:
                request = _half(kv_pb2.ReleaseRequest, request)
            case Fault.DELAYED:
                await asyncio.sleep(DELAY_S)
        reply = await release(request)
        if self.cell.fault is Fault.DUPLICATED:  # The caller hears the answer to the first.
            await release(request)
        elif self.cell.fault is Fault.REORDERED:
            await self._levers.renew()
        return reply


def _half(kind: type[M], message: M) -> M:
    raw = message.SerializeToString()
    try:
        return kind.FromString(raw[: len(raw) // 2])
    except DecodeError:
        raise PeerLost("half of this message is no message") from None
