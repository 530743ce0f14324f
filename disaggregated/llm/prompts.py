"""What a caller calls prompts, turned into token ids. Everything is checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from disaggregated.errors import InvalidRequest, PromptTooLong
from disaggregated.text import Tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One prompt or several, as text or as token ids."""
Message = Mapping[str, Any]
Chats = Sequence[Message] | Sequence[Sequence[Message]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    text: str | None
    token_ids: list[int]


class PromptReader:
    """Reads prompts for one model. `num_tokens_max` is the longest sequence, prompt and generated tokens together."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, num_tokens_max: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._num_tokens_max = num_tokens_max

    def read(self, prompts: Prompts) -> list[Prompt]:
        """
        Raises:
            InvalidRequest, PromptTooLong: names the prompt that is wrong.
        """
        if isinstance(prompts, str) or _is_token_ids(prompts):
            return [self.read_one(prompts, "prompts")]
        if not isinstance(prompts, Sequence):
            raise InvalidRequest(
                f"prompts must be text, token ids, or a list of either, is {type(prompts).__name__}", param="prompts"
            )
        return [self.read_one(each, f"prompts[{index}]") for index, each in enumerate(prompts)]

    def read_chats(self, chats: Chats, **template: Any) -> list[Prompt]:
        """One chat, or a list of them, through the model's template; `template` as in `Tokenizer.render_chat`."""
        if not isinstance(chats, Sequence) or not chats:
            raise InvalidRequest("messages must be a list of messages, or a list of such lists", param="messages")
        if isinstance(chats[0], Mapping):
            return [self._read_chat(chats, "messages", template)]
        return [self._read_chat(chat, f"messages[{index}]", template) for index, chat in enumerate(chats)]

    def read_one(self, prompt: object, name: str) -> Prompt:
        if isinstance(prompt, str):
            return self._checked(prompt, self._tokenizer.encode(prompt, param=name), name)
        if isinstance(prompt, (list, tuple)) and not prompt:
            raise InvalidRequest(f"{name} is empty", param=name)
        if not _is_token_ids(prompt):
            raise InvalidRequest(f"{name} must be text or token ids, is {prompt!r:.80}", param=name)
        return self._checked(None, list(prompt), name)

    def _read_chat(self, chat: object, name: str, template: Mapping[str, Any]) -> Prompt:
        if not isinstance(chat, Sequence) or not chat:
            raise InvalidRequest(f"{name} must be a list of messages, is {chat!r:.80}", param=name)
        for index, message in enumerate(chat):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequest(f"{name}[{index}] must have a role, is {message!r:.80}", param=f"{name}[{index}]")
        text = self._tokenizer.render_chat(chat, **template)
        return self._checked(text, self._tokenizer.encode(text, False, param=name), name)

    def _checked(self, text: str | None, token_ids: list[int], name: str) -> Prompt:
        if not token_ids:
            raise InvalidRequest(f"{name} is empty", param=name)
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            odd = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise InvalidRequest(f"{name}: token id {odd} is not between 0 and {self._vocab_size - 1}", param=name)
        if len(token_ids) >= self._num_tokens_max:
            raise PromptTooLong(
                f"{name} has {len(token_ids)} tokens; with one token after it, {self._num_tokens_max} is the limit",
                param=name,
            )
        return Prompt(text=text, token_ids=token_ids)


def _is_token_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    """An empty list is none: it may as well be a list of no prompts."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and len(prompt) > 0
        and set(map(type, prompt)) == {int}
    )
