"""What aiohttp reads: what is no HTTP is refused in the shape of all errors, and bodies are unpacked within a limit."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from orchestrator.loop_lag import LoopLag
from tests.support.front_door import Door, front_door
from tests.support.http_answers import Answer, answers_in
from tests.support.http_client import connected
from tests.support.raw_http import CHUNKED, HEAD, SMUGGLED, TOO_LARGE, said

BODY: Final = json.dumps({"model": "fake", "prompt": "Hi", "max_tokens": 2}).encode()
WITHIN_S: Final = 20.0
LATE_MAX_S: Final = 0.1
NUM_ATTEMPTS: Final = 4
"""Who else computes on this machine makes a loop late, but not each time."""


def packed(coding: str, body: bytes) -> bytes:
    """A request that says so of its body, and is the last on its connection."""
    framing = f"content-encoding: {coding}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return HEAD + framing.encode() + body


async def answer_to(door: Door, message: bytes) -> Answer:
    (answer,) = answers_in(await said(door.port.address[1], message, within_s=WITHIN_S))
    return answer


def error_in(answer: Answer) -> dict[str, object]:
    assert answer.headers["content-type"].startswith("application/json")
    error: dict[str, object] = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


@pytest.mark.parametrize("what", [*SMUGGLED, *TOO_LARGE])
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_no_http_is_refused_like_everything_else_and_hung_up_on(what: str, door: Door) -> None:
    answer = await answer_to(door, {**SMUGGLED, **TOO_LARGE}[what])
    message = str(error_in(answer)["message"])
    assert answer.status == 400
    assert message.startswith(("this is no valid HTTP: ", "the body is not valid JSON"))
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.asyncio(loop_scope="module")
async def test_whoever_waits_for_the_rest_of_a_body_is_told_that_it_is_no_http(door: Door, waits: bool) -> None:
    async with connected(door.port.address[1]) as client, asyncio.timeout(WITHIN_S):
        client.send(HEAD + CHUNKED + b"\r\n5\r\n")
        client.send(b'{"mod\r\n')
        if waits:
            await door.get("/version")  # By now, the handler waits.
        client.send(b"zz\r\n")
        (answer,) = answers_in(await client.rest())
    assert answer.status == 400
    assert "Invalid character" in str(error_in(answer)["message"])


@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_but_to_go_on_may_be_expected(door: Door) -> None:
    message = HEAD + b"expect: a miracle\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    answer = await answer_to(door, message)
    assert answer.status == 417
    assert "100-continue" in str(error_in(answer)["message"])
    answer = await answer_to(door, message.replace(b"a miracle", b"100-continue"))
    assert error_in(answer)["param"] == "model"


@pytest.mark.parametrize("coding", ["gzip", "X-GZIP", "deflate", "identity"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_packed_body_means_what_is_in_it(coding: str, door: Door) -> None:
    bodies = {"deflate": zlib.compress(BODY), "identity": BODY}
    answer = await answer_to(door, packed(coding, bodies.get(coding, gzip.compress(BODY))))
    assert answer.status == 200, answer


@pytest.mark.parametrize(
    ("coding", "body", "status", "message"),
    [
        ("br", BODY, 400, "content-encoding must be gzip or deflate, is 'br'"),
        ("gzip, gzip", BODY, 400, "content-encoding must be gzip or deflate"),
        ("gzip", BODY, 400, "the body is not gzip: "),
        ("deflate", gzip.compress(BODY), 400, "the body is not deflate: "),
        ("gzip", gzip.compress(BODY)[:-1], 400, "it does not end where it should"),
        ("gzip", gzip.compress(BODY) + b"x", 400, "it does not end where it should"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_packed_otherwise_is_refused(
    coding: str, body: bytes, status: int, message: str, door: Door
) -> None:
    answer = await answer_to(door, packed(coding, body))
    error = error_in(answer)
    assert (answer.status, error["param"]) == (status, "content-encoding")
    assert message in str(error["message"])


@pytest.mark.asyncio(loop_scope="module")
async def test_no_more_is_unpacked_than_may_be_sent_and_nobody_waits_for_it(door: Door) -> None:
    bomb = packed("gzip", gzip.compress(b" " * (100 << 20), 1))
    late_s: list[float] = []
    while min(late_s, default=1.0) >= LATE_MAX_S and len(late_s) < NUM_ATTEMPTS:
        lag = LoopLag(lambda _: None, interval_s=0.005)
        lag.start()
        answer = await answer_to(door, bomb)
        lag.stop()
        late_s.append(lag.longest_s)
        assert answer.status == 413
        assert "larger than the limit of 8388608 bytes" in str(error_in(answer)["message"])
    assert min(late_s) < LATE_MAX_S, late_s
