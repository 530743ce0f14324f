"""What a reply is made of, bit by bit and in the model's own order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """More of what the model says to its reader."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model says to itself."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its name is complete. Calls are numbered from 0."""

    index: int
    call_id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`: all of them together are the text of one JSON object."""

    index: int
    text: str


Delta = Content | Reasoning | CallStart | CallArguments


class ReplyParser(Protocol):
    """For one reply. What could still become a marker is held back until it is decided."""

    has_enough: bool = False
    """The client wants no more of the reply: it may end here."""

    def push(self, text: str) -> list[Delta]:
        """What this text completes. `text` is never empty."""

    def finish(self) -> list[Delta]:
        """The reply is over: what was held back. Called once, after the last `push`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A tool call as a whole."""

    call_id: str
    name: str
    arguments: str


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same reply in as few deltas as its order allows."""
    result: list[Delta] = []
    for delta in deltas:
        match result[-1] if result else None, delta:
            case Content(before), Content(text):
                result[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                result[-1] = Reasoning(before + text)
            case CallArguments(index, before), CallArguments(same, text) if index == same:
                result[-1] = CallArguments(index, before + text)
            case _:
                result.append(delta)
    return result


def content_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if type(delta) is Content)


def reasoning_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas if type(delta) is Reasoning)


def calls_of(deltas: Sequence[Delta]) -> list[Call]:
    """Complete calls; of a reply that was cut short, the last one's arguments may end anywhere."""
    starts = {delta.index: delta for delta in deltas if type(delta) is CallStart}
    arguments = dict.fromkeys(starts, "")
    for delta in deltas:
        if type(delta) is CallArguments:
            arguments[delta.index] += delta.text
    return [Call(start.call_id, start.name, arguments[index]) for index, start in starts.items()]
