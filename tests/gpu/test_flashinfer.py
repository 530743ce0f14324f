"""FlashInfer's decode on a device: the formula's values, and a graph's logits are those of the step without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from disaggregated.config.server import CudaGraphConfig, KVCacheConfig, ServerConfig
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.cuda import flashinfer_decode
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.load import load_engine
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams
from tests.support.servers import random_prompt, write_model
from tests.unit.engine.attention_cases import PagedSequences, SequenceKV, dense_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(flashinfer_decode.missing() is not None, reason="FlashInfer is not installed"),
]

BLOCK_SIZE = 16
GREEDY = SamplingParams(max_tokens=1)


class FlashOps(ReferenceOps):
    def __init__(self) -> None:
        super().__init__()
        decode = flashinfer_decode.load(torch.device("cuda"), is_deterministic=False)
        assert decode is not None
        self.decode = decode
        self.num_taken = 0

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        rows = tuple(zip(batch.first_position.tolist(), batch.query_start.diff().tolist(), strict=True))
        found = self.decode.attend(q_TND, pool, dataclasses.replace(batch, rows=rows), spec)
        self.num_taken += found is not None
        return super().paged_attention(q_TND, pool, batch, spec) if found is None else found


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(scale=0.125),
        AttentionSpec(scale=0.1, window=100),
        AttentionSpec(scale=0.2, softcap=30.0),
    ],
    ids=["plain", "window", "softcap"],
)
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 2, 64)], ids=str)
def test_decoded_tokens_attend_to_what_the_formula_says(spec: AttentionSpec, heads: tuple[int, int, int]) -> None:
    ops = FlashOps()
    sequences = [SequenceKV.random(length, heads, length, torch.bfloat16, "cuda") for length in (1, 32, 33, 300)]
    paged = PagedSequences(ops, sequences, BLOCK_SIZE, 0, spec=spec)
    paged.pool.values.zero_()  # Its kernels may multiply what lies past a sequence's end by zero.
    for i, sequence in enumerate(sequences):
        if len(sequence.q_LND) > 1:
            paged.step([(i, 0, len(sequence.q_LND) - 1)])
    paged.step([(i, len(sequence.q_LND) - 1, 1) for i, sequence in enumerate(sequences)])
    assert ops.num_taken == 1
    for i, sequence in enumerate(sequences):
        expected = dense_attention(sequence, spec)[-1]
        torch.testing.assert_close(paged.out[i][-1].double(), expected, rtol=2e-2, atol=2e-2)


def make_runner(folder: Path, attn_backend: str) -> CudaModelRunner:
    path = write_model(folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "head_dim": 64}))

    def allocate(layout: KVLayout) -> bytearray:
        raise AssertionError("the pool of a CUDA engine is CUDA memory")

    server = ServerConfig(
        model=str(path),
        role="generation",
        device="cuda",
        dtype="bfloat16",
        load_format="dummy",
        max_batch_size=4,
        max_num_tokens=128,
        max_seq_len=512,
        deterministic=False,
        attn_backend=attn_backend,
        cuda_graph_config=CudaGraphConfig(batch_sizes=(4,)),
        kv_cache_config=KVCacheConfig(max_tokens=64 * BLOCK_SIZE, tokens_per_block=BLOCK_SIZE),
    )
    runner = load_engine(server, allocate=allocate).runner
    assert isinstance(runner, CudaModelRunner)
    return runner


def row(token_ids: list[int], first_position: int, table: list[int]) -> ScheduledSequence:
    return ScheduledSequence(
        request_id="0", token_ids=token_ids, first_position=first_position, block_table=table, sampling=GREEDY
    )


def test_a_graphs_logits_are_those_of_the_step_without_it_and_of_our_kernel(tmp_path: Path) -> None:
    """Three sequences in a graph of four rows, some steps on, so that each replay needs another plan."""
    found = {}
    for attn_backend in ("flashinfer", "triton"):
        runner = make_runner(tmp_path, attn_backend)
        prompts = [random_prompt(length, length) for length in (5, 40, 90)]
        tables = [list(range(8 * i, 8 * i + 8)) for i in range(3)]
        for prompt, table in zip(prompts, tables, strict=True):
            runner.execute([row(prompt, 0, table)])
        for step in range(20):
            rows = [row([7 + step], len(prompt) + step, table) for prompt, table in zip(prompts, tables, strict=True)]
            graph = runner.graphs.find(rows)
            assert graph is not None
            with torch.inference_mode():
                replayed = graph.run(rows).clone()
                eager = runner._without_graph(rows)
            assert eager is not None
            torch.testing.assert_close(replayed, eager, rtol=5e-2, atol=5e-2)
        found[attn_backend] = replayed
    torch.testing.assert_close(found["flashinfer"], found["triton"], rtol=5e-2, atol=5e-2)
