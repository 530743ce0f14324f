"""The engine of a server: requests in, one forward pass a step, events out.

It ties the scheduler, which decides, to a `ModelRunner`, which computes, and is itself neither: no tensors and no
threads here, so that the same code runs in a server, in a simulation of a cluster and against a fake runner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from concurrent.futures import Future

from disaggregated.block_hash import BlockHash
from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    EngineStatistics,
    ModelRunner,
    OverlappingRunner,
    RequestFailed,
    RequestKind,
    Reservation,
    ScheduledSequence,
    TokensSampled,
)
from disaggregated.engine.block_events import BlockEventBatch, BlockSnapshot
from disaggregated.engine.block_pool import BlockPool, LedgerEntry
from disaggregated.engine.grammar import attach as grammars
from disaggregated.engine.grammar.api import Grammars
from disaggregated.engine.grammar.follower import GrammarFollower
from disaggregated.engine.host_tier.copies import BlockCopier
from disaggregated.engine.launched_step import ExecutedStep, LaunchedRow, LaunchedStep, launched, scheduled
from disaggregated.engine.layer_watch import LayeredRunner, LayerWatcher, progress_of
from disaggregated.engine.prefix_holdings import PrefixHoldings, PrefixReservation
from disaggregated.engine.request_check import check_request
from disaggregated.engine.scheduler import Scheduler
from disaggregated.engine.scheduler_limits import Chunk, SchedulerLimits
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.engine.speculation import Speculation
from disaggregated.engine.step_results import Totals, chunk_computed, snapshot, take_tokens
from disaggregated.engine.tiered_cache import TieredCache
from disaggregated.errors import InvalidRequest, QueueFull, TransferError


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
        *,
        num_blocks: int,
        block_size: int,
        max_num_tokens: int,
        max_batch_size: int,
        max_seq_len: int,
        max_prefill_tokens_beside_decode: int | None = None,
        enable_block_reuse: bool = True,
        speculation: Speculation | None = None,
        overlap: bool = False,
        num_waiting_max: int = 4096,
        vocab_size: int = 2**31,
        copier: BlockCopier | None = None,
        grammar_source: Grammars | None = None,
        event_buffer_max_size: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        num_blocks: size of the runner's pool, in blocks of `block_size` tokens.
        max_num_tokens: computed in one step, of prompts and of decoding sequences together.
        max_batch_size: sequences in one step.
        max_seq_len: prompt and generated tokens of one sequence.
        max_prefill_tokens_beside_decode: of prompts, in a step in which somebody decodes; None: as many as fit.
        speculation: makes drafts; None: every step brings a sequence one token. Not together with `overlap`: a draft
            continues tokens that the host knows.
        overlap: the runner is an OverlappingRunner.
        num_waiting_max: requests that wait to start; submit() refuses when there are as many.
        vocab_size: token ids that the runner takes; a request with another one is refused, and cannot crash it.
        copier: the host tier's memory, in which evicted blocks live on; None: there is none.
        grammar_source: compiles what texts must match; None: a request with a grammar is refused.
        event_buffer_max_size: changes of the prefix cache kept between two steps, for take_block_events(); 0: none.
        """
        assert min(block_size, max_num_tokens, max_batch_size, max_seq_len) > 0, "a limit is not positive"
        assert not (overlap and speculation), "a draft continues tokens that the host knows"
        assert not overlap or isinstance(runner, OverlappingRunner), f"{runner} can't launch a step ahead"
        self._runner = runner
        self._overlap = overlap
        self._speculation = speculation
        self._clock = clock
        self._max_seq_len = max_seq_len
        self._num_waiting_max = num_waiting_max
        self._vocab_size = vocab_size
        self._limits = SchedulerLimits(
            block_size=block_size,
            max_num_tokens=max_num_tokens,
            max_batch_size=max_batch_size,
            max_prefill_tokens_beside_decode=max_prefill_tokens_beside_decode,
            enable_block_reuse=enable_block_reuse,
        )
        self._copier = copier
        self._grammars = grammar_source
        self.run_soon: Callable[[Callable[[], None]], None] | None = None
        """Lets the thread that owns this engine call something; of any thread. None: whoever submits waits for
        grammars."""
        num_host_slots = 0 if copier is None else copier.num_slots
        self._cache = TieredCache(num_host_slots=num_host_slots, event_buffer_max_size=event_buffer_max_size)
        self._pool = BlockPool(num_blocks, self._cache)
        self._scheduler = Scheduler(self._pool, self._limits, speculation)
        self._prefixes = PrefixHoldings(self._pool)
        self._layer_watcher: LayerWatcher | None = None
        self._launched: LaunchedStep | None = None
        self._sequences: dict[str, Sequence] = {}
        self._unsent: list[EngineEvent] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._last_progress_s = clock()
        """When a step was last finished, or when there was last nothing to do."""
        self._totals = Totals()

    def watch_layers(self, watcher: LayerWatcher) -> bool:
        """Tell `watcher` what is written while it is computed. False: this engine's runner only knows whole steps."""
        if self._overlap or not isinstance(self._runner, LayeredRunner):
            return False
        self._layer_watcher = watcher
        return True

    @property
    def max_seq_len(self) -> int:
        """Prompt and generated tokens at which a sequence ends, its last token needing no room in the pool."""
        return min(self._max_seq_len, self._pool.num_blocks * self._limits.block_size + 1)

    @property
    def has_work(self) -> bool:
        """Whether step() has something to do. Not so when all that is left waits for a transfer: call again after
        the next admit(), release() or cancel()."""
        return bool(self._unsent) or self._launched is not None or self._scheduler.has_work

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
        if self._scheduler.num_waiting >= self._num_waiting_max:
            raise QueueFull(
                f"{self._scheduler.num_waiting} requests wait already, the limit is {self._num_waiting_max}"
            )
        sequence = self._new_sequence(request)
        beginning = grammars.begin(self._grammars, sequence)
        self._scheduler.enqueue(sequence, now_s=self._clock())
        self._sequences[request.request_id] = sequence
        self._await_grammar(sequence, beginning)

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
        beginning = grammars.begin(self._grammars, sequence)
        self._scheduler.reserve(sequence, now_s=self._clock())
        self._sequences[request.request_id] = sequence
        self._await_grammar(sequence, beginning)
        self._copy_blocks(before_others=True)
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
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.RESERVED:
            self.release(request_id)
            return False
        if (error := self._wrong_first_token(sequence, first_token)) is not None:
            self._unsent.append(RequestFailed(request_id=request_id, error=error))
            self._end(sequence)
            return False
        self._scheduler.land(sequence, now_s=self._clock())
        self._totals.count_prompt(sequence)
        finish_reason = sequence.append(first_token)
        if finish_reason is not None:
            self._unsent.append(
                TokensSampled(
                    request_id=request_id,
                    first_position=len(sequence.token_ids),
                    token_ids=(),
                    finish_reason=finish_reason,
                )
            )
            self._end(sequence)
        return True

    def lend(self, owner: str, hashes: AnySequence[BlockHash]) -> tuple[int, ...]:
        """Hold what is found here of `hashes`, from the first on, until release(owner): another server reads it.

        Fewer blocks, or none, when there is no room to hold them all.
        """
        num_free = self._scheduler.num_blocks_unpromised
        block_ids = self._prefixes.lend(owner, hashes, num_free=num_free, now_s=self._clock())
        self._copy_blocks(before_others=True)
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
        self._copy_blocks(before_others=True)
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
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is Phase.ENDING:
            return
        if sequence.kind is RequestKind.PREFILL_ONLY or sequence.phase in {Phase.RESERVED, Phase.QUARANTINED}:
            self._end(sequence)

    def cancel(self, request_id: str) -> None:
        """Stop the request; no event of it follows. Idempotent, also for an id that has ended.

        Its blocks are back afterwards, or when the step that computes it is finished; except those that a transfer may
        still touch, which wait for release(): a reservation's are quarantined, and those of a PREFILL_ONLY of which a
        chunk was told stay leased.
        """
        self._note_progress_if_idle()
        self._prefixes.cancel(request_id, now_s=self._clock())
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.phase is Phase.RESERVED:
            self._scheduler.quarantine(sequence, now_s=self._clock())
        elif sequence.phase in {Phase.QUARANTINED, Phase.LEASED, Phase.ENDING}:
            return
        elif sequence.kind is RequestKind.PREFILL_ONLY and sequence.is_published:
            self._scheduler.lease(sequence, now_s=self._clock())
        else:
            self._end(sequence)

    def step(self) -> list[EngineEvent]:
        """Finish one forward pass, if there is something to compute; what it brought, chunks before tokens."""
        events, self._unsent = self._unsent, []
        if self._launched is not None and (self._scheduler.may_preempt or self._launched.decides_what_may_follow):
            events += self._finish()
        before, launched = self._launched, self._launch()
        if before is not None:
            events += self._finish()
        self._launched = launched
        if launched is not None and not self._overlap:
            events += self._finish()
        return events

    def statistics(self) -> EngineStatistics:
        step_age_s = self._clock() - self._last_progress_s if self.has_work else 0.0
        return snapshot(
            self._scheduler, self._pool, self._cache, self._totals, step=self._num_steps, step_age_s=step_age_s
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

    def block_snapshot(self) -> BlockSnapshot:
        """Every block that can be found now; what take_block_events() brings with later numbers comes on top."""
        return self._cache.snapshot()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity(self._sequences.values())
        for entry in self.ledger():
            is_known = entry.owner in self._sequences or entry.owner in self._prefixes.owners
            assert is_known, f"{entry} belongs to no request"
        self._prefixes.check_integrity()

    # Parts of the above.

    def _copy_blocks(self, *, before_others: bool = False) -> None:
        """Before anything is written into the pool: what evicted blocks held is saved, what comes back is there.

        before_others: somebody who does not follow the engine's order is about to write, a transfer.
        """
        copies = self._cache.take_copies()
        if copies and self._copier is not None:
            self._copier.copy(copies)
            if before_others:
                self._copier.wait()

    def _note_progress_if_idle(self) -> None:
        """Called before anything that may bring work, so that a step's age does not count the idle time before it."""
        if not self.has_work:
            self._last_progress_s = self._clock()

    def _check(self, request: EngineRequest) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request {request.request_id} is here already", param="request_id")
        check_request(
            request,
            max_seq_len=self._max_seq_len,
            num_blocks=self._pool.num_blocks,
            block_size=self._limits.block_size,
            vocab_size=self._vocab_size,
        )

    def _new_sequence(self, request: EngineRequest) -> Sequence:
        self._num_arrivals += 1
        return Sequence(request, arrival=self._num_arrivals, num_tokens_max=self.max_seq_len, arrived_s=self._clock())

    def _await_grammar(self, sequence: Sequence, beginning: Future[GrammarFollower] | None) -> None:
        """Its prompt is computed meanwhile, or transferred, and nobody else waits."""
        if beginning is None:
            return
        if beginning.done() or self.run_soon is None:
            self._grammar_begins(sequence, beginning)
            return
        run_soon = self.run_soon
        beginning.add_done_callback(lambda done: run_soon(lambda: self._grammar_begins(sequence, done)))

    def _grammar_begins(self, sequence: Sequence, beginning: Future[GrammarFollower]) -> None:
        if sequence.phase in grammars.MAY_SAMPLE:
            self._note_progress_if_idle()
            if (error := grammars.attach(sequence, beginning)) is not None:
                self._fail(sequence, error)

    def _wrong_first_token(self, sequence: Sequence, first_token: int) -> Exception | None:
        if not 0 <= first_token < self._vocab_size:
            return TransferError(f"the first token is {first_token}, the model has {self._vocab_size}")
        return grammars.broken_by(sequence, (first_token,))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._unsent.append(RequestFailed(request_id=sequence.request_id, error=error))
        self.cancel(sequence.request_id)

    def _launch(self) -> LaunchedStep | None:
        """Decide on the next step, and begin it. A runner that can't launch has computed it when this returns."""
        started_s = self._clock()
        chunks = self._scheduler.schedule(now_s=started_s)
        self._copy_blocks()
        if not chunks:
            return None
        batch = [scheduled(chunk, before=self._launched) for chunk in chunks]
        if self._overlap:
            assert isinstance(self._runner, OverlappingRunner)
            pending = self._runner.launch(batch)
        else:
            pending = ExecutedStep(self._execute(batch, chunks))
        rows = [launched(chunk, row.logprobs) for chunk, row in zip(chunks, batch, strict=True)]
        return LaunchedStep(rows, pending, started_s)

    def _execute(self, batch: list[ScheduledSequence], chunks: list[Chunk]) -> AnySequence[AnySequence[int]]:
        watcher, block_size = self._layer_watcher, self._limits.block_size
        progress = None if watcher is None else progress_of(chunks, watcher, block_size=block_size)
        if progress is None:
            return self._runner.execute(batch)
        assert isinstance(self._runner, LayeredRunner)
        return self._runner.execute_layered(batch, progress)

    def _finish(self) -> list[EngineEvent]:
        """Take the tokens of the step that was launched first. Rows of those who ended meanwhile are dropped."""
        step, self._launched = self._launched, None
        assert step is not None, "nothing is launched"
        sampled = step.pending.tokens()
        assert len(sampled) == len(step.rows), f"{len(step.rows)} rows, {len(sampled)} results"
        self._num_steps += 1
        self._last_progress_s = self._clock()
        self._learn_duration(step)
        events: list[EngineEvent] = []
        tokens_sampled: list[EngineEvent] = []
        for row, token_ids in zip(step.rows, sampled, strict=True):
            sequence = row.sequence
            sequence.num_launched -= 1
            assert bool(token_ids) == row.samples, f"{sequence.request_id}: {token_ids}, {row.samples=}"
            if sequence.phase is Phase.RUNNING and (error := grammars.broken_by(sequence, token_ids)) is not None:
                self._fail(sequence, error)
            elif sequence.phase is Phase.RUNNING:
                tokens = self._take_tokens(row, token_ids)
                self._scheduler.computed(sequence, row.num_computed + max(0, len(tokens.token_ids) - 1))
                if row.tells_progress:
                    events.append(self._chunk_computed(row, step.started_s))
                if tokens.token_ids:
                    tokens_sampled.append(tokens)
                    self._end_if_over(sequence, tokens)
            elif sequence.phase is Phase.ENDING and sequence.num_launched == 0:
                self._end(sequence)
        return events + tokens_sampled

    def _learn_duration(self, step: LaunchedStep) -> None:
        if self._speculation is not None and (num_tokens := step.num_tokens_decoded) is not None:
            self._speculation.step_took(num_tokens, self._last_progress_s - step.started_s)

    def _chunk_computed(self, row: LaunchedRow, started_s: float) -> ChunkComputed:
        """Progress in the prompt is told once: not again when it is computed again."""
        row.sequence.is_published = True
        num_blocks = self._limits.num_blocks_for(row.num_computed)
        return chunk_computed(row, num_blocks=num_blocks, started_s=started_s, finished_s=self._last_progress_s)

    def _take_tokens(self, row: LaunchedRow, token_ids: AnySequence[int]) -> TokensSampled:
        if row.samples and row.num_computed == row.sequence.num_prompt_tokens:
            self._totals.count_prompt(row.sequence)
        if row.num_drafts and self._speculation is not None:
            self._speculation.verified(row.sequence, row.num_drafts, len(token_ids) - 1)
            self._totals.count_drafts(row.num_drafts, len(token_ids) - 1)
        tokens = take_tokens(row, token_ids)
        self._totals.generation += len(tokens.token_ids)
        return tokens

    def _end_if_over(self, sequence: Sequence, tokens: TokensSampled) -> None:
        if sequence.kind is RequestKind.PREFILL_ONLY:
            self._scheduler.lease(sequence, now_s=self._last_progress_s)
        elif tokens.finish_reason is not None:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.end(sequence, now_s=self._clock())
        if sequence.phase is Phase.ENDED:
            del self._sequences[sequence.request_id]
