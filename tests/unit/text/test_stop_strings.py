"""Stop strings: nothing of one is ever sent, nothing else is ever lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disaggregated.errors import InvalidRequest
from disaggregated.text import StopStrings

few_letters = st.text(st.sampled_from("ab\n"), max_size=20)
some_stops = st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character until a stop string is complete; of several, the longest counts."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def replay(chunks: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    scanner, sent = StopStrings(stops), []
    for chunk in chunks:
        text, stopped = scanner.push(chunk)
        sent.append(text)
        if stopped:
            return sent, scanner.matched
    return [*sent, scanner.flush()], None


@settings(max_examples=1000)
@given(text=few_letters, stops=some_stops, cuts=st.lists(st.integers(0, 20), max_size=8))
def test_any_chunks_give_what_a_naive_search_finds(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(bounds)]
    sent, matched = replay(chunks, stops)
    assert ("".join(sent), matched) == naive(text, stops)


@settings(max_examples=500)
@given(text=few_letters, stops=some_stops.filter(bool))
def test_no_more_is_held_back_than_could_still_become_a_stop_string(text: str, stops: list[str]) -> None:
    scanner, sent = StopStrings(stops), ""
    for end in range(len(text)):
        now, stopped = scanner.push(text[end])
        sent += now
        if stopped:
            return
        held = text[len(sent) : end + 1]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopStrings([]).push("anything") == ("anything", False)


def test_a_stop_string_in_pieces_is_never_sent() -> None:
    scanner = StopStrings(["\n\nUser:"])
    assert [scanner.push(piece).text for piece in ("Hello\n", "\nUse", "less. ", "\n", "\nUser")] == [
        "Hello", "", "\n\nUseless. ", "", "",
    ]  # fmt: skip
    assert scanner.push(": what?") == ("", True)
    assert scanner.matched == "\n\nUser:"
    assert scanner.flush() == ""


def test_what_was_held_back_comes_with_the_flush() -> None:
    scanner = StopStrings(["END"])
    assert scanner.push("the EN") == ("the ", False)
    assert scanner.flush() == "EN"
    assert scanner.matched is None


def test_an_empty_stop_string_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequest, match="must not be empty") as caught:
        StopStrings(["a", ""])
    assert caught.value.param == "stop"


def test_text_after_the_end_is_our_mistake() -> None:
    scanner = StopStrings(["x"])
    scanner.push("x")
    with pytest.raises(AssertionError, match="after the stop string"):
        scanner.push("y")
