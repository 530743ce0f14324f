"""Steps of nothing but decoding in one call: the bits of the way over tensors, and nothing read or written outside."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch

from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import DecodeProgram, DecodeRows
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.runners import GREEDY, Driven, generate, make_runner, random_blocks, random_prompt
from tests.unit.engine.test_native_step import IN_ONE_CALL, ISAS, OpByOp, all_equal, loaded, stored_bytes
from tests.unit.engine.tiny_models import VOCAB_SIZE, write_model

pytestmark = pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")

WITH_SOFTCAP: Final = "gemma2"
LENGTHS: Final = (70, 1, 16, 33, 5)
SAMPLINGS: Final = (
    GREEDY,
    SamplingParams(max_tokens=1, temperature=0.9, seed=3),
    SamplingParams(max_tokens=1, temperature=1.5, top_p=0.8, top_k=40, seed=2**63),
    SamplingParams(max_tokens=1, logit_bias=((7, 30.0),)),
    SamplingParams(max_tokens=1, allowed_token_ids=frozenset({5, 9, 11})),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("llama")).path


def decode_of(runner: TorchModelRunner) -> DecodeProgram:
    assert runner._model.decode is not None
    return runner._model.decode


def begun(runner: TorchModelRunner, samplings: tuple[SamplingParams, ...] = (GREEDY,) * len(LENGTHS)) -> list[Driven]:
    """Sequences whose prompts are in the pool, but for the last token."""
    blocks = random_blocks(6 * len(LENGTHS), 1)
    sequences = [
        Driven(random_prompt(length, i, VOCAB_SIZE), [blocks.pop() for _ in range(6)], sampling)
        for i, (length, sampling) in enumerate(zip(LENGTHS, samplings, strict=True))
    ]
    for sequence in sequences:
        if len(sequence.token_ids) > 1:
            runner.execute([sequence.take(len(sequence.token_ids) - 1)])
    return sequences


def decode_rows(rows: list[ScheduledSequence]) -> DecodeRows:
    tokens, positions = [row.token_ids[0] for row in rows], [row.first_position for row in rows]
    return DecodeRows(tokens, positions, [row.block_table for row in rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", sorted(set(IN_ONE_CALL) - {WITH_SOFTCAP}))
def test_a_decode_step_gives_the_bits_of_the_way_over_tensors(family: str, isa: str, tmp_path: Path) -> None:
    path = write_model(family, tmp_path).path
    one, other = make_runner(path, ops=loaded(isa)), make_runner(path, ops=loaded(isa, num_threads=2))
    ones, others = begun(one), begun(other)
    for present in ([0], [1, 2, 3], [0, 4], [4, 3, 2, 1, 0]):
        rows, pools = decode_rows([ones[i].take(1) for i in present]), one._kv_cache.layers
        expected = other.logits([others[i].take(1) for i in present])
        assert torch.equal(decode_of(one).logits(rows, pools), expected)
        likeliest = decode_of(one).likeliest(rows, pools)
        assert likeliest == expected.argmax(-1).tolist()
        for sequences in (ones, others):
            for i, token in zip(present, likeliest, strict=True):
                sequences[i].token_ids.append(token)
    assert all_equal(stored_bytes(one), stored_bytes(other))


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_tokens_are_the_same_however_they_are_sampled(llama: Path, quantization: str, kv_dtype: str) -> None:
    in_one_call = make_runner(llama, ops=loaded(quantization=quantization), kv_dtype=kv_dtype)
    op_by_op = make_runner(llama, ops=OpByOp(loaded(quantization=quantization)), kv_dtype=kv_dtype)
    assert op_by_op._model.decode is None
    tokens = [generate(runner, begun(runner, SAMPLINGS), 12, [1] * 5) for runner in (in_one_call, op_by_op)]
    assert tokens[0] == tokens[1]


def test_a_model_that_caps_its_logits_takes_the_way_over_tensors(tmp_path: Path) -> None:
    runner = make_runner(write_model(WITH_SOFTCAP, tmp_path).path, ops=loaded())
    assert runner._model.decode is None


@pytest.mark.parametrize(
    ("token_id", "position", "table"),
    [
        (VOCAB_SIZE, 4, [3]),
        (-1, 4, [3]),
        (5, 16, [3]),
        (5, -1, [3]),
        (5, 1024, [3] * 65),
        (5, 4, [160]),
        (5, 20, [160, 3]),
        (5, 4, [-1]),
    ],
)
def test_a_row_that_would_reach_outside_is_refused_and_nothing_is_written(
    llama: Path, token_id: int, position: int, table: list[int]
) -> None:
    runner = make_runner(llama, ops=loaded())
    before = [pool.clone() for pool in stored_bytes(runner)]
    with pytest.raises(AssertionError, match="in row"):
        decode_of(runner).logits(DecodeRows([1, token_id], [0, position], [[7], table]), runner._kv_cache.layers)
    assert all_equal(stored_bytes(runner), before)
