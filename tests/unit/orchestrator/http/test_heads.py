"""Which heads are read here, and which bytes are left to the other reader."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.http import heads
from orchestrator.http.heads import (
    BODY_BYTES_MAX,
    HEAD_BYTES_MAX,
    LINE_KEPT_MAX,
    LINES_KEPT_MAX,
    may_become_ours,
    read_head,
)
from tests.support import raw_http

PLAIN = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: here:8000\r\nAccept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\nX-Stainless-Lang: python\r\nContent-Type: application/json\r\nContent-Length: 12\r\n"
)
TRANSFORMS = (
    "transfer-encoding: chunked",
    "content-encoding: gzip",
    "expect: 100-continue",
    "upgrade: h2c",
    "te: trailers",
)


def head_with(*lines: str) -> bytes:
    return PLAIN + "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


def test_a_plain_head_is_read() -> None:
    head = read_head(head_with("Authorization:Bearer  a b ", "X-Empty:") + b"{}")
    assert head is not None
    assert head.path == "/v1/chat/completions"
    assert head.headers["authorization"] == "Bearer  a b"
    assert head.headers["x-empty"] == ""
    assert head.headers["host"] == "here:8000"
    assert (head.keep_alive, head.body_bytes) == (True, 12)
    assert head.num_bytes == len(head_with("Authorization:Bearer  a b ", "X-Empty:"))


@pytest.mark.parametrize(("value", "keeps"), [("close", False), ("Close", False), ("Keep-Alive", True)])
def test_a_client_may_ask_to_close(value: str, keeps: bool) -> None:
    head = read_head(head_with().replace(b"keep-alive", value.encode()))
    assert head is not None
    assert head.keep_alive is keeps


@pytest.mark.parametrize(
    "line",
    [
        *TRANSFORMS,
        "content-length: 12",
        "Host: there",
        "x-stainless-lang: again",
        "x: caf\xe9",
        "x: a\tb",
        "x: a\0b",
        "x : 1",
        " folded",
        "no colon",
        ": no name",
        "x: a\nb: c",
        "x: a\rb: c",
        "proxy-connection: keep-alive",
    ],
)
def test_whatever_could_be_read_in_two_ways_is_left_alone(line: str) -> None:
    assert read_head(head_with(line)) is None


@pytest.mark.parametrize(
    "length",
    [
        "",
        "-1",
        "+12",
        "0x12",
        "1 2",
        "12,12",
        "1_2",
        "1.0",
        str(BODY_BYTES_MAX + 1),
        "9" * 30,
        "\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_a_length_that_is_not_a_short_row_of_digits_is_left_alone(length: str) -> None:
    assert read_head(head_with().replace(b"Content-Length: 12", f"Content-Length: {length}".encode())) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"POST", b"GET"),
        (b"POST", b"post"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"HTTP/1.1", b"HTTP/1.1 "),
        (b"/v1/chat/completions", b"/v1/chat/completions?a=b"),
        (b"/v1/chat/completions", b"//v1/chat/completions"),
        (b"/v1/chat/completions", b"/v1/models"),
        (b"/v1/chat/completions", b"http://here/v1/chat/completions"),
        (b"POST ", b"POST  "),
        (b"POST ", b"\r\nPOST "),
        (b"\r\n", b"\n"),
        (b"Connection: keep-alive", b"Connection: keep-alive, upgrade"),
        (b"Host: here:8000\r\n", b""),
        (b"Content-Length: 12\r\n", b""),
    ],
)
def test_other_requests_are_left_alone(old: bytes, new: bytes) -> None:
    assert read_head(head_with()) is not None
    assert read_head(head_with().replace(old, new)) is None


@pytest.mark.parametrize("message", [*raw_http.SMUGGLED.values(), *raw_http.TOO_LARGE.values()])
def test_nothing_that_could_smuggle_a_request_is_read_here(message: bytes) -> None:
    assert read_head(message) is None
    assert not may_become_ours(message)


def test_a_head_is_bounded_in_bytes_and_lines() -> None:
    assert read_head(head_with("x: " + "y" * HEAD_BYTES_MAX)) is None
    assert read_head(head_with(*(f"h{number}: 1" for number in range(101)))) is None
    assert not may_become_ours(PLAIN + b"x: " + b"y" * HEAD_BYTES_MAX)


@given(st.integers(0, len(PLAIN)))
def test_every_beginning_of_a_plain_head_is_waited_for(length: int) -> None:
    assert read_head(PLAIN[:length]) is None
    assert may_become_ours(PLAIN[:length])


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(PLAIN) + 1), st.binary(max_size=4)), min_size=1, max_size=4))
def test_whatever_is_read_accounts_for_every_byte(changes: list[tuple[int, bytes]]) -> None:
    """With any bytes put anywhere into it, a head is taken only if a second reader, line by line, agrees about it."""
    message = bytearray(head_with())
    for at, new in changes:
        message[at : at + len(new)] = new
    head = read_head(message)
    if head is None:
        return
    whole = bytes(message[: head.num_bytes])
    assert whole.endswith(b"\r\n\r\n")
    assert whole.count(b"\r") == whole.count(b"\n") == whole.count(b"\r\n")
    first, *lines = whole[:-4].split(b"\r\n")
    assert first == f"POST {head.path} HTTP/1.1".encode()
    assert len(lines) == len(head.headers)
    for line in lines:
        name, value = line.split(b":", 1)
        assert re.fullmatch(rb"[!-9;-~]+", name), "a name has only visible characters"
        assert head.headers[name.decode().lower()] == value.decode().strip(" ")
    assert int(head.headers["content-length"]) == head.body_bytes <= BODY_BYTES_MAX


def test_lines_that_came_before_say_the_same_and_are_kept_in_bounds() -> None:
    for _ in range(2):
        for number in range(LINES_KEPT_MAX + 100):
            head = read_head(head_with(f"x-request-id: {number}"))
            assert head is not None
            assert head.headers["x-request-id"] == str(number)
    kept = heads._said_by.__self__  # type: ignore[attr-defined]
    assert len(kept) <= LINES_KEPT_MAX
    read_head(head_with("x-long: " + "y" * LINE_KEPT_MAX))
    assert max(map(len, kept)) <= LINE_KEPT_MAX
