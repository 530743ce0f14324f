"""What is computed next: requests and free blocks in, the rows of one forward pass out. No I/O, no tensors, no clock.

A step has a budget of tokens and a number of rows. Whoever decodes goes first, with one token each; then prompts get
what is left of the budget, by rank, but no more than `max_prefill_tokens_beside_decode` while somebody decodes: so a
long prompt slows a running conversation down by one short chunk a step and never stops it. What is left after that may
be spent on drafts. A sequence gets the blocks of all tokens it has when it starts, and one more whenever it fills them;
when there is none left, the one with the worst rank gives its blocks up and is continued later.

Rank is arrival, moved by a fixed time for each step of priority, so it never changes and the order is total. Why
everybody ends: only so many can still come and have a better rank than one who waits; the best that runs is preempted
only when blocks held for transfers leave no room for it, and those come back by themselves; and nobody with a worse
rank gets a block that the first in the queue is waiting for.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from collections.abc import Sequence as AnySequence

from disaggregated.engine.block_pool import BlockPool, HoldingKind
from disaggregated.engine.ranked_queue import RankedQueue
from disaggregated.engine.scheduler_limits import Chunk, SchedulerLimits
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.engine.sequence_blocks import HOLDING_NO_MORE, SequenceBlocks
from disaggregated.engine.speculation import Speculation
from disaggregated.errors import PoolExhausted


class Scheduler:
    """Moves sequences between phases and decides on blocks; only prefixes for other servers are held beside it.

    Invariant: a sequence is in the queue of its phase and in no other; RUNNING, RESERVED, LANDED, LEASED and
    QUARANTINED and ENDING ones hold blocks, WAITING ones hold none; at most `max_rows` are RUNNING. No block goes back
    while a launched step that writes into it is unfinished.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, speculation: Speculation | None = None) -> None:
        self.pool = pool
        self.limits = limits
        self._blocks = SequenceBlocks(pool, limits)
        self.preemptions_total = 0
        self._speculation = speculation
        self._waiting = RankedQueue()
        self._landed = RankedQueue()
        self._running = RankedQueue()
        self._num_waiting_tokens = 0
        self._head_wants = 0
        """Blocks kept for the first in the queue, which was preempted or refused; 0 while it has not been."""
        self._head_refused_at = -1
        """The pool's `num_returns` when the first in the queue found too few blocks."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._landed)

    @property
    def num_prompt_tokens_left(self) -> int:
        """Tokens to compute before everybody who waits or prefills is decoding."""
        return self._num_waiting_tokens + sum(s.num_to_compute for s in self._running if s.num_to_compute > 1)

    @property
    def num_blocks_unpromised(self) -> int:
        """Free blocks that neither a growing sequence nor the first in the queue is counting on."""
        return max(0, self.pool.num_free - max(self._blocks.num_growing, self._head_wants))

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything. Not so when all who wait need blocks that are held for transfers, or
        grammars that are still compiled."""
        has_row = len(self._running) < self.limits.max_rows
        may_start = has_row and bool(self._landed or (self._waiting and not self._head_is_refused))
        return may_start or any(sequence.num_computable for sequence in self._running)

    @property
    def may_preempt(self) -> bool:
        """Whether the next step may take blocks from a running sequence. The steps launched must be finished first."""
        if self.pool.num_free >= len(self._running) + len(self._landed):
            return False
        candidates = itertools.chain(self._running, self._landed)
        num_wanted = sum(
            s.num_to_compute == 1 and not s.is_complete and not self._blocks.has_room(s) for s in candidates
        )
        return num_wanted > self.pool.num_free

    # What happens to sequences.

    def enqueue(self, sequence: Sequence, *, now_s: float) -> None:
        sequence.advance(Phase.WAITING, now_s=now_s)
        self._waiting.add(sequence)
        if self._waiting.first is sequence:
            self._note_new_head()
        self._num_waiting_tokens += sequence.num_to_compute
        self._blocks.will_ask(sequence)

    def reserve(self, sequence: Sequence, *, now_s: float) -> None:
        """Take the blocks of a whole prompt for a transfer to fill.

        Raises:
            PoolExhausted: there are too few, or those that there are belong to the first in the queue.
        """
        num_tokens = sequence.num_prompt_tokens
        cached = self._blocks.find_cached(sequence, num_tokens // self.limits.block_size)
        num_new = self.limits.num_blocks_for(num_tokens) - len(cached)
        wanted = self.pool.num_wanted(cached, num_new)
        free = self.num_blocks_unpromised
        if wanted > free:
            raise PoolExhausted.of(wanted=wanted, free=free)
        self._blocks.hold(sequence, HoldingKind.RESERVED, cached, num_new, now_s)
        sequence.advance(Phase.RESERVED, now_s=now_s)

    def land(self, sequence: Sequence, *, now_s: float) -> None:
        """The prompt's KV is in the reserved blocks: they can be found, and the sequence joins at the next step.

        The caller adds the token after the prompt, which is what the sequence computes first.
        """
        assert sequence.holding is not None, f"{sequence.request_id} is {sequence.phase}"
        sequence.num_computed = sequence.num_prompt_tokens
        self._blocks.computed(sequence, sequence.num_computed)
        self.pool.change_kind(sequence.holding, HoldingKind.SEQUENCE, now_s=now_s)
        sequence.advance(Phase.LANDED, now_s=now_s)
        self._landed.add(sequence)

    def lease(self, sequence: Sequence, *, now_s: float) -> None:
        """Stop computing; another server may be reading the blocks."""
        assert sequence.holding is not None, f"{sequence.request_id} is {sequence.phase}"
        self._running.remove(sequence)
        self.pool.change_kind(sequence.holding, HoldingKind.LEASED, now_s=now_s)
        sequence.advance(Phase.LEASED, now_s=now_s)

    def quarantine(self, sequence: Sequence, *, now_s: float) -> None:
        """A reservation is given up while its transfer may still write."""
        self._blocks.quarantine(sequence, now_s=now_s)
        sequence.advance(Phase.QUARANTINED, now_s=now_s)

    def end(self, sequence: Sequence, *, now_s: float) -> None:
        """From any phase. The blocks are back, unless a step that was launched still writes into them: the sequence is
        ENDING then, and this is called again when the step is finished."""
        self._running.discard(sequence)
        self._landed.discard(sequence)
        if sequence.num_launched:
            if sequence.phase is Phase.RUNNING:
                self._blocks.grows_no_more(sequence)
            sequence.advance(Phase.ENDING, now_s=now_s)
            return
        if sequence.phase is Phase.WAITING:
            self._leave_queue(sequence)
            self.pool.drop_swap(sequence.request_id)
        self._blocks.give_back(sequence)
        sequence.advance(Phase.ENDED, now_s=now_s)

    # What to do next.

    def schedule(self, *, now_s: float) -> list[Chunk]:
        """The rows of the next step; each is within budget, and its sequence holds the blocks for it."""
        self._join_landed(now_s)
        decoding = self._decode_chunks(now_s)
        prefilling = self._prefill_chunks(self._prefill_budget(decoding), now_s)
        if self._speculation is not None:
            num_tokens = len(decoding) + sum(chunk.num_tokens for chunk in prefilling)
            decoding = self._with_drafts(decoding, num_tokens, self._speculation)
        return decoding + prefilling

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is in the pool; blocks that they fill can be found from now on."""
        self._blocks.computed(sequence, num_tokens)

    def check_integrity(self, sequences: Collection[Sequence]) -> None:
        """`sequences`: all that have begun and not ended."""
        self.pool.check_integrity()
        queues = {Phase.WAITING: self._waiting, Phase.LANDED: self._landed, Phase.RUNNING: self._running}
        for sequence in sequences:
            name, phase = sequence.request_id, sequence.phase
            assert phase not in {Phase.NEW, Phase.ENDED}, f"{name} is {phase}"
            assert (sequence.holding is None) == (phase is Phase.WAITING), f"{name} is {phase}: {sequence.holding}"
            assert phase not in queues or sequence in queues[phase], f"{name} is {phase}, not in its queue"
            assert phase not in queues or sequence.num_to_compute > 0, f"{name} is {phase} with nothing to compute"
            assert phase is not Phase.WAITING or sequence.num_computed == 0, f"{name} waits and is computed"
            assert phase is not Phase.ENDING or sequence.num_launched, f"{name} is ending, and nothing is launched"
            self._check_length(sequence)
        for queue in queues.values():
            queue.check_integrity()
        num_queued = sum(map(len, queues.values()))
        assert num_queued == sum(s.phase in queues for s in sequences), f"{num_queued} queued: somebody twice"
        num_growing = sum(s.can_grow and s.phase not in HOLDING_NO_MORE for s in sequences)
        assert num_growing == self._blocks.num_growing, f"{self._blocks.num_growing} counted, {num_growing} grow"
        waiting_tokens = sum(sequence.num_to_compute for sequence in self._waiting)
        assert waiting_tokens == self._num_waiting_tokens, f"{self._num_waiting_tokens} counted, {waiting_tokens} wait"
        assert len(self._running) <= self.limits.max_rows, f"{len(self._running)} rows of {self.limits.max_rows}"

    def _check_length(self, sequence: Sequence) -> None:
        name, num_tokens = sequence.request_id, len(sequence.token_ids)
        assert num_tokens <= sequence.num_tokens_max, f"{name} has {num_tokens} tokens, of {sequence.num_tokens_max}"
        if sequence.phase in {Phase.RUNNING, Phase.LANDED}:
            num_slots = len(sequence.block_table) * self.limits.block_size
            assert sequence.num_computed <= num_slots, f"{name}: {sequence.num_computed} tokens in {num_slots} slots"

    # The parts of a step.

    def _join_landed(self, now_s: float) -> None:
        """Rows for those whose KV came from elsewhere, but not the row of somebody in the queue with a better rank."""
        while (sequence := self._landed.first) is not None:
            head = self._waiting.first
            head_goes_first = head is not None and head.rank < sequence.rank and not self._head_is_refused
            if len(self._running) + head_goes_first >= self.limits.max_rows:
                return
            self._landed.remove(sequence)
            self._run(sequence, now_s)

    def _decode_chunks(self, now_s: float) -> list[Chunk]:
        """One token of everybody who has just one to compute, the best rank first: only worse ones are preempted."""
        decoding = [s for s in self._running if s.num_to_compute == s.num_computable == 1 and not s.is_complete]
        return [Chunk(sequence, 1) for sequence in decoding if self._make_room(sequence, now_s)]

    def _make_room(self, sequence: Sequence, now_s: float) -> bool:
        """A block for its next token, if need be taken from the worst rank; False when that is `sequence` itself."""
        while sequence.phase is Phase.RUNNING:
            if self._blocks.has_room(sequence):
                return True
            if self.pool.num_free > 0:
                self._blocks.grow(sequence)
                return True
            worst = [next((s for s in reversed(queue) if s.can_grow), None) for queue in (self._running, self._landed)]
            self._preempt(max((s for s in worst if s is not None), key=lambda s: s.rank), now_s)
        return False

    def _prefill_budget(self, decoding: list[Chunk]) -> int:
        budget = self.limits.max_num_tokens - len(decoding)
        most = self.limits.max_prefill_tokens_beside_decode
        if most is None or not any(chunk.sequence.num_generated for chunk in decoding):
            return budget
        return min(budget, most)

    def _prefill_chunks(self, budget: int, now_s: float) -> list[Chunk]:
        """Prompts that are under way, and those that wait, all by rank."""
        chunks: list[Chunk] = []
        for sequence in [s for s in self._running if s.num_to_compute > 1]:
            budget = self._start_waiting(chunks, budget, now_s, before=sequence)
            if budget:
                chunks.append(Chunk(sequence, min(budget, sequence.num_computable)))
                budget -= chunks[-1].num_tokens
        self._start_waiting(chunks, budget, now_s)
        return chunks

    def _with_drafts(self, decoding: list[Chunk], num_tokens: int, speculation: Speculation) -> list[Chunk]:
        """What the budget still allows, in slots that cost nobody a block."""
        if speculation.max_concurrency is not None and len(decoding) > speculation.max_concurrency:
            return decoding
        left = self.limits.max_num_tokens - num_tokens
        chunks: list[Chunk] = []
        for sequence, one, _ in decoding:
            drafts: AnySequence[int] = ()
            if left and sequence.num_generated and sequence.can_grow:
                drafts = speculation.draft(sequence, left, num_tokens_in_step=num_tokens)
                promised = max(self._blocks.num_growing, self._head_wants)
                drafts = drafts[: self._blocks.num_slots_ahead(sequence, len(drafts), num_promised=promised)]
                left -= len(drafts)
            chunks.append(Chunk(sequence, one, drafts))
        return chunks

    def _preempt(self, sequence: Sequence, now_s: float) -> None:
        """Back to the head of the queue without blocks. The cache may still have them when it returns."""
        assert sequence.num_launched == 0, f"{sequence.request_id} is preempted while a step computes it"
        self._running.discard(sequence)
        self._landed.discard(sequence)
        self._blocks.swap_out(sequence, now_s=now_s)
        sequence.num_computed = 0
        self.enqueue(sequence, now_s=now_s)
        if self._waiting.first is sequence:
            self._head_wants = self.limits.num_blocks_for(len(sequence.token_ids))
        self.preemptions_total += 1

    def _start_waiting(self, chunks: list[Chunk], budget: int, now_s: float, *, before: Sequence | None = None) -> int:
        """Start those at the head of the queue, with a better rank than `before`; the budget that is left."""
        while budget and len(self._running) < self.limits.max_rows:
            head = self._waiting.first
            if head is None or (before is not None and head.rank > before.rank):
                break
            if self._head_is_refused or not self._try_start(head, now_s):
                break
            if head.num_computable:
                chunks.append(Chunk(head, min(budget, head.num_computable)))
                budget -= chunks[-1].num_tokens
        return budget

    def _try_start(self, sequence: Sequence, now_s: float) -> bool:
        """Give the first in the queue blocks for all its tokens, or note how many it lacks.

        One block more for each who grows must stay free, or the next steps would preempt whom this one started.
        The last token is always computed, even when all of the prompt is cached: its logits choose the next one.
        """
        num_tokens = len(sequence.token_ids)
        cached = self._blocks.find_cached(sequence, (num_tokens - 1) // self.limits.block_size)
        num_new = self.limits.num_blocks_for(num_tokens) - len(cached)
        wanted = self.pool.num_wanted(cached, num_new) + self._blocks.num_growing
        if wanted > self.pool.num_free:
            self._head_wants = wanted
            self._head_refused_at = self.pool.num_returns
            return False
        self._leave_queue(sequence)
        self._blocks.hold(sequence, HoldingKind.SEQUENCE, cached, num_new, now_s)
        sequence.num_computed = cached.num_tokens(self.limits.block_size)
        self._run(sequence, now_s)
        return True

    # Books.

    @property
    def _head_is_refused(self) -> bool:
        """No block has come back since the first in the queue found too few."""
        return self._head_refused_at == self.pool.num_returns

    def _run(self, sequence: Sequence, now_s: float) -> None:
        sequence.advance(Phase.RUNNING, now_s=now_s)
        self._running.add(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        was_first = self._waiting.first is sequence
        self._waiting.remove(sequence)
        self._num_waiting_tokens -= sequence.num_to_compute
        if was_first:
            self._note_new_head()

    def _note_new_head(self) -> None:
        self._head_wants = 0
        self._head_refused_at = -1
