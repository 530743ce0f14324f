"""A stream by a lane and the same stream without one: the same bytes at its client, the same books at the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
from collections.abc import Sequence

import pytest

from disaggregated.errors import DisaggregatedError, ServerLost
from disaggregated.request_life import Phase
from disaggregated.sampling_params import SamplingParams
from disaggregated.text import ChoiceText
from disaggregated.v1 import control_pb2
from orchestrator.api.outbox import Outbox
from orchestrator.api.shapes import ChatShape
from orchestrator.api.sse import EventStream
from orchestrator.api.streamed import StreamedText
from orchestrator.fan_out import FanOut, Lane, Terminal
from orchestrator.fan_out.library import PENDING_MAX, library
from orchestrator.generation_link import GenerationLink
from orchestrator.request_run import RequestRun, TokenRequest
from orchestrator.story import AttemptStory, RequestStory
from orchestrator.token_flow import TokenFlow
from orchestrator.token_order import arrival_of
from tests.support.byte_model import byte_tokenizer
from tests.support.event_wire import PATIENCE_S, Wire, wire
from tests.support.fake_cluster import FakeClient, FakeCluster

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")

PROMPT = (1, 2, 3)
END_ID = 256
DATE = re.compile(rb"Date: [^\r]*\r\n")


class Flow(TokenFlow):
    """Of an attempt without a context server."""

    __slots__ = ("key", "lanes", "link", "lost")

    def __init__(self, run: RequestRun, link: GenerationLink) -> None:
        story = AttemptStory(context_instance="", generation_instance="g0")
        super().__init__(run, story)
        run.story.attempts.append(story)
        run.life.advance(Phase.PREFILLING, now_s=0.0)
        self.link = link
        self.lanes: list[Lane] = []
        self.lost: list[ServerLost] = []
        self.key = link.open(self)

    def on_delta(self, delta: control_pb2.StreamDelta, now_s: float) -> None:
        self._arrived(arrival_of(delta), now_s)

    def on_refused(self, error: DisaggregatedError) -> None:
        raise error

    def on_lost(self, error: ServerLost) -> None:
        self.lost.append(error)
        self._leave_flow()
        self._is_over = True

    def _open_lane(self, terminal: Terminal) -> Lane | None:
        lane = self.link.open_lane(self.key, terminal)
        self.lanes += [lane] if lane is not None else []
        return lane

    def _landed(self) -> None:
        self._has_landed = True

    def _delivered(self, now_s: float) -> None:
        if self.run.life.phase is Phase.PREFILLING:
            self.run.life.advance(Phase.DECODING, now_s=now_s)
        self._enter_flow()

    def _finish(self, now_s: float) -> None:
        if self._flow_position >= 0:
            self._leave_flow()
        self._is_over = True
        self.link.close(self.key, is_over=True)


class Played:
    """One stream from its first token on."""

    def __init__(self, exchange: Wire, fan_out: FanOut | None, *, num_tokens_max: int) -> None:
        self.now_s = 0.0
        client = FakeClient(FakeCluster(0, num_context=0, num_generation=1).of("generation")[0])
        self.link = GenerationLink(client, "link-1", clock=lambda: self.now_s, fan_out=fan_out)
        tokenizer = byte_tokenizer()
        tokenizer.learn_texts()
        self.shape = ChatShape("id", "house/fake", 1_700_000_000, include_usage=False)
        self.choice = StreamedText(0, self.shape, ChoiceText(tokenizer, (), ()))
        self.stream = EventStream(exchange, {}, (self.choice,), Outbox())
        request = TokenRequest(
            request_id="r",
            token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=num_tokens_max),
            arrived_s=0.0,
            deadline_s=100.0,
        )
        self.run = RequestRun(request, self.choice, _nobody, lambda _: None, now_s=0.0)
        self.run.terminal = self.choice.terminal
        self.flow = Flow(self.run, self.link)
        self.position = len(PROMPT)

    def step(self, *token_ids: int, finish_reason: str = "") -> None:
        """One of the server's messages: a plain token stands in the columns, and everything else is a delta."""
        self.now_s += 0.25
        batch = control_pb2.StepBatch()
        if len(token_ids) == 1 and not finish_reason:
            batch.stream_keys.append(self.flow.key)
            batch.positions.append(self.position)
            batch.token_ids.extend(token_ids)
        else:
            delta = batch.deltas.add(stream_key=self.flow.key, first_position=self.position)
            delta.token_ids.extend(token_ids)
            delta.finish_reason = finish_reason
        self.position += len(token_ids)
        self.link._take_apart(batch)

    def books(self) -> tuple[object, ...]:
        story, attempt = self.run.story, self.run.story.attempts[0]
        counted = story.num_tokens, story.first_token_s, story.last_token_s, story.longest_gap_s, story.finish_reason
        return *counted, attempt.num_tokens, list(self.run.emitted)


