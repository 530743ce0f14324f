"""Before a prompt is computed: its beginning is brought from a generation server that holds it, if that is quicker.

    hint ─▶ prices ─▶ engine: what is here? ─▶ plan ─▶ blocks reserved ─▶ pulled ─▶ found by whoever has these tokens
              └────────────────┴────────────────┴──────────┴───────────────┴─▶ computed, as if there had been no hint

Nothing here can fail a prompt, and the wait is bounded by what computing would have taken. A pull that is late is
stopped, and its blocks stay reserved until it has really ended; the prompt does not wait for that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from context_server.pull_cost import PullCosts, PullPlan, Quote, Verdict
from disaggregated import logs
from disaggregated.block_hash import BlockHash, block_hashes, to_bytes
from disaggregated.compute_cost import ComputeCost
from disaggregated.engine.prefix_holdings import PrefixReservation
from disaggregated.engine.serving.role import LoadedServer
from disaggregated.engine.thread import EngineThread
from disaggregated.errors import DisaggregatedError, TransferTimeout
from disaggregated.v1 import control_pb2
from kvtransfer import Landed, PeerStatistics, Region, TransferDestination
from kvtransfer.configured import destination_options, identity_of

log = logs.get(__name__)


_NOTHING: Final = PrefixReservation(num_cached_blocks=0, block_ids=())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Ticket:
    """Implements kvtransfer's `Ticket`."""

    address: str
    instance_id: str
    epoch: int
    transfer_id: str


class _Hint:
    """One prompt, who may have its beginning, and what is planned by now."""

    plan: PullPlan

    def __init__(
        self, owner: str, token_ids: Sequence[int], wire: control_pb2.PrefixHint, quote: Quote, *, salt: str
    ) -> None:
        self.owner = owner
        self.wire = wire
        self._salt = salt
        self._token_ids = token_ids
        self._quote = quote
        # The last token is computed here in any case: its logits choose the next one.
        self._num_offered = min(wire.num_tokens, len(token_ids) - 1) // quote.block_size
        self._hashes: list[BlockHash] = []

    def num_wanted(self, num_cached: int) -> int:
        """Plan anew, when `num_cached` blocks are here. On the engine's thread, while the event loop waits for it."""
        self.plan = self._quote.plan(num_cached, self._num_offered, num_tokens=len(self._token_ids))
        return self.plan.num_blocks

    def hashes(self) -> list[BlockHash]:
        """Of the blocks that are offered; made when first wanted."""
        if not self._hashes:
            block_size = self._quote.block_size
            tokens = self._token_ids[: self._num_offered * block_size]
            self._hashes = list(block_hashes(tokens, block_size, salt=self._salt))
        return self._hashes

    def ticket(self, our_id: str) -> _Ticket:
        wire = self.wire
        transfer_id = f"{self.owner}@{our_id}"
        return _Ticket(address=wire.address, instance_id=wire.instance_id, epoch=wire.epoch, transfer_id=transfer_id)


