"""Where the tokens of one sequence end up: in an answer that is collected, or in events as they come."""

from __future__ import annotations

from collections.abc import Sequence

from disaggregated.text import ChoiceText
from orchestrator.api.shapes import Shape
from orchestrator.api.sse import EventStream


class CollectedChoice:
    """One choice of an answer that is not streamed."""

    def __init__(self, text: ChoiceText) -> None:
        self._text = text
        self._pieces: list[str] = []
        self.token_ids: list[int] = []

    def push(self, token_ids: Sequence[int], finish_reason: str) -> bool:
        self._pieces.append(self._text.push(token_ids, finish_reason))
        self.token_ids.extend(token_ids)
        return not self._text.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def finish_reason(self) -> str:
        return self._text.finish_reason


class StreamedChoice:
    """One choice of a stream. What its client is too slow for is kept here, joined into one event."""

    def __init__(self, index: int, text: ChoiceText, shape: Shape, *, shows_token_ids: bool) -> None:
        self._index = index
        self._text = text
        self._shape = shape
        self._kept_text = ""
        self._kept_ids: list[int] | None = [] if shows_token_ids else None
        self._is_opened = False
        self._is_finished = False
        self.stream: EventStream
        """Set by whoever makes both, before the first token."""

    def push(self, token_ids: Sequence[int], finish_reason: str) -> bool:
        self._kept_text += self._text.push(token_ids, finish_reason)
        if self._kept_ids is not None:
            self._kept_ids.extend(token_ids)
        if self.stream.takes_more:
            self.flush()
        else:
            self.stream.wake()
        return not self._text.finish_reason

    def flush(self) -> None:
        """Send what is kept; also when there is nothing."""
        event = b""
        if not self._is_opened:
            self._is_opened = True
            event = self._shape.opening(self._index)
        if self._kept_text or self._kept_ids:
            event += self._shape.text(self._index, self._kept_text, self._kept_ids)
            self._kept_text = ""
            self._kept_ids = None if self._kept_ids is None else []
        if self._text.finish_reason and not self._is_finished:
            self._is_finished = True
            event += self._shape.finish(self._index, self._text.finish_reason)
        if event:
            self.stream.send(event)
