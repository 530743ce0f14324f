"""A step of nothing but decoding is laid out in a way of its own: it must be the general way's layout, in every bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.engine import step_layout
from disaggregated.engine.api import ScheduledSequence
from disaggregated.engine.step_layout import step_tensors
from disaggregated.sampling_params import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=1)
rows = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 49_151), st.lists(st.integers(0, 900), min_size=11, max_size=14)),
    min_size=1,
    max_size=9,
)
"""Position, token, and a block table that is long enough for it."""


def decoding(position: int, token: int, block_table: list[int]) -> ScheduledSequence:
    return ScheduledSequence(
        request_id="r", token_ids=[token], first_position=position, block_table=block_table, sampling=GREEDY
    )


@given(rows=rows, block_size=st.sampled_from([4, 7, 16]))
def test_a_decode_step_lies_as_any_step_would(rows: list[tuple[int, int, list[int]]], block_size: int) -> None:
    batch = [decoding(*row) for row in rows]
    token_ids, attention, sampled = step_tensors(batch, block_size, CPU)
    expected_ids, expected, expected_sampled = step_layout._any_step(batch, block_size, CPU)
    pairs = [(token_ids, expected_ids), (sampled, expected_sampled)]
    for field in dataclasses.fields(attention):
        ours, theirs = getattr(attention, field.name), getattr(expected, field.name)
        if isinstance(ours, torch.Tensor):
            pairs.append((ours, theirs))
        else:
            assert ours == theirs, field.name
    for ours, theirs in pairs:
        assert ours.dtype is theirs.dtype
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", [{"token_ids": [3, 4]}, {"sampling": None}, {"draft_token_ids": (7,)}])
def test_a_row_that_does_more_or_less_than_decode_makes_it_any_step(change: dict[str, object]) -> None:
    plain = decoding(5, 3, [2, 1])
    batch = [plain, dataclasses.replace(plain, **change)]  # type: ignore[arg-type]
    token_ids, _, sampled = step_tensors(batch, 4, CPU)
    expected_ids, _, expected_sampled = step_layout._any_step(batch, 4, CPU)
    assert torch.equal(token_ids, expected_ids)
    assert torch.equal(sampled, expected_sampled)
    assert (len(token_ids), len(sampled)) != (2, 2)
