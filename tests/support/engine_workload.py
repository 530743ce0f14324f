"""A random workload for one engine, a seed each: everything that a server, its clients and its peers may do to it.

Whatever happens, the tokens are the oracle's, no invariant is broken after any step, and every block comes back.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable

from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    FinishReason,
    RequestKind,
    TokensSampled,
)
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.sequence import Sequence
from disaggregated.engine.speculation import Speculation
from disaggregated.errors import AdmissionError, InvalidRequest
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_device import FakeDevice, FakeHostMemory
from tests.support.fake_runner import VOCAB_SIZE, kv_of, oracle

MAX_SEQ_LEN = 40


@dataclasses.dataclass
class Life:
    """What the client, and the other server, know of one request."""

    request: EngineRequest
    tokens: list[int]
    finish_reason: FinishReason
    received: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    blocks: tuple[int, ...] = ()
    """PREFILL_ONLY: published to a reader. FROM_REMOTE: being written by a transfer."""
    num_cached_blocks: int = 0
    prefill_is_over: bool = False
    is_admitted: bool = False
    is_cancelled: bool = False


class Foresight(Speculation):
    """Guesses the oracle's tokens, and is wrong now and then: a text made of hashes repeats nothing."""

    def __init__(self, draw: random.Random, generated: Callable[[str], list[int]]) -> None:
        """`generated`: the oracle's tokens of a request, by its id."""
        super().__init__(max_draft_len=draw.choice([1, 3, 8]), max_matching_ngram_size=2)
        self._draw = draw
        self._generated = generated
        self._error_rate = draw.choice([0.02, 0.3])

    def guess(self, sequence: Sequence, num_drafts: int) -> list[int]:
        right = self._generated(sequence.request_id)[sequence.num_generated :][:num_drafts]
        return [self._draw.randrange(VOCAB_SIZE) if self._draw.random() < self._error_rate else t for t in right]


