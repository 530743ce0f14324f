"""Frames come out as they went in, however the bytes were cut on their way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggregated.wire.frames import FRAME_BYTES_MAX, FrameError, FrameReader, Kind, call_frame, frame

FRAMES = st.lists(st.tuples(st.sampled_from([*Kind]), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8)


@given(frames=FRAMES, cuts=st.lists(st.integers(1, 40), max_size=200))
def test_any_cutting_of_the_bytes_gives_the_same_frames(frames: list[tuple[Kind, int, bytes]], cuts: list[int]) -> None:
    sent = b"".join(frame(*each) for each in frames)
    reader = FrameReader()
    found: list[tuple[int, int, bytes]] = []
    for size in cuts:
        found += reader.feed(sent[:size])
        sent = sent[size:]
    found += reader.feed(sent)
    assert found == frames


def test_a_frame_that_is_larger_than_any_of_ours_is_refused_before_it_is_kept() -> None:
    head = frame(Kind.MESSAGE, 1)[4:]
    with pytest.raises(FrameError, match="limit"):
        list(FrameReader().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "little") + head))


def test_a_call_names_its_method_before_its_message() -> None:
    [(kind, number, payload)] = FrameReader().feed(call_frame(7, b"Context.Prefill", b"message"))
    assert (kind, number) == (Kind.CALL, 7)
    assert payload == bytes([15]) + b"Context.Prefill" + b"message"
