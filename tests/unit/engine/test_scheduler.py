"""Who is computed in which step. Through the engine, since that is where the rows can be seen."""

from __future__ import annotations

import pytest

from disaggregated.engine.api import FinishReason, RequestKind, TokensSampled
from disaggregated.engine.sequence import Sequence
from disaggregated.engine.speculation import Speculation
from disaggregated.errors import PoolExhausted
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.engine_driver import EngineDriver


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    driver = EngineDriver(max_num_tokens=8)
    driver.submit("long", range(19), max_tokens=1)
    driver.run()
    assert driver.runner.batches == [[("long", 0, 8)], [("long", 8, 8)], [("long", 16, 3)]]


def test_who_decodes_goes_first_and_the_rest_of_the_budget_is_the_prompts() -> None:
    driver = EngineDriver(max_num_tokens=8, max_batch_size=4)
    driver.submit("a", [1, 2], max_tokens=9)
    driver.submit("b", [3, 4], max_tokens=9)
    driver.step()
    driver.submit("long", range(20))
    driver.step()
    assert driver.rows == [("a", 2, 1), ("b", 2, 1), ("long", 0, 6)]
    driver.step()
    assert driver.rows == [("a", 3, 1), ("b", 3, 1), ("long", 6, 6)]


def test_prompts_share_a_step_in_the_order_in_which_they_came() -> None:
    driver = EngineDriver(max_num_tokens=8)
    for name in ("a", "b", "c"):
        driver.submit(name, range(3))
    driver.step()
    assert driver.rows == [("a", 0, 3), ("b", 0, 3), ("c", 0, 2)]


def test_a_sequence_beyond_the_batch_size_waits_for_a_row() -> None:
    driver = EngineDriver(max_batch_size=2)
    for name in ("a", "b", "c"):
        driver.submit(name, [1], max_tokens=2)
    driver.step()
    driver.step()
    assert [row[0] for row in driver.rows] == ["a", "b"]
    driver.step()
    assert driver.rows == [("c", 0, 1)]


def test_a_budget_smaller_than_the_batch_limits_the_rows_so_that_all_of_them_move() -> None:
    driver = EngineDriver(max_num_tokens=2, max_batch_size=4)
    for name in ("a", "b", "c"):
        driver.submit(name, [1], max_tokens=3)
    driver.step()
    assert [row[0] for row in driver.rows] == ["a", "b"]
    driver.run()
    assert all(driver.tokens[name] == driver.alone(name) for name in "abc")


def test_when_blocks_run_out_the_youngest_starts_again_and_gets_the_same_tokens() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, max_num_tokens=8, enable_block_reuse=False)
    driver.submit("old", [1, 2], max_tokens=9)
    driver.submit("young", [3, 4], max_tokens=9)
    driver.run()
    statistics = driver.engine.statistics()
    assert statistics.preemptions_total > 0
    assert statistics.num_blocks_free == 6
    assert {name: driver.tokens[name] for name in ("old", "young")} == {
        name: driver.alone(name) for name in ("old", "young")
    }
    steps_of_old = [row for batch in driver.runner.batches for row in batch if row[0] == "old"]
    assert steps_of_old == [("old", 0, 2), *(("old", position, 1) for position in range(2, 10))]


def test_a_preempted_sequence_finds_its_computed_blocks_in_the_prefix_cache() -> None:
    driver = EngineDriver(num_blocks=7, block_size=2, max_num_tokens=8)
    driver.submit("old", [1, 2], max_tokens=7)
    driver.submit("young", [3, 4, 5, 6, 7], max_tokens=7)
    driver.run()
    assert driver.engine.statistics().preemptions_total == 1
    starts = [row for batch in driver.runner.batches for row in batch if row[0] == "young" and row[2] > 1]
    assert starts == [("young", 0, 5), ("young", 6, 3)]
    assert driver.tokens["young"] == driver.alone("young")


def test_those_before_it_evict_other_blocks_than_the_cached_ones_of_who_waits() -> None:
    driver = EngineDriver(num_blocks=16, max_num_tokens=8, max_batch_size=1)
    for name, begin in (("chat", 0), ("over", 100)):
        driver.submit(name, range(begin, begin + 24), max_tokens=1)
        driver.run()
    driver.submit("big", range(200, 232), max_tokens=2)
    driver.submit("again", [*range(24), 50], max_tokens=2)
    driver.run()
    starts = [row for batch in driver.runner.batches for row in batch if row[0] == "again"]
    assert starts[0] == ("again", 24, 1)
    assert driver.tokens["again"] == driver.alone("again")