class Workload:
    """An engine and the world around it: clients that give up, readers of leases, transfers that land late or never."""

    def __init__(self, seed: int, *, num_requests: int) -> None:
        self.draw = random.Random(seed)
        self.now_s = 0.0
        mode = self.draw.choice(["plain", "speculation", "overlap"])
        self.block_size = self.draw.choice([1, 2, 4, 8])
        num_blocks = self.draw.choice([24, 40, 80, 160]) // self.block_size
        num_host_slots = self.draw.choice([0, 8, 80]) // self.block_size
        self.runner = FakeDevice(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_num_tokens=self.draw.choice([1, 3, 8, 32]),
            max_batch_size=self.draw.choice([1, 2, 4, 8]),
        )
        self.engine = LLMEngine(
            self.runner,
            EngineLimits(
                num_blocks=num_blocks,
                block_size=self.block_size,
                max_num_tokens=self.runner.max_num_tokens,
                max_batch_size=self.runner.max_batch_size,
                max_seq_len=MAX_SEQ_LEN,
                max_prefill_tokens_beside_decode=self.draw.choice([None, 1, 4]),
                enable_block_reuse=self.draw.random() < 0.8,
            ),
            EngineOptions(
                speculation=Foresight(self.draw, lambda name: self.lives[name].tokens)
                if mode == "speculation"
                else None,
                overlap=mode == "overlap",
                copier=FakeHostMemory(self.runner, num_slots=num_host_slots) if num_host_slots else None,
            ),
            clock=lambda: self.now_s,
        )
        lateness = self.draw.choice([0.0, 0.5, 1.0])
        self.runner.is_late = lambda: self.draw.random() < lateness
        self.num_priorities = self.draw.choice([1, 3])
        self.kinds = self.draw.choice(
            [list(RequestKind), [RequestKind.FULL], [RequestKind.FULL, RequestKind.FROM_REMOTE]]
        )
        self.num_shared_max = self.draw.choice([1, 8, 30])
        self.stems = [[self.draw.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(3)]
        self.num_left = num_requests
        self.lives: dict[str, Life] = {}
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        for _ in range(20_000):
            while self.num_left and self.draw.random() < 0.4:
                self.arrive()
            self.interfere()
            self.now_s += self.draw.choice([0.0, 0.1, 2.0])
            if self.engine.has_work:
                for event in self.engine.step():
                    self.hear(event)
            self.check()
            if not (self.num_left or self.lives or self.engine.has_work):
                break
        assert not self.lives, f"never ended: {self.lives}"
        assert not self.engine.has_work
        assert self.engine.ledger() == []
        assert self.engine.statistics().num_blocks_free == self.engine.statistics().num_blocks
        self.count()

    # What may happen between two steps.

    def arrive(self) -> None:
        self.num_left -= 1
        stem = self.draw.choice(self.stems)[: self.draw.randrange(self.num_shared_max)]
        prompt = [*stem, *(self.draw.randrange(VOCAB_SIZE) for _ in range(self.draw.randrange(1, 9)))]
        max_tokens = self.draw.randrange(1, 36)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.draw.choice([0, 0, max_tokens // 2]),
            temperature=self.draw.choice([0.0, 1.0]),
            seed=self.draw.randrange(4),
            stop_token_ids=frozenset(self.draw.sample(range(VOCAB_SIZE), 3)),
        )
        kind = self.draw.choice(self.kinds)
        request = EngineRequest(
            request_id=f"r{self.num_left}",
            kind=kind,
            token_ids=prompt,
            sampling=sampling,
            priority=self.draw.randrange(self.num_priorities),
        )
        tokens, finish_reason = oracle(prompt, sampling, max_seq_len=self.engine.max_seq_len)
        life = Life(request, tokens, finish_reason)
        try:
            if kind is RequestKind.FROM_REMOTE:
                reservation = self.engine.reserve(request)
                life.blocks, life.num_cached_blocks = reservation.block_ids, reservation.num_cached_blocks
            else:
                self.engine.submit(request)
        except (AdmissionError, InvalidRequest):
            self.counts["requests refused"] += 1
        else:
            self.lives[request.request_id] = life

    def interfere(self) -> None:
        for request_id, life in list(self.lives.items()):
            if self.draw.random() < 0.02 and not life.is_cancelled:
                self.engine.cancel(request_id)
                self.counts["requests cancelled"] += 1
                life.is_cancelled = True
                if life.request.kind is RequestKind.FULL or life.is_admitted or not life.blocks:
                    del self.lives[request_id]
                    continue
            if life.request.kind is RequestKind.FROM_REMOTE and not life.is_admitted:
                self.transfer(request_id, life)
            elif life.request.kind is RequestKind.PREFILL_ONLY and self.draw.random() < 0.1:
                self.read(request_id, life)

    def transfer(self, request_id: str, life: Life) -> None:
        """Writes go on after a cancellation, until one side says that it is over."""
        self.runner.spoil(life.blocks[life.num_cached_blocks :])
        if self.draw.random() < 0.7:
            return
        if self.draw.random() < 0.3:
            self.engine.release(request_id)
            self.counts["transfers failed"] += 1
            del self.lives[request_id]
            return
        self.runner.fill(life.blocks, life.request.token_ids, first_block=life.num_cached_blocks)
        life.is_admitted = self.engine.admit(request_id, life.tokens[0])
        assert life.is_admitted == (not life.is_cancelled)
        life.received.append(life.tokens[0])
        if life.is_cancelled:
            del self.lives[request_id]

    def read(self, request_id: str, life: Life) -> None:
        """The reader of a lease lets go: when it has all, or earlier, when it failed."""
        if life.prefill_is_over or life.is_cancelled or self.draw.random() < 0.1:
            self.engine.release(request_id)
            del self.lives[request_id]
            self.counts["leases released"] += 1

    # What must hold.

    def hear(self, event: EngineEvent) -> None:
        life = self.lives[event.request_id]
        assert not life.is_cancelled, f"{event} after its cancellation"
        if isinstance(event, ChunkComputed):
            assert event.num_cached_tokens < len(life.request.token_ids), "the last prompt token was not computed"
            assert event.num_computed_tokens <= len(life.request.token_ids)
            if life.request.kind is RequestKind.PREFILL_ONLY:  # The others may be preempted, and begin again.
                assert event.num_computed_tokens > life.num_computed
                assert event.block_ids[: len(life.blocks)] == life.blocks
            life.num_computed, life.blocks = event.num_computed_tokens, event.block_ids
            return
        assert isinstance(event, TokensSampled), event
        assert event.first_position == len(life.request.token_ids) + len(life.received)
        life.received += event.token_ids
        expected = life.tokens[:1] if life.request.kind is RequestKind.PREFILL_ONLY else life.tokens
        assert life.received == expected[: len(life.received)], f"{event.request_id} got other tokens than alone"
        is_last = len(life.received) == len(life.tokens)
        assert event.finish_reason == (life.finish_reason if is_last else None)
        if life.request.kind is RequestKind.PREFILL_ONLY:
            life.prefill_is_over = True
        elif is_last:
            del self.lives[event.request_id]
            self.counts["requests finished"] += 1

    def count(self) -> None:
        statistics = self.engine.statistics()
        self.counts["steps"] = statistics.step
        self.counts["steps launched ahead"] = self.runner.num_launched
        self.counts["prompt tokens found in the cache"] = statistics.prompt_cached_tokens_total
        self.counts["tokens generated"] = statistics.generation_tokens_total
        self.counts["drafts"] = statistics.draft_tokens_total
        self.counts["drafts accepted"] = statistics.accepted_draft_tokens_total
        self.counts["preemptions"] = statistics.preemptions_total
        self.counts["sequences swapped out"] = statistics.swapped_sequences_total
        self.counts["blocks offloaded"] = statistics.offloaded_blocks_total
        self.counts["blocks onboarded"] = statistics.onboarded_blocks_total

    def check(self) -> None:
        self.engine.check_integrity()
        self.counts["checks"] += 1
        self.counts["steps with blocks in quarantine"] += self.engine.statistics().num_blocks_quarantined > 0
        for life in self.lives.values():
            if life.request.kind is RequestKind.PREFILL_ONLY and life.blocks:
                published = self.runner.read(life.blocks, life.num_computed)
                assert published == kv_of(life.request.token_ids[: life.num_computed]), "a published block has changed"
