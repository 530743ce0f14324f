"""FlashInfer's decode behind our attention, its wrapper computed in torch: what is planned, when, and for what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disaggregated.engine.cuda import flashinfer_decode
from disaggregated.engine.cuda.flashinfer_decode import FlashInferDecode
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.cuda.start import capture_graphs
from disaggregated.engine.kv_cache import KVCache
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.weights import DummySource, build_model
from disaggregated.kv_layout import KVLayout
from disaggregated.model_files import ModelConfig
from tests.support.fake_flashinfer import FakeDecodeWrapper
from tests.support.servers import write_model
from tests.unit.engine.attention_cases import PagedSequences, SequenceKV, dense_attention
from tests.unit.engine.cuda.test_runner import (
    BLOCK_SIZE,
    LIMITS,
    NUM_BLOCKS,
    Decoding,
    ForgetfulOps,
    capture_on_cpu,
    sample_by_columns,
)

CPU = torch.device("cpu")
PLAIN = AttentionSpec(scale=0.125)


@pytest.fixture(autouse=True)
def wrappers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDecodeWrapper]]:
    monkeypatch.setattr(flashinfer_decode, "WORKSPACE_BYTES", 1024)
    FakeDecodeWrapper.made.clear()
    yield FakeDecodeWrapper.made
    FakeDecodeWrapper.made.clear()


class FlashOps(ForgetfulOps):
    """The reference, with decode attention by FlashInfer where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = FlashInferDecode(FakeDecodeWrapper, CPU)
        self.num_taken = 0

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        found = self.decode.attend(q_TND, pool, batch, spec)
        self.num_taken += found is not None
        return super().paged_attention(q_TND, pool, batch, spec) if found is None else found


class WithRows(FlashOps):
    """For batches that a test made without saying what is in them."""

    def paged_attention(
        self, q_TND: torch.Tensor, pool: LayerPool, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        counts = batch.query_start.diff().tolist()
        rows = tuple(zip(batch.first_position.tolist(), counts, strict=True))
        return super().paged_attention(q_TND, pool, dataclasses.replace(batch, rows=rows), spec)


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        AttentionSpec(scale=0.1, window=7),
        AttentionSpec(scale=0.2, softcap=3.0),
        AttentionSpec(scale=1.0, window=40),
    ],
    ids=["plain", "window", "softcap", "wide window"],
)
@pytest.mark.parametrize("heads", [(8, 2, 64), (16, 2, 128)], ids=str)
def test_decoded_tokens_attend_to_what_the_formula_says(spec: AttentionSpec, heads: tuple[int, int, int]) -> None:
    ops = WithRows()
    sequences = [SequenceKV.random(length, heads, length, torch.bfloat16) for length in (1, 16, 17, 41)]
    paged = PagedSequences(ops, sequences, 16, 0, spec=spec)
    for i, sequence in enumerate(sequences):
        if len(sequence.q_LND) > 1:
            paged.step([(i, 0, len(sequence.q_LND) - 1)])
    assert ops.num_taken == 0, "prompts are not for a decode kernel"
    paged.step([(i, len(sequence.q_LND) - 1, 1) for i, sequence in enumerate(sequences)])
    assert ops.num_taken == 1
    for i, sequence in enumerate(sequences):
        expected = dense_attention(sequence, spec)[-1]
        torch.testing.assert_close(paged.out[i][-1].double(), expected, rtol=2e-2, atol=2e-2)
    (wrapper,) = FakeDecodeWrapper.made
    assert wrapper.use_tensor_cores is (heads[0] // heads[1] > 4)


@pytest.mark.parametrize(
    ("q_dtype", "pool", "spec"),
    [
        (torch.float32, LayerPool(torch.zeros(2, 2, 1, 4, 64)), PLAIN),
        (torch.bfloat16, LayerPool(torch.zeros(2, 2, 1, 4, 80, dtype=torch.bfloat16)), PLAIN),
        (torch.bfloat16, LayerPool(torch.zeros(2, 2, 1, 4, 64, dtype=torch.int8), torch.zeros(2, 2, 1, 4)), PLAIN),
        (torch.bfloat16, LayerPool(torch.zeros(2, 1, 1, 4, 64, dtype=torch.bfloat16)), PLAIN),
        (torch.float16, LayerPool(torch.zeros(2, 2, 1, 4, 64, dtype=torch.bfloat16)), PLAIN),
    ],
    ids=["float32", "head size", "quantised", "latents", "mixed"],
)
def test_what_it_does_not_compute_is_left_to_our_kernel(
    q_dtype: torch.dtype, pool: LayerPool, spec: AttentionSpec
) -> None:
    q = torch.zeros(1, 1, pool.values.shape[-1], dtype=q_dtype)
    assert flashinfer_decode.unsupported(q, pool, spec)
    batch = AttentionBatch(
        query_start=torch.tensor([0, 1]),
        first_position=torch.tensor([0]),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        positions=torch.tensor([0]),
        slots=torch.tensor([0]),
        max_context_len=1,
        rows=((0, 1),),
    )
    assert FlashInferDecode(FakeDecodeWrapper, CPU).attend(q, pool, batch, spec) is None


def test_a_step_is_planned_once_for_all_layers_of_a_kind() -> None:
    ops = FlashOps()
    pool = LayerPool(torch.randn(4, 2, 1, 4, 64).bfloat16())
    batches = [
        AttentionBatch(
            query_start=torch.tensor([0, 1, 2]),
            first_position=torch.tensor([first, 0]),
            block_tables=torch.tensor([[3, 1], [2, 0]], dtype=torch.int32),
            positions=torch.tensor([first, 0]),
            slots=torch.tensor([0, 0]),
            max_context_len=8,
            rows=((first, 1), (0, 1)),
        )
        for first in (5, 6)
    ]
    q = torch.randn(2, 1, 64).bfloat16()
    for batch in batches:
        for spec in (PLAIN, dataclasses.replace(PLAIN, window=3), PLAIN, dataclasses.replace(PLAIN, window=3)):
            assert ops.decode.attend(q, pool, batch, spec) is not None
    assert [wrapper.num_plans for wrapper in FakeDecodeWrapper.made] == [2, 2]


def test_a_kernel_that_cannot_be_built_is_said_once_and_ours_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeDecodeWrapper, "fails", "ninja: no such file")
    ops = WithRows()
    sequences = [SequenceKV.random(20, (4, 2, 64), 1, torch.bfloat16)]
    paged = PagedSequences(ops, sequences, 16, 0)
    for first, count in ((0, 18), (18, 1), (19, 1)):
        paged.step([(0, first, count)])
    expected = dense_attention(sequences[0], paged.scale)
    torch.testing.assert_close(paged.out[0].double(), expected, rtol=2e-2, atol=2e-2)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "no kernel for torch.bfloat16, heads of 64: ninja" in caplog.text


