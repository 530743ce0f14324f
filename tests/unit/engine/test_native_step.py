"""The whole step in one native call gives the very bits of the pass that is made op by op, for every family."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from disaggregated.engine.models.decoder import Decoder, DecoderShape, DecoderWeights
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import LayerPool, Ops, StepProgram
from disaggregated.engine.ops.native_isa import runnable_isas
from disaggregated.engine.ops.native_step import NativeStepProgram
from disaggregated.engine.runner import TorchModelRunner
from disaggregated.engine.step_layout import step_tensors
from tests.unit.engine.attention_cases import Row, attention_batch
from tests.unit.engine.runners import Driven, make_runner, random_blocks, random_prompt
from tests.unit.engine.tiny_models import FAMILIES, VOCAB_SIZE, write_model

IN_ONE_CALL: Final = [
    name for name in FAMILIES if name.startswith(("llama", "mistral", "qwen2", "gemma")) or name == "qwen3"
]
IN_ONE_CALL.remove("llama-odd")
ISAS: Final = [isa for isa in runnable_isas() if not isa.endswith("vnni")]

pytestmark = pytest.mark.skipif(native.load(1) is None, reason="no native kernels here: no C compiler")


class OpByOp:
    """An op table without a program, which makes the decoder call its ops one by one."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def step_program(self, shape: DecoderShape, weights: DecoderWeights) -> None:
        return None


def loaded(isa: str | None = None, num_threads: int = 1, **options: Any) -> Ops:
    ops = native.load(num_threads, isa, **options)
    assert ops is not None
    return ops


def program_of(runner: TorchModelRunner) -> StepProgram | None:
    assert isinstance(runner._model, Decoder)
    return runner._model._program


def steps_of(lengths: list[int], seed: int) -> list[list[tuple[int, int]]]:
    """(sequence, number of tokens) of each row of each step until all is computed: chunks beside single tokens."""
    rng = random.Random(seed)
    left, steps = dict(enumerate(lengths)), []
    while left:
        taking = rng.sample(sorted(left), rng.randint(1, len(left)))
        rows = [(i, min(left[i], rng.choice([1, 1, 2, 40, 100]))) for i in taking]
        left = {i: n - dict(rows).get(i, 0) for i, n in left.items() if n > dict(rows).get(i, 0)}
        steps.append(rows)
    return steps


def hidden_states(runner: TorchModelRunner, lengths: list[int], seed: int = 1) -> list[torch.Tensor]:
    """Of every step."""
    blocks = random_blocks(sum(-(-n // 16) for n in lengths), seed)
    sequences = [
        Driven(random_prompt(n, i, VOCAB_SIZE), [blocks.pop() for _ in range(-(-n // 16))])
        for i, n in enumerate(lengths)
    ]
    hidden = []
    with torch.inference_mode():
        for rows in steps_of(lengths, seed):
            batch = [sequences[i].take(n) for i, n in rows]
            token_ids, attention, _ = step_tensors(batch, 16, torch.device("cpu"))
            hidden.append(runner._model.forward(token_ids, attention, runner._kv_cache.layers))
    return hidden


def stored_bytes(runner: TorchModelRunner) -> list[torch.Tensor]:
    return [pool.values.contiguous().view(torch.uint8) for pool in runner._kv_cache.layers]


def all_equal(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(name, tmp_path_factory.mktemp(name)).path for name in FAMILIES}


@pytest.fixture
def llama(model_paths: dict[str, Path]) -> Path:
    return model_paths["llama"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", IN_ONE_CALL)
def test_one_call_gives_the_bits_of_all_its_ops(family: str, isa: str, model_paths: dict[str, Path]) -> None:
    op_by_op = make_runner(model_paths[family], ops=OpByOp(loaded(isa)))
    in_one_call = make_runner(model_paths[family], ops=loaded(isa, num_threads=2))
    assert program_of(op_by_op) is None
    assert isinstance(program_of(in_one_call), NativeStepProgram)
    lengths = [150, 1, 33, 90]
    assert all_equal(hidden_states(op_by_op, lengths), hidden_states(in_one_call, lengths))
    assert all_equal(stored_bytes(op_by_op), stored_bytes(in_one_call))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_one_call_gives_the_same_bits_in_every_precision(llama: Path, quantization: str, kv_dtype: str) -> None:
    op_by_op = make_runner(llama, ops=OpByOp(loaded(quantization=quantization)), kv_dtype=kv_dtype)
    in_one_call = make_runner(llama, ops=loaded(quantization=quantization), kv_dtype=kv_dtype)
    lengths = [120, 20]
    assert all_equal(hidden_states(op_by_op, lengths), hidden_states(in_one_call, lengths))
    assert all_equal(stored_bytes(op_by_op), stored_bytes(in_one_call))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(IN_ONE_CALL)))
def test_a_model_with_parts_of_another_kind_has_no_program(family: str, model_paths: dict[str, Path]) -> None:
    assert program_of(make_runner(model_paths[family], ops=loaded())) is None


def test_a_program_outlives_all_that_made_it(llama: Path) -> None:
    runner = make_runner(llama, ops=loaded())
    before = hidden_states(runner, [60])
    gc.collect()
    assert all_equal(hidden_states(runner, [60]), before)


def test_a_step_without_tokens_gives_no_rows(llama: Path) -> None:
    runner = make_runner(llama, ops=loaded())
    hidden = runner._model.forward(
        torch.zeros(0, dtype=torch.int64), attention_batch([Row(0, 0, [0])], 16), runner._kv_cache.layers
    )
    assert hidden.shape == (0, 64)


@pytest.mark.parametrize(
    ("field", "index", "wrong", "words"),
    [
        ("token_ids", 1, VOCAB_SIZE, f"token 1 has id {VOCAB_SIZE}"),
        ("token_ids", 0, -1, "token 0 has id -1"),
        ("positions", 2, 1024, "token 2 is at position 1024, the tables have 1024"),
        ("slots", 3, 160 * 16, "token 3 goes to slot 2560, the pool has 160 blocks"),
        ("block_tables", (0, 0), 160, "row 0 does not lie within 4 tokens"),
        ("query_start", 1, 5, "row 0 does not lie within 4 tokens"),
    ],
)
def test_a_step_that_would_reach_outside_is_refused_and_writes_nothing(
    llama: Path, field: str, index: Any, wrong: int, words: str
) -> None:
    runner = make_runner(llama, ops=loaded())
    batch, token_ids = attention_batch([Row(0, 4, [3])], 16), torch.zeros(4, dtype=torch.int64)
    (token_ids if field == "token_ids" else getattr(batch, field))[index] = wrong
    before = [pool.clone() for pool in stored_bytes(runner)]
    with pytest.raises(AssertionError, match=words):
        runner._model.forward(token_ids, batch, runner._kv_cache.layers)
    assert all_equal(stored_bytes(runner), before)


def test_pools_of_another_shape_are_refused(llama: Path) -> None:
    runner = make_runner(llama, ops=loaded())
    batch, token_ids = attention_batch([Row(0, 4, [3])], 16), torch.zeros(4, dtype=torch.int64)
    pools = runner._kv_cache.layers
    with pytest.raises(AssertionError, match="2 pools, 3 layers"):
        runner._model.forward(token_ids, batch, pools[:2])
    narrow = LayerPool(torch.zeros(160, 2, 1, 16, 16))
    with pytest.raises(AssertionError, match="shape"):
        runner._model.forward(token_ids, batch, [pools[0], narrow, pools[2]])
