"""Where the tokens of one sequence end up: in an answer that is collected, or in events as they come.

token ids ──ChoiceText──▶ text ──ReplyParser──▶ deltas ──Shape──▶ JSON

Without a parser, all text is content, and nothing is built for it but the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from disaggregated.text import ChoiceText
from disaggregated.token_logprobs import Told
from orchestrator.api.shapes import Reply, Shape
from orchestrator.api.sse import EventStream
from orchestrator.parsers import CallStart, Content, Delta, ReplyParser, joined

KEPT_MAX: Final = 64
"""Bits of text kept apart before they are joined: a slow client costs a few bytes a token, and a long answer is not
copied once a token."""


class ParsedText:
    """The text of one sequence after its parser."""

    def __init__(self, text: ChoiceText, parser: ReplyParser | None) -> None:
        self._text = text
        self._parser = parser
        self._has_called = False
        self._kept_text: list[str] = []
        """Without a parser; joined when it is taken."""
        self._kept: list[Delta] = []
        self.finish_reason = ""

    def push(self, token_ids: Sequence[int], finish_reason: str) -> bool:
        """Whether more is wanted."""
        text = self._text.push(token_ids, finish_reason)
        reason = self._text.finish_reason
        if self._parser is None:
            if text:
                self._kept_text.append(text)
            if len(self._kept_text) > KEPT_MAX:
                self._kept_text = ["".join(self._kept_text)]
        else:
            self._parse(self._parser, text, is_last=bool(reason))
        self.finish_reason = "tool_calls" if self._has_called and reason == "stop" else reason
        return not reason

    def _parse(self, parser: ReplyParser, text: str, *, is_last: bool) -> None:
        deltas = parser.push(text) if text else []
        if is_last:
            deltas += parser.finish()
        self._has_called = self._has_called or any(type(delta) is CallStart for delta in deltas)
        self._kept += deltas
        if len(self._kept) > KEPT_MAX:
            self._kept = joined(self._kept)

    def take_text(self) -> str | None:
        """All the text since it was last taken; None where a parser makes deltas of it."""
        if self._parser is not None:
            return None
        text = self._kept_text[0] if len(self._kept_text) == 1 else "".join(self._kept_text)
        self._kept_text.clear()
        return text

    def take_deltas(self) -> list[Delta]:
        """All deltas since they were last taken, joined."""
        if self._parser is None:
            text = self.take_text()
            return [Content(text)] if text else []
        kept, self._kept = self._kept, []
        return joined(kept) if len(kept) > 1 else kept


class CollectedChoice:
    """One choice of an answer that is not streamed."""

    def __init__(self, text: ChoiceText, parser: ReplyParser | None, *, shows_token_ids: bool) -> None:
        self._text = ParsedText(text, parser)
        self._token_ids: list[int] | None = [] if shows_token_ids else None

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        if self._token_ids is not None:
            self._token_ids.extend(token_ids)
        return self._text.push(token_ids, finish_reason)

    def reply(self) -> Reply:
        """Called once, at the end."""
        return Reply(self._text.take_deltas(), self._text.finish_reason, self._token_ids)


class StreamedChoice:
    """One choice of a stream. What its client is too slow for is kept here, joined into one event."""

    def __init__(
        self, index: int, text: ChoiceText, parser: ReplyParser | None, shape: Shape, *, shows_token_ids: bool
    ) -> None:
        self._index = index
        self._text = ParsedText(text, parser)
        self._shape = shape
        self._kept_ids: list[int] | None = [] if shows_token_ids else None
        self._is_opened = False
        self._is_finished = False
        self.stream: EventStream
        """Set by whoever makes both, before the first token."""

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        wants_more = self._text.push(token_ids, finish_reason)
        if self._kept_ids is not None:
            self._kept_ids.extend(token_ids)
        if self.stream.takes_more:
            self.flush()
        else:
            self.stream.wake()
        return wants_more

    def flush(self) -> None:
        """Send what is kept; also when there is nothing."""
        event = b""
        if not self._is_opened:
            self._is_opened = True
            event = self._shape.opening(self._index)
        event += self._said()
        if self._text.finish_reason and not self._is_finished:
            self._is_finished = True
            event += self._shape.finish(self._index, self._text.finish_reason)
        if event:
            self.stream.send(event)

    def _said(self) -> bytes:
        text = self._text.take_text()
        if text is not None:
            if not (text or self._kept_ids):
                return b""
            return self._shape.text(self._index, text, self._taken_ids())
        deltas = self._text.take_deltas()
        if not (deltas or self._kept_ids):
            return b""
        return self._shape.deltas(self._index, deltas, self._taken_ids())

    def _taken_ids(self) -> list[int] | None:
        ids = self._kept_ids
        if ids is not None:
            self._kept_ids = []
        return ids
