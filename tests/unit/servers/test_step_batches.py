"""What a step brought comes out of its message as it went in, whether it stood in columns or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.errors import ServerLost
from disaggregated.step_batches import columns_of, deltas_of, packed
from disaggregated.v1 import control_pb2

DELTAS = st.builds(
    control_pb2.StreamDelta,
    stream_key=st.integers(1, 2**64 - 1),
    first_position=st.integers(1, 2**32 - 1),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    finish_reason=st.sampled_from(["", "", "", "stop", "length"]),
    times=st.sampled_from([None, None, control_pb2.AdmissionTimes(transport="SHM")]),
)


@given(st.lists(DELTAS, max_size=6))
def test_every_delta_comes_out_as_it_went_in(deltas: list[control_pb2.StreamDelta]) -> None:
    sent = packed(7, deltas).SerializeToString()
    batch = control_pb2.StepBatch.FromString(sent)
    assert batch.step == 7
    found = {delta.SerializeToString() for delta in deltas_of(batch)}
    assert found == {delta.SerializeToString() for delta in deltas}


def test_one_token_and_nothing_else_stands_in_columns() -> None:
    plain = control_pb2.StreamDelta(stream_key=1, first_position=9, token_ids=[5])
    last = control_pb2.StreamDelta(stream_key=2, first_position=9, token_ids=[5], finish_reason="stop")
    batch = packed(1, [plain, last])
    assert columns_of(batch) == ([1], [9], [5])
    assert [delta.stream_key for delta in batch.deltas] == [2]


def test_a_delta_with_a_field_that_is_not_known_here_is_kept_whole() -> None:
    told = control_pb2.StreamDelta(stream_key=1, first_position=9, token_ids=[5])
    told.logprobs.logprobs.append(-0.5)
    assert columns_of(packed(1, [told])) == ([], [], [])


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ServerLost, match="differ in length"):
        columns_of(control_pb2.StepBatch(stream_keys=[1, 2], positions=[9], token_ids=[5, 6]))
