"""`truncation: "auto"`: a conversation that is longer than the model can read is cut to what it can.

What was said first is left out first, and never half of anything: turns, from the user's message to the next one, as
long as there is another turn; then, of a last turn in which an agent works for long, its earliest steps, a step being
what the assistant said with the results of its calls. Instructions, the last turn's question and its last step stay.

As a conversation grows by a turn each time, the place of the cut stays where it was for several turns: it moves by an
eighth of what the model can read, so that what is left begins alike and is found in prefix caches.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson

from disaggregated.errors import PromptTooLong
from orchestrator.api.chat import chat_prompt
from orchestrator.api.fields import Fields
from orchestrator.api.responses.input_items import Message
from orchestrator.front_door import FrontDoor
from orchestrator.served_model import ServedModel

STRIDES: Final = 8
"""Of what the model can read: the cut moves by one, and as much is left for the answer if it wants that."""
TRIES_MAX: Final = 8
"""Of rendering what is left: how long it is shows only then."""

BYTES_A_TOKEN: Final = 4
"""Of what people write, roughly. Where a cut may be is said in bytes that are left out: these cost nothing to count."""

NumTokens = Callable[[Sequence[Message]], Awaitable[int]]
"""Of the prompt that these messages make."""
SizeOf = Callable[[Message], int]
"""Tokens of a message, roughly. Called on a thread."""


class Cut(NamedTuple):
    num_leading: int
    """Messages of instructions, which stay."""
    pinned: int | None
    """The last turn's question, where steps behind it are left out."""
    resumes_at: int

    def kept(self, messages: Sequence[Message]) -> list[Message]:
        pinned = [] if self.pinned is None else [messages[self.pinned]]
        return [*messages[: self.num_leading], *pinned, *messages[self.resumes_at :]]


def cuts(messages: Sequence[Message]) -> Sequence[Cut]:
    """Each leaves out more than the one before."""
    return list(_cuts(messages))


def _cuts(messages: Sequence[Message]) -> Iterator[Cut]:
    roles = [message["role"] for message in messages]
    is_leading = (role in ("system", "developer") for role in roles)
    num_leading = sum(1 for _ in itertools.takewhile(bool, is_leading))
    questions = [index for index in range(num_leading, len(roles)) if roles[index] == "user"]
    for index in questions:
        if index > num_leading:
            yield Cut(num_leading, None, index)
    question = questions[-1] if questions else None
    first_step = num_leading if question is None else question + 1
    for index in range(first_step + 1, len(roles)):
        if roles[index] == "assistant":
            yield Cut(num_leading, question, index)


async def fitted(
    messages: Sequence[Message],
    size_of: SizeOf,
    num_tokens_of: NumTokens,
    *,
    num_tokens_max: int,
    num_tokens_wanted: int,
) -> Sequence[Message]:
    """The messages that are left, all of them where they fit; too many still where even the last turn does not.

    num_tokens_max: of a prompt. num_tokens_wanted: at most, for the answer.
    """
    if await num_tokens_of(messages) <= num_tokens_max:
        return messages
    stride = max(1, num_tokens_max // STRIDES)
    target = num_tokens_max - min(num_tokens_wanted, stride)
    possible = await asyncio.to_thread(_likely, messages, size_of, target)
    kept, num_tries = messages, 0
    due_bytes = _strides(possible[0][1], stride * BYTES_A_TOKEN) if possible else 0
    for number, (cut, left_out_bytes) in enumerate(possible, start=1):
        if left_out_bytes < due_bytes and number < len(possible):
            continue
        kept, num_tries = cut.kept(messages), num_tries + 1
        excess = await num_tokens_of(kept) - target
        if excess <= 0 or num_tries == TRIES_MAX:
            break
        due_bytes = left_out_bytes + excess * BYTES_A_TOKEN
    return kept


def _likely(messages: Sequence[Message], size_of: SizeOf, num_tokens_max: int) -> list[tuple[Cut, int]]:
    """The cuts that leave few enough tokens, roughly, and the last one whatever it leaves; and how many bytes each
    leaves out. Sizes are asked for from the end, until they are too many."""
    possible = cuts(messages)
    if not possible:
        return []
    num_bytes = [0, *itertools.accumulate(len(orjson.dumps(message)) for message in messages)]
    num_leading, last = possible[0].num_leading, possible[-1]
    question = None if last.pinned is None else size_of(messages[last.pinned])
    num_left = sum(map(size_of, messages[:num_leading]))
    found, resumes_at = list[tuple[Cut, int]](), len(messages)
    for cut in reversed(possible):
        num_left += sum(map(size_of, messages[cut.resumes_at : resumes_at]))
        resumes_at = cut.resumes_at
        pinned = 0 if cut.pinned is None or question is None else question
        if num_left + pinned > num_tokens_max and cut is not last:
            break
        pinned_bytes = 0 if cut.pinned is None else num_bytes[cut.pinned + 1] - num_bytes[cut.pinned]
        found.append((cut, num_bytes[cut.resumes_at] - num_bytes[num_leading] - pinned_bytes))
    return found[::-1]


def _strides(num_bytes: int, stride: int) -> int:
    return -(-num_bytes // stride) * stride


async def truncated(door: FrontDoor, model: ServedModel, chat: Mapping[str, Any]) -> Sequence[Message]:
    """Of a chat that was made of a response. Raises InvalidRequest as `chat_prompt` does."""
    longest, limit = door.num_tokens_max(model) - 1, door.config.door.prompt_tokens_max
    num_tokens_max = min(longest, limit or longest)

    async def num_tokens_of(messages: Sequence[Message]) -> int:
        try:
            return len(await chat_prompt(Fields({**chat, "messages": messages}), model))
        except PromptTooLong:  # By so much that it was not counted.
            return model.num_tokens_read_max + 1

    def size_of(message: Message) -> int:
        text = orjson.dumps(message).decode()
        try:
            return len(model.tokenizer.encode(text, add_special_tokens=False, num_tokens_max=num_tokens_max))
        except PromptTooLong:
            return num_tokens_max + 1

    return await fitted(
        chat["messages"],
        size_of,
        num_tokens_of,
        num_tokens_max=num_tokens_max,
        num_tokens_wanted=chat["max_completion_tokens"] or longest,
    )