def _nobody(story: RequestStory, error: DisaggregatedError | None) -> None: ...


def text_in(answer: bytes) -> str:
    events = [json.loads(found) for found in re.findall(rb"data: (\{.*?\})\n\n", answer)]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


async def answered(
    fan_out: FanOut | None, steps: Sequence[Sequence[int]], pauses: Sequence[bool]
) -> tuple[object, ...]:
    async with wire() as exchange:
        reading = asyncio.create_task(exchange.read_all())
        played = Played(exchange, fan_out, num_tokens_max=10_000)
        for token_ids, pause in zip(steps[:-1], pauses, strict=False):
            played.step(*token_ids)
            if pause:
                await asyncio.sleep(0)
        played.step(*steps[-1], finish_reason="stop")
        await played.stream.end(played.shape.closing)
        assert bool(played.flow.lanes) == (fan_out is not None)
        assert played.flow._lane is None, "a stream that is over keeps no lane"
        return DATE.sub(b"", await reading), *played.books()


@pytest.mark.parametrize("seed", range(25))
async def test_a_stream_by_a_lane_has_the_same_bytes_and_the_same_books(seed: int) -> None:
    chance, fan_out = random.Random(seed), FanOut.make()
    odd_share = chance.choice((0.0, 0.02, 0.3))
    steps: list[Sequence[int]] = [[72]]
    for _ in range(chance.choice((5, 3 * PENDING_MAX))):
        if chance.random() >= odd_share:
            steps.append([chance.randrange(0x21, 0x60)])
        else:
            steps.append(chance.choice(([END_ID], [chance.randrange(256)], [65, 66, 67], [200, 201])))
    steps.append([90])
    pauses = [chance.random() < 0.3 for _ in steps]
    assert await answered(fan_out, steps, pauses) == await answered(None, steps, pauses)


async def test_most_tokens_of_a_plain_stream_are_never_seen_by_its_flow() -> None:
    async with wire() as exchange:
        played = Played(exchange, FanOut.make(), num_tokens_max=10_000)
        seen: list[int] = []

        def see(token_id: int) -> bool:
            seen.append(token_id)
            return True

        played.flow._push_token = see
        for token_id in itertools.islice(itertools.cycle(range(0x30, 0x40)), 3 * PENDING_MAX):
            played.step(token_id)
            with contextlib.suppress(BlockingIOError):
                exchange.client.recv(1 << 16)
        assert 1 <= len(seen) <= 3
        played.flow.on_lost(ServerLost("gone"))
        assert len(played.run.emitted) == 3 * PENDING_MAX


@pytest.mark.parametrize("num_tokens_max", [2, 3, 40])
async def test_the_last_token_that_may_come_ends_the_stream(num_tokens_max: int) -> None:
    async with wire() as exchange:
        played = Played(exchange, FanOut.make(), num_tokens_max=num_tokens_max)
        for token_id in range(0x30, 0x30 + num_tokens_max):
            assert not played.flow._is_over
            played.step(token_id)
        assert played.flow._is_over
        assert played.run.story.finish_reason == "length"
        assert len(played.run.emitted) == num_tokens_max


async def test_a_token_that_comes_twice_or_too_early_is_found_out_with_a_lane_too() -> None:
    async with wire() as exchange:
        played = Played(exchange, FanOut.make(), num_tokens_max=100)
        for token_id in b"hello":
            played.step(token_id)
        played.position -= 2
        played.step(0x30)
        assert [str(error) for error in played.flow.lost] == [
            "the token at position 8 was due, and a server sent the one at 6"
        ]
        assert played.run.emitted.tolist() == list(b"hello")


async def test_a_client_that_stops_reading_gets_all_of_its_text_once_it_reads_again() -> None:
    num_tokens = 4000
    a, b, c, d = byte_tokenizer().encode("abcd")
    async with wire(buffer_bytes=4096) as exchange:
        played = Played(exchange, FanOut.make(), num_tokens_max=100_000)
        for _ in range(num_tokens):
            played.step(a)
        assert not played.stream.takes_more, "the kernel took it all: the test shows nothing"
        assert played.choice.terminal() is None
        reading = asyncio.create_task(exchange.read_all())
        async with asyncio.timeout(PATIENCE_S):
            while played.choice.terminal() is None:
                await asyncio.sleep(0)
                played.step(b)
        for _ in range(100):
            played.step(c)
            await asyncio.sleep(0)
        played.step(d, finish_reason="length")
        await played.stream.end(played.shape.closing)
        read = await reading

    assert re.fullmatch(f"a{{{num_tokens}}}b+c{{100}}d", text_in(read))
    assert played.run.story.num_tokens == len(played.run.emitted)
