"""Harmony, gpt-oss' format: a reply is several messages, each with a header that says what it is.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{…}<|call|>

The prompt ends with the beginning of the first header. `analysis` is reasoning, a message to a function is a call, and
all else is said to the reader. A grammar begins with the message of the `final` channel.
"""

from __future__ import annotations

import re
from typing import Final

from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart, Content, Delta, Reasoning, ReplyParser
from orchestrator.parsers.source import GrammarParser, Source, Steps, collect, skip, take_one_of, until

START: Final = "<|start|>"
CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", START)
MARKERS: Final = (*_ENDS, CHANNEL, MESSAGE, "<|constrain|>")
FINAL_HEADER: Final = f"{CHANNEL}final{MESSAGE}"
_TO: Final = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_RECIPIENT: Final = " to="
"""May come before the channel."""


class HarmonyMessages(GrammarParser):
    def __init__(
        self,
        new_id: NewCallId,
        *,
        then: ReplyParser | None = None,
        separates_reasoning: bool = True,
        shows_reasoning: bool = True,
    ) -> None:
        """`then` reads what is said to the reader, where that is more than text."""
        super().__init__()
        self._new_id = new_id
        self._then = then
        self._reasoning: type[Reasoning | Content] = Reasoning if separates_reasoning else Content
        self._shows_reasoning = shows_reasoning
        self._num_calls = 0

    def _run(self) -> list[Delta]:
        deltas = super()._run()
        return deltas if self._shows_reasoning else [delta for delta in deltas if type(delta) is not Reasoning]

    def _grammar(self, source: Source) -> Steps[None]:
        marker = yield from take_one_of(source, (START, CHANNEL, _RECIPIENT))
        if not marker:
            marker = yield from self._said(source)
        while marker or not (source.is_over and source.is_empty):
            header = yield from collect(source, [MESSAGE])
            if header is None:
                break
            marker = yield from self._message(source, marker + header)
        if self._then is not None:
            yield from self._then.finish()

    def _message(self, source: Source, header: str) -> Steps[str]:
        """Reads it, and the beginning of the next header, which is returned; "" at the end of the reply."""
        channel = header.partition(CHANNEL)[2]
        to = _TO.search(header)
        if to is not None:
            end = yield from self._call(source, to[1])
        elif channel.startswith("analysis"):
            end = yield from until(source, _ENDS, self._reasoning)
        else:
            end = yield from self._said(source)
        if end == START or not end:
            return end
        yield from skip(source)
        return (yield from take_one_of(source, (START, CHANNEL)))

    def _call(self, source: Source, name: str) -> Steps[str]:
        index = self._num_calls
        self._num_calls += 1
        yield CallStart(index, self._new_id(), name)
        return (yield from until(source, _ENDS, lambda text: CallArguments(index, text)))

    def _said(self, source: Source) -> Steps[str]:
        """To the reader; the marker that ends it is returned."""
        if self._then is None:
            return (yield from until(source, _ENDS, Content))
        steps = until(source, _ENDS, Content)
        while True:
            try:
                delta = next(steps)
            except StopIteration as ended:
                return str(ended.value)
            if isinstance(delta, Content):
                yield from self._then.push(delta.text)
            else:
                yield delta