class PrefixPuller:
    """Owns the transfers that land on a context server. Lives on the event loop, but for the planning.

    Invariant: a reservation is the engine's again when its pull has ended, whoever still waits for it.
    """

    def __init__(self, server: LoadedServer[Region], engine: EngineThread, compute: ComputeCost) -> None:
        """server: its pool is the memory that transports write into. compute: what computing costs here."""
        assert server.copier is None, "blocks are pulled into a pool in host memory"
        transceiver = server.config.cache_transceiver_config
        layout = server.memory_layout
        self._engine = engine
        self._instance_id = server.identity.instance_id
        self._block_size = layout.block_size
        self._block_bytes = layout.token_bytes * layout.block_size
        self._chunk_size = server.config.max_num_tokens
        self._compute = compute
        self._patience_s = transceiver.pull_back_patience_ms / 1000
        self._costs = PullCosts()
        self._destination = TransferDestination(server.memory, identity_of(server), destination_options(server))
        self._pulls = asyncio.TaskGroup()
        self._running: set[asyncio.Task[Landed | DisaggregatedError]] = set()

    @property
    def unhealthy(self) -> str:
        return self._destination.quarantine().unhealthy

    async def __aenter__(self) -> Self:
        await self._pulls.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Before the engine stops: what is reserved goes back to it."""
        for pull in self._running:
            pull.cancel()
        await self._pulls.__aexit__(kind, error, trace)
        await self._destination.close()

    def statistics(self) -> list[PeerStatistics]:
        return self._destination.statistics()

    async def bring(
        self, owner: str, token_ids: Sequence[int], hint: control_pb2.PrefixHint, *, salt: str = ""
    ) -> control_pb2.PrefixReuse:
        """Have the beginning of a prompt here, if it is worth it. Tells what became of it; raises nothing of ours.

        owner: a name for the engine's ledger, and for the transfer; used once. salt: of the request's blocks.
        """
        begin_s = time.monotonic()
        reuse = control_pb2.PrefixReuse()
        quote = self._quote(hint.instance_id, now_s=begin_s)
        if quote is None:
            reuse.verdict = Verdict.RESTING
        else:
            reuse.verdict = await self._follow(_Hint(owner, token_ids, hint, quote, salt=salt), reuse)
        reuse.spent_s = time.monotonic() - begin_s
        log.debug("prefix_hint_followed", owner=owner, verdict=reuse.verdict, tokens=reuse.num_tokens)
        return reuse

    def _quote(self, instance_id: str, *, now_s: float) -> Quote | None:
        prices = self._costs.prices(instance_id, is_connected=self._is_connected(instance_id), now_s=now_s)
        if prices is None:
            return None
        return Quote(
            step=self._compute.fit(),
            asking_s=prices[0],
            byte_s=prices[1],
            block_size=self._block_size,
            block_bytes=self._block_bytes,
            chunk_size=self._chunk_size,
        )

    async def _follow(self, hint: _Hint, reuse: control_pb2.PrefixReuse) -> Verdict:
        is_worth_it = hint.num_wanted(0)  # With a part of it here already, it would be worth even less.
        reservation = await self._reserve(hint) if is_worth_it else _NOTHING
        plan = hint.plan
        reuse.num_considered_tokens = plan.num_considered_blocks * self._block_size
        reuse.pull_estimate_s, reuse.compute_estimate_s = plan.pull_s, plan.compute_s
        if reservation.block_ids:
            return await self._pull(hint, reservation, reuse)
        if not plan.num_considered_blocks:
            return Verdict.ALREADY_HERE
        return Verdict.NO_ROOM if plan.num_blocks else Verdict.COMPUTING_IS_CHEAPER

    async def _reserve(self, hint: _Hint) -> PrefixReservation:
        """The engine answers between two steps, and the prompt could not begin before that either."""
        try:
            return await asyncio.wrap_future(self._engine.reserve_prefix(hint.owner, hint.hashes(), hint.num_wanted))
        except DisaggregatedError:  # It is stopping, or has too much to do: the prompt will be told so itself.
            return _NOTHING
        except BaseException:
            self._engine.release(hint.owner)
            raise

    # The pull itself.

    async def _pull(self, hint: _Hint, reservation: PrefixReservation, reuse: control_pb2.PrefixReuse) -> Verdict:
        pull = self._pulls.create_task(self._run(hint, reservation), name=hint.owner)
        self._running.add(pull)
        # Not a `finally` in the task: one that is cancelled before its first step never gets to it.
        pull.add_done_callback(functools.partial(self._pull_ended, hint.owner))
        try:
            await asyncio.wait([pull], timeout=hint.plan.deadline_s(self._patience_s))
        finally:
            if not pull.done():
                self._engine.cancel(hint.owner)
                pull.cancel()
        outcome = pull.result() if pull.done() and not pull.cancelled() else TransferTimeout("it was late")
        if isinstance(outcome, Landed):
            reuse.num_tokens, reuse.num_bytes = outcome.num_tokens, outcome.num_bytes
            return Verdict.PULLED if outcome.num_tokens else Verdict.NOT_THERE
        self._costs.failed(hint.wire.instance_id, now_s=time.monotonic())
        log.info("prefix_not_pulled", source=hint.wire.instance_id, kind=type(outcome).__name__, error=str(outcome))
        return Verdict.TOO_LATE if isinstance(outcome, TransferTimeout) else Verdict.FAILED

    async def _run(self, hint: _Hint, reservation: PrefixReservation) -> Landed | DisaggregatedError:
        """Errors are results here: nobody may be there to be told."""
        begin_s = time.monotonic()
        instance_id = hint.wire.instance_id
        was_connected = self._is_connected(instance_id)
        first = reservation.num_cached_blocks
        try:
            landed = await self._destination.pull(
                hint.ticket(self._instance_id),
                reservation.block_ids,
                deadline_s=hint.plan.deadline_s(self._patience_s),
                block_hashes=to_bytes(hint.hashes()[first : first + len(reservation.block_ids)]),
            )
        except DisaggregatedError as error:
            return error
        now_s = time.monotonic()
        self._costs.pulled(
            instance_id,
            was_connected=was_connected,
            asking_s=max(0.0, now_s - begin_s - landed.transfer_s),
            num_bytes=landed.num_bytes,
            transfer_s=landed.transfer_s,
            now_s=now_s,
        )
        return landed

    def _is_connected(self, instance_id: str) -> bool:
        return any(peer.peer_id == instance_id for peer in self._destination.statistics())

    def _pull_ended(self, owner: str, pull: asyncio.Task[Landed | DisaggregatedError]) -> None:
        """However it ended, nothing can land any more. Called before whoever waits for the pull goes on."""
        self._running.discard(pull)
        outcome = None if pull.cancelled() or pull.exception() else pull.result()
        if isinstance(outcome, Landed):
            self._engine.land_prefix(owner, outcome.num_tokens // self._block_size)
        else:
            self._engine.release(owner)
