"""The short way of plain streams and the long way of all others put the same bytes on a connection."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import weakref
from collections.abc import Sequence

import pytest

from disaggregated.text import ChoiceText
from disaggregated.text.detokenizer import ESCAPED_MAX, ByteLevelCache, ByteLevelDetokenizer
from orchestrator.api.choices import ParsedText
from orchestrator.api.outbox import Outbox
from orchestrator.api.shapes import ChatShape, CompletionShape, Shape
from orchestrator.api.sse import FRAME_MAX, EventStream
from orchestrator.api.streamed import Streamed, StreamedChoice, StreamedText
from tests.support.byte_model import byte_tokenizer
from tests.support.event_wire import PATIENCE_S, Wire, wire

TOKENIZER = byte_tokenizer()
END_ID = 256
DATE = re.compile(rb"Date: [^\r]*\r\n")


def shape_of(kind: str, *, answer_id: str = "id", include_usage: bool = False) -> Shape:
    make = ChatShape if kind == "chat" else CompletionShape
    return make(answer_id, "house/fake", 1_700_000_000, include_usage=include_usage)


def choice_of(shape: Shape, *, is_short: bool, echoed: str = "", index: int = 0) -> Streamed:
    text = ChoiceText(TOKENIZER, (), ())
    if is_short:
        return StreamedText(index, shape, text, echoed=echoed)
    return StreamedChoice(index, shape, ParsedText(text, None, echoed))


async def said_by(
    exchange: Wire, choices: Sequence[Streamed], shape: Shape, tokens: Sequence[tuple[int, int]], finish_reason: str
) -> bytes:
    """What a client gets of choices that are given `tokens` (which choice, which token), most one by one."""
    stream = EventStream(exchange, {"x-request-id": "r"}, choices, Outbox())
    lasts = {number: at for at, (number, _) in enumerate(tokens)}
    reading = asyncio.create_task(exchange.read_all())
    for at, (number, token_id) in enumerate(tokens):
        choice = choices[number]
        if at == lasts[number]:
            assert not choice.push((token_id,), finish_reason)
        elif isinstance(choice, StreamedText) and choice._reason == "":
            assert choice.push_token(token_id)
        else:
            assert choice.push((token_id,), "")
        if at % 3 == 0:
            await asyncio.sleep(0)
    await stream.end(shape.closing)
    return DATE.sub(b"", await reading)


@pytest.mark.parametrize("seed", range(60))
async def test_a_plain_stream_is_the_same_to_the_byte_on_its_short_way(seed: int) -> None:
    chance = random.Random(seed)
    kind, is_http_11 = chance.choice(("chat", "completion")), chance.random() < 0.8
    num_choices = chance.choice((1, 1, 3))
    ids = [chance.choice((chance.randrange(256), chance.choice(b' "\\\n{}aZ'), END_ID)) for _ in range(90)]
    tokens = [(chance.randrange(num_choices), each) for each in ids]
    echoed, reason = chance.choice(("", 'He said: "')), chance.choice(("stop", "length"))
    answers = []
    for is_short in (True, False):
        async with wire(is_http_11=is_http_11) as exchange:
            shape = shape_of(kind, include_usage=seed % 2 == 0)
            choices = [choice_of(shape, is_short=is_short, echoed=echoed, index=i) for i in range(num_choices)]
            answers.append(await said_by(exchange, choices, shape, tokens, reason))
    short, long = answers
    assert short == long


def text_in(answer: bytes) -> str:
    events = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["text"] for event in events)


async def test_who_reads_late_gets_the_same_text_in_fewer_events_and_then_one_a_token_again() -> None:
    num_tokens = 4000
    async with wire(is_http_11=False, buffer_bytes=4096) as exchange:
        shape = shape_of("completion")
        choice = choice_of(shape, is_short=True)
        assert isinstance(choice, StreamedText)
        stream = EventStream(exchange, {}, (choice,), Outbox())
        a, b, c, d = TOKENIZER.encode("abcd")
        choice.push([a], "")
        for _ in range(num_tokens):
            choice.push_token(b)
            stream.outbox.flush()
        assert not stream.takes_more, "the kernel took it all: the test shows nothing"
        assert not choice._known, "tokens still go past what is kept"
        reading = asyncio.create_task(exchange.read_all())
        async with asyncio.timeout(PATIENCE_S):
            while not choice._known:
                await asyncio.sleep(0)
                choice.push_token(c)
        choice.push([d], "length")
        await stream.end(shape.closing)
        answer = await reading
    assert re.fullmatch(f"ab{{{num_tokens}}}c+d", text_in(answer))
    assert answer.count(b"data: {") < num_tokens


@pytest.mark.parametrize("num_bytes", [10, FRAME_MAX * 2])
async def test_an_answer_with_a_very_long_name_has_no_frame_and_the_same_events(num_bytes: int) -> None:
    answers = []
    for is_short in (True, False):
        async with wire() as exchange:
            shape = shape_of("chat", answer_id="i" * num_bytes)
            choice = choice_of(shape, is_short=is_short)
            answers.append(await said_by(exchange, [choice], shape, [(0, each) for each in b"hello you"], "stop"))
            if isinstance(choice, StreamedText):
                assert choice._has_frame == (num_bytes < FRAME_MAX)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("length", "is_known"), [(ESCAPED_MAX, True), (ESCAPED_MAX + 1, False)])
def test_a_token_of_very_much_text_has_to_be_pushed(length: int, is_known: bool) -> None:
    detokenizer = ByteLevelDetokenizer(ByteLevelCache(lambda _: "a" * length))
    for _ in range(2):
        assert detokenizer.escaped(1) == (b"a" * length if is_known else None)
    assert (1 in detokenizer.known()) == is_known
    assert detokenizer.push([1]) == "a" * length


@pytest.mark.parametrize("is_short", [True, False])
async def test_the_end_of_a_stream_of_one_leaves_in_one_write_with_its_last_token(is_short: bool) -> None:
    async with wire() as exchange:
        shape = shape_of("chat")
        choice = choice_of(shape, is_short=is_short)
        stream = EventStream(exchange, {}, (choice,), Outbox())
        first, last = TOKENIZER.encode("ab")
        choice.push([first], "")
        stream.outbox.flush()
        choice.push([last], "length")
        assert not stream.outbox.waiting
        stream.gather()
        assert stream.try_end(shape.closing)
        assert len(stream.outbox.waiting) == 1
        answer = await exchange.read_all()
    assert answer.count(b'"content":"b"') == answer.count(b'"finish_reason":"length"') == 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


class Remembered(StreamedChoice):
    """One that can be asked about when it is gone."""


async def test_a_stream_that_has_ended_is_freed_by_its_last_reference() -> None:
    async with wire() as exchange:
        shape = shape_of("chat")
        choice = Remembered(0, shape, ParsedText(ChoiceText(TOKENIZER, (), ()), None))
        gc.disable()
        try:
            await said_by(exchange, [choice], shape, [(0, each) for each in b"hello"], "stop")
            remembered = weakref.ref(choice)
            del choice
            assert remembered() is None
        finally:
            gc.enable()