def test_a_sequence_starts_only_when_those_that_run_keep_a_block_to_grow_into() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, max_num_tokens=8)
    driver.submit("old", [1, 2], max_tokens=6)
    driver.step()
    driver.submit("young", range(10, 17), max_tokens=4)  # Would fit, but leave nothing for "old" to grow into.
    driver.step()
    assert [row[0] for row in driver.rows] == ["old"]
    driver.run()
    assert driver.engine.statistics().preemptions_total == 0
    assert driver.tokens["young"] == driver.alone("young")


def test_a_preempted_sequence_goes_before_those_that_never_ran_and_before_reservations() -> None:
    driver = EngineDriver(num_blocks=6, block_size=2, max_num_tokens=8, max_batch_size=2)
    driver.submit("old", [1, 2], max_tokens=9)
    driver.submit("young", [3, 4], max_tokens=9)
    driver.submit("new", [5], max_tokens=2)
    while driver.engine.statistics().preemptions_total == 0:
        driver.step()
    assert driver.num_free == 2
    with pytest.raises(PoolExhausted, match="wanted 1 KV blocks, 0 are free"):
        driver.reserve("remote", [1])
    driver.run()
    order = [row[0] for batch in driver.runner.batches for row in batch]
    assert order.index("new") > len(order) - 1 - order[::-1].index("old")
    assert order[order.index("new") - 1] == "young"
    assert driver.tokens["young"] == driver.alone("young")


def test_a_preempted_sequence_keeps_its_claim_while_a_prompt_takes_the_whole_budget() -> None:
    driver = EngineDriver(num_blocks=21, block_size=2, max_num_tokens=3)
    driver.submit("old", [1, 2], max_tokens=9)
    driver.submit("young", [3, 4], max_tokens=9)
    driver.submit("long", range(10, 40), kind=RequestKind.PREFILL_ONLY)
    while driver.engine.statistics().preemptions_total == 0:
        driver.step()
    assert [row[2] for row in driver.rows] == [1, 2]
    with pytest.raises(PoolExhausted, match="wanted 1 KV blocks, 0 are free"):
        driver.reserve("remote", [1])


def test_a_prompt_preempted_before_its_first_token_does_not_count_its_own_blocks_as_cached() -> None:
    driver = EngineDriver(num_blocks=7, block_size=2, max_num_tokens=2)
    driver.submit("old", [1, 2], max_tokens=8)
    driver.step()
    driver.submit("young", range(10, 17), max_tokens=1)
    driver.run()
    assert driver.engine.statistics().preemptions_total == 1
    assert [("young", 4, 2)] in driver.runner.batches  # Again from where its two full blocks end, now alone.
    assert {chunk.num_cached_tokens for chunk in driver.chunks["young"]} == {0}
    assert driver.engine.statistics().prompt_cached_tokens_total == 0
    assert driver.tokens["young"] == driver.alone("young")


def test_a_prefill_whose_blocks_may_be_read_elsewhere_is_never_preempted() -> None:
    driver = EngineDriver(num_blocks=7, block_size=2, max_num_tokens=2)
    driver.submit("full", [1, 2], max_tokens=8)
    driver.step()
    driver.submit("prefill", range(10, 17), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.engine.statistics().preemptions_total == 1  # "full", itself.
    positions = [row[1] for batch in driver.runner.batches for row in batch if row[0] == "prefill"]
    assert positions == sorted(set(positions))
    assert driver.tokens["prefill"] == driver.alone("prefill")[:1]
    driver.engine.release("prefill")
    driver.run()
    assert driver.tokens["full"] == driver.alone("full")


def test_a_lone_sequence_may_fill_the_pool_to_the_last_slot() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4, max_num_tokens=8)
    driver.submit("lone", range(10), max_tokens=100)
    driver.run()
    assert driver.tokens["lone"] == driver.alone("lone")
    assert len(driver.tokens["lone"]) == driver.engine.max_seq_len - 10 == 7
    assert driver.finish_reasons["lone"] == "length"


def test_without_room_there_is_no_work_until_a_lease_comes_back() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4)
    driver.submit("leased", range(12), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    driver.submit("next", range(20, 30))
    driver.run()
    assert "next" not in driver.tokens
    assert driver.engine.statistics().num_waiting_tokens == 10
    driver.engine.release("leased")
    assert driver.engine.has_work
    driver.run()
    assert driver.tokens["next"] == driver.alone("next")


def test_when_the_first_in_the_queue_leaves_the_next_one_may_fit() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4)
    driver.submit("leased", range(12), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    driver.submit("large", range(20, 30))
    driver.submit("small", [1, 2], max_tokens=3)
    driver.run()
    assert "small" not in driver.tokens  # First come, first served.
    driver.engine.cancel("large")
    driver.run()
    assert driver.tokens["small"] == driver.alone("small")


def test_a_reservation_leaves_the_blocks_that_running_sequences_will_want() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4)
    driver.submit("running", [1, 2], max_tokens=20)
    driver.step()
    with pytest.raises(PoolExhausted, match="wanted 3 KV blocks, 2 are free"):
        driver.reserve("remote", range(12))
    assert driver.reserve("remote", range(8)).num_cached_blocks == 0


