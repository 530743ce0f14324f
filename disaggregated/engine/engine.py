"""The engine of a server: requests in, one forward pass a step, events out.

It ties the scheduler, which decides, to a `ModelRunner`, which computes, and is itself neither: no tensors and no
threads here, so that the same code runs in a server, in a simulation of a cluster and against a fake runner. What a
step does is in `forward_steps.py`, who is here in `roster.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as AnySequence

from disaggregated.block_hash import BlockHash
from disaggregated.engine.api import (
    EngineEvent,
    EngineRequest,
    EngineStatistics,
    ModelRunner,
    RequestFailed,
    RequestKind,
    Reservation,
    TokensSampled,
)
from disaggregated.engine.block_events import BlockEventBatch, BlockSnapshot
from disaggregated.engine.block_pool import BlockPool, LedgerEntry
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.forward_steps import ForwardSteps
from disaggregated.engine.grammar import attach as grammars
from disaggregated.engine.grammar_wait import GrammarWait, RunSoon
from disaggregated.engine.layer_watch import LayerWatcher
from disaggregated.engine.prefix_holdings import PrefixHoldings, PrefixReservation
from disaggregated.engine.request_check import check_request
from disaggregated.engine.roster import Roster
from disaggregated.engine.scheduler import Scheduler
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.engine.step_results import snapshot
from disaggregated.engine.tiered_cache import TieredCache
from disaggregated.errors import InvalidRequest, QueueFull, TransferError

NOTHING_MORE = EngineOptions()


class LLMEngine:
    """Owned by one thread: nothing here locks.

    A request is known from submit() or reserve() until it has ended and no launched step computes it any more; then
    its id may be used again. What the runner raises leaves step() as it is: the books are no longer to be trusted, and
    the owner must let the process end.

    With `overlap`, step() launches the next step before it waits for the tokens of the one before, so that a device
    which works on its own never waits for the host. The tokens are the same. What is not known yet when a step is
    launched can only cost a row in vain: when a token ends its sequence, the row after it is dropped.

    Invariant: every block that is held belongs to a request known here, or to a prefix that is lent or reserved, and
    the ledger names it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        limits: EngineLimits,
        options: EngineOptions = NOTHING_MORE,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        num_host_slots = 0 if options.copier is None else options.copier.num_slots
        self._cache = TieredCache(num_host_slots=num_host_slots, event_buffer_max_size=options.event_buffer_max_size)
        self._pool = BlockPool(limits.num_blocks, self._cache)
        self._scheduler = Scheduler(self._pool, limits, options.speculation)
        self._roster = Roster(self._scheduler, clock)
        self._steps = ForwardSteps(runner, self._scheduler, self._roster, options, clock)
        self._prefixes = PrefixHoldings(self._pool)
        self._grammars = GrammarWait(options.grammars, self._roster, self._note_progress_if_idle)
        self._num_arrivals = 0

    def call_between_steps_by(self, run_soon: RunSoon) -> None:
        """`run_soon` lets the thread that owns this engine call something, and may be called by any thread. Without
        it whoever submits waits for grammars."""
        self._grammars.run_soon = run_soon

    def watch_layers(self, watcher: LayerWatcher) -> bool:
        """Tell `watcher` what is written while it is computed. False: this engine's runner only knows whole steps."""
        return self._steps.watch_layers(watcher)

    @property
    def max_seq_len(self) -> int:
        """As of `EngineLimits.num_tokens_max`."""
        return self._limits.num_tokens_max

    @property
    def has_work(self) -> bool:
        """Whether step() has something to do. Not so when all that is left waits for a transfer: call again after
        the next admit(), release() or cancel()."""
        return self._roster.has_unsent or self._steps.is_under_way or self._scheduler.has_work

    def submit(self, request: EngineRequest) -> None:
        """Queue a FULL or PREFILL_ONLY request.

        Raises:
            InvalidRequest, PromptTooLong: it can't be served by anyone with these limits.
            PoolExhausted: its prompt is larger than this pool.
            QueueFull: `num_waiting_max` requests wait already.
        """
        assert request.kind is not RequestKind.FROM_REMOTE, f"{request.request_id}: reserve() is for FROM_REMOTE"
        self._note_progress_if_idle()
        self._check(request)
        if self._scheduler.num_waiting >= self._limits.num_waiting_max:
            raise QueueFull(
                f"{self._scheduler.num_waiting} requests wait already, the limit is {self._limits.num_waiting_max}"
            )
        sequence = self._new_sequence(request)
        beginning = self._grammars.begin(sequence)
        self._scheduler.enqueue(sequence, now_s=self._clock())
        self._roster.add(sequence)
        self._grammars.join(sequence, beginning)

    def reserve(self, request: EngineRequest) -> Reservation:
        """Hold the blocks of a FROM_REMOTE request's prompt, to be filled by a transfer.

        They are the caller's until admit() or release(). The prefix cache may cover the whole prompt here: the token
        after it comes from the other server.

        Raises:
            InvalidRequest, PromptTooLong: as in submit().
            PoolExhausted: no room now; nothing is held.
        """
        assert request.kind is RequestKind.FROM_REMOTE, f"{request.request_id}: submit() is for {request.kind}"
        self._check(request)
        sequence = self._new_sequence(request)
        beginning = self._grammars.begin(sequence)
        self._scheduler.reserve(sequence, now_s=self._clock())
        self._roster.add(sequence)
        self._grammars.join(sequence, beginning)
        self._steps.copy_blocks(before_others=True)
        return Reservation(
            request_id=request.request_id,
            block_ids=tuple(sequence.block_table),
            num_cached_blocks=sequence.num_cached_prompt_tokens // self._limits.block_size,
        )

    def admit(self, request_id: str, first_token: int) -> bool:
        """The reserved blocks are filled and verified, and no transfer will write into them again.

        The sequence goes on as prompt + [first_token]; its events begin at the position after `first_token`. If that
        token already ends it, one event without tokens says so. False when the request was cancelled meanwhile: its
        blocks are back now, as they are when `first_token` is none of the model's: a RequestFailed event says so.
        """
        self._note_progress_if_idle()
        sequence = self._roster.get(request_id)
        if sequence is None or sequence.phase is not Phase.RESERVED:
            self.release(request_id)
            return False
        if (error := self._wrong_first_token(sequence, first_token)) is not None:
            self._roster.tell(RequestFailed(request_id=request_id, error=error))
            self._roster.end(sequence)
            return False
        self._scheduler.land(sequence, now_s=self._clock())
        self._steps.totals.count_prompt(sequence)
        finish_reason = sequence.append(first_token)
        if finish_reason is not None:
            self._roster.tell(
                TokensSampled(
                    request_id=request_id,
                    first_position=len(sequence.token_ids),
                    token_ids=(),
                    finish_reason=finish_reason,
                )
            )
            self._roster.end(sequence)
        return True

    def lend(self, owner: str, hashes: AnySequence[BlockHash]) -> tuple[int, ...]:
        """Hold what is found here of `hashes`, from the first on, until release(owner): another server reads it.

        Fewer blocks, or none, when there is no room to hold them all.
        """
        num_free = self._scheduler.num_blocks_unpromised
        block_ids = self._prefixes.lend(owner, hashes, num_free=num_free, now_s=self._clock())
        self._steps.copy_blocks(before_others=True)
        return block_ids

    def reserve_prefix(
        self, owner: str, hashes: AnySequence[BlockHash], num_wanted: Callable[[int], int]
    ) -> PrefixReservation:
        """Take blocks for what follows the longest run of `hashes` found here, to be filled by a transfer.

        num_wanted: how many, given how many are here; called once, on this thread. They are the caller's until
        land_prefix() or release(). Fewer, or none, when there is no room.
        """
        num_free = self._scheduler.num_blocks_unpromised
        reservation = self._prefixes.reserve(owner, hashes, num_wanted, num_free=num_free, now_s=self._clock())
        self._steps.copy_blocks(before_others=True)
        return reservation

    def land_prefix(self, owner: str, num_blocks: int) -> bool:
        """The first `num_blocks` of a prefix reservation are filled and verified: they are found from here on.

        False when it was cancelled meanwhile. Either way nothing is held afterwards.
        """
        self._note_progress_if_idle()
        return self._prefixes.land(owner, num_blocks)

    def release(self, request_id: str) -> None:
        """No transfer reads or writes the request's blocks any more: they go back, whatever was left to do.

        For a PREFILL_ONLY in any phase, a reservation that failed and a cancelled one, and what was lent. Anything
        else, also an id that has ended, is left alone: a late release is not a mistake.
        """
        self._note_progress_if_idle()
        if self._prefixes.release(request_id):
            return
        sequence = self._roster.get(request_id)
        if sequence is None or sequence.phase is Phase.ENDING:
            return
        if sequence.kind is RequestKind.PREFILL_ONLY or sequence.phase in {Phase.RESERVED, Phase.QUARANTINED}:
            self._roster.end(sequence)

    def cancel(self, request_id: str) -> None:
        """Stop the request; no event of it follows. Idempotent, also for an id that has ended.

        Its blocks are back afterwards, or when the step that computes it is finished; except those that a transfer may
        still touch, which wait for release(): a reservation's are quarantined, and those of a PREFILL_ONLY of which a
        chunk was told stay leased.
        """
        self._note_progress_if_idle()
        self._prefixes.cancel(request_id, now_s=self._clock())
        sequence = self._roster.get(request_id)
        if sequence is not None:
            self._roster.cancel(sequence)

    def step(self) -> list[EngineEvent]:
        """Finish one forward pass, if there is something to compute; what it brought, chunks before tokens."""
        return self._steps.step()

    def statistics(self) -> EngineStatistics:
        step_age_s = self._clock() - self._steps.last_progress_s if self.has_work else 0.0
        return snapshot(
            self._scheduler,
            self._pool,
            self._cache,
            self._steps.totals,
            step=self._steps.num_finished,
            step_age_s=step_age_s,
        )

    def ledger(self) -> list[LedgerEntry]:
        """(kind, owner, num_blocks, age_s) of everyone who holds blocks, the oldest first; empty when idle."""
        return self._pool.ledger(self._clock())

    @property
    def event_buffer_max_size(self) -> int:
        return self._cache.events.num_events_max

    def take_block_events(self) -> BlockEventBatch:
        """Which blocks can be found, and no longer, since the last call."""
        return self._cache.take_events()

    def call_before_computing(self, call: Callable[[], None]) -> None:
        """Once a step is decided on: a step may take seconds, and what is evicted for it is gone at its beginning."""
        self._steps.before_computing = call

    def block_snapshot(self) -> BlockSnapshot:
        """Every block that can be found now; what take_block_events() brings with later numbers comes on top."""
        return self._cache.snapshot()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity(self._roster.sequences)
        for entry in self.ledger():
            is_known = entry.owner in self._roster or entry.owner in self._prefixes.owners
            assert is_known, f"{entry} belongs to no request"
        self._prefixes.check_integrity()

    # Parts of the above.

    def _note_progress_if_idle(self) -> None:
        """Called before anything that may bring work, so that a step's age does not count the idle time before it."""
        if not self.has_work:
            self._steps.last_progress_s = self._clock()

    def _check(self, request: EngineRequest) -> None:
        if request.request_id in self._roster:
            raise InvalidRequest(f"request {request.request_id} is here already", param="request_id")
        check_request(request, self._limits)

    def _new_sequence(self, request: EngineRequest) -> Sequence:
        self._num_arrivals += 1
        return Sequence(
            request,
            arrival=self._num_arrivals,
            num_tokens_max=self._limits.num_tokens_max,
            arrived_s=self._clock(),
        )

    def _wrong_first_token(self, sequence: Sequence, first_token: int) -> Exception | None:
        if not 0 <= first_token < self._limits.vocab_size:
            return TransferError(f"the first token is {first_token}, the model has {self._limits.vocab_size}")
        return grammars.broken_by(sequence, (first_token,))
