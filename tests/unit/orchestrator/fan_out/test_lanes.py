"""What lanes write, what they leave, and what they remember of it, beside a model that does the same in Python."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
from collections.abc import Iterator

import pytest

from orchestrator.fan_out import FanOut, Lane, Terminal
from orchestrator.fan_out.library import EVENT_MAX, PENDING_MAX, library

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")

BEFORE, AFTER = b'data: {"text":"', b'"}\n\n'
KNOWN = {token_id: b"%d " % token_id for token_id in range(100)} | {7: b"", 8: b"x" * 1100}
"""Token 7 prints nothing, and token 8 is longer than what a lane takes."""


def fan_out() -> FanOut:
    made = FanOut.make()
    assert made is not None
    return made


class Client:
    """Both ends of a connection, and what could not be written to it at once."""

    def __init__(self, *, buffer_bytes: int = 0, is_chunked: bool = True, before: bytes = BEFORE) -> None:
        self.ours, self.theirs = socket.socketpair()
        if buffer_bytes:
            self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        self.ours.setblocking(False)
        self.theirs.setblocking(False)
        self.is_chunked = is_chunked
        self.before = before
        self.after = AFTER + b"\r\n" * is_chunked
        self.rests: list[bytes] = []
        self.lanes: list[Lane] = []
        self.num_flushes = 0
        self.read = b""

    def write_rest(self, rest: bytes) -> None:
        self.rests.append(rest)

    def terminal(self, known: dict[int, bytes] = KNOWN) -> Terminal:
        return Terminal(
            self.ours.fileno(), self.before, self.after, self.is_chunked, known, self, self.lanes.append, self.flush
        )

    def flush(self) -> None:
        self.num_flushes += 1

    def drain(self) -> bytes:
        """All that has come by now."""
        with contextlib.suppress(BlockingIOError):
            while part := self.theirs.recv(1 << 16):
                self.read += part
        return self.read

    def event(self, token_id: int) -> bytes:
        event = self.before + KNOWN[token_id] + AFTER
        return b"%x\r\n%b\r\n" % (len(event), event) if self.is_chunked else event

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def client() -> Iterator[Client]:
    with contextlib.closing(Client()) as made:
        yield made


def opened(lanes: FanOut, key: int, client: Client, *, position: int = 0, last: int = 10_000) -> Lane:
    lane = lanes.open(key, client.terminal())
    assert lane is not None
    lane.go_on(position, last, 0.0, 0.0)
    return lane


def test_each_token_is_written_to_the_client_of_its_stream_and_a_strangers_is_left() -> None:
    lanes = fan_out()
    with contextlib.closing(Client()) as one, contextlib.closing(Client(is_chunked=False)) as two:
        first, second = opened(lanes, 11, one, position=5), opened(lanes, 22, two)
        assert lanes.deliver([22, 33, 11, 11], [0, 0, 5, 6], [1, 2, 3, 4], 1.0) == [1]
        assert one.drain() == one.event(3) + one.event(4)
        assert two.drain() == two.event(1)
        assert first.take() == ([3, 4], 1.0, 1.0)
        assert second.take() == ([1], 1.0, 1.0)
        assert first.take() == ([], 1.0, 1.0), "what was taken over is not told again"


@pytest.mark.parametrize(
    ("position", "token_id", "why"),
    [
        (4, 1, "it came before"),
        (6, 1, "one is missing before it"),
        (20, 1, "it is the last one"),
        (5, 7, "it prints nothing"),
        (5, 8, "its text is too long"),
        (5, 100, "its text is not known"),
        (5, 2**32 - 1, "no vocabulary has it"),
    ],
)
def test_what_is_out_of_the_ordinary_is_left_and_changes_nothing(
    client: Client, position: int, token_id: int, why: str
) -> None:
    lanes = fan_out()
    lane = opened(lanes, 1, client, position=20 if position == 20 else 5, last=20)
    assert lanes.deliver([1], [position], [token_id], 1.0) == [0], why
    assert client.drain() == b""
    assert lane.take() == ([], 0.0, 0.0)
    if position != 20:
        assert lanes.deliver([1], [5], [1], 2.0) == ()
        assert client.drain() == client.event(1)


def test_a_lane_takes_nothing_before_it_is_told_to_go_on_and_none_once_it_is_shut(client: Client) -> None:
    lanes = fan_out()
    lane = lanes.open(1, client.terminal())
    assert lane is not None
    assert client.lanes == [lane]
    assert lanes.deliver([1], [0], [1], 1.0) == [0]
    lane.go_on(0, 100, 1.0, 0.5)
    assert lanes.deliver([1], [0], [1], 3.0) == ()
    lane.shut()
    assert lanes.deliver([1], [1], [2], 4.0) == [0]
    lane.go_on(2, 100, 4.0, 2.0)
    assert lanes.deliver([1], [2], [3], 4.5) == ()
    assert client.drain() == client.event(1) + client.event(3)
    assert lane.take() == ([1, 3], 4.5, 2.0)
    lane.close()
    lane.shut()
    assert lanes.deliver([1], [3], [4], 5.0) == range(1)


def test_everything_that_waits_elsewhere_is_written_before_a_step(client: Client) -> None:
    lanes = fan_out()
    opened(lanes, 1, client)
    lanes.deliver([1, 1], [0, 1], [1, 2], 1.0)
    lanes.deliver([2], [0], [1], 1.0)
    assert client.num_flushes == 2


def test_books_that_nobody_takes_over_are_full_at_last_and_the_next_token_is_left(client: Client) -> None:
    lanes = fan_out()
    lane = opened(lanes, 1, client)
    for position in range(PENDING_MAX):
        assert lanes.deliver([1], [position], [1], 1.0) == ()
        client.drain()
    assert lanes.deliver([1], [PENDING_MAX], [1], 1.0) == [0]
    assert len(lane.take()[0]) == PENDING_MAX
    assert lanes.deliver([1], [PENDING_MAX], [1], 1.0) == ()


def test_a_token_whose_text_becomes_known_is_taken_from_then_on(client: Client) -> None:
    lanes, known = fan_out(), dict(KNOWN)
    lane = lanes.open(1, client.terminal(known))
    assert lane is not None
    lane.go_on(0, 100, 0.0, 0.0)
    lane.learn(3_000_000)
    assert lanes.deliver([1], [0], [3_000_000], 1.0) == [0]
    known[3_000_000] = b"new"
    lane.learn(3_000_000)
    assert lanes.deliver([1], [0], [3_000_000], 1.0) == ()
    assert b'"text":"new"' in client.drain()


@pytest.mark.parametrize("around", [0, 0xF0, 0xFF0, 0x1800])
def test_the_size_of_a_chunk_is_right_for_events_of_any_length(around: int) -> None:
    lanes = fan_out()
    for num_bytes in range(around, around + 20):
        with contextlib.closing(Client(before=b"b" * num_bytes)) as client:
            opened(lanes, num_bytes, client)
            assert lanes.deliver([num_bytes] * 2, range(2), [1, 11], 1.0) == ()
            assert client.drain() == client.event(1) + client.event(11)


def test_an_event_that_is_too_long_has_no_lane(client: Client) -> None:
    lanes = fan_out()
    client.before = b"b" * EVENT_MAX
    assert lanes.open(1, client.terminal()) is None
    assert client.lanes == []


def test_a_client_that_has_gone_gets_nothing_and_its_tokens_are_left(client: Client) -> None:
    lanes = fan_out()
    opened(lanes, 1, client)
    client.theirs.close()
    assert lanes.deliver([1], [0], [1], 1.0) == [0]


def test_what_a_client_is_too_slow_for_is_handed_over_to_the_byte_and_its_lane_is_shut() -> None:
    lanes, position = fan_out(), 0
    with contextlib.closing(Client(buffer_bytes=4096, before=b"b" * 3000)) as client:
        lane = opened(lanes, 1, client)
        taken: list[int] = []
        while not client.rests:
            if lanes.deliver([1], [position], [position % 7], 1.0):
                break  # This socket takes an event as a whole or not at all.
            position += 1
            taken += lane.take()[0]
        assert position > 0
        if client.rests:
            assert lanes.deliver([1], [position], [1], 1.0) == [0], "it goes past what could not be written"
        assert client.drain() + b"".join(client.rests) == b"".join(map(client.event, taken))


def test_a_tcp_connection_takes_a_part_of_an_event_and_the_other_part_is_handed_over() -> None:
    lanes = fan_out()
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.closing(Client(before=b"b" * 6000)) as client:
        client.close()
        client.theirs = socket.create_connection(listener.getsockname())
        client.ours, _ = listener.accept()
        client.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.ours.setblocking(False)
        lane, position, taken = opened(lanes, 1, client), 0, list[int]()
        while not lanes.deliver([1], [position], [position % 7], 1.0) and not client.rests:
            position += 1
            taken += lane.take()[0]
        taken += lane.take()[0]
        expected = b"".join(map(client.event, taken))
        client.theirs.setblocking(True)
        client.theirs.settimeout(20.0)
        unread = len(expected) - len(b"".join(client.rests))
        while len(client.read) < unread:
            client.read += client.theirs.recv(1 << 16)
        assert client.read + b"".join(client.rests) == expected


@dataclasses.dataclass
class Expected:
    """One stream of the model."""

    client: Client
    lane: Lane
    position: int
    pending: list[int]
    is_open: bool = True


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_steps_openings_and_closings_writes_what_the_model_says(seed: int) -> None:
    chance, lanes = random.Random(seed), fan_out()
    streams: dict[int, Expected] = {}
    ended: list[tuple[Client, bytes]] = []
    written: dict[int, bytes] = {}
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            key = chance.choice([*streams, chance.randrange(1 << 64)]) if streams else chance.randrange(1 << 64)
            move = chance.random()
            if key not in streams and len(streams) < 90:
                client = stack.enter_context(contextlib.closing(Client(is_chunked=chance.random() < 0.5)))
                position = chance.randrange(100)
                streams[key] = Expected(client, opened(lanes, key, client, position=position), position, [])
                written[key] = b""
            elif key in streams and move < 0.1:
                gone = streams.pop(key)
                assert list(gone.lane.take()[0]) == gone.pending
                gone.lane.close()
                ended.append((gone.client, written[key]))
            elif key in streams and move < 0.2:
                streams[key].lane.shut()
                streams[key].is_open = False
            elif key in streams and move < 0.3:
                stream = streams[key]
                assert list(stream.lane.take()[0]) == stream.pending
                stream.pending, stream.is_open = [], True
                stream.lane.go_on(stream.position, 10_000, 0.0, 0.0)
            else:
                _one_step(chance, lanes, streams, written)
        for key, stream in streams.items():
            assert stream.client.drain() == written[key]
        for client, expected in ended:
            assert client.drain() == expected


def _one_step(chance: random.Random, lanes: FanOut, streams: dict[int, Expected], written: dict[int, bytes]) -> None:
    columns: list[tuple[int, int, int]] = []
    left = []
    for key in chance.sample([*streams, 12345], k=chance.randint(1, len(streams) + 1)):
        stream = streams.get(key)
        token_id = chance.choice((chance.randrange(100), chance.randrange(6), 5000))
        position = 0 if stream is None else stream.position + chance.choice((0, 0, 0, 0, 1))
        columns.append((key, position, token_id))
        is_text = 0 < len(KNOWN.get(token_id, b"")) <= 1024
        if (
            stream is None
            or not stream.is_open
            or not is_text
            or position != stream.position
            or len(stream.pending) == PENDING_MAX
        ):
            left.append(len(columns) - 1)
        else:
            stream.position += 1
            stream.pending.append(token_id)
            written[key] += stream.client.event(token_id)
    stream_keys, positions, token_ids = zip(*columns, strict=True)
    assert list(lanes.deliver(stream_keys, positions, token_ids, 1.0)) == left