def test_a_reservation_does_not_take_what_the_first_in_the_queue_waits_for() -> None:
    driver = EngineDriver(num_blocks=4, block_size=4)
    driver.submit("leased", range(8), kind=RequestKind.PREFILL_ONLY)
    driver.run()
    driver.submit("waiting", range(20, 32))
    driver.run()
    with pytest.raises(PoolExhausted, match="0 are free"):
        driver.reserve("remote", [1])
    driver.engine.release("leased")
    with pytest.raises(PoolExhausted):  # Also in the moment between the release and the step that uses it.
        driver.reserve("remote", range(40, 48))
    driver.step()
    assert [row[0] for row in driver.rows] == ["waiting"]
    driver.engine.cancel("waiting")
    assert len(driver.reserve("remote", range(40, 56)).block_ids) == 4  # Nobody waits any more.


def test_a_landed_sequence_joins_the_next_step_before_any_prompt() -> None:
    driver = EngineDriver(max_num_tokens=4)
    driver.submit("long", range(30, 50))
    driver.step()
    reservation = driver.reserve("remote", range(6))
    driver.land(reservation)
    driver.step()
    assert driver.rows == [("remote", 6, 1), ("long", 4, 3)]


def test_landed_sequences_do_not_take_the_row_of_who_came_earlier() -> None:
    driver = EngineDriver(max_batch_size=1)
    driver.submit("running", [1], max_tokens=2)
    driver.step()
    driver.submit("earlier", [2], max_tokens=2)
    driver.land(driver.reserve("remote", range(6)))
    driver.step()
    driver.step()
    assert driver.rows == [("earlier", 0, 1)]
    driver.run()
    assert driver.tokens["remote"] == driver.alone("remote")


def test_a_landed_sequence_goes_before_a_prompt_that_came_later() -> None:
    driver = EngineDriver(max_batch_size=1)
    driver.submit("running", [1], max_tokens=2)
    driver.step()
    driver.land(driver.reserve("remote", range(6), max_tokens=2))
    driver.submit("later", [2], max_tokens=2)
    driver.step()
    driver.step()
    assert driver.rows == [("remote", 6, 1)]
    driver.run()
    assert driver.tokens["later"] == driver.alone("later")


def test_two_equal_prompts_in_one_step_share_nothing_that_is_not_computed() -> None:
    driver = EngineDriver(max_num_tokens=32)
    driver.submit("a", range(12))
    driver.submit("b", range(12))
    driver.step()
    assert driver.rows == [("a", 0, 12), ("b", 0, 12)]
    driver.submit("c", range(12))
    driver.step()
    assert driver.rows[-1] == ("c", 8, 4)
    driver.run()
    assert driver.tokens["a"] == driver.tokens["b"] == driver.tokens["c"] == driver.alone("a")


def test_a_computed_chunk_of_an_unfinished_prompt_is_already_shared() -> None:
    driver = EngineDriver(max_num_tokens=8)
    driver.submit("a", range(18))
    driver.step()
    driver.step()
    driver.submit("b", range(18))
    driver.step()
    assert driver.rows == [("a", 16, 2), ("b", 16, 2)]


@pytest.mark.parametrize("num_prompt_tokens", range(1, 14))
def test_the_prefix_cache_never_covers_the_last_prompt_token(num_prompt_tokens: int) -> None:
    driver = EngineDriver(max_num_tokens=32)
    driver.submit("a", range(num_prompt_tokens), max_tokens=6)
    driver.run()
    for name, kind in (("full", RequestKind.FULL), ("prefill", RequestKind.PREFILL_ONLY)):
        driver.submit(name, range(num_prompt_tokens), max_tokens=6, kind=kind)
        driver.step()
        num_cached = (num_prompt_tokens - 1) // 4 * 4
        assert driver.rows == [(name, num_cached, num_prompt_tokens - num_cached)]
        assert driver.chunks[name][0].num_cached_tokens == num_cached
        driver.engine.cancel(name)
    driver.engine.release("prefill")


