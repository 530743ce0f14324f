"""The frame around calls that stand between markers, or are the whole reply; what the calls look like is a subclass's.

What begins like a call and is none is content: nothing that the model said is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import Content
from orchestrator.parsers.source import GrammarParser, Source, Steps, everything, skip, take_one_of, until

Schemas = Mapping[str, Mapping[str, Any]]
"""The tools that a request offers: each name with the JSON schema of its parameters."""


@dataclasses.dataclass(frozen=True, slots=True)
class CallFrame:
    begin: tuple[str, ...] = ()
    """What comes before the calls; empty: they are the whole reply, which must begin with them."""
    end: tuple[str, ...] = ()
    """What comes after them, where there is something."""


class FramedCalls(GrammarParser):
    may_be_bare = False
    """The reply may begin with calls also where the frame has markers."""

    def __init__(self, frame: CallFrame, schemas: Schemas, new_id: NewCallId) -> None:
        super().__init__()
        self._frame = frame
        self._schemas = schemas
        self._new_id = new_id
        self._num_calls = 0

    def _calls(self, source: Source) -> Steps[bool]:
        """Calls one after the other, to what is none; whether there was one. What is read of none is pinned."""
        raise NotImplementedError

    def _begins_otherwise(self, source: Source) -> None:
        """The reply should begin with a call, and does not. It is content, unless it is read here."""

    def _grammar(self, source: Source) -> Steps[None]:
        if self.may_be_bare or not self._frame.begin:
            source.pin()
            if not (yield from self._calls(source)):
                source.rewind()
                self._begins_otherwise(source)
        if not self._frame.begin:
            yield from everything(source)
            return
        while marker := (yield from until(source, self._frame.begin, Content, trims=True)):
            source.pin()
            if not (yield from self._calls(source)):
                source.rewind()
                yield Content(marker)

    def _ends(self, source: Source) -> Steps[None]:
        """Reads on behind calls."""
        if self._frame.end:
            yield from take_one_of(source, self._frame.end)
            yield from skip(source)
