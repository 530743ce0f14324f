"""Ends a reply at the first stop string, although text arrives in chunks that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from disaggregated.errors import InvalidRequest


class Scanned(NamedTuple):
    text: str
    """What may be sent to the client now."""
    stopped: bool
    """A stop string is complete: nothing comes after `text`."""


class StopStrings:
    """One request's stop strings. What could still become one of them is held back until it is decided.

    The reply ends before the stop string that is complete first; of those complete at the same character, before the
    longest. So the outcome is the same however the text was cut into chunks. The text held back is always shorter than
    the longest stop string.
    """

    def __init__(self, stops: Sequence[str], *, includes: bool = False) -> None:
        """`includes`: the reply ends with the stop string, not before it."""
        if any(not stop for stop in stops):
            raise InvalidRequest("stop: a string in it must not be empty", param="stop")
        self._stops = tuple(dict.fromkeys(stops))
        self._includes = includes
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the reply."""

    def push(self, text: str) -> Scanned:
        """Take the next text of the reply. Must not be called again once it has said `stopped`."""
        assert self.matched is None, f"text after the stop string {self.matched!r}"
        if not self._stops:
            return Scanned(text, False)
        pending = self._held + text
        if found := self._first_complete(pending):
            start, self.matched = found
            self._held = ""
            return Scanned(pending[: start + len(self.matched)] if self._includes else pending[:start], True)
        keep = num_undecided(pending, self._stops)
        self._held = pending[len(pending) - keep :]
        return Scanned(pending[: len(pending) - keep], False)

    def flush(self) -> str:
        """The reply is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str) -> tuple[int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop


def num_undecided(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `markers` begins."""
    return max(_overlap(text, marker) for marker in markers)


def _overlap(text: str, stop: str) -> int:
    first = stop[0]
    at = text.find(first, max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(first, at + 1)
    return 0
