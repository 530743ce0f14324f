"""What a model says to itself before it answers, between two tags at the beginning of its reply.

Some templates open the first tag in the prompt, so that the reply begins within; some open and close it, so that there
is no reasoning at all; else the model decides with its first word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from orchestrator.parsers.deltas import Content, Delta, Reasoning, ReplyParser
from orchestrator.parsers.source import SPACE, GrammarParser, Source, Steps, skip, take_one_of, until, wait


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningTags:
    begin: str
    end: str
    always: bool = False
    """The model reasons even where neither prompt nor reply has the first tag."""

    def opens(self, prompt_tail: str) -> bool:
        """Whether a reply to a prompt that ends so begins with reasoning."""
        tail = prompt_tail.rstrip(SPACE)
        return tail.endswith(self.begin) or (self.always and not tail.endswith(self.end))

    def is_left_open(self, said: str, prompt_tail: str) -> bool:
        """Whether a reply that goes on from what was `said` begins within reasoning. Who said something without the
        first tag was no longer reasoning, whatever model it is."""
        if said.strip(SPACE):
            return said.rfind(self.begin) > said.rfind(self.end)
        return prompt_tail.rstrip(SPACE).endswith(self.begin)


_THINK: Final = ("<think>", "</think>")
REASONING: Final[Mapping[str, ReasoningTags]] = {
    "qwen3": ReasoningTags(*_THINK),
    "deepseek_v3": ReasoningTags(*_THINK),
    "glm45": ReasoningTags(*_THINK),
    "deepseek_r1": ReasoningTags(*_THINK, always=True),
    "nano_v3": ReasoningTags(*_THINK, always=True),
    "mistral": ReasoningTags("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningTags("<seed:think>", "</seed:think>"),
    "command_a": ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
}
"""By the names that `reasoning_parser` takes."""


class ReasoningParser(GrammarParser):
    """Gives the text behind the reasoning to `then`; without one it is content."""

    def __init__(
        self, tags: ReasoningTags, *, begins_within: bool, then: ReplyParser | None, is_shown: bool = True
    ) -> None:
        super().__init__()
        self._tags = tags
        self._begins_within = begins_within
        self._then = then
        self._is_shown = is_shown

    def _run(self) -> list[Delta]:
        deltas = super()._run()
        if self._then is not None:
            self.has_enough = self._then.has_enough
        return deltas if self._is_shown else [delta for delta in deltas if type(delta) is not Reasoning]

    def _grammar(self, source: Source) -> Steps[None]:
        if (yield from self._opens(source)):
            yield from skip(source)
            yield from until(source, [self._tags.end], Reasoning, trims=True)
            yield from skip(source)
        while (yield from wait(source)):
            text = source.cut(len(source.rest))
            yield from [Content(text)] if self._then is None else self._then.push(text)
        if self._then is not None:
            yield from self._then.finish()

    def _opens(self, source: Source) -> Steps[bool]:
        """A model that was let in may still write the first tag once more."""
        source.pin()
        yield from skip(source)
        if (yield from take_one_of(source, [self._tags.begin])):
            source.unpin_all()
            return True
        source.rewind()
        return self._begins_within
