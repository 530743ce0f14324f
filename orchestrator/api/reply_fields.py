"""What a client wants to see of a reply, and how many replies: text, token ids, how likely they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.sampling_params import LOGPROBS_MAX, SamplingParams
from orchestrator.api.fields import Fields

REPLIES_MAX: Final = 128

REPLY_FIELDS: Final = frozenset(
    {
        "n", "best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids",
        "return_tokens_as_token_ids", "return_prompt_text", "include_stop_str_in_output", "skip_special_tokens",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFields:
    is_chat: bool
    n: int
    """Replies to each prompt."""
    best_of: int
    """Replies that are generated for each prompt, of which the `n` likeliest are given; at least `n`."""
    echo: bool
    """The text begins with the prompt; in a chat with the assistant's own message, where that is the last one."""
    logprobs: int | None
    """Of each token, and so many of the likeliest; None: not shown."""
    prompt_logprobs: int | None
    """The same of the prompt, in a field of its own."""
    shows_token_ids: bool
    tokens_as_ids: bool
    """In logprobs, tokens are spelled "token_id:42"."""
    shows_prompt_text: bool
    """Of a chat: what its template made of it."""
    include_stop: bool
    """The text ends with what stopped it."""
    skip_special_tokens: bool
    drops_tokens: bool = False
    """Only what is told of the prompt is wanted; the one token that is generated all the same is not shown."""

    @property
    def echoes_prompt(self) -> bool:
        return self.echo and not self.is_chat

    @property
    def is_text_alone(self) -> bool:
        """Nothing has to be known of a token but its text."""
        asks = self.shows_token_ids or self.logprobs is not None or self.prompt_logprobs is not None
        return not asks and self.best_of == self.n

    @property
    def is_one_text(self) -> bool:
        """There is one reply, and it has nothing in it but the text of what was generated."""
        adds = self.echo or self.shows_prompt_text or self.include_stop
        return self.n == 1 and self.is_text_alone and not adds and not self.drops_tokens

    def told_of_prompt(self, token_ids: Sequence[int], text: str) -> dict[str, Any]:
        """Fields of a chat's answer."""
        told: dict[str, Any] = {}
        if self.shows_token_ids:
            told["prompt_token_ids"] = list(token_ids)
        if self.shows_prompt_text:
            told["prompt_text"] = text
        return told

    def applied_to(self, sampling: SamplingParams) -> SamplingParams:
        """With everything told that some field needs."""
        logprobs, prompt_logprobs = self.logprobs, self.prompt_logprobs
        if self.best_of > self.n and logprobs is None:
            logprobs = 0
        if self.echoes_prompt and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return sampling.but(logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def read_reply_fields(fields: Fields, *, is_chat: bool, stream: bool) -> ReplyFields:
    """
    Raises:
        InvalidRequest: names the field and its limit, or the one that it does not go together with.
    """
    n = fields.integer("n", low=1, high=REPLIES_MAX) or 1
    reply = ReplyFields(
        is_chat=is_chat,
        n=n,
        best_of=fields.integer("best_of", low=1, high=REPLIES_MAX) or n,
        echo=fields.flag("echo"),
        logprobs=_chat_logprobs(fields) if is_chat else _completion_logprobs(fields),
        prompt_logprobs=fields.integer("prompt_logprobs", low=0, high=LOGPROBS_MAX),
        shows_token_ids=fields.flag("return_token_ids"),
        tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        shows_prompt_text=fields.flag("return_prompt_text"),
        include_stop=fields.flag("include_stop_str_in_output"),
        skip_special_tokens=fields.flag("skip_special_tokens", default=True),
        drops_tokens=fields.get("max_tokens") == 0,
    )
    _check_together(reply, stream=stream)
    return reply


def _check_together(reply: ReplyFields, *, stream: bool) -> None:
    if reply.best_of < reply.n:
        raise InvalidRequest(f"best_of is {reply.best_of}, it must be at least n, which is {reply.n}", param="best_of")
    if stream and reply.best_of > reply.n:
        raise InvalidRequest("best_of above n is not possible when stream is true", param="best_of")
    if stream and reply.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not possible when stream is true", param="prompt_logprobs")
    if reply.drops_tokens and not (reply.echoes_prompt or reply.prompt_logprobs is not None):
        raise InvalidRequest("max_tokens must be at least 1, is 0; 0 goes together with echo", param="max_tokens")


def _chat_logprobs(fields: Fields) -> int | None:
    num_top = fields.integer("top_logprobs", low=0, high=LOGPROBS_MAX)
    if fields.flag("logprobs"):
        return num_top or 0
    if num_top:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    return None


def _completion_logprobs(fields: Fields) -> int | None:
    if fields.get("logprobs") is False:  # What clients of chats send for nothing.
        return None
    return fields.integer("logprobs", low=0, high=LOGPROBS_MAX)
