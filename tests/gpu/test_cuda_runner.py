"""The CUDA runner on a device: graphs, sampling and steps launched ahead change no token."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from disaggregated.config.server import CudaGraphConfig, KVCacheConfig, ServerConfig
from disaggregated.engine.api import PLACEHOLDER, ScheduledSequence
from disaggregated.engine.cuda.graphs import DecodeGraphs
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.load import load_engine
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams
from tests.support.servers import VOCAB_SIZE, random_prompt, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

NUM_BLOCKS = 64
BLOCK_SIZE = 16


def no_host_memory(layout: KVLayout) -> bytearray:
    raise AssertionError("the pool of a CUDA engine is CUDA memory")


def make_runner(
    folder: Path, *, deterministic: bool = True, kv_dtype: str = "auto", dtype: str = "auto"
) -> CudaModelRunner:
    config = ServerConfig(
        model=str(write_model(folder)),
        role="generation",
        device="cuda",
        dtype=dtype,
        load_format="dummy",
        max_batch_size=8,
        max_num_tokens=128,
        max_seq_len=512,
        deterministic=deterministic,
        cuda_graph_config=CudaGraphConfig(batch_sizes=(1, 2, 4, 8)),
        kv_cache_config=KVCacheConfig(max_tokens=NUM_BLOCKS * BLOCK_SIZE, tokens_per_block=BLOCK_SIZE, dtype=kv_dtype),
    )
    runner = load_engine(config, allocate=no_host_memory).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


class Sequences:
    """Some that decode together: prompts computed, then a token a step."""

    def __init__(self, lengths: list[int], samplings: list[SamplingParams]) -> None:
        free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.tokens = [random_prompt(length, i) for i, length in enumerate(lengths)]
        self.tables = [[free.pop() for _ in range(-(-(length + 40) // BLOCK_SIZE))] for length in lengths]
        self.samplings = samplings

    def row(self, i: int, first: int, *, previous_row: int | None = None) -> ScheduledSequence:
        return ScheduledSequence(
            request_id=str(i),
            token_ids=self.tokens[i][first:] if previous_row is None else [PLACEHOLDER],
            first_position=first,
            block_table=self.tables[i],
            sampling=self.samplings[i],
            previous_row=previous_row,
        )

    def prefill(self, runner: CudaModelRunner) -> None:
        for i in range(len(self.tokens)):
            (tokens,) = runner.execute([self.row(i, 0)])
            self.tokens[i] += tokens

    def decode(self, runner: CudaModelRunner, num_steps: int) -> None:
        for _ in range(num_steps):
            rows = [self.row(i, len(tokens) - 1) for i, tokens in enumerate(self.tokens)]
            for own, tokens in zip(self.tokens, runner.execute(rows), strict=True):
                own.extend(tokens)

    def decode_ahead(self, runner: CudaModelRunner, num_steps: int) -> None:
        """Each step is launched before the tokens of the one before are asked for."""
        pending = runner.launch([self.row(i, len(tokens) - 1) for i, tokens in enumerate(self.tokens)])
        for _ in range(num_steps - 1):
            rows = [self.row(i, len(tokens), previous_row=i) for i, tokens in enumerate(self.tokens)]
            following = runner.launch(rows)
            for own, tokens in zip(self.tokens, pending.tokens(), strict=True):
                own.extend(tokens)
            pending = following
        for own, tokens in zip(self.tokens, pending.tokens(), strict=True):
            own.extend(tokens)


SAMPLINGS = [
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=1, temperature=0.8, seed=5),
    SamplingParams(max_tokens=1, temperature=1.2, top_k=20, top_p=0.9, seed=6),
]


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
def test_graphs_and_steps_ahead_give_the_tokens_of_eager_steps(tmp_path: Path, kv_dtype: str) -> None:
    runner = make_runner(tmp_path, kv_dtype=kv_dtype)
    captured = runner.graphs
    assert captured.sizes, "nothing was captured"
    found = []
    for graphs, is_ahead in ((captured, True), (captured, False), (DecodeGraphs([], is_padding_enabled=False), False)):
        runner.graphs = graphs
        sequences = Sequences([5, 40, 90], SAMPLINGS)
        sequences.prefill(runner)
        (sequences.decode_ahead if is_ahead else sequences.decode)(runner, 30)
        found.append(sequences.tokens)
    assert found[0] == found[1] == found[2]
    assert runner.graph_steps_total >= 60


def test_a_sequence_has_the_same_tokens_alone_and_beside_others(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    together = Sequences([5, 40, 90], SAMPLINGS)
    together.prefill(runner)
    together.decode(runner, 30)
    for i, length in enumerate([5, 40, 90]):
        alone = Sequences([length], [SAMPLINGS[i]])
        alone.tokens = [random_prompt(length, i)]
        alone.prefill(runner)
        alone.decode(runner, 30)
        assert alone.tokens[0] == together.tokens[i], f"sequence {i}"


def test_recomputed_in_one_chunk_a_sequence_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    """What preemption and failover stand on: decode steps and prefill chunks leave the same KV."""
    runner = make_runner(tmp_path)
    stepwise = Sequences([30], SAMPLINGS[:1])
    stepwise.prefill(runner)
    stepwise.decode(runner, 35)
    for known in (31, 40, 64):
        again = Sequences([30], SAMPLINGS[:1])
        again.tokens = [stepwise.tokens[0][:known]]
        again.prefill(runner)
        assert again.tokens[0] == stepwise.tokens[0][: known + 1]


def test_the_fast_mode_runs_too(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, deterministic=False)
    sequences = Sequences([5, 40, 90], SAMPLINGS)
    sequences.prefill(runner)
    sequences.decode(runner, 5)
    assert all(0 <= token < VOCAB_SIZE for tokens in sequences.tokens for token in tokens)


def test_fp8_weights_run_and_are_deterministic(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs compute capability 9.0")
    runner = make_runner(tmp_path, dtype="fp8", kv_dtype="fp8")
    runs = []
    for _ in range(2):
        sequences = Sequences([5, 40, 90], SAMPLINGS)
        sequences.prefill(runner)
        sequences.decode(runner, 10)
        runs.append(sequences.tokens)
    assert runs[0] == runs[1]
