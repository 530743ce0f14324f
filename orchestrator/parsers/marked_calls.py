"""Tool calls whose names stand between markers, and of which only the arguments are JSON: DeepSeek, Kimi, Mistral."""

from __future__ import annotations

import dataclasses
from typing import Final

from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import CallArguments, CallStart, Content
from orchestrator.parsers.json_calls import JsonCalls
from orchestrator.parsers.json_source import json_value
from orchestrator.parsers.source import (
    GrammarParser,
    Source,
    Steps,
    collect,
    collect_before,
    skip,
    take_one_of,
    until,
)

_FENCE: Final = "```"


@dataclasses.dataclass(frozen=True, slots=True)
class MarkedLayout:
    section_begin: str
    call_begin: str
    name_end: str
    call_end: str
    section_end: str

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.section_begin, self.call_begin, self.name_end, self.call_end, self.section_end)


DEEPSEEK: Final = MarkedLayout(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI: Final = MarkedLayout(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)


class MarkedCalls(GrammarParser):
    def __init__(self, layout: MarkedLayout, new_id: NewCallId) -> None:
        super().__init__()
        self._layout = layout
        self._new_id = new_id
        self._num_calls = 0

    def _grammar(self, source: Source) -> Steps[None]:
        layout = self._layout
        while marker := (yield from until(source, (layout.section_begin, layout.call_begin), Content, trims=True)):
            before, marker_here = self._num_calls, marker
            source.pin()
            while marker_here:
                if marker_here.endswith(layout.call_begin) and not (yield from self._call(source)):
                    break
                yield from skip(source)
                marker_here = yield from take_one_of(source, (*layout.markers, _FENCE))
            if self._num_calls == before:
                source.rewind()
                yield Content(marker)
            source.unpin_all()

    def _call(self, source: Source) -> Steps[bool]:
        """False: the reply ends before the name does."""
        name = yield from collect(source, [self._layout.name_end])
        if name is not None and (yield from skip(source)) not in ("{", ""):
            # Older DeepSeek models write the kind of tool here, and name and arguments in lines of their own.
            name = yield from collect(source, ["\n"])
            yield from skip(source)
            if (yield from take_one_of(source, [_FENCE])):
                yield from take_one_of(source, ["json"])
            yield from skip(source)
        if name is None:
            return False
        name, call_id = self._named(name.strip())
        index = self._num_calls
        self._num_calls += 1
        source.unpin_all()
        yield CallStart(index, call_id, name)
        yield from json_value(source, lambda text: CallArguments(index, text))
        return True

    def _named(self, name: str) -> tuple[str, str]:
        """Kimi writes `functions.weather:0`, and expects to find that again as the id of the call."""
        if name.startswith("functions."):
            return name.removeprefix("functions.").rpartition(":")[0] or name.removeprefix("functions."), name
        return name, self._new_id()


class MistralCalls(JsonCalls):
    """A list of objects, or in newer models `[TOOL_CALLS]weather[ARGS]{…}`, once for each call."""

    def _calls(self, source: Source) -> Steps[bool]:
        if (yield from skip(source)) in ("[", "{", ""):
            return (yield from super()._calls(source))
        name = yield from collect_before(source, "[{")
        if name is None:
            return False
        call_id: str | None = None
        if (yield from take_one_of(source, ["[CALL_ID]", "[ARGS]"])) == "[CALL_ID]":
            call_id = yield from collect(source, ["[ARGS]"])
        index = self._num_calls
        self._num_calls += 1
        source.unpin_all()
        yield CallStart(index, call_id or self._new_id(), name.strip())
        yield from skip(source)
        yield from json_value(source, lambda text: CallArguments(index, text))
        yield from skip(source)
        return True
