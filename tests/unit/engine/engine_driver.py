"""An engine over the fake runner, and what came out of it, for tests that say what happens in which step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disaggregated.engine.api import (
    ChunkComputed,
    EngineEvent,
    EngineRequest,
    FinishReason,
    RequestKind,
    Reservation,
    TokensSampled,
)
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.speculation import Speculation
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_copier import FakeBlockCopier
from tests.support.fake_device import FakeDevice
from tests.support.fake_grammar import END_ID, FakeGrammars, follower_of
from tests.support.fake_runner import oracle


class EngineDriver:
    """Every step is followed by check_integrity(), and the runner checks the step's limits."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_num_tokens: int = 8,
        max_batch_size: int = 4,
        max_seq_len: int = 1000,
        max_prefill_tokens_beside_decode: int | None = None,
        enable_block_reuse: bool = True,
        speculation: Speculation | None = None,
        overlap: bool = False,
        num_waiting_max: int = 100,
        vocab_size: int = 2**31,
        num_host_slots: int = 0,
        grammars: FakeGrammars | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.runner = FakeDevice(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_tokens=max_num_tokens,
            max_batch_size=max_batch_size,
        )
        self.copier = FakeBlockCopier(self.runner, num_host_slots)
        self.engine = LLMEngine(
            self.runner,
            EngineLimits(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_tokens=max_num_tokens,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                max_prefill_tokens_beside_decode=max_prefill_tokens_beside_decode,
                enable_block_reuse=enable_block_reuse,
                num_waiting_max=num_waiting_max,
                vocab_size=vocab_size,
            ),
            EngineOptions(speculation=speculation, overlap=overlap, copier=self.copier, grammars=grammars),
            clock=clock,
        )
        self.grammars = grammars
        self.requests: dict[str, EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.chunks: dict[str, list[ChunkComputed]] = {}
        self.finish_reasons: dict[str, FinishReason] = {}

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 4,
        kind: RequestKind = RequestKind.FULL,
        sampling: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        sampling = sampling or SamplingParams(max_tokens=max_tokens)
        self.engine.submit(self._request(request_id, prompt, kind, sampling, priority))

    def reserve(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int = 4, sampling: SamplingParams | None = None
    ) -> Reservation:
        sampling = sampling or SamplingParams(max_tokens=max_tokens)
        return self.engine.reserve(self._request(request_id, prompt, RequestKind.FROM_REMOTE, sampling))

    def ask(self, request_id: str, prompt: Sequence[int], *, max_tokens: int, kind: RequestKind) -> None:
        if kind is RequestKind.FROM_REMOTE:
            self.reserve(request_id, prompt, max_tokens=max_tokens)
        else:
            self.submit(request_id, prompt, max_tokens=max_tokens, kind=kind)

    def land(self, reservation: Reservation) -> int:
        """Fill the reserved blocks as a transfer would, and admit with the first token, which is returned."""
        request_id = reservation.request_id
        prompt = self.requests[request_id].token_ids
        self.runner.fill(reservation.block_ids, prompt, first_block=reservation.num_cached_blocks)
        first_token = self.alone(request_id)[0]
        assert self.engine.admit(request_id, first_token)
        self.tokens[request_id] = [first_token]
        self.engine.check_integrity()
        return first_token

    def step(self) -> list[EngineEvent]:
        events = self.engine.step()
        self.engine.check_integrity()
        for event in events:
            if isinstance(event, ChunkComputed):
                self.chunks.setdefault(event.request_id, []).append(event)
            elif isinstance(event, TokensSampled):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason is not None:
                    self.finish_reasons[event.request_id] = event.finish_reason
        return events

    def run(self, *, num_steps_max: int = 1000) -> None:
        """Step until there is nothing left to do."""
        for _ in range(num_steps_max):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {num_steps_max} steps: {self.engine.statistics()}")

    def alone(self, request_id: str) -> list[int]:
        """The tokens the request would get if it had the engine for itself."""
        request = self.requests[request_id]
        prompt, sampling, max_seq_len = request.token_ids, request.sampling, self.engine.max_seq_len
        if sampling.grammar is None:
            return oracle(prompt, sampling, max_seq_len=max_seq_len)[0]
        follower = follower_of(sampling.grammar)
        assert follower.follow(prompt[len(prompt) - sampling.num_emitted :])
        ends = sampling.stop_token_ids | {END_ID}
        return oracle(prompt, sampling, max_seq_len=max_seq_len, grammar=follower, stop_token_ids=ends)[0]

    @property
    def rows(self) -> list[tuple[str, int, int]]:
        """(request id, first position, number of tokens) of each row of the last step."""
        return self.runner.batches[-1]

    @property
    def num_free(self) -> int:
        return self.engine.statistics().num_blocks_free

    def _request(
        self, request_id: str, prompt: Sequence[int], kind: RequestKind, sampling: SamplingParams, priority: int = 0
    ) -> EngineRequest:
        request = EngineRequest(
            request_id=request_id, kind=kind, token_ids=tuple(prompt), sampling=sampling, priority=priority
        )
        self.requests[request_id] = request
        return request
