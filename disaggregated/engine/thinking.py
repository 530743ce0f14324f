"""Reasoning of a bounded length: once its budget is spent, the tokens of its end tag are all that may come.

What is forced follows from the tokens that were generated, and from nothing else, so a server that continues a sequence
goes on as the first one would have. Drafts are looked at without being taken, as a step may reject them.

    AWAITED ──begin tag──▶ INSIDE ──end tag──▶ OVER          INSIDE, budget spent: the end tag, token by token
       └──the reply began otherwise──────────────▲
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

from disaggregated.thinking_budget import ThinkingBudget

BEFORE_MAX: Final = 4
"""Tokens of blanks that a model may put before the tag with which it begins to reason. A tag that comes later stands in
an answer, and is a text like any other."""


class _Where(enum.Enum):
    AWAITED = enum.auto()
    INSIDE = enum.auto()
    OVER = enum.auto()


class _Place(NamedTuple):
    where: _Where
    num_tokens: int
    """Since the reply began, or since its reasoning did."""
    tail: tuple[int, ...]
    """The last of these, one fewer than the tag that is waited for may have."""


class Thinking:
    """Follows one sequence's generated tokens."""

    __slots__ = ("_budget", "_place")

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        begins = _Where.INSIDE if budget.is_open else _Where.AWAITED if budget.begin else _Where.OVER
        self._place = _Place(begins, 0, ())

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that were generated."""
        self._place = self._after(token_ids)

    def forced(self, drafts: Sequence[int] = ()) -> int | None:
        """The only token that may come, after `drafts` too; None: any."""
        place, end = self._after(drafts), self._budget.end
        if place.where is not _Where.INSIDE or place.num_tokens < self._budget.num_tokens:
            return None
        return end[_num_written(end, place.tail)]

    def _after(self, token_ids: Sequence[int]) -> _Place:
        place = self._place
        for token_id in token_ids:
            if place.where is _Where.OVER:
                break
            place = self._step(place, token_id)
        return place

    def _step(self, place: _Place, token_id: int) -> _Place:
        budget, num_tokens, tail = self._budget, place.num_tokens + 1, (*place.tail, token_id)
        if place.where is _Where.INSIDE:
            if _ends_with(tail, budget.end):
                return _Place(_Where.OVER, 0, ())
            return _Place(_Where.INSIDE, num_tokens, _last(tail, len(budget.end) - 1))
        if _ends_with(tail, budget.begin):
            return _Place(_Where.INSIDE, 0, ())
        if num_tokens >= BEFORE_MAX + len(budget.begin):
            return _Place(_Where.OVER, 0, ())
        return _Place(_Where.AWAITED, num_tokens, _last(tail, len(budget.begin) - 1))


def _num_written(tag: tuple[int, ...], tail: tuple[int, ...]) -> int:
    """How much of the tag's beginning the tail ends with."""
    return next(size for size in range(len(tag) - 1, -1, -1) if _ends_with(tail, tag[:size]))


def _ends_with(tokens: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return not end or tokens[-len(end) :] == end


def _last(tokens: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    return tokens[max(0, len(tokens) - num_tokens) :]
