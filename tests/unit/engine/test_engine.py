"""What a server may ask of an engine, and what it hears."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from disaggregated.engine.api import (
    ChunkComputed,
    EngineRequest,
    FinishReason,
    RequestFailed,
    RequestKind,
    ScheduledSequence,
    TokensSampled,
)
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits
from disaggregated.errors import InvalidRequest, PoolExhausted, PromptTooLong, QueueFull, TransferError
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_runner import VOCAB_SIZE
from tests.unit.engine.engine_driver import EngineDriver


def all_back(driver: EngineDriver) -> bool:
    statistics = driver.engine.statistics()
    return driver.engine.ledger() == [] and statistics.num_blocks_free == statistics.num_blocks


# FULL


def test_a_full_request_tells_its_chunks_and_then_each_token_at_its_position() -> None:
    driver = EngineDriver(max_num_tokens=8)
    driver.submit("one", range(10), max_tokens=3)
    tokens = driver.alone("one")
    steps = [driver.step() for _ in range(4)]
    first, second = driver.chunks["one"]
    assert (first.num_computed_tokens, second.num_computed_tokens) == (8, 10)
    assert (len(first.block_ids), len(second.block_ids)) == (2, 3)
    assert steps == [
        [first],
        [second, TokensSampled(request_id="one", first_position=10, token_ids=(tokens[0],))],
        [TokensSampled(request_id="one", first_position=11, token_ids=(tokens[1],))],
        [TokensSampled(request_id="one", first_position=12, token_ids=(tokens[2],), finish_reason=FinishReason.LENGTH)],
    ]
    assert not driver.engine.has_work
    assert all_back(driver)


def test_all_chunks_of_a_step_come_before_its_tokens() -> None:
    driver = EngineDriver(max_num_tokens=32)
    for name in ("a", "b"):
        driver.submit(name, range(5))
    kinds = [type(event) for event in driver.step()]
    assert kinds == [ChunkComputed, ChunkComputed, TokensSampled, TokensSampled]


def test_a_stop_token_ends_a_request_and_is_reported() -> None:
    driver = EngineDriver()
    driver.submit("probe", range(5), max_tokens=6)
    stop = driver.alone("probe")[2]
    driver.submit("one", range(5), sampling=SamplingParams(max_tokens=6, stop_token_ids=frozenset({stop})))
    driver.run()
    assert driver.tokens["one"] == driver.tokens["probe"][: driver.tokens["one"].index(stop) + 1]
    assert driver.finish_reasons["one"] is FinishReason.STOP
    assert all_back(driver)


def test_stop_tokens_are_not_sampled_before_min_tokens() -> None:
    driver = EngineDriver()
    stops = frozenset(range(VOCAB_SIZE - 1))  # All but one token.
    driver.submit("one", range(5), sampling=SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=stops))
    driver.run()
    assert driver.tokens["one"][:3] == [VOCAB_SIZE - 1] * 3
    assert driver.tokens["one"] == driver.alone("one")


def test_a_sequence_ends_at_the_longest_length() -> None:
    driver = EngineDriver(max_seq_len=8)
    driver.submit("one", range(5), max_tokens=100)
    driver.run()
    assert len(driver.tokens["one"]) == 3
    assert driver.finish_reasons["one"] is FinishReason.LENGTH


# PREFILL_ONLY


def test_the_blocks_of_a_prefill_stay_leased_until_they_are_released() -> None:
    driver = EngineDriver(num_blocks=4)
    driver.submit("one", range(10), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.tokens["one"] == driver.alone("one")[:1]
    assert "one" not in driver.finish_reasons
    leased = driver.chunks["one"][-1].block_ids
    kv = driver.runner.read(leased, 10)
    for number in range(6):  # Others come and go in what is left of the pool.
        driver.submit(f"other-{number}", [number, 1], max_tokens=2)
        driver.run()
    assert driver.runner.read(leased, 10) == kv
    assert [(entry.kind, entry.owner, entry.num_blocks) for entry in driver.engine.ledger()] == [("leased", "one", 3)]
    assert driver.engine.statistics().num_blocks_leased == 3
    driver.engine.release("one")
    assert all_back(driver)


@pytest.mark.parametrize(("max_tokens", "finish_reason"), [(1, FinishReason.LENGTH), (2, None)])
def test_a_prefill_says_whether_its_first_token_was_the_last(
    max_tokens: int, finish_reason: FinishReason | None
) -> None:
    driver = EngineDriver()
    driver.submit("one", range(5), max_tokens=max_tokens, kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.finish_reasons.get("one") is finish_reason
    assert driver.engine.statistics().num_blocks_leased == 2  # Either way its reader has to let go.
    driver.engine.release("one")
    assert all_back(driver)


def test_every_chunk_of_a_prefill_tells_the_whole_table_so_far_and_it_never_changes() -> None:
    driver = EngineDriver(max_num_tokens=3)
    driver.submit("warm", range(5), max_tokens=1)
    driver.run()
    driver.submit("one", range(14), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    chunks = driver.chunks["one"]
    assert [chunk.num_computed_tokens for chunk in chunks] == [7, 10, 13, 14]
    assert {chunk.num_cached_tokens for chunk in chunks} == {4}
    assert [len(chunk.block_ids) for chunk in chunks] == [2, 3, 4, 4]
    assert all(chunk.block_ids == chunks[-1].block_ids[: len(chunk.block_ids)] for chunk in chunks)


def test_releasing_a_prefill_that_still_computes_stops_it() -> None:
    driver = EngineDriver(max_num_tokens=3)
    driver.submit("one", range(14), kind=RequestKind.PREFILL_ONLY)
    driver.step()
    driver.engine.release("one")
    assert not driver.engine.has_work
    assert all_back(driver)


# FROM_REMOTE


def test_a_landed_sequence_goes_on_after_its_first_token_as_if_it_had_always_been_here() -> None:
    driver = EngineDriver()
    reservation = driver.reserve("one", range(10), max_tokens=5)
    assert len(reservation.block_ids) == 3
    assert not driver.engine.has_work
    driver.land(reservation)
    events = driver.step()
    assert [event.first_position for event in events if isinstance(event, TokensSampled)] == [11]
    driver.run()
    assert driver.tokens["one"] == driver.alone("one")
    assert len(driver.tokens["one"]) == 5
    assert "one" not in driver.chunks
    assert all_back(driver)


def test_what_has_landed_is_found_by_the_next_reservation_even_the_whole_prompt() -> None:
    driver = EngineDriver()
    first = driver.reserve("one", range(8), max_tokens=20)
    assert driver.reserve("early", range(8)).num_cached_blocks == 0  # Nothing has landed yet.
    driver.land(first)
    second = driver.reserve("two", range(8))
    assert second.num_cached_blocks == 2
    assert second.block_ids == first.block_ids
    driver.land(second)
    driver.engine.release("early")
    driver.run()
    assert driver.tokens["two"] == driver.alone("two")
    assert driver.engine.statistics().prompt_cached_tokens_total == 8
    assert all_back(driver)


def test_a_cancelled_reservation_is_quarantined_until_its_transfer_is_over() -> None:
    driver = EngineDriver(num_blocks=4)
    reservation = driver.reserve("one", range(10))
    driver.engine.cancel("one")
    driver.engine.cancel("one")
    assert [(entry.kind, entry.num_blocks) for entry in driver.engine.ledger()] == [("quarantined", 3)]
    assert driver.engine.statistics().num_blocks_quarantined == 3
    driver.submit("other", [1, 2], max_tokens=3)
    driver.step()
    driver.runner.spoil(reservation.block_ids)  # A late write.
    driver.run()
    assert driver.tokens["other"] == driver.alone("other")
    driver.engine.release("one")
    driver.engine.release("one")
    assert all_back(driver)


def test_a_transfer_that_lands_after_its_cancellation_gives_the_blocks_back() -> None:
    driver = EngineDriver()
    driver.reserve("one", range(10))
    driver.engine.cancel("one")
    assert not driver.engine.admit("one", 3)
    assert all_back(driver)
    assert not driver.engine.admit("one", 3)
    assert not driver.engine.has_work


def test_a_failed_reservation_goes_back_without_a_trace() -> None:
    driver = EngineDriver()
    reservation = driver.reserve("one", range(8))
    driver.runner.spoil(reservation.block_ids)
    driver.engine.release("one")
    assert all_back(driver)
    assert driver.reserve("one", range(8)).num_cached_blocks == 0


@pytest.mark.parametrize(
    ("max_tokens", "stops", "finish_reason"), [(1, [], FinishReason.LENGTH), (5, [3], FinishReason.STOP)]
)
def test_a_first_token_that_ends_the_request_is_told_by_an_event_without_tokens(
    max_tokens: int, stops: list[int], finish_reason: FinishReason
) -> None:
    driver = EngineDriver()
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset(stops))
    driver.engine.reserve(
        EngineRequest(request_id="one", kind=RequestKind.FROM_REMOTE, token_ids=range(6), sampling=sampling)
    )
    assert driver.engine.admit("one", 3)
    assert driver.engine.has_work
    assert driver.step() == [
        TokensSampled(request_id="one", first_position=7, token_ids=(), finish_reason=finish_reason)
    ]
    assert driver.step() == []
    assert driver.runner.batches == []
    assert all_back(driver)


def test_a_preempted_remote_sequence_is_computed_here_with_the_same_tokens() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, enable_block_reuse=False)
    for name, prompt in (("old", [1, 2]), ("young", [3, 4])):
        driver.land(driver.reserve(name, prompt, max_tokens=9))
    driver.run()
    assert driver.engine.statistics().preemptions_total > 0
    assert driver.tokens["old"] == driver.alone("old")
    assert driver.tokens["young"] == driver.alone("young")
    assert driver.chunks == {}


# Cancellation and refusal


@pytest.mark.parametrize("num_steps", range(7))
@pytest.mark.parametrize("kind", [RequestKind.FULL, RequestKind.PREFILL_ONLY])
def test_a_request_cancelled_at_any_moment_says_nothing_more_and_its_blocks_come_back(
    kind: RequestKind, num_steps: int
) -> None:
    driver = EngineDriver(max_num_tokens=4)
    driver.submit("other", range(30, 35), max_tokens=9)
    driver.submit("one", range(10), max_tokens=4, kind=kind)
    for _ in range(num_steps):
        driver.step()
    driver.engine.cancel("one")
    driver.engine.cancel("one")
    heard = [len(driver.chunks.get("one", [])), len(driver.tokens.get("one", []))]
    driver.run()
    assert heard == [len(driver.chunks.get("one", [])), len(driver.tokens.get("one", []))]
    assert (driver.engine.ledger() == []) == (kind is RequestKind.FULL or heard[0] == 0)
    driver.engine.release("one")
    assert all_back(driver)
    assert driver.tokens["other"] == driver.alone("other")


def test_cancelling_and_releasing_what_was_never_here_does_nothing() -> None:
    driver = EngineDriver()
    driver.engine.cancel("nobody")
    driver.engine.release("nobody")
    assert all_back(driver)


def test_releasing_a_request_that_decodes_does_nothing() -> None:
    driver = EngineDriver()
    driver.land(driver.reserve("one", range(5)))
    driver.engine.release("one")
    driver.run()
    assert driver.tokens["one"] == driver.alone("one")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "words"),
    [
        ([], 1, InvalidRequest, "the prompt is empty"),
        ([1], 0, InvalidRequest, "max_tokens is 0, it must be at least 1"),
        (range(100), 1, PromptTooLong, "the prompt has 100 tokens; with one token after it, 100 is the limit"),
        (range(65), 1, PoolExhausted, "the prompt of 65 tokens wants 17 KV blocks, the whole pool has 16"),
    ],
)
@pytest.mark.parametrize("kind", list(RequestKind))
def test_what_can_never_be_served_is_refused_at_once_with_numbers(
    kind: RequestKind, prompt: Sequence[int], max_tokens: int, error: type[Exception], words: str
) -> None:
    driver = EngineDriver(max_seq_len=100)
    with pytest.raises(error, match=words):
        driver.ask("one", prompt, max_tokens=max_tokens, kind=kind)
    assert not driver.engine.has_work
    assert all_back(driver)


def test_an_id_is_refused_while_it_is_here_and_taken_again_afterwards() -> None:
    driver = EngineDriver()
    driver.submit("one", [1])
    with pytest.raises(InvalidRequest, match="request one is here already"):
        driver.submit("one", [1])
    driver.run()
    driver.submit("one", [1])


def test_a_full_queue_refuses() -> None:
    driver = EngineDriver(num_waiting_max=2)
    driver.submit("a", [1])
    driver.submit("b", [1])
    with pytest.raises(QueueFull, match="2 requests wait already, the limit is 2"):
        driver.submit("c", [1])
    driver.run()
    driver.submit("c", [1])


def test_what_the_runner_raises_leaves_the_step_as_it_is() -> None:
    class BrokenRunner:
        def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
            raise RuntimeError("device lost")

    engine = LLMEngine(
        BrokenRunner(), EngineLimits(num_blocks=4, block_size=4, max_num_tokens=4, max_batch_size=1, max_seq_len=16)
    )
    engine.submit(
        EngineRequest(request_id="one", kind=RequestKind.FULL, token_ids=[1], sampling=SamplingParams(max_tokens=1))
    )
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()


# Numbers


def test_statistics_count_what_happened() -> None:
    driver = EngineDriver(max_num_tokens=8, max_batch_size=1)
    driver.submit("a", range(10), max_tokens=3)
    driver.submit("b", range(10), max_tokens=3)
    driver.step()
    statistics = driver.engine.statistics()
    assert (statistics.step, statistics.num_running, statistics.num_waiting) == (1, 1, 1)
    assert statistics.num_waiting_tokens == 2 + 10
    assert statistics.num_blocks_free == 13
    driver.run()
    statistics = driver.engine.statistics()
    assert (statistics.prompt_tokens_total, statistics.prompt_cached_tokens_total) == (20, 8)
    assert statistics.generation_tokens_total == 6
    assert (statistics.num_running, statistics.num_waiting, statistics.num_waiting_tokens) == (0, 0, 0)


def test_the_age_of_a_step_grows_only_while_there_is_work() -> None:
    now_s = 100.0
    driver = EngineDriver(clock=lambda: now_s)
    now_s = 160.0
    assert driver.engine.statistics().step_age_s == 0.0
    driver.submit("one", [1], max_tokens=2)
    now_s = 161.0
    assert driver.engine.statistics().step_age_s == 1.0  # Since the work came; the idle minute before does not count.
    driver.step()
    now_s = 164.0
    assert driver.engine.statistics().step_age_s == 3.0
    assert [(entry.kind, entry.owner, entry.age_s) for entry in driver.engine.ledger()] == [("sequence", "one", 3.0)]
    driver.run()
    assert driver.engine.statistics().step_age_s == 0.0


# What the model does not know


def test_a_prompt_with_an_id_that_the_model_does_not_have_is_refused() -> None:
    driver = EngineDriver(vocab_size=VOCAB_SIZE)
    with pytest.raises(InvalidRequest, match="token id"):
        driver.submit("one", [1, VOCAB_SIZE])
    assert all_back(driver)


def test_a_first_token_that_the_model_does_not_have_fails_its_request_alone() -> None:
    driver = EngineDriver(vocab_size=VOCAB_SIZE)
    request = EngineRequest(
        request_id="one", kind=RequestKind.FROM_REMOTE, token_ids=range(5), sampling=SamplingParams(max_tokens=3)
    )
    driver.engine.reserve(request)
    assert not driver.engine.admit("one", VOCAB_SIZE)
    (event,) = driver.engine.step()
    assert isinstance(event, RequestFailed)
    assert isinstance(event.error, TransferError)
    assert all_back(driver)
