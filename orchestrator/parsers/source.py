"""Straight-line code that reads text which has not all come yet.

A grammar is a generator over a `Source`. It yields deltas as soon as they are certain, yields None where it needs more
text, and returns when it has read what it is there for. So each format below reads as if the whole reply lay before it,
and how the reply was cut into pieces cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from disaggregated.text.stop_strings import num_undecided
from orchestrator.parsers.deltas import Content, Delta, ReplyParser

T = TypeVar("T")
Steps = Generator[Delta | None, None, T]
"""Yields deltas, or None for "more text, please"; returns a T."""

SPACE = " \t\r\n"


class Source:
    """The text of one reply, as far as it came, and a position in it.

    What lies before the position is forgotten, unless a pin stands there to return to.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._pins: list[int] = []
        self.is_over = False
        """No more text will come."""

    def add(self, text: str) -> None:
        start = self._pins[0] if self._pins else self._at
        self._text = self._text[start:] + text
        self._at -= start
        self._pins = [pin - start for pin in self._pins]

    @property
    def rest(self) -> str:
        return self._text[self._at :]

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._text)

    def pin(self) -> None:
        self._pins.append(self._at)

    def unpin_all(self) -> None:
        """There is no way back."""
        self._pins.clear()

    def rewind(self) -> None:
        """Back to the last pin, which is taken out."""
        self._at = self._pins.pop()

    def cut(self, count: int) -> str:
        """Reads the next `count` characters, which are there."""
        text = self._text[self._at : self._at + count]
        self._at += count
        return text


def wait(source: Source) -> Steps[str]:
    """The next character, not read yet; "" at the end of the reply."""
    while source.is_empty:
        if source.is_over:
            return ""
        yield None
    return source.rest[0]


def skip(source: Source, characters: str = SPACE) -> Steps[str]:
    """Reads on to the first character that is none of these; it is returned, "" at the end of the reply."""
    while (character := (yield from wait(source))) and character in characters:
        rest = source.rest
        source.cut(len(rest) - len(rest.lstrip(characters)))
    return character


def take_one_of(source: Source, markers: Sequence[str]) -> Steps[str]:
    """The marker that stands here, which is read; "" if none does. No marker begins with another one."""
    while True:
        rest = source.rest
        for marker in markers:
            if rest.startswith(marker):
                return source.cut(len(marker))
        if source.is_over or not any(marker.startswith(rest) for marker in markers):
            return ""
        yield None


def until(source: Source, markers: Sequence[str], make: Callable[[str], Delta], *, trims: bool = False) -> Steps[str]:
    """Gives on all text before the first of `markers`, which is read and returned; "" at the end of the reply.

    `trims` does not give on the space before the marker, but returns it with the marker.
    """
    while True:
        rest = source.rest
        at, marker = _first(rest, markers)
        ends = bool(marker) or source.is_over
        end = at if ends else len(rest) - num_undecided(rest, markers)
        if trims and (marker or not ends):
            end = len(rest[:end].rstrip(SPACE))
        if end:
            yield make(source.cut(end))
        if ends:
            return source.cut(at - end + len(marker))
        yield None


def _first(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first of them begins, and which it is; the end of the text and "" if there is none."""
    found = ((at, marker) for marker in markers if (at := text.find(marker)) >= 0)
    return min(found, default=(len(text), ""))


def everything(source: Source) -> Steps[None]:
    """Gives on the rest of the reply as content."""
    while (yield from wait(source)):
        yield Content(source.cut(len(source.rest)))


def collect(source: Source, markers: Sequence[str]) -> Steps[str | None]:
    """The text before the first of `markers`, which is read; None if the reply ends before one. For short texts."""
    while True:
        at, marker = _first(source.rest, markers)
        if marker:
            text = source.cut(at)
            source.cut(len(marker))
            return text
        if source.is_over:
            return None
        yield None


def collect_before(source: Source, characters: str) -> Steps[str | None]:
    """The text before the first of these characters, which is not read; None if the reply ends before one."""
    while True:
        at, character = _first(source.rest, characters)
        if character:
            return source.cut(at)
        if source.is_over:
            return None
        yield None


class GrammarParser(ReplyParser):
    """Runs a grammar over the pieces of a reply. A grammar reads to the reply's end."""

    def __init__(self) -> None:
        self._source = Source()
        self._steps = self._grammar(self._source)

    def _grammar(self, source: Source) -> Steps[None]:
        raise NotImplementedError

    def push(self, text: str) -> list[Delta]:
        self._source.add(text)
        return self._run()

    def finish(self) -> list[Delta]:
        self._source.is_over = True
        return self._run()

    def _run(self) -> list[Delta]:
        deltas: list[Delta] = []
        for delta in self._steps:
            if delta is None:
                break
            deltas.append(delta)
        return deltas
