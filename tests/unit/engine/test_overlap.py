"""A step is launched before the tokens of the one before are known: the same tokens, and no block is free too early."""

from __future__ import annotations

import pytest

from disaggregated.engine.api import FinishReason, RequestKind, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.sampling_params import SamplingParams
from tests.support.fake_runner import FakeModelRunner
from tests.unit.engine.engine_driver import EngineDriver


def first_step_without_tokens(driver: EngineDriver) -> None:
    assert driver.step() == []
    assert driver.engine.has_work


def test_a_step_brings_what_the_one_before_computed() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("a", [1, 2], max_tokens=3)
    first_step_without_tokens(driver)
    chunk, tokens = driver.step()
    assert (chunk.request_id, tokens.request_id) == ("a", "a")
    assert driver.runner.num_launched == 2
    driver.run()
    assert driver.tokens["a"] == driver.alone("a")
    assert driver.runner.num_launched == 3, "that max_tokens ends it was known before"


def test_the_row_after_a_token_that_ends_a_sequence_is_dropped() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("probe", [1, 2], max_tokens=9)
    driver.run()
    third = driver.tokens["probe"][2]
    num_launched = driver.runner.num_launched
    driver.submit("a", [1, 2], sampling=SamplingParams(max_tokens=9, stop_token_ids=frozenset({third})))
    driver.run()
    assert driver.tokens["a"] == driver.tokens["probe"][:3]
    assert driver.finish_reasons["a"] is FinishReason.STOP
    assert driver.runner.num_launched - num_launched == 4
    assert driver.num_free == 16


def test_blocks_come_back_only_when_the_last_launched_step_is_finished() -> None:
    driver = EngineDriver(overlap=True, enable_block_reuse=False)
    driver.submit("a", range(8), max_tokens=9)
    driver.step()
    driver.step()
    driver.engine.cancel("a")
    driver.engine.check_integrity()
    assert driver.num_free == 13, "the launched step writes its first token's KV into a third block"
    assert driver.engine.has_work
    assert driver.step() == []
    assert driver.num_free == 16
    assert not driver.engine.has_work


def test_a_request_that_is_cancelled_or_released_while_it_is_launched_tells_nothing_more() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("context", range(6), kind=RequestKind.PREFILL_ONLY)
    driver.submit("full", range(6, 8), max_tokens=9)
    driver.step()
    driver.engine.release("context")
    driver.engine.cancel("full")
    driver.engine.cancel("full")
    driver.engine.release("context")
    driver.run()
    assert not driver.tokens
    assert not driver.chunks
    assert driver.engine.ledger() == []


def test_a_prefill_of_which_a_chunk_was_told_stays_leased_while_it_is_launched() -> None:
    driver = EngineDriver(overlap=True, max_num_tokens=4)
    driver.submit("context", range(12), kind=RequestKind.PREFILL_ONLY)
    driver.step()
    driver.step()
    assert [chunk.num_computed_tokens for chunk in driver.chunks["context"]] == [4]
    driver.engine.cancel("context")
    driver.run()
    (entry,) = driver.engine.ledger()
    assert (entry.kind, entry.num_blocks) == ("leased", 3)
    driver.engine.release("context")
    assert driver.engine.ledger() == []


def test_a_prefill_gets_no_row_after_its_token_and_is_leased() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("context", range(6), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.tokens["context"] == driver.alone("context")[:1]
    assert driver.runner.batches == [[("context", 0, 6)]]
    driver.engine.release("context")
    assert driver.num_free == 16


def test_nobody_is_preempted_while_a_step_computes_it_and_the_tokens_are_the_same() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, max_num_tokens=8, enable_block_reuse=False, overlap=True)
    driver.submit("old", [1, 2], max_tokens=9)
    driver.submit("young", [3, 4], max_tokens=9)
    driver.run()
    assert driver.engine.statistics().preemptions_total > 0
    assert all(driver.tokens[name] == driver.alone(name) for name in ("old", "young"))


def test_a_sequence_from_elsewhere_joins_while_steps_are_launched() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("here", [1, 2], max_tokens=12)
    driver.step()
    reservation = driver.reserve("remote", range(10, 19), max_tokens=8)
    driver.step()
    driver.land(reservation)
    driver.run()
    assert all(driver.tokens[name] == driver.alone(name) for name in ("here", "remote"))


def test_a_finished_prompt_is_found_by_the_next_one_only_when_it_is_computed() -> None:
    driver = EngineDriver(overlap=True, max_num_tokens=64)
    driver.submit("a", range(8), max_tokens=1)
    driver.step()
    driver.submit("b", range(8), max_tokens=1)
    driver.step()
    assert driver.rows == [("a", 0, 8)], "the device has done only the first step; the second holds b whole"
    driver.run()
    assert driver.runner.batches[1] == [("b", 0, 8)]
    driver.submit("c", range(8), max_tokens=1)
    driver.run()
    assert driver.runner.batches[2] == [("c", 4, 4)]


def test_the_age_of_a_step_counts_from_the_last_one_that_was_finished() -> None:
    now_s = 0.0
    driver = EngineDriver(overlap=True, clock=lambda: now_s)
    driver.submit("a", [1], max_tokens=2)
    driver.step()
    now_s = 5.0
    assert driver.engine.statistics().step_age_s == 5.0
    assert driver.engine.statistics().step == 0
    driver.step()
    assert (driver.engine.statistics().step, driver.engine.statistics().step_age_s) == (1, 0.0)


def test_an_event_has_one_token_and_its_position() -> None:
    driver = EngineDriver(overlap=True)
    driver.submit("a", [1, 2], max_tokens=3)
    events: list[TokensSampled] = []
    while driver.engine.has_work:
        events += [event for event in driver.step() if isinstance(event, TokensSampled)]
    assert [(event.first_position, len(event.token_ids)) for event in events] == [(2, 1), (3, 1), (4, 1)]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]


def test_a_runner_that_cannot_launch_is_refused_at_start() -> None:
    runner = FakeModelRunner(num_blocks=4, block_size=4)
    with pytest.raises(AssertionError, match="can't launch a step ahead"):
        LLMEngine(
            runner,
            EngineLimits(num_blocks=4, block_size=4, max_num_tokens=4, max_batch_size=1, max_seq_len=16),
            EngineOptions(overlap=True),
        )
