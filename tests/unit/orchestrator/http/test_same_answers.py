"""The same bytes are answered the same, whether a connection of ours reads them or aiohttp alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import pytest

from orchestrator.api import bodies as bodies_module
from orchestrator.api import jobs as jobs_module
from orchestrator.api import sampling_fields
from orchestrator.api.drafts import Draft
from orchestrator.http import port as port_module
from orchestrator.http.port import PublicPort
from tests.support.front_door import Door, front_door
from tests.support.fuzz_bodies import GOOD
from tests.support.http_answers import Answer, answers_in
from tests.support.http_client import connected, request
from tests.support.raw_http import CHUNKED, GET, SMUGGLED, STALLED, TOO_LARGE

CHAT: Final = "/v1/chat/completions"
MALFORMED: Final = "it is no HTTP"
CLOSED: Final = "it was the last"
RESET: Final = "the rest of the answers is lost"
HELLO: Final = [{"role": "user", "content": "Hello"}]
NO_HTTP: Final = re.compile(rb'"message":"(this is no valid HTTP|the body is not framed as HTTP wants it):')
CREATED: Final = re.compile(rb'"created":[0-9]+')
BODIES: Final[Sequence[tuple[str, dict[str, Any]]]] = [
    ("/v1/completions", {}),
    ("/v1/completions", {"prompt": [65, 66, 67], "max_tokens": 3}),
    ("/v1/completions", {"prompt": [0xC3], "max_tokens": 40, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 500}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 900, "include_stop_str_in_output": True}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "skip_special_tokens": False}),
    ("/v1/completions", {"prompt": [65, -1]}),
    ("/v1/completions", {"prompt": [65], "add_special_tokens": 3}),
    ("/v1/completions", {"prompt": [65] * 2000}),
    ("/v1/completions", {"prompt": [[65, 66], [67]], "echo": True}),
    ("/v1/completions", {"prompt": "long " * 1000}),
    ("/v1/completions", {"prompt": ["a", 3]}),
    ("/v1/completions", {"logprobs": 2}),
    ("/v1/completions", {"stop": ["a", "e"], "max_tokens": 100}),
    ("/v1/completions", {"unknown_field": 1, "priority": 2}),
    ("/v1/completions", {"max_tokens": 0}),
    ("/v1/completions", {"model": "another"}),
    ("/v1/completions", {"n": 2, "seed": 3}),
    ("/v1/completions", {"stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "", "stream": True}),
    ("/v1/completions", {"regex": "[ab]+"}),
    (CHAT, {"messages": HELLO}),
    (CHAT, {"messages": HELLO, "stream": True}),
    (CHAT, {"messages": HELLO, "stream": True, "n": 3}),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 1000}]}),
]


@contextlib.asynccontextmanager
async def without_ours(port: PublicPort) -> AsyncIterator[int]:
    """A port of the same application where aiohttp reads everything."""
    server = await asyncio.get_running_loop().create_server(port.make_other, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def answer_at(port: int, message: bytes) -> Answer:
    async with connected(port) as client:
        client.send(message)
        status, headers, body = await client.answer()
        return Answer(status, headers, body)


async def test_each_body_is_answered_the_same_at_once_in_a_task_and_by_the_other_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with front_door() as door, without_ours(door.port) as other:
        for path, fields in BODIES:
            message = request(path, "x-request-id: same", **fields)
            first, again = [await answer_at(door.port.address[1], message) for _ in range(2)]
            theirs = await answer_at(other, message)
            with monkeypatch.context() as never_at_once:
                never_at_once.setattr("orchestrator.api.generate.prepare", late)
                in_a_task = await answer_at(door.port.address[1], message)
            assert first.gist == again.gist == in_a_task.gist == theirs.gist, (path, fields)
            shown = [{*answer.headers} - {"server", "date"} for answer in (first, again, in_a_task, theirs)]
            assert shown[0] == shown[1] == shown[2] == shown[3], (path, fields)
            if not fields.get("stream"):
                bodies = {CREATED.sub(b"", answer.body) for answer in (first, again, in_a_task, theirs)}
                assert len(bodies) == 1, (path, fields)
        await door.wait_idle()


def late(draft: Draft) -> Any:
    """As `prepare`, but nothing is done at once."""
    return lambda: jobs_module.job_of(draft)


def mutated(random_: random.Random) -> bytes:
    """One to three requests in a row, some of them broken."""
    messages = []
    for _ in range(random_.randint(1, 3)):
        path, fields = random_.choice([*BODIES, *GOOD])
        whole = request(path, "x-request-id: same", *random_.sample(HEADERS, random_.randint(0, 1)), **fields)
        if random_.random() < 0.1:
            whole = random_.choice([GET, *SMUGGLED.values(), *STALLED.values(), *TOO_LARGE.values()])
        elif random_.random() < 0.1:
            head, _, body = whole.partition(b"\r\n\r\n")
            chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            whole = head[: head.index(b"Content-Length")] + CHUNKED + b"\r\n" + chunks
        messages.append(whole)
    message = bytearray(b"".join(messages))
    for _ in range(random_.choice([0, 0, 1, 1, 2])):
        at = random_.randrange(min(len(message), 400))
        match random_.randrange(4):
            case 0:
                message[at] = random_.choice(ODD)
            case 1:
                del message[at]
            case 2:
                message.insert(at, random_.choice(ODD))
            case _:
                message[at:at] = message[at : at + random_.randint(1, 60)]
    return bytes(message)


class AlwaysSeven(random.Random):
    def getrandbits(self, k: int, /) -> int:
        return 7


HEADERS: Final = [
    "Connection: close", "Connection: Keep-Alive", "X-A: b", "Expect: 100-continue", "Accept: */*", "Host: twice",
    "Content-Length: 5", "Transfer-Encoding: chunked", "Content-Encoding: identity", "X-Odd: \x7f", "Upgrade: h2c",
]  # fmt: skip
ODD: Final = b'\r\n\t :\0\x7f\x80\xff0193aZ{"[,/?-'


async def gists_in_pieces(port: int, message: bytes, random_: random.Random) -> list[Any]:
    """Of all that is answered until the other end closes, which it does when nothing more comes. Who closes on bytes
    that nobody has read resets the connection, and the kernel drops what its client has not taken yet."""
    async with connected(port) as client:
        cuts = sorted(random_.randrange(len(message)) for _ in range(random_.randint(0, 4)))
        for begin, end in zip([0, *cuts], [*cuts, len(message)], strict=True):
            if begin < end:
                client.send(message[begin:end])
                await asyncio.sleep(0)
        said = await client.rest()
        return [*gists_of(said), RESET] if client.was_reset else gists_of(said)


def gists_of(said: bytes) -> list[Any]:
    """What is no HTTP is told in words that quote whatever came in the same piece. Nothing comes after a close."""
    gists: list[Any] = []
    for answer in answers_in(said):
        gists.append(MALFORMED if NO_HTTP.search(answer.body) else answer.gist)
        if answer.headers.get("connection") == "close":
            gists.append(CLOSED)
    return gists


def assert_same(ours: list[Any], theirs: list[Any], message: bytes) -> None:
    """What is no HTTP ends its connection, and so does whatever comes after a request that was to be the last. Which of
    the answers before that still reach a client depends on which pieces came together; it gets no other ones."""
    ends = {MALFORMED, CLOSED, RESET}
    if ends.isdisjoint(end for end in [*ours, *theirs] if isinstance(end, str)):
        assert ours == theirs, message
        return
    one, other = ([answer for answer in answers if not isinstance(answer, str)] for answers in (ours, theirs))
    common = min(len(one), len(other))
    assert one[:common] == other[:common], message


@pytest.mark.parametrize(("seed", "count"), [(1, 400), pytest.param(2, 20_000, marks=pytest.mark.soak)])
@pytest.mark.timeout(3600)
async def test_broken_requests_in_any_pieces_are_answered_as_by_the_other_reader_alone(
    monkeypatch: pytest.MonkeyPatch, seed: int, count: int
) -> None:
    """So no bytes are two requests for one of them and one for the other: smuggling takes two readers that differ."""
    monkeypatch.setattr(bodies_module, "BODY_TIMEOUT_S", 0.4)
    monkeypatch.setattr(port_module, "KEEPALIVE_S", 0.4)
    monkeypatch.setattr(sampling_fields, "_SEEDS", AlwaysSeven())  # Some lose the seed that they had.
    random_ = random.Random(seed)
    messages = [mutated(random_) for _ in range(count)]
    turns = asyncio.Semaphore(40)

    async def compare(door: Door, other: int, message: bytes) -> None:
        async with turns:
            pieces = random.Random(message)
            ours = await gists_in_pieces(door.port.address[1], message, pieces)
            theirs = await gists_in_pieces(other, message, pieces)
        assert_same(ours, theirs, message)

    async with front_door(num_tokens_max=128) as door, without_ours(door.port) as other:
        async with asyncio.TaskGroup() as group:
            for message in messages:
                group.create_task(compare(door, other, message))
        await door.wait_idle()
        assert not door.port._tasks
