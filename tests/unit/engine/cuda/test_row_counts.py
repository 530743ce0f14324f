"""Which row counts a deterministic linear calls with, and what it makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine.cuda.linear import CudaLinears, plain_scaled_product
from disaggregated.engine.cuda.row_counts import COUNTS, exact_class, probe, split
from disaggregated.engine.ops.quantise import quantise_rows

CLASSES = st.lists(st.sampled_from(COUNTS), min_size=1, unique=True).map(lambda counts: tuple(sorted(counts)))


def linears(*, to_fp8: bool = False, is_deterministic: bool = True) -> CudaLinears:
    return CudaLinears(
        is_deterministic=is_deterministic,
        quantise_rows=quantise_rows,
        scaled_product=plain_scaled_product,
        to_fp8=to_fp8,
    )


@given(st.integers(1, 20_000), CLASSES)
def test_calls_cover_every_row_in_counts_of_the_class_only(num_rows: int, counts: tuple[int, ...]) -> None:
    sizes = split(num_rows, counts)
    assert set(sizes) <= set(counts)
    assert num_rows <= sum(sizes) < num_rows + max(sizes)


def test_a_call_that_is_waiting_for_memory_anyway_is_padded_rather_than_cut() -> None:
    assert split(100, (16, 32, 64, 128)) == (128,)
    assert split(1, (64, 128)) == (64,)
    assert split(4100, (64, 4096, 8192)) == (4096, 64)


def test_the_class_that_serves_decode_and_prefill_is_taken() -> None:
    """A product that is done in one way from 64 rows on, and in another below."""
    rows, _ = probe(torch.empty(4, 30), 2 * 8192)

    def product(part: torch.Tensor) -> torch.Tensor:
        return part.sum(-1, keepdim=True) + (1e-6 if len(part) < 64 else 0.0)

    assert exact_class(product, rows.round(), 4) == tuple(n for n in COUNTS if n >= 64)


def test_a_count_at_which_the_place_of_a_row_matters_is_in_no_class() -> None:
    def product(part: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(part))[:, None] if len(part) > 100 else 0.0
        return part.sum(-1, keepdim=True) + places * 1e-3

    rows = torch.ones(512, 4)
    assert exact_class(product, rows, 4) == (8, 16, 32, 64)
    with pytest.raises(RuntimeError, match="depend on its place"):
        exact_class(lambda part: part + torch.arange(len(part))[:, None], rows, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_probe_cancels_to_rounding_errors(dtype: torch.dtype) -> None:
    rows, matrix = probe(torch.empty(20, 300, dtype=dtype), 16)
    assert (rows.dtype, matrix.shape) == (dtype, (20, 300))
    exact = rows.double() @ matrix.double().t()
    assert exact.abs().max() < 1e-10
    assert (rows.float() @ matrix.float().t()).abs().max() > 0


@pytest.mark.parametrize("to_fp8", [False, True])
def test_a_row_of_a_linear_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch, to_fp8: bool) -> None:
    monkeypatch.setattr("disaggregated.engine.cuda.row_counts.COUNTS", (8, 16, 32))
    table = linears(to_fp8=to_fp8)
    dtype = torch.bfloat16 if to_fp8 else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(n, generator=generator).to(dtype) for n in ((48, 64), (48,)))
    linear = table.prepare(weight, bias, exact=False)
    x = torch.randn(70, 64, generator=generator).to(dtype)
    whole = table.apply(x, linear)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(whole.double(), expected, rtol=0.1 if to_fp8 else 1e-4, atol=2.0 if to_fp8 else 1e-4)
    for size in (1, 7, 8, 33):
        assert torch.equal(table.apply(x[:size], linear), whole[:size])


def test_what_must_be_exact_or_has_an_odd_shape_is_not_quantised() -> None:
    table = linears(to_fp8=True, is_deterministic=False)
    assert table.prepare(torch.randn(32, 32).bfloat16(), None, exact=False).scale_M is not None
    assert table.prepare(torch.randn(32, 32).bfloat16(), None, exact=True).scale_M is None
    assert table.prepare(torch.randn(30, 32).bfloat16(), None, exact=False).scale_M is None


def test_a_batch_is_padded_once_to_what_every_linear_takes() -> None:
    table = linears()
    assert table.padded_rows(5) == 5, "nothing was prepared"
    table.measured = {("a",): (8, 64, 128), ("b",): (16, 64, 128)}
    assert [table.padded_rows(n) for n in (1, 64, 65, 200)] == [64, 64, 128, 200]


def test_the_fast_mode_measures_and_pads_nothing() -> None:
    table = linears(is_deterministic=False)
    weight = torch.randn(6, 10)
    linear = table.prepare(weight, None, exact=False)
    x = torch.randn(3, 10)
    assert table.measured == {}
    assert torch.equal(table.apply(x, linear), x @ weight.t())
