"""Where the tokens of one sequence end up in a stream: in events, as they come.

Most replies are text and nothing else, and their events differ in that text only: what stands around it is put together
once, what a token is in JSON is known from the last time, and both go into the outbox without a call in between
(`StreamedText.push_token`). What a client is too slow for is kept, and joined into one event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

from disaggregated.text import ChoiceText
from disaggregated.token_logprobs import Told
from orchestrator.api.beside import Beside
from orchestrator.api.choices import KEPT_MAX, ParsedText
from orchestrator.api.outbox import Address
from orchestrator.api.shapes import Shape
from orchestrator.api.sse import EventStream
from orchestrator.fan_out import Lane, Terminal

_NOTHING: Final[Mapping[int, bytes]] = {}
_joined: Final = b"".join


class Streamed(ABC):
    """One choice of a stream. Implements `TokenSink`."""

    __slots__ = ("_index", "_is_finished", "_is_opened", "_reason", "_shape", "stream")

    def __init__(self, index: int, shape: Shape) -> None:
        self._index = index
        self._shape = shape
        self._reason = ""
        """It ended, if there is one."""
        self._is_opened = False
        self._is_finished = False
        self.stream: EventStream
        """Set by the stream when that is made, which is before the first token."""

    @property
    def num_reasoning_tokens(self) -> int:
        return 0

    @abstractmethod
    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        """As `TokenSink` says it."""

    def fell_behind(self) -> None:  # noqa: B027 - most have nothing to do then
        """The client did not take all that was written."""

    def terminal(self) -> Terminal | None:
        """Where the next tokens may go without this choice, as long as it does not say otherwise; None: nowhere."""
        return None

    @abstractmethod
    def _said(self) -> bytes:
        """An event with all that is kept; empty when nothing is."""

    def taken(self) -> bytes:
        event = b""
        if not self._is_opened:
            self._is_opened = True
            event = self._shape.opening(self._index)
        event += self._said()
        if self._reason and not self._is_finished:
            self._is_finished = True
            event += self._shape.finish(self._index, self._reason)
        return event

    def flush(self) -> None:
        """Send what is kept; also when there is nothing."""
        if event := self.taken():
            self.stream.send(event)

    def _tell(self) -> None:
        """Now, if the client takes it; but the end of its only reply leaves with the end of the stream."""
        stream = self.stream
        if self._reason and stream.is_of_one:
            return
        if stream.takes_more:
            self.flush()
        else:
            self.fell_behind()
            stream.wake()


class StreamedText(Streamed):
    """A reply that is nothing but text, which nothing in it can end."""

    __slots__ = (
        "_after", "_before", "_has_frame", "_kept", "_known", "_lane", "_lines", "_text", "_to", "_waiting"
    )  # fmt: skip

    def __init__(self, index: int, shape: Shape, text: ChoiceText, *, echoed: str = "") -> None:
        """`echoed`: what the reply begins with, before anything that was generated."""
        super().__init__(index, shape)
        self._text = text
        self._kept = [echoed] if echoed else []
        self._known: Mapping[int, bytes] = _NOTHING
        """Text of tokens that may go into the outbox at once: none while something is kept, or left unread."""
        self._lane: Lane | None = None
        # The rest is set once the stream is open, where it takes events as they are; each token needs all of it.
        self._has_frame = False
        self._lines: Sequence[bytes]
        self._before: bytes
        self._after: bytes
        self._to: Address
        self._waiting: list[tuple[Address, bytes]]

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        if text := self._text.push(token_ids, finish_reason):
            self._kept.append(text)
            if len(self._kept) > KEPT_MAX:
                self._kept = ["".join(self._kept)]
        self._reason = finish_reason
        self._tell()
        return not finish_reason

    def push_token(self, token_id: int) -> bool:
        """An event of one token, in the least time: there is no call between here and the outbox."""
        text = self._known.get(token_id)
        if not text:
            return self._push_other(token_id)
        waiting = self._waiting
        if not waiting:
            self.stream.outbox.flush_soon()
        waiting.append((self._to, _joined((self._lines[len(text)], self._before, text, self._after))))
        return True

    def _push_other(self, token_id: int) -> bool:
        """One that is not known yet, prints nothing, is a part of a character, or comes too fast for the client."""
        if self._known is _NOTHING:
            return self.push((token_id,), "")
        text = self._text.escaped(token_id)
        if text is None:
            return self.push((token_id,), "")
        return self.push_token(token_id) if text else True

    def fell_behind(self) -> None:
        self._known = _NOTHING
        if self._lane is not None:
            self._lane.shut()

    def terminal(self) -> Terminal | None:
        if not self._known:
            return None
        descriptor, _, stream = self._to
        has_lines = bool(self._lines[0])
        return Terminal(
            descriptor,
            self._before,
            self._after,
            has_lines,
            self._known,
            stream,
            self._has_lane,
            self.stream.outbox.flush,
        )

    def _has_lane(self, lane: Lane) -> None:
        self._lane = lane

    def flush(self) -> None:
        super().flush()
        if not self._has_frame:
            self._find_frame()
        self._known = self._text.known() if self._has_frame and self.stream.takes_more else _NOTHING

    def _find_frame(self) -> None:
        around, stream = self._shape.around_text(self._index), self.stream
        frame = None if around is None or not stream.is_open else stream.frame(*around)
        if frame is not None:
            self._has_frame = True
            self._lines, self._before, self._after = frame
            self._to, self._waiting = (stream.descriptor, stream.transport, stream), stream.outbox.waiting

    def _said(self) -> bytes:
        if not self._kept:
            return b""
        text = "".join(self._kept)
        self._kept.clear()
        return self._shape.text(self._index, text, None)


class StreamedChoice(Streamed):
    """A reply with a parser, with stop strings, or with more to tell than its text."""

    __slots__ = ("_beside", "_counted", "_num_tokens", "_text")

    def __init__(
        self, index: int, shape: Shape, text: ParsedText, beside: Beside | None = None, *, counted: int | None = None
    ) -> None:
        """`counted`: tokens of its prompt, where every event tells the counts so far (`stream_options`'
        `continuous_usage_stats`, as vLLM has it). They are those of one prompt and of this reply to it."""
        super().__init__(index, shape)
        self._text = text
        self._beside = beside
        self._counted = counted
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        self._num_tokens += len(token_ids)
        wants_more = self._text.push(token_ids, finish_reason)
        self._reason = self._text.finish_reason
        if self._beside is not None:
            self._beside.push(token_ids, told)
        self._tell()
        return wants_more

    @property
    def num_reasoning_tokens(self) -> int:
        return self._text.num_reasoning_tokens

    def taken(self) -> bytes:
        if self._counted is not None:
            self._shape.count(self._counted, self._num_tokens)
        return super().taken()

    def _said(self) -> bytes:
        beside = None if self._beside is None else self._beside.take()
        text = self._text.take_text()
        if text is not None:
            return self._shape.text(self._index, text, beside) if text or beside else b""
        deltas = self._text.take_deltas()
        return self._shape.deltas(self._index, deltas, beside) if deltas or beside else b""
