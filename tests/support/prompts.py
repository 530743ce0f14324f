"""Forty prompts, 10 to 1,500 tokens, chat and raw: real English without shipping a text of our own.

The prose is what every Python carries in `pydoc_data.topics`, so a prompt is the same wherever the same Python runs,
and every comparison computes its own oracle in the same run.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Final, Protocol

NUM_PROMPTS: Final = 40
_QUESTIONS: Final = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a river that never sleeps.",
    "List three uses of a paper clip.",
    "How do I reverse a list in Python?",
    "Translate 'good morning, my friend' into Spanish and French.",
    "Who wrote Hamlet, and when?",
    "Give me a recipe for pancakes with numbered steps.",
)


class Text(Protocol):
    """What is needed of a tokenizer here."""

    def encode(self, text: str) -> Sequence[int]: ...

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    name: str
    token_ids: tuple[int, ...]


def forty_prompts(text: Text) -> list[Prompt]:
    """Lengths grow evenly from about 10 to exactly 1,500 tokens; every other prompt is a chat."""
    lengths = [10 + round((1500 - 10) * (index / (NUM_PROMPTS - 1)) ** 1.5) for index in range(NUM_PROMPTS)]
    passages = _passages()
    prompts = []
    for index, (length, passage) in enumerate(zip(lengths, passages, strict=False)):
        if index % 2 == 0:
            token_ids = tuple(text.encode(passage))[:length]
        else:
            question = _QUESTIONS[index // 2 % len(_QUESTIONS)]
            material = " ".join(passage.split()[: max(0, length - 60) * 2 // 3])
            content = f"{material}\n\n{question}" if material else question
            token_ids = tuple(text.encode(text.render_chat([{"role": "user", "content": content}])))[-1500:]
        kind = "raw" if index % 2 == 0 else "chat"
        prompts.append(Prompt(name=f"{index:02d}-{kind}-{len(token_ids)}", token_ids=token_ids))
    return prompts


def short_prompts(text: Text, count: int) -> list[Prompt]:
    """Different ones of up to 400 tokens, about half of them chats."""
    return [Prompt(name=each.name, token_ids=each.token_ids[-400:]) for each in forty_prompts(text)[:count]]


def _passages() -> list[str]:
    """One long stretch of prose for each prompt, none the beginning of another."""
    names = sorted(topics)
    random.Random(20).shuffle(names)
    around = itertools.cycle(names)
    passages = []
    for _ in range(NUM_PROMPTS):
        passage = ""
        while len(passage) < 9000:
            passage += topics[next(around)]
        passages.append(passage)
    return passages
