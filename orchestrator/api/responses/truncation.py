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

from disaggregated.text import Tokenizer
from orchestrator.api.chat import chat_prompt
from orchestrator.api.fields import Fields
from orchestrator.api.responses.input_items import Message
from orchestrator.front_door import FrontDoor
from orchestrator.served_model import ServedModel

STRIDES: Final = 8
"""Of what the model can read: the cut moves by one, and as much is left for the answer if it wants that."""
TRIES_MAX: Final = 8
"""Of rendering what is left: how long it is shows only then."""

NumTokens = Callable[[Sequence[Message]], Awaitable[int]]
"""Of the prompt that these messages make."""


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
    sizes: Callable[[], Awaitable[Sequence[int]]],
    num_tokens_of: NumTokens,
    *,
    num_tokens_max: int,
    num_tokens_wanted: int,
) -> Sequence[Message]:
    """The messages that are left, all of them where they fit; too many still where even the last turn does not.

    sizes: tokens of each message, roughly. num_tokens_max: of a prompt. num_tokens_wanted: at most, for the answer.
    """
    num_tokens = await num_tokens_of(messages)
    if num_tokens <= num_tokens_max:
        return messages
    stride = max(1, num_tokens_max // STRIDES)
    target = num_tokens_max - min(num_tokens_wanted, stride)
    before = [0, *itertools.accumulate(await sizes())]
    wanted, kept, num_tries = _strides(num_tokens - target, stride), messages, 0
    possible = cuts(messages)
    for cut in possible:
        pinned = 0 if cut.pinned is None else before[cut.pinned + 1] - before[cut.pinned]
        left_out = before[cut.resumes_at] - before[cut.num_leading] - pinned
        if left_out < wanted and cut is not possible[-1]:
            continue
        kept, num_tries = cut.kept(messages), num_tries + 1
        num_tokens = await num_tokens_of(kept)
        if num_tokens <= target or num_tries == TRIES_MAX:
            break
        wanted = left_out + _strides(num_tokens - target, stride)
    return kept


def _strides(num_tokens: int, stride: int) -> int:
    return -(-num_tokens // stride) * stride


async def truncated(door: FrontDoor, model: ServedModel, chat: Mapping[str, Any]) -> Sequence[Message]:
    """Of a chat that was made of a response. Raises InvalidRequest as `chat_prompt` does."""

    async def num_tokens_of(messages: Sequence[Message]) -> int:
        return len(await chat_prompt(Fields({**chat, "messages": messages}), model))

    messages: Sequence[Message] = chat["messages"]
    longest, limit = door.num_tokens_max(model) - 1, door.config.door.prompt_tokens_max
    return await fitted(
        messages,
        lambda: asyncio.to_thread(_sizes, messages, model.tokenizer),
        num_tokens_of,
        num_tokens_max=min(longest, limit or longest),
        num_tokens_wanted=chat["max_completion_tokens"] or longest,
    )


def _sizes(messages: Sequence[Message], tokenizer: Tokenizer) -> Sequence[int]:
    """A message's does not depend on the others: so the same ones are left out next time."""
    return [len(tokenizer.encode(orjson.dumps(message).decode(), add_special_tokens=False)) for message in messages]
