"""Chats of several turns, drawn once, so that every deployment is asked the same by the same clients at the same pace.

What decides how much routing can bring is how much of the live chats the caches hold. Where each server could hold all
of them, taking turns costs a chat its first turn on each server and no more; where none holds anything, nothing helps.
Here all caches together hold what all live chats have on average, as they do in a fleet that is neither too large nor
too small. A chat begins with a long turn (a document, instructions, tools) and goes on with short ones: in the
published traces of Kimi (Mooncake, FAST 2025) prompts are thirty times as long as answers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Final

NUM_TURNS: Final = (3, 5)
"""Least and most, as the pairs below."""
FIRST_TURN: Final = (384, 640)
"""Tokens."""
LATER_TURN: Final = (16, 48)
ANSWER: Final = 8
THINKING_S: Final = (1.0, 5.0)
"""From the end of an answer to the next turn, and from the beginning to the first."""
MEAN_LENGTH: Final = 572
"""Tokens of a chat that is half over: its first turn, half of the three others that it has on average, answers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    thinking_s: float
    tokens: list[int]
    """What the client adds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    turns: Sequence[Turn]

    @property
    def prompt_lengths(self) -> list[int]:
        """Of each turn: all that was said before, and what is said now."""
        lengths: list[int] = []
        for turn in self.turns:
            lengths.append((lengths[-1] + ANSWER if lengths else 0) + len(turn.tokens))
        return lengths

    def num_findable(self, block_size: int) -> int:
        """Tokens of its prompts that its own earlier prompts have left, if nothing is ever evicted: the most that any
        placement finds in a context server's cache. Answers are computed elsewhere."""
        lengths = self.prompt_lengths
        return sum(before // block_size * block_size for before in lengths[:-1])


def rounds(seed: int, *, num_rounds: int, num_clients: int) -> list[list[Chat]]:
    """In each round every client has one chat."""
    dice = random.Random(seed)
    return [[_chat(dice) for _ in range(num_clients)] for _ in range(num_rounds)]


def _chat(dice: random.Random) -> Chat:
    later = [_turn(dice, LATER_TURN) for _ in range(dice.randint(*NUM_TURNS) - 1)]
    return Chat([_turn(dice, FIRST_TURN), *later])


def _turn(dice: random.Random, num_tokens: tuple[int, int]) -> Turn:
    tokens = [dice.randrange(1000, 40_000) for _ in range(dice.randint(*num_tokens))]
    return Turn(dice.uniform(*THINKING_S), tokens)
