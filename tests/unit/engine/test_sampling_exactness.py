"""Whatever a request asks of its sampling, its tokens and their log-probabilities are the same alone and in company,
however the prompt is cut, with drafts, from another server's blocks, and after the loss of a server at any token.

Real engines with a tiny random model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from disaggregated.engine.api import ChunkComputed, EngineEvent, EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.speculation import Speculation
from disaggregated.repetition_rule import RepetitionRule
from disaggregated.sampling_params import SamplingParams
from disaggregated.thinking_budget import ThinkingBudget
from disaggregated.token_logprobs import TokenLogprob
from tests.unit.engine.runners import random_prompt
from tests.unit.engine.test_exactness import Mode, Server, copy_blocks, environment, run
from tests.unit.engine.tiny_models import VOCAB_SIZE, write_model

NUM_NEW: Final = 24
PROMPT: Final = random_prompt(70, 0, VOCAB_SIZE)
LIKELY_STOPS: Final = frozenset(range(0, VOCAB_SIZE, 3))
"""So many that one of them comes soon: only `min_tokens` keeps it away."""
ASKED: Final[dict[str, dict[str, Any]]] = {
    "repetition": {"repetition_penalty": 1.4},
    "presence and frequency": {"presence_penalty": 0.8, "frequency_penalty": 0.3, "temperature": 0.9},
    "everything": {
        "temperature": 0.7,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.2,
        "logit_bias": ((7, 2.5), (12, -100.0)),
        "bad_words": ((5,), (9, 4), (7, 7)),
        "min_tokens": 8,
        "stop_token_ids": LIKELY_STOPS,
    },
    "few allowed": {"allowed_token_ids": frozenset(range(10, 22)), "temperature": 1.3},
    "nothing but logprobs": {},
    "tokens told by their ids": {"logprob_token_ids": (9, 3, VOCAB_SIZE - 1)},
    "circles": {"repetition": RepetitionRule(2, 8, 2), "allowed_token_ids": frozenset(range(4)), "temperature": 1.0},
    "reasoning that is cut": {"thinking": ThinkingBudget(6, begin=(3,), end=(17, 4, 9), is_open=True)},
}


@dataclasses.dataclass(slots=True)
class Told:
    """What an engine said of one sequence."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def take(self, events: Sequence[EngineEvent], name: str = "own") -> Told:
        for event in events:
            if isinstance(event, TokensSampled) and event.request_id == name:
                assert len(event.logprobs) == len(event.token_ids), "tokens and logprobs came apart"
                self.tokens += event.token_ids
                self.logprobs += event.logprobs
                self.prompt += event.prompt_logprobs
                self.finish_reason = event.finish_reason
        return self


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    model = write_model("llama-tied", tmp_path_factory.mktemp("model")).path
    mode = Mode("native", "float32")
    with environment(mode):
        yield Server(Path(model), mode), Server(Path(model), mode)


@pytest.fixture(params=ASKED, scope="module")
def sampling(request: pytest.FixtureRequest) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_NEW, seed=11, logprobs=3, **ASKED[request.param])


def engine_of(server: Server, *, chunk: int = 512, speculation: Speculation | None = None) -> LLMEngine:
    layout = server.loaded.layout
    return LLMEngine(
        server.loaded.runner,
        EngineLimits(
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            max_num_tokens=chunk,
            max_batch_size=min(chunk, 32),
            max_seq_len=512,
            vocab_size=VOCAB_SIZE,
        ),
        EngineOptions(speculation=speculation),
    )


def request(
    sampling: SamplingParams, prompt: Sequence[int] = PROMPT, name: str = "own", kind: RequestKind = RequestKind.FULL
) -> EngineRequest:
    return EngineRequest(request_id=name, kind=kind, token_ids=prompt, sampling=sampling)


def alone(server: Server, sampling: SamplingParams, prompt: Sequence[int] = PROMPT) -> Told:
    engine = engine_of(server)
    engine.submit(request(sampling, prompt))
    return Told().take(run(engine))


@pytest.fixture(scope="module")
def expected(servers: tuple[Server, Server], sampling: SamplingParams) -> Told:
    return alone(servers[0], sampling)


def test_what_was_asked_has_an_effect(servers: tuple[Server, Server], sampling: SamplingParams, expected: Told) -> None:
    plain = SamplingParams(
        max_tokens=NUM_NEW, seed=sampling.seed, temperature=sampling.temperature, top_p=sampling.top_p
    )
    asks = sampling.edits_logits or sampling.min_tokens > 0
    engine = engine_of(servers[0])
    engine.submit(request(plain))
    events = run(engine)
    tokens = [token for event in events if isinstance(event, TokensSampled) for token in event.token_ids]
    assert (tokens != expected.tokens) is asks
    assert len(expected.tokens) > sampling.min_tokens
    if sampling.allowed_token_ids:
        assert set(expected.tokens) <= sampling.allowed_token_ids
    if sampling.thinking is not None:
        assert expected.tokens[6:9] == [17, 4, 9]
    if sampling.repetition is not None:
        assert expected.finish_reason == "repetition"
        assert len(expected.tokens) < NUM_NEW
    if sampling.logprob_token_ids:
        assert {one.top_token_ids for one in expected.logprobs} == {sampling.logprob_token_ids}


