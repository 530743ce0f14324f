"""Forward passes, one after the other: what the scheduler decides is launched, and what it brought is told.

    schedule ─▶ copies of evicted blocks ─▶ launch ─▶ (the device computes) ─▶ finish: tokens, chunks, ends

With overlap the next one is launched before the one before it is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AnySequence

from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    ModelRunner,
    OverlappingRunner,
    RequestKind,
    ScheduledSequence,
    TokensSampled,
)
from disaggregated.engine.engine_limits import EngineOptions
from disaggregated.engine.grammar import attach as grammars
from disaggregated.engine.launched_step import ExecutedStep, LaunchedRow, LaunchedStep, launched, scheduled
from disaggregated.engine.layer_watch import LayeredRunner, LayerWatcher, progress_of
from disaggregated.engine.roster import Roster
from disaggregated.engine.scheduler import Scheduler
from disaggregated.engine.scheduler_limits import Chunk
from disaggregated.engine.sequence import Phase, Sequence
from disaggregated.engine.step_results import Totals, chunk_computed, take_tokens


class ForwardSteps:
    """Part of an engine, and owned by its thread. What the runner raises leaves it as it is: the books are no longer
    to be trusted."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        roster: Roster,
        options: EngineOptions,
        clock: Callable[[], float],
    ) -> None:
        assert not options.overlap or isinstance(runner, OverlappingRunner), f"{runner} can't launch a step ahead"
        self._runner = runner
        self._scheduler = scheduler
        self._roster = roster
        self._overlap = options.overlap
        self._speculation = options.speculation
        self._copier = options.copier
        self._clock = clock
        self._layer_watcher: LayerWatcher | None = None
        self.before_computing: Callable[[], None] = lambda: None
        """Called when it is decided what a step computes, and what is evicted for it."""
        self._launched: LaunchedStep | None = None
        self.totals = Totals()
        self.num_finished = 0
        self.last_progress_s = clock()
        """When a step was last finished, or when there was last nothing to do."""

    @property
    def is_under_way(self) -> bool:
        """A step is launched and not finished."""
        return self._launched is not None

    def watch_layers(self, watcher: LayerWatcher) -> bool:
        """As of `LLMEngine.watch_layers`."""
        if self._overlap or not isinstance(self._runner, LayeredRunner):
            return False
        self._layer_watcher = watcher
        return True

    def step(self) -> list[EngineEvent]:
        """Finish one forward pass, if there is something to compute; what it brought, chunks before tokens."""
        events = self._roster.take_unsent()
        if self._launched is not None and (self._scheduler.may_preempt or self._launched.decides_what_may_follow):
            events += self._finish()
        before, launched = self._launched, self._launch()
        if before is not None:
            events += self._finish()
        self._launched = launched
        if launched is not None and not self._overlap:
            events += self._finish()
        return events

    def copy_blocks(self, *, before_others: bool = False) -> None:
        """Before anything is written into the pool: what evicted blocks held is saved, what comes back is there.

        before_others: somebody who does not follow the engine's order is about to write, a transfer.
        """
        copies = self._scheduler.pool.cache.take_copies()
        if copies and self._copier is not None:
            self._copier.copy(copies)
            if before_others:
                self._copier.wait()

    def _launch(self) -> LaunchedStep | None:
        """Decide on the next step, and begin it. A runner that can't launch has computed it when this returns."""
        started_s = self._clock()
        chunks = self._scheduler.schedule(now_s=started_s)
        self.copy_blocks()
        if not chunks:
            return None
        self.before_computing()
        batch = [scheduled(chunk, before=self._launched) for chunk in chunks]
        if self._overlap:
            assert isinstance(self._runner, OverlappingRunner)
            pending = self._runner.launch(batch)
        else:
            pending = ExecutedStep(self._execute(batch, chunks))
        rows = [launched(chunk, row.logprobs) for chunk, row in zip(chunks, batch, strict=True)]
        return LaunchedStep(rows, pending, started_s)

    def _execute(self, batch: list[ScheduledSequence], chunks: list[Chunk]) -> AnySequence[AnySequence[int]]:
        watcher, block_size = self._layer_watcher, self._scheduler.limits.block_size
        progress = None if watcher is None else progress_of(chunks, watcher, block_size=block_size)
        if progress is None:
            return self._runner.execute(batch)
        assert isinstance(self._runner, LayeredRunner)
        return self._runner.execute_layered(batch, progress)

    def _finish(self) -> list[EngineEvent]:
        """Take the tokens of the step that was launched first."""
        step, self._launched = self._launched, None
        assert step is not None, "nothing is launched"
        sampled = step.pending.tokens()
        assert len(sampled) == len(step.rows), f"{len(step.rows)} rows, {len(sampled)} results"
        self.num_finished += 1
        self.last_progress_s = self._clock()
        self._learn_duration(step)
        chunks: list[EngineEvent] = []
        tokens: list[EngineEvent] = []
        for row, token_ids in zip(step.rows, sampled, strict=True):
            self._finish_row(row, token_ids, step.started_s, chunks, tokens)
        return chunks + tokens

    def _finish_row(
        self,
        row: LaunchedRow,
        token_ids: AnySequence[int],
        started_s: float,
        chunks: list[EngineEvent],
        tokens: list[EngineEvent],
    ) -> None:
        """What it brought is added to `chunks` and `tokens`; nothing when its sequence ended meanwhile."""
        sequence = row.sequence
        sequence.num_launched -= 1
        assert bool(token_ids) == row.samples, f"{sequence.request_id}: {token_ids}, {row.samples=}"
        if sequence.phase is Phase.ENDING and sequence.num_launched == 0:
            self._roster.end(sequence)
        if sequence.phase is not Phase.RUNNING:
            return
        if (error := grammars.broken_by(sequence, token_ids)) is not None:
            self._roster.fail(sequence, error)
            return
        taken = self._take_tokens(row, token_ids)
        self._scheduler.computed(sequence, row.num_computed + max(0, len(taken.token_ids) - 1))
        if row.tells_progress:
            chunks.append(self._chunk_computed(row, started_s))
        if taken.token_ids:
            tokens.append(taken)
            self._end_if_over(sequence, taken)

    def _learn_duration(self, step: LaunchedStep) -> None:
        if self._speculation is not None and (num_tokens := step.num_tokens_decoded) is not None:
            self._speculation.step_took(num_tokens, self.last_progress_s - step.started_s)

    def _chunk_computed(self, row: LaunchedRow, started_s: float) -> ChunkComputed:
        """Progress in the prompt is told once: not again when it is computed again."""
        row.sequence.is_published = True
        num_blocks = self._scheduler.limits.num_blocks_for(row.num_computed)
        return chunk_computed(row, num_blocks=num_blocks, started_s=started_s, finished_s=self.last_progress_s)

    def _take_tokens(self, row: LaunchedRow, token_ids: AnySequence[int]) -> TokensSampled:
        if row.samples and row.num_computed == row.sequence.num_prompt_tokens:
            self.totals.count_prompt(row.sequence)
        if row.num_drafts and self._speculation is not None:
            self._speculation.verified(row.sequence, row.num_drafts, len(token_ids) - 1)
            self.totals.count_drafts(row.num_drafts, len(token_ids) - 1)
        tokens = take_tokens(row, token_ids)
        self.totals.generation += len(tokens.token_ids)
        return tokens

    def _end_if_over(self, sequence: Sequence, tokens: TokensSampled) -> None:
        if sequence.kind is RequestKind.PREFILL_ONLY:
            self._scheduler.lease(sequence, now_s=self.last_progress_s)
        elif tokens.finish_reason is not None:
            self._roster.end(sequence)
