"""The law of the op table on CUDA: the same properties as on CPU, over the same cases."""

from __future__ import annotations

import random

import pytest
import torch

from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.attention_cases import PagedSequences, SequenceKV, chunks_of, dense_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.bfloat16)
HEADS = ((9, 3, 64), (32, 8, 128))
BATCH_SIZES = (1, 2, 7, 32, 128, 300)


@pytest.fixture(scope="module")
def ops() -> ReferenceOps:
    return ReferenceOps()


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "m"), [(576, 960), (1536, 576), (4096, 6144), (176, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_row_is_bitwise_the_same_in_any_batch(
    ops: ReferenceOps, k: int, m: int, dtype: torch.dtype, with_bias: bool
) -> None:
    bias = randn(m, seed=1, dtype=dtype) if with_bias else None
    linear = ops.prepare_linear(randn(m, k, dtype=dtype), bias)
    x = randn(300, k, seed=2, dtype=dtype)
    alone = torch.cat([ops.linear(x[i : i + 1].clone(), linear) for i in range(len(x))])
    for size in BATCH_SIZES:
        assert torch.equal(ops.linear(x[:size].clone(), linear), alone[:size]), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [176, 576, 4096])
def test_norms_and_gates_are_row_invariant(ops: ReferenceOps, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(300, width, dtype=dtype), randn(width, seed=1, dtype=dtype)
    normed, gated = ops.rms_norm(x, weight, 1e-5), ops.silu_mul(x)
    for size in BATCH_SIZES:
        assert torch.equal(ops.rms_norm(x[-size:].clone(), weight, 1e-5), normed[-size:])
        assert torch.equal(ops.silu_mul(x[-size:].clone()), gated[-size:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_right_and_bitwise_the_same_for_any_chunking(
    ops: ReferenceOps, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    sequence = SequenceKV.random(300, heads, 0, dtype, "cuda")
    whole = PagedSequences(ops, [sequence], 32, 0)
    whole.step([(0, 0, 300)])
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        whole.out[0].double(), dense_attention(sequence, whole.scale), rtol=tolerance, atol=tolerance
    )
    for seed, sizes in enumerate(([7], [64], [129, 1, 1]), 1):
        chunked = PagedSequences(ops, [sequence], 32, seed)
        for start, n in chunks_of(300, sizes):
            chunked.step([(0, start, n)])
        assert torch.equal(chunked.out[0], whole.out[0]), sizes


def test_attention_is_bitwise_the_same_alone_and_in_a_batch(ops: ReferenceOps) -> None:
    rng = random.Random(0)
    lengths = [rng.choice([1, 5, 30, 130, 140]) for _ in range(12)]
    sequences = [SequenceKV.random(n, (6, 2, 32), i, torch.float32, "cuda") for i, n in enumerate(lengths)]
    together = PagedSequences(ops, sequences, 32, 1)
    parts = [chunks_of(n, [rng.choice([1, 20, 64]), 1]) for n in lengths]
    for step in range(max(map(len, parts))):
        together.step([(i, *own[step]) for i, own in enumerate(parts) if step < len(own)])
    for i, sequence in enumerate(sequences):
        alone = PagedSequences(ops, [sequence], 32, 2)
        alone.step([(0, 0, lengths[i])])
        assert torch.equal(together.out[i], alone.out[0])


def test_a_row_draws_the_same_token_in_any_batch_and_on_either_device() -> None:
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)) * 3
    rng = random.Random(1)
    rows = [
        SampleRow(
            SamplingParams(
                max_tokens=1,
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([0, 40]),
                seed=rng.randrange(2**64),
            ),
            position,
        )
        for position in range(40)
    ]
    together = sample(logits.cuda(), rows)
    assert together == [sample(logits[i : i + 1].cuda(), rows[i : i + 1])[0] for i in range(40)]
    on_cpu = sample(logits.clone(), rows)
    assert sum(a == b for a, b in zip(together, on_cpu, strict=True)) >= 38, "rounding may move a draw, rarely"