def model_runner(folder: Path, ops: ReferenceOps) -> CudaModelRunner:
    config = ModelConfig.load(write_model(folder))
    with torch.inference_mode():
        model = build_model(DummySource(config, CPU), config, ops, device=CPU, dtype=torch.float32, num_positions=256)
    layout = KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
        dtype="float32",
        num_blocks=NUM_BLOCKS + 1,
    )
    cache = KVCache(layout, device=CPU, allocate=lambda layout: bytearray(layout.pool_bytes))
    return CudaModelRunner(model, cache, CPU, max_rows=8, sample=sample_by_columns)


@pytest.mark.parametrize("ahead", [False, True])
def test_graphs_are_planned_anew_before_each_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, ahead: bool
) -> None:
    """A batch of three goes through a graph of four, whose dummy has one token; sequences grow over blocks."""
    monkeypatch.setattr(flashinfer_decode, "DTYPES", (torch.float32,))
    monkeypatch.setattr(flashinfer_decode, "HEAD_DIMS", tuple(range(8, 129, 8)))
    expected = Decoding([3, 11, 6]).generate(model_runner(tmp_path, ForgetfulOps()), 9)
    ops = FlashOps()
    runner = model_runner(tmp_path, ops)
    prepare = functools.partial(ops.decode.prepare, block_size=BLOCK_SIZE)
    runner.graphs = capture_graphs(runner, [2, 4], LIMITS, capture_on_cpu, is_padding_enabled=True, prepare=prepare)
    assert len(FakeDecodeWrapper.made) == 2, "one a graph"
    assert Decoding([3, 11, 6]).generate(runner, 9, ahead=ahead) == expected
    assert runner.graph_steps_total == 9
    assert FakeDecodeWrapper.made[0].num_plans >= 10, "the graph of four rows: at its capture, and before each replay"


def test_a_graph_that_was_captured_without_it_is_not_planned(tmp_path: Path) -> None:
    """float32 is none of its dtypes."""
    ops = FlashOps()
    runner = model_runner(tmp_path, ops)
    prepare = functools.partial(ops.decode.prepare, block_size=BLOCK_SIZE)
    runner.graphs = capture_graphs(runner, [4], LIMITS, capture_on_cpu, is_padding_enabled=True, prepare=prepare)
    Decoding([3, 11, 6]).generate(runner, 3)
    assert FakeDecodeWrapper.made == []
    assert ops.num_taken == 0


def test_it_is_for_the_fast_mode_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert flashinfer_decode.load(CPU, is_deterministic=True) is None
    assert "needs deterministic: false" in caplog.text


@pytest.mark.skipif(flashinfer_decode.missing() is None, reason="FlashInfer is installed")
def test_a_package_that_is_missing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert flashinfer_decode.load(CPU, is_deterministic=False) is None
    assert "pip install 'disaggregated[flashinfer]'" in caplog.text