def test_without_block_reuse_nothing_is_shared() -> None:
    driver = EngineDriver(max_num_tokens=32, enable_block_reuse=False)
    for name in ("a", "b"):
        driver.submit(name, range(12))
        driver.run()
    assert driver.engine.statistics().prompt_cached_tokens_total == 0
    assert driver.tokens["a"] == driver.tokens["b"]


# Prompts beside decode


def test_a_prompt_makes_decode_steps_longer_by_no_more_than_the_limit() -> None:
    driver = EngineDriver(max_num_tokens=16, max_prefill_tokens_beside_decode=3)
    driver.submit("stream", [1, 2], max_tokens=9)
    driver.step()
    driver.submit("long", range(20), max_tokens=1)
    driver.submit("other", range(30, 34), max_tokens=1)
    driver.step()
    assert driver.rows == [("stream", 2, 1), ("long", 0, 3)]
    while "long" not in driver.finish_reasons:
        driver.step()
        assert sum(num_tokens for _, _, num_tokens in driver.rows) <= 4
    assert driver.rows[-1] == ("other", 0, 1), "what one prompt leaves of the limit is the next one's"


def test_without_anybody_who_decodes_a_prompt_has_the_whole_budget() -> None:
    driver = EngineDriver(max_num_tokens=16, max_prefill_tokens_beside_decode=3)
    driver.submit("a", range(17), max_tokens=1)
    driver.submit("b", range(20, 30), max_tokens=1)
    driver.step()
    assert driver.rows == [("a", 0, 16)]
    driver.step()
    assert driver.rows == [("a", 16, 1), ("b", 0, 10)], "the last token of a prompt is not decoding"


# Drafts


class Right(Speculation):
    """Guesses what comes, for as long as it is told to."""

    def __init__(self, driver_tokens: dict[str, list[int]]) -> None:
        super().__init__(max_draft_len=4, max_matching_ngram_size=2)
        self.tokens = driver_tokens

    def guess(self, sequence: Sequence, num_drafts: int) -> list[int]:
        return self.tokens[sequence.request_id][sequence.num_generated :][:num_drafts]


def test_right_drafts_bring_several_tokens_in_one_event() -> None:
    tokens: dict[str, list[int]] = {}
    driver = EngineDriver(speculation=Right(tokens))
    driver.submit("a", [1, 2], max_tokens=9)
    tokens["a"] = driver.alone("a")
    driver.step()
    (event,) = driver.step()
    assert isinstance(event, TokensSampled)
    assert (event.first_position, len(event.token_ids)) == (3, 5)
    driver.run()
    assert driver.tokens["a"] == tokens["a"]
    assert len(driver.runner.batches) < 9
    statistics = driver.engine.statistics()
    assert statistics.draft_tokens_total == statistics.accepted_draft_tokens_total == 9 - len(driver.runner.batches)


def test_a_stop_token_amid_accepted_drafts_ends_the_sequence_there() -> None:
    tokens: dict[str, list[int]] = {}
    driver = EngineDriver(speculation=Right(tokens))
    driver.submit("probe", [1, 2], max_tokens=9)
    tokens["probe"] = whole = driver.alone("probe")
    driver.run()
    driver.submit("a", [1, 2], sampling=SamplingParams(max_tokens=9, stop_token_ids=frozenset({whole[2]})))
    tokens["a"] = whole
    driver.run()
    assert driver.tokens["a"] == driver.alone("a") == whole[:3]
    assert driver.finish_reasons["a"] is FinishReason.STOP
    assert driver.num_free == 16


def test_drafts_take_what_prompts_leave_of_the_budget() -> None:
    tokens: dict[str, list[int]] = {}
    driver = EngineDriver(max_num_tokens=8, speculation=Right(tokens))
    driver.submit("a", [1, 2], max_tokens=30)
    tokens["a"] = driver.alone("a")
    driver.step()
    driver.submit("long", range(30), max_tokens=1)
    driver.step()
    assert driver.rows == [("a", 2, 1), ("long", 0, 7)]
    assert driver.runner.num_drafts == 0
    driver.run()
    assert driver.runner.num_drafts > 0


def test_drafts_take_no_block_that_somebody_was_promised() -> None:
    tokens: dict[str, list[int]] = {}
    driver = EngineDriver(num_blocks=3, block_size=4, speculation=Right(tokens))
    driver.submit("a", [1, 2], max_tokens=9)
    tokens["a"] = driver.alone("a")
    driver.step()
    driver.submit("waits", range(10, 18), max_tokens=1)
    driver.step()
    assert driver.num_free == 2, "its second draft would have wanted a block"
    assert driver.runner.num_drafts == 1
    driver.run()
    assert all(driver.tokens[name] == driver.alone(name) for name in ("a", "waits"))
