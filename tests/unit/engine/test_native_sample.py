"""Native embedding, argmax and top-k: comparing and copying, so what they give is exactly what torch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.engine.ops.api import Ops
from disaggregated.engine.ops.reference import ReferenceOps
from disaggregated.engine.sample_row import SampleRow
from disaggregated.engine.sampler import sample
from disaggregated.sampling_params import SamplingParams
from tests.unit.engine.native_libraries import ISAS, loaded, needs_kernels

pytestmark = needs_kernels
thorough = settings(max_examples=40)
few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, torch.inf, -torch.inf])
"""Few, so that rows are full of equals, and all of them awkward."""


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return loaded(str(request.param))


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", ISAS)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 1500)),
    awkward=st.lists(few_values, min_size=1, max_size=9),
    num_equal=st.integers(0, 1500),
    seed=st.integers(0, 1000),
)
@thorough
def test_argmax_is_the_first_of_the_largest(
    isa: str, shape: tuple[int, int], awkward: list[float], num_equal: int, seed: int
) -> None:
    num_rows, width = shape
    x = randn(num_rows, width, seed=seed)
    places = torch.randint(width, (num_rows, min(num_equal, width)), generator=torch.Generator().manual_seed(seed))
    x.scatter_(1, places, torch.tensor(awkward).repeat(places.numel())[: places.numel()].view(places.shape))
    first_largest = (x == x.amax(-1, keepdim=True)).long().argmax(-1)
    for num_threads in (1, 2):
        assert torch.equal(loaded(isa, num_threads).argmax(x), first_largest)


@pytest.mark.parametrize("isa", ISAS)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3000)),
    part=st.floats(0, 1),
    num_levels=st.sampled_from([1, 2, 30, 1 << 20]),
    seed=st.integers(0, 1000),
)
@thorough
def test_top_k_values_are_those_of_a_full_sort_and_the_first_of_equals_come_first(
    isa: str, shape: tuple[int, int], part: float, num_levels: int, seed: int
) -> None:
    """Few levels: nearly everything is equal to the k-th largest."""
    num_rows, width = shape
    k = max(1, round(part * width))
    x = (randn(num_rows, width, seed=seed) * num_levels).round() / num_levels + 0.0
    expected = x.sort(stable=True, dim=-1, descending=True)
    for num_threads in (1, 2):
        values, ids = loaded(isa, num_threads).top_k(x, k)
        assert torch.equal(values, expected.values[:, :k])
        assert torch.equal(ids, expected.indices[:, :k])


def test_nan_is_larger_than_all_else_whatever_its_sign(ops: Ops) -> None:
    x = randn(3, 900)
    x[0, 500] = torch.nan
    x[1, 899] = -torch.nan
    x[1, 3] = torch.inf
    x[2, [7, 70]] = torch.nan
    assert ops.argmax(x).tolist() == [500, 899, 7]
    values, ids = ops.top_k(x, 2)
    assert values[:, 0].isnan().all()
    assert ids[:, 0].tolist() == [500, 899, 7]
    assert ids[1, 1] == 3


def test_both_zeros_are_equal(ops: Ops) -> None:
    x = torch.full((1, 80), -1.0)
    x[0, 20], x[0, 60] = -0.0, 0.0
    assert ops.argmax(x).tolist() == [20]
    assert ops.top_k(x, 2)[1].tolist() == [[20, 60]]


def test_a_vocabulary_of_a_real_model_agrees_with_torch_in_every_row(ops: Ops) -> None:
    logits = randn(33, 49152) * 4
    assert torch.equal(ops.argmax(logits), logits.argmax(-1))
    for k in (1, 50, 256, 5000, 49152):
        values, ids = ops.top_k(logits[:3].contiguous(), k)
        assert torch.equal(values, logits[:3].topk(k).values)
        assert torch.equal(logits[:3].gather(1, ids), values)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_a_sampler_gives_the_same_tokens_with_any_op_table(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 3000, generator=rng).mul_(3).round(decimals=1)
    choices = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9999},
        {"temperature": 1.3, "top_k": 700, "top_p": 0.95, "min_p": 0.01},
    ]
    rows = [SampleRow(SamplingParams(max_tokens=1, seed=seed, **choices[i % 6]), i) for i in range(12)]  # type: ignore[arg-type]
    expected = sample(logits.clone(), rows, ReferenceOps())
    for isa in ISAS:
        assert sample(logits.clone(), rows, loaded(isa, 2)) == expected


def test_embedding_copies_rows_and_refuses_ids_that_the_table_lacks(ops: Ops) -> None:
    table, ids = randn(100, 37), torch.randint(100, (500,))
    assert torch.equal(ops.embedding(ids, table), table[ids])
    assert ops.embedding(torch.zeros(0, dtype=torch.int64), table).shape == (0, 37)
    for wrong in (-1, 100):
        with pytest.raises(AssertionError, match=f"token 2 has the id {wrong}, the table has 100 rows"):
            ops.embedding(torch.tensor([0, 99, wrong]), table)


def test_what_does_not_fit_is_refused(ops: Ops) -> None:
    with pytest.raises(AssertionError, match="the 4 largest of 3"):
        ops.top_k(randn(1, 3), 4)
    with pytest.raises(AssertionError, match="the 0 largest of 3"):
        ops.top_k(randn(1, 3), 0)
    with pytest.raises(AssertionError, match="the largest of no numbers"):
        ops.argmax(randn(2, 0))
    with pytest.raises(AssertionError, match="not contiguous"):
        ops.argmax(randn(9, 3).t())
    with pytest.raises(AssertionError, match="dtype"):
        ops.embedding(torch.tensor([1], dtype=torch.int32), randn(3, 3))
