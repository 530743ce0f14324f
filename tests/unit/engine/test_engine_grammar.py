"""Texts that must match a grammar, among others, in any order of events: the same tokens, and nobody waits for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from disaggregated.engine.api import FinishReason, RequestFailed, RequestKind
from disaggregated.engine.grammar import follower
from disaggregated.engine.speculation import Speculation
from disaggregated.errors import GrammarBroken, GrammarRefused, InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_grammar import END_ID, FakeGrammars, fake_grammar, is_text_of
from tests.unit.engine.engine_driver import EngineDriver

FIVE = fake_grammar(5)
BAD = Grammar(GrammarKind.LARK, "bad")


def under(grammar: Grammar, *, max_tokens: int = 60, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, grammar=grammar, **others)  # type: ignore[arg-type]


def driver_with(
    *, is_slow: bool = False, overlap: bool = False, speculation: Speculation | None = None
) -> EngineDriver:
    driver = EngineDriver(
        grammars=FakeGrammars(is_slow=is_slow), num_blocks=64, overlap=overlap, speculation=speculation
    )
    driver.engine.call_between_steps_by(lambda command: command())
    return driver


def drafts() -> Speculation:
    return Speculation(max_draft_len=4, max_matching_ngram_size=2)


WAYS: dict[str, Callable[[], EngineDriver]] = {
    "plain": driver_with,
    "overlap": lambda: driver_with(overlap=True),
    "drafts": lambda: driver_with(speculation=drafts()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_ends_where_its_grammar_lets_it(way: str) -> None:
    driver = WAYS[way]()
    for number in (2, 3, 5, 7):
        driver.submit(f"g{number}", [number, 8, 9], sampling=under(fake_grammar(number)))
    driver.submit("free", [1, 2, 3], max_tokens=30)
    driver.run()
    for number in (2, 3, 5, 7):
        assert is_text_of(number, driver.tokens[f"g{number}"])
        assert driver.finish_reasons[f"g{number}"] is FinishReason.STOP
    for request_id in driver.requests:
        assert driver.tokens[request_id] == driver.alone(request_id)


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_is_cut_by_max_tokens_says_length(way: str) -> None:
    driver = WAYS[way]()
    driver.submit("a", [4, 4], sampling=under(FIVE, max_tokens=3, min_tokens=3))
    driver.run()
    assert driver.finish_reasons["a"] is FinishReason.LENGTH
    assert driver.tokens["a"] == driver.alone("a")


def test_nothing_ends_a_text_before_min_tokens_unless_nothing_else_can() -> None:
    driver = driver_with()
    driver.submit("long", [4, 4], sampling=under(FIVE, min_tokens=20))
    driver.submit("must", [4, 4], sampling=under(FIVE, min_tokens=60))
    driver.run()
    assert len(driver.tokens["long"]) > 20
    assert len(driver.tokens["must"]) == 41
    assert driver.finish_reasons["must"] is FinishReason.STOP


def test_an_end_of_text_ends_it_though_the_client_ignores_them_and_a_clients_own_does_too() -> None:
    driver = driver_with()
    driver.submit("probe", [9, 9], sampling=under(FIVE, stop_token_ids=frozenset()))
    driver.run()
    assert driver.tokens["probe"][-1] == END_ID
    third = driver.tokens["probe"][2]
    driver.submit("own", [9, 9], sampling=under(FIVE, stop_token_ids=frozenset({third})))
    driver.run()
    assert driver.tokens["own"] == driver.tokens["probe"][:3]


@pytest.mark.parametrize("kind", [RequestKind.FULL, RequestKind.PREFILL_ONLY])
def test_a_prompt_is_computed_while_its_grammar_is_compiled_and_others_go_on(kind: RequestKind) -> None:
    driver = driver_with(is_slow=True)
    driver.submit("slow", range(1, 15), sampling=under(FIVE), kind=kind)
    driver.submit("other", [7, 7, 7], max_tokens=12)
    driver.run()
    assert driver.tokens["other"] == driver.alone("other")
    assert driver.chunks["slow"][-1].num_computed_tokens == 13, "all but the token that is sampled after"
    assert "slow" not in driver.tokens
    assert not driver.engine.has_work, "nobody spins while it waits"
    assert driver.grammars is not None
    driver.grammars.compile_all()
    driver.run()
    expected = driver.alone("slow")
    assert driver.tokens["slow"] == (expected if kind is RequestKind.FULL else expected[:1])
    driver.engine.release("slow")
    assert driver.engine.ledger() == []


def test_rows_that_all_wait_for_grammars_are_no_work() -> None:
    driver = driver_with(is_slow=True)
    for index in range(6):  # More than there are rows, prompts of a single token among them.
        driver.submit(f"r{index}", range(1, 2 + index % 3), sampling=under(FIVE))
    driver.run(num_steps_max=20)
    assert driver.tokens == {}
    assert driver.grammars is not None
    driver.grammars.compile_all()
    driver.run()
    assert all(driver.tokens[request_id] == driver.alone(request_id) for request_id in driver.requests)


@pytest.mark.parametrize("compiled", ["before", "after"])
def test_a_text_goes_on_from_the_first_token_of_another_server(compiled: str) -> None:
    driver = driver_with(is_slow=True)
    reservation = driver.reserve("a", [3, 4, 5, 6, 7], sampling=under(FIVE))
    assert driver.grammars is not None
    if compiled == "before":
        driver.grammars.compile_all()
    driver.land(reservation)
    if compiled == "after":
        driver.run()
        driver.grammars.compile_all()
    driver.run()
    assert driver.tokens["a"] == driver.alone("a")
    assert driver.finish_reasons["a"] is FinishReason.STOP


@pytest.mark.parametrize("way", WAYS)
def test_after_failover_the_rest_of_a_text_is_the_same(way: str) -> None:
    """Cut at any token, also within what comes before the grammar starts."""
    prompt, sampling = [5, 6, 7], under(fake_grammar(7, starts_after=(11,)), max_tokens=120)
    driver = WAYS[way]()
    driver.submit("whole", prompt, sampling=sampling)
    driver.run()
    whole = driver.tokens["whole"]
    assert is_text_of(7, whole[whole.index(11) + 1 :])
    cuts = range(1, len(whole), 3)
    for cut in cuts:
        driver.submit(f"rest{cut}", [*prompt, *whole[:cut]], sampling=sampling.after(cut))
        if cut % 4 == 0:
            driver.run()
    driver.run()
    for cut in cuts:
        assert driver.tokens[f"rest{cut}"] == whole[cut:]


@pytest.mark.parametrize("kind", RequestKind)
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_grammar_that_cannot_be_compiled_fails_its_own_request(kind: RequestKind, is_slow: bool) -> None:
    driver = driver_with(is_slow=is_slow)
    assert driver.grammars is not None
    driver.submit("other", [7, 7, 7], max_tokens=12)
    if kind is RequestKind.FROM_REMOTE:
        driver.reserve("bad", [3, 4, 5], sampling=under(BAD))
    else:
        driver.submit("bad", [3, 4, 5], sampling=under(BAD), kind=kind)
    events = driver.step()
    driver.grammars.compile_all()
    while driver.engine.has_work:
        events += driver.step()
    (failure,) = [event for event in events if isinstance(event, RequestFailed)]
    assert isinstance(failure.error, GrammarRefused)
    assert driver.tokens["other"] == driver.alone("other")
    driver.engine.release("bad")  # As whoever reads or writes its blocks does in the end.
    assert driver.engine.ledger() == []
    assert "bad" not in driver.tokens


def test_a_request_that_is_cancelled_while_its_grammar_is_compiled_is_gone() -> None:
    driver = driver_with(is_slow=True)
    driver.submit("a", range(1, 9), sampling=under(FIVE))
    driver.submit("b", range(1, 9), sampling=under(BAD))
    driver.run()
    driver.engine.cancel("a")
    driver.engine.cancel("b")
    assert driver.engine.ledger() == []
    assert driver.grammars is not None
    driver.grammars.compile_all()
    driver.run()
    assert driver.tokens == {}


def test_what_another_server_emitted_must_match_as_well() -> None:
    driver = driver_with()
    driver.submit("a", [1, 2, 5], sampling=under(FIVE, num_emitted=1))
    (failure,) = driver.step()
    assert isinstance(failure, RequestFailed)
    assert isinstance(failure.error, GrammarBroken)
    reservation = driver.reserve("b", [3, 4, 5], sampling=under(FIVE))
    driver.runner.fill(reservation.block_ids, [3, 4, 5])
    assert not driver.engine.admit("b", 10)
    (failure,) = driver.step()
    assert isinstance(failure, RequestFailed)
    assert isinstance(failure.error, InvalidRequest)
    assert driver.engine.ledger() == []


def test_a_grammar_that_takes_too_long_to_follow_costs_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "TIME_MAX_S", -1.0)
    driver = driver_with()
    driver.submit("hard", [1, 2, 3], sampling=under(FIVE))
    driver.submit("other", [7, 7, 7], max_tokens=12)
    events = [event for _ in range(15) for event in driver.step()]
    (failure,) = [event for event in events if isinstance(event, RequestFailed)]
    assert isinstance(failure.error, GrammarRefused)
    assert "too ambiguous" in str(failure.error)
    assert driver.tokens == {"other": driver.alone("other")}
    assert driver.engine.ledger() == []


def test_an_engine_without_grammars_says_so() -> None:
    driver = EngineDriver()
    with pytest.raises(InvalidRequest, match="this server follows none") as caught:
        driver.submit("a", [1], sampling=under(FIVE))
    assert caught.value.param == "grammar"
    assert not driver.engine.has_work


@pytest.mark.parametrize("seed", range(60))
def test_in_any_crowd_and_order_every_text_is_the_one_it_is_alone(seed: int) -> None:
    """Small pools, so that some are preempted; grammars that come late, cancelled requests, drafts or overlap."""
    rng = random.Random(seed)
    overlap = rng.random() < 0.5
    driver = EngineDriver(
        grammars=FakeGrammars(is_slow=rng.random() < 0.7),
        num_blocks=rng.randrange(14, 30),
        overlap=overlap,
        speculation=None if overlap or rng.random() < 0.5 else drafts(),
        max_batch_size=rng.randrange(1, 5),
    )
    driver.engine.call_between_steps_by(lambda command: command())
    assert driver.grammars is not None
    cancelled = set()
    for index in range(12):
        grammar = fake_grammar(rng.choice((2, 3, 7)), rng.choice(((), (), (11,))))
        sampling = under(grammar, max_tokens=rng.randrange(1, 40)) if rng.random() < 0.7 else None
        prompt = [rng.randrange(97) for _ in range(rng.randrange(1, 12))]
        driver.submit(f"r{index}", prompt, sampling=sampling, max_tokens=rng.randrange(1, 20))
        for _ in range(rng.randrange(6)):
            driver.step()
        if rng.random() < 0.3:
            driver.grammars.compile_all()
        if rng.random() < 0.1:
            driver.engine.cancel(f"r{index}")
            cancelled.add(f"r{index}")
    driver.run()
    driver.grammars.compile_all()
    driver.run()
    for request_id in driver.requests.keys() - cancelled:
        assert driver.tokens[request_id] == driver.alone(request_id)
    assert driver.engine.ledger() == []
