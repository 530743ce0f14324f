"""Replies cut into pieces, in every way that matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from orchestrator.parsers import Delta, ReplyParser, joined

NUM_CUTS = 40


def parsed(parser: ReplyParser, pieces: Iterator[str] | list[str]) -> list[Delta]:
    deltas = [delta for piece in pieces if piece for delta in parser.push(piece)]
    return joined([*deltas, *parser.finish()])


def cuts(text: str) -> Iterator[list[str]]:
    """The whole at once, character by character, and at random."""
    yield [text]
    yield list(text)
    for seed in range(NUM_CUTS):
        chosen = random.Random(seed)
        places = sorted(chosen.sample(range(len(text) + 1), k=min(len(text), chosen.randint(1, 8))))
        yield [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def one_reading(make: Callable[[], ReplyParser], text: str) -> list[Delta]:
    """What every cut of the text is read as."""
    readings = [parsed(make(), pieces) for pieces in cuts(text)]
    assert all(reading == readings[0] for reading in readings), next(r for r in readings if r != readings[0])
    return readings[0]


def fixed_id() -> str:
    return "id"
