"""What the runner makes of a batch: the step's layout, who samples, and where in the pool things go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.engine.step_layout import step_tensors
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import GREEDY, Driven, make_runner, random_blocks, random_prompt
from tests.unit.engine.tiny_models import VOCAB_SIZE, write_model


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchModelRunner:
    return make_runner(write_model("llama", tmp_path_factory.mktemp("llama")).path)


def scheduled(
    token_ids: list[int], first_position: int, block_table: list[int], sampling: SamplingParams | None = GREEDY
) -> ScheduledSequence:
    return ScheduledSequence(
        request_id="r",
        token_ids=token_ids,
        first_position=first_position,
        block_table=block_table,
        sampling=sampling,
    )


def test_a_step_lays_tokens_out_one_row_after_the_other() -> None:
    batch = [scheduled([5, 6, 7], 3, [9, 2]), scheduled([8], 0, [4], None), scheduled([1], 8, [1, 0, 3])]
    token_ids, attention, last_tokens = step_tensors(batch, 4, torch.device("cpu"))
    assert token_ids.tolist() == [5, 6, 7, 8, 1]
    assert attention.query_start.tolist() == [0, 3, 4, 5]
    assert attention.first_position.tolist() == [3, 0, 8]
    assert attention.block_tables.tolist() == [[9, 2, 0], [4, 0, 0], [1, 0, 3]]
    assert attention.positions.tolist() == [3, 4, 5, 0, 8]
    assert attention.slots.tolist() == [39, 8, 9, 16, 12]
    assert attention.rows == ((3, 3), (0, 1), (8, 1))
    assert attention.max_context_len == 9
    assert last_tokens.tolist() == [2, 4]
    for name in ("query_start", "first_position", "block_tables"):
        assert getattr(attention, name).dtype is torch.int32
        assert getattr(attention, name).is_contiguous()


def with_drafts(row: ScheduledSequence, *drafts: int) -> ScheduledSequence:
    return dataclasses.replace(row, draft_token_ids=drafts)


def test_drafts_are_laid_out_behind_their_rows_tokens_and_each_is_sampled_after() -> None:
    batch = [
        scheduled([5, 6], 3, [9, 2], None),
        with_drafts(scheduled([7], 8, [1, 0, 3]), 21, 22),
        scheduled([8], 2, [4]),
    ]
    token_ids, attention, sampled = step_tensors(batch, 4, torch.device("cpu"))
    assert token_ids.tolist() == [5, 6, 7, 21, 22, 8]
    assert attention.query_start.tolist() == [0, 2, 5, 6]
    assert attention.positions.tolist() == [3, 4, 8, 9, 10, 2]
    assert attention.slots.tolist() == [39, 8, 12, 13, 14, 18]
    assert attention.rows == ((3, 2), (8, 3), (2, 1))
    assert sampled.tolist() == [2, 3, 4, 5]


def test_a_row_brings_its_token_and_the_drafts_that_are_right_and_batch_mates_notice_nothing(
    runner: TorchModelRunner,
) -> None:
    prompt = random_prompt(20, 3, VOCAB_SIZE)
    sequence = Driven(list(prompt), random_blocks(3, 3), SamplingParams(max_tokens=1, temperature=1.5, seed=4))
    for _ in range(6):
        sequence.token_ids.extend(runner.execute([sequence.take(64)])[0])
    first, *later = sequence.token_ids[len(prompt) :]
    for num_right in range(4):
        drafts = [*later[:num_right], (later[num_right] + 1) % VOCAB_SIZE]
        again = Driven([*prompt, first], random_blocks(3, 5), sequence.sampling)
        mate = Driven(list(prompt), random_blocks(3, 7, taken=again.block_table), sequence.sampling)
        runner.execute([Driven(list(prompt), again.block_table, sequence.sampling).take(64)])
        again.num_computed = len(prompt)
        tokens, mates = runner.execute([with_drafts(again.take(1), *drafts), mate.take(64)])
        assert tokens == later[: num_right + 1]
        assert mates == [first]
        # What a wrong draft left in the pool is overwritten before anything sees it.
        again.token_ids.extend(tokens)
        again.num_computed = len(prompt) + 1 + num_right
        assert runner.execute([again.take(1)]) == [[later[num_right + 1]]]


def test_rows_in_the_middle_of_a_prompt_get_no_token(runner: TorchModelRunner) -> None:
    batch = [scheduled([5, 6], 0, [1], None), scheduled([5, 6], 0, [2]), scheduled([9], 0, [3], None)]
    first, second, third = runner.execute(batch)
    assert (first, len(second), third) == ([], 1, [])
    assert runner.execute(batch[:1]) == [[]]


def test_forbidden_tokens_are_not_chosen(runner: TorchModelRunner) -> None:
    row = scheduled([5, 6], 0, [1])
    ((best,),) = runner.execute([row])
    forbidding = ScheduledSequence(
        request_id="r",
        token_ids=[5, 6],
        first_position=0,
        block_table=[1],
        sampling=GREEDY,
        forbidden_token_ids=frozenset({best}),
    )
    ((other,),) = runner.execute([forbidding])
    assert other != best


def test_the_random_number_belongs_to_the_position_of_the_sampled_token(runner: TorchModelRunner) -> None:
    """A sequence continued from its first sampled token, elsewhere, draws what it would have drawn."""
    sampling = SamplingParams(max_tokens=1, temperature=2.0, seed=99)
    prompt = random_prompt(20, 1, VOCAB_SIZE)
    sequence = Driven(list(prompt), random_blocks(3, 1), sampling)
    for _ in range(8):
        ((token,),) = runner.execute([sequence.take(64)])
        sequence.token_ids.append(token)
    for known in range(1, 8):
        again = Driven(sequence.token_ids[: len(prompt) + known], random_blocks(3, known), sampling)
        assert runner.execute([again.take(64)]) == [[sequence.token_ids[len(prompt) + known]]]


def test_only_the_sequences_own_slots_are_written(tmp_path: Path) -> None:
    runner = make_runner(write_model("qwen2", tmp_path).path)
    runner.execute([scheduled(random_prompt(20, 1, VOCAB_SIZE), 0, [7, 3])])
    pool = torch.stack([layer.values for layer in runner._kv_cache.layers])
    written = ~pool.isnan()
    assert written[:, 7].all()
    assert written[:, 3, :, :, :4].all()
    written[:, 7] = written[:, 3, :, :, :4] = False
    assert not written.any()


def test_the_pool_is_the_buffer_it_was_given() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=3, head_dim=4, block_size=8, dtype="float32", num_blocks=5)
    buffer = bytearray(layout.pool_bytes)
    cache = KVCache(layout, device=torch.device("cpu"), allocate=lambda _: memoryview(buffer))
    cache.layers[1].values[4].fill_(1.0)
    start = layout.offset(1, 4)
    assert buffer[start : start + 4] == b"\x00\x00\x80\x3f"
    assert not any(buffer[:start])
    assert cache.layers[0].values.shape == (5, 2, 3, 8, 4)
