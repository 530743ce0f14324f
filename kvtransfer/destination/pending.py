"""A transfer that lands here, as whoever lent it its blocks sees it: it has an outcome, and it becomes quiet.

    started ──▶ outcome: landed ─────────────────────────────▶ the blocks hold the prompt, and are the caller's
        └─────▶ outcome: failed │ timed out │ cancelled ──▶ quiet ──▶ the blocks are the caller's, whatever they hold

These are two moments. The outcome is decided once and told at once, so that a request never waits for a dead peer; the
blocks come back when the last read into them has ended, which may be later: until then they are in quarantine, lent
still and counted. An outcome that was decided stays, also when the read that was under way ends well.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from disaggregated import logs
from disaggregated.errors import DisaggregatedError, RequestCancelled, TransferError
from kvtransfer.destination.landed import Landed
from kvtransfer.machine import CancelResult, DestinationPhase, DestinationTransfer
from kvtransfer.off_loop import to_the_end

log = logs.get(__name__)

_MOST_SEVERE_FIRST: Final = (
    CancelResult.BACKEND_UNHEALTHY,
    CancelResult.NOT_CANCELLABLE,
    CancelResult.REQUESTED_IN_FLIGHT,
    CancelResult.CANCELLED_WHILE_QUIET,
    CancelResult.CANCELLED_BEFORE_ADVERTISE,
    CancelResult.ALREADY_COMPLETE,
)


class PendingTransfer:
    """Lives on one event loop. None of its methods blocks; `outcome` and `quiet` wait.

    Invariants: it is quiet only when it is decided; once quiet, no byte can land any more.
    """

    def __init__(
        self,
        transfer_id: str,
        blocks: Sequence[int],
        *,
        on_decided: Callable[[PendingTransfer], None],
        on_ended: Callable[[PendingTransfer], None],
    ) -> None:
        """Each is called once, on the event loop: when the outcome stands, and when all of it has been cleared away."""
        self.transfer_id = transfer_id
        self.blocks = tuple(blocks)
        """Lent from the start until it has landed or is quiet."""
        self.error: DisaggregatedError | None = None
        """What it failed with; None while it is not decided, and when it has landed."""
        self.decided_s: float | None = None
        self._on_decided = on_decided
        self._on_ended = on_ended
        self._strands: list[Strand] = []
        self._outcome: asyncio.Future[Landed] = asyncio.get_running_loop().create_future()
        self._quiet = asyncio.Event()
        self._cleared_away = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None]

    # For whoever lent the blocks.

    async def outcome(self) -> Landed:
        """Wait until it is decided. Whoever stops waiting cancels nothing.

        Raises:
            RequestCancelled: `cancel` was called before it had landed.
            TransferError: it did not land.
        """
        return await asyncio.shield(self._outcome)

    async def quiet(self) -> None:
        """Wait until no byte can land any more: the blocks are the caller's again. Never raises for how it ended."""
        await self._quiet.wait()

    async def ended(self) -> None:
        """Wait until it is quiet and everything of it has been cleared away.

        Goes on through every cancellation of the caller's own, the last of which is raised then. Never raises for how
        the transfer ended, but for a mistake of ours after that.
        """
        await to_the_end(self._cleared_away.wait, self._cleared_away.is_set)
        if not self._task.cancelled():
            self._task.result()

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def is_decided(self) -> bool:
        return self._outcome.done()

    @property
    def is_quarantined(self) -> bool:
        """It did not land, and its blocks can still be written into."""
        return self.is_decided and not self.is_quiet

    @property
    def is_quiet(self) -> bool:
        return self._quiet.is_set()

    def cancel(self) -> CancelResult:
        """Decide it now, unless it is decided; tells whether the blocks may be given back at once."""
        return self._decide(RequestCancelled(f"the transfer {self.transfer_id} was cancelled"))

    # For the transfer itself.

    def begin(self, work: Coroutine[Any, Any, Landed], *, deadline_s: float, late: Callable[[], TransferError]) -> None:
        """Run `work` to its end, or until it is decided otherwise: by `late` after `deadline_s`, or by a cancel."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(deadline_s, lambda: self.fail(late()))
        self._task = loop.create_task(self._run(work), name=f"kv-pull-{self.transfer_id}")
        self._task.add_done_callback(lambda _: self._cleared(work))

    def _cleared(self, work: Coroutine[Any, Any, Landed]) -> None:
        work.close()  # One that is cancelled before its first step was never begun.
        if not self.is_decided:
            self._decide(self._cancelled_from_outside())
        self.check_quiet()
        self._cleared_away.set()
        self._on_ended(self)

    def strand(self, name: str, *, source: str = "", can_stop: bool = True) -> Strand:
        """One of the reads that it is made of, from one source."""
        strand = Strand(self, DestinationTransfer(name, can_stop=can_stop), source)
        self._strands.append(strand)
        return strand

    def fail(self, error: DisaggregatedError) -> CancelResult:
        """Decide it, where the failure is seen. The first outcome stands."""
        return self._decide(error)

    def check_quiet(self) -> None:
        """A read has ended."""
        if self.is_decided and not self.is_quiet and not self.writing_sources:
            self._quiet.set()

    @property
    def writing_sources(self) -> list[str]:
        """Those from which a read is running."""
        return [strand.source for strand in self._strands if strand.transfer.is_writable]

    @property
    def story(self) -> list[list[tuple[float, DestinationPhase]]]:
        return [strand.transfer.story for strand in self._strands]

    def _decide(self, error: DisaggregatedError) -> CancelResult:
        """Also for one that is decided: what a cancel finds may be another thing by now."""
        now_s = time.monotonic()
        strands = [strand.transfer for strand in self._strands]
        cancelled = isinstance(error, RequestCancelled)
        found = [strand.cancel(now_s=now_s) if cancelled else strand.fail(now_s=now_s) for strand in strands]
        if self.is_decided:
            return _worst(found, CancelResult.ALREADY_COMPLETE)
        self._decided(error)
        self._outcome.set_exception(error)
        self._outcome.exception()  # Whoever waits is told; that nobody does is no mistake.
        self._task.cancel()
        self._on_decided(self)
        self.check_quiet()
        return _worst(found, CancelResult.CANCELLED_BEFORE_ADVERTISE)

    def _decided(self, error: DisaggregatedError | None) -> None:
        self.error = error
        self.decided_s = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()

    async def _run(self, work: Coroutine[Any, Any, Landed]) -> None:
        try:
            landed = await work
        except asyncio.CancelledError:
            self._decide(self._cancelled_from_outside())
        except DisaggregatedError as error:
            self._decide(error)
        except Exception as error:
            if self.is_decided:  # Nobody waits any more who could be told.
                raise
            self._broke(error)
        else:
            self._landed(landed)
        finally:
            self.check_quiet()

    def _cancelled_from_outside(self) -> RequestCancelled:
        return RequestCancelled(f"the transfer {self.transfer_id} was cancelled from outside")

    def _landed(self, landed: Landed) -> None:
        """A completion that comes after the outcome was decided changes nothing."""
        if not self.is_decided:
            self._decided(None)
            self._outcome.set_result(landed)
            self._on_decided(self)

    def _broke(self, error: Exception) -> None:
        """Our own mistake: it reaches whoever waits for the outcome, unchanged."""
        log.traceback("kv_transfer_broke", error, transfer_id=self.transfer_id)
        self._decided(None)
        self._outcome.set_exception(error)
        self._on_decided(self)


@dataclasses.dataclass(slots=True, eq=False)
class Strand:
    """One source's half of a transfer, which is all of it unless it comes from several."""

    pending: PendingTransfer
    transfer: DestinationTransfer
    source: str = ""
    """Its address."""
    error: DisaggregatedError | None = None
    """What the transfer failed with, when it failed by this very source."""

    def advance(self, to: DestinationPhase) -> None:
        """Raises what was decided meanwhile: nothing is begun, and nothing lands, after that."""
        if self.pending.error is not None:
            raise self.pending.error
        self.transfer.advance(to, now_s=time.monotonic())

    def read_ended(self) -> None:
        """It can write no more, whether it went well or not."""
        self.transfer.read_ended(now_s=time.monotonic())
        self.pending.check_quiet()

    def fail(self, error: DisaggregatedError) -> None:
        if not self.pending.is_decided:
            self.error = error
        self.pending.fail(error)

    def lost(self, error: TransferError) -> None:
        """Its source was found to be gone; that matters no more once it has brought everything."""
        if not self.transfer.is_over:
            self.fail(error)


def _worst(found: Sequence[CancelResult], if_none: CancelResult) -> CancelResult:
    return next((result for result in _MOST_SEVERE_FIRST if result in found), if_none)