def test_it_comes_out_alike_in_any_company(
    servers: tuple[Server, Server], sampling: SamplingParams, expected: Told
) -> None:
    engine = engine_of(servers[0], chunk=64)
    for mate, params in enumerate(ASKED.values()):
        engine.submit(request(SamplingParams(max_tokens=9 + mate, seed=mate, **params), PROMPT[mate:], f"mate-{mate}"))
        if mate == 2:
            engine.submit(request(sampling))
    assert Told().take(run(engine)) == expected


def test_drafts_change_neither_tokens_nor_what_is_told_of_them(
    servers: tuple[Server, Server], sampling: SamplingParams, expected: Told
) -> None:
    speculation = Speculation(max_draft_len=4, max_matching_ngram_size=2)
    engine = engine_of(servers[0], speculation=speculation)
    engine.submit(request(sampling, PROMPT))
    assert Told().take(run(engine)) == expected


@pytest.mark.parametrize("is_right", [True, False])
def test_drafts_that_are_all_tried_change_nothing(
    servers: tuple[Server, Server], sampling: SamplingParams, expected: Told, is_right: bool
) -> None:
    """Guesses from the very answer, every other one spoilt."""

    class Oracle(Speculation):
        def guess(self, sequence: Any, num_drafts: int) -> list[int]:
            drafts = expected.tokens[sequence.num_generated :][:num_drafts]
            return drafts if is_right else [*drafts[:1], *((token + 1) % VOCAB_SIZE for token in drafts[1:])]

    engine = engine_of(servers[0], speculation=Oracle(max_draft_len=5, max_matching_ngram_size=2))
    engine.submit(request(sampling))
    assert Told().take(run(engine)) == expected
    assert engine.statistics().accepted_draft_tokens_total > 0


def test_a_sequence_goes_on_alike_after_the_loss_of_its_server_at_any_token(
    servers: tuple[Server, Server], sampling: SamplingParams, expected: Told
) -> None:
    for num_told in range(1, len(expected.tokens)):
        rest = alone(servers[1], sampling.after(num_told), [*PROMPT, *expected.tokens[:num_told]])
        assert rest.tokens == expected.tokens[num_told:], f"after {num_told} tokens"
        assert rest.logprobs == expected.logprobs[num_told:]
        assert rest.finish_reason == expected.finish_reason


@pytest.mark.parametrize("num_told", [0, 5])
def test_it_goes_on_alike_where_the_prompt_was_computed_elsewhere(
    servers: tuple[Server, Server], sampling: SamplingParams, expected: Told, num_told: int
) -> None:
    """The first token comes from the context server, the others from the generation server."""
    here, there = servers
    left = sampling.after(num_told) if num_told else sampling
    prompt = [*PROMPT, *expected.tokens[:num_told]]
    context, generation = engine_of(here, chunk=32), engine_of(there)
    context.submit(request(left, prompt, kind=RequestKind.PREFILL_ONLY))
    events = run(context)
    first = Told().take(events)
    source = [event for event in events if isinstance(event, ChunkComputed)][-1]
    reservation = generation.reserve(request(left, prompt, kind=RequestKind.FROM_REMOTE))
    copy_blocks(here, source.block_ids, there, reservation.block_ids)
    context.release("own")
    assert generation.admit("own", first.tokens[0])
    rest = Told().take(run(generation))
    assert first.tokens + rest.tokens == expected.tokens[num_told:]
    assert first.logprobs + rest.logprobs == expected.logprobs[num_told:]


@pytest.mark.parametrize("chunk", [7, 16, 512])
def test_a_prompt_is_told_alike_however_it_is_cut(servers: tuple[Server, Server], chunk: int) -> None:
    engine = engine_of(servers[0], chunk=chunk)
    engine.submit(request(SamplingParams(max_tokens=3, prompt_logprobs=2)))
    told = Told()
    for event in run(engine):
        if isinstance(event, TokensSampled):
            told.prompt += event.prompt_logprobs
    assert len(told.prompt) == len(PROMPT) - 1
    decoded = [alone(servers[0], SamplingParams(max_tokens=1, logprobs=2), PROMPT[:end]) for end in (1, 16, 69)]
    for end, one in zip((1, 16, 69), decoded, strict=True):
        assert told.prompt[end - 1].top_logprobs == one.logprobs[0].top_logprobs
        assert told.prompt[end - 1].top_token_ids == one.logprobs[0].top_token_ids
        if told.prompt[end - 1].rank == 1:
            assert PROMPT[end] == one.tokens[0]


def test_a_prompt_that_is_told_is_computed_although_it_is_cached(servers: tuple[Server, Server]) -> None:
    engine = engine_of(servers[0])
    engine.submit(request(SamplingParams(max_tokens=2), name="before"))
    run(engine)
    for name, wanted, num_cached in (("told", 0, 0), ("untold", None, 64)):
        before = engine.statistics().prompt_cached_tokens_total
        engine.submit(request(SamplingParams(max_tokens=2, prompt_logprobs=wanted), name=name))
        told = [event for event in run(engine) if isinstance(event, TokensSampled)]
        assert len(told[0].prompt_logprobs) == (0 if wanted is None else len(PROMPT) - 1)
        assert not told[1].prompt_logprobs
        assert engine.statistics().prompt_cached_tokens_total - before == num_cached
