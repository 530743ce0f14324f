"""What a client may ask to see beside a reply's text: token ids, and how likely tokens were, in OpenAI's two forms.

Every token that was generated has its entry, the one that ended the reply too, so that there are as many as
`usage.completion_tokens` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from disaggregated.text import Detokenizer, Tokenizer
from disaggregated.token_logprobs import TokenLogprob, Told
from orchestrator.api.reply_fields import ReplyFields

LOGPROB_MIN: Final = -9999.0
"""JSON has no infinity."""
LARGE: Final = 256
"""Tokens whose entries take some milliseconds to be made."""

_Told = tuple[int, TokenLogprob | None]


class TokenNames:
    """How tokens are spelled in JSON. Half a character is spelled as its bytes, as OpenAI does it."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def bytes_of(self, token_id: int) -> list[int]:
        return list(self._tokenizer.spelled(token_id))

    def __call__(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        spelled = self._tokenizer.spelled(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class ShownLogprobs(Protocol):
    def add(self, token_id: int, told: TokenLogprob | None) -> None:
        """The next token; None for the first one of a prompt, which nothing comes before."""

    def take(self) -> dict[str, Any]:
        """`logprobs` of the tokens since it was last taken, at least one."""


class ChatLogprobs:
    """Implements `ShownLogprobs`: a list of entries."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._content: list[dict[str, Any]] = []

    def add(self, token_id: int, told: TokenLogprob | None) -> None:
        assert told is not None, "a chat does not show its prompt"
        top = zip(told.top_token_ids, told.top_logprobs, strict=True)
        self._content.append(
            {**self._entry(token_id, told.logprob), "top_logprobs": [self._entry(other, value) for other, value in top]}
        )

    def take(self) -> dict[str, Any]:
        content, self._content = self._content, []
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._names(token_id), "logprob": shown(logprob), "bytes": self._names.bytes_of(token_id)}


class CompletionLogprobs:
    """Implements `ShownLogprobs`: lists side by side."""

    def __init__(self, names: TokenNames, detokenizer: Detokenizer) -> None:
        """`detokenizer`: one for all the tokens that are to be added, to know where in the text each begins."""
        self._names = names
        self._detokenizer = detokenizer
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token_id: int, told: TokenLogprob | None) -> None:
        self._tokens.append(self._names(token_id))
        self._offsets.append(self._offset)
        self._offset += len(self._detokenizer.push([token_id]))
        self._logprobs.append(None if told is None else shown(told.logprob))
        self._top.append(None if told is None else self._top_of(token_id, told))

    def _top_of(self, token_id: int, told: TokenLogprob) -> dict[str, float]:
        """With the token itself, also when it is not among the likeliest."""
        top = zip(told.top_token_ids, told.top_logprobs, strict=True)
        likeliest = {self._names(other): shown(logprob) for other, logprob in top}
        return {**likeliest, self._names(token_id): shown(told.logprob)}

    def take(self) -> dict[str, Any]:
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return taken


class Beside:
    """Of one reply."""

    def __init__(self, wanted: ReplyFields, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._names = TokenNames(tokenizer, as_ids=wanted.tokens_as_ids)
        self._prompt_ids = prompt_ids
        self._token_ids: list[int] | None = [] if wanted.shows_token_ids else None
        self._awaits_prompt_ids = wanted.shows_token_ids and not wanted.is_chat
        """Of a text completion, which may have several prompts; a chat's answer has them itself."""
        self._logprobs = _shown_logprobs(wanted, self._names, tokenizer, prompt_ids)
        self._echoes = wanted.echoes_prompt
        self._shows_prompt_logprobs = wanted.prompt_logprobs is not None
        self._awaits_prompt = self._shows_prompt_logprobs or (self._echoes and self._logprobs is not None)
        """It comes with the first tokens; of a prompt of one token there is nothing to be told."""
        self._prompt: Sequence[TokenLogprob] | None = None
        """Told of the prompt, and not taken."""
        self._tokens: list[_Told] = []
        """Told, where logprobs are shown, and not taken."""
        self._num_tokens = 0
        self._logprob_sum = 0.0

    @property
    def is_large(self) -> bool:
        """To take it would keep an event loop from its work."""
        return len(self._tokens) + len(self._prompt or ()) > LARGE

    @property
    def mean_logprob(self) -> float:
        """Of the tokens so far, where logprobs were asked for."""
        return self._logprob_sum / max(1, self._num_tokens)

    def push(self, token_ids: Sequence[int], told: Told | None) -> None:
        if self._token_ids is not None:
            self._token_ids.extend(token_ids)
        if self._awaits_prompt and (told is not None or len(self._prompt_ids) == 1):
            self._awaits_prompt = False
            self._prompt = () if told is None else told.prompt
        if told is None:
            return
        self._num_tokens += len(told.tokens)
        self._logprob_sum += sum(one.logprob for one in told.tokens)
        if self._logprobs is not None:
            self._tokens += zip(token_ids, told.tokens, strict=True)

    def _by_id(self, token_id: int, told: TokenLogprob) -> dict[str, Any]:
        """vLLM's form: the likeliest, and the token itself."""
        top = zip(told.top_token_ids, told.top_logprobs, strict=True)
        ranked = {other: (logprob, rank) for rank, (other, logprob) in enumerate(top, start=1)}
        ranked[token_id] = (told.logprob, told.rank)
        return {
            str(one): {"logprob": shown(logprob), "rank": rank, "decoded_token": self._names(one)}
            for one, (logprob, rank) in ranked.items()
        }

    def take(self) -> Mapping[str, Any] | None:
        """Fields of the choice, for what came since it was last taken; None when there is nothing."""
        fields: dict[str, Any] = {}
        tokens, self._tokens = self._tokens, []
        prompt, self._prompt = self._prompt, None
        if prompt is not None:
            whole: list[_Told] = list(zip(self._prompt_ids, [None, *prompt], strict=True))
            if self._shows_prompt_logprobs:
                fields["prompt_logprobs"] = [one and self._by_id(token_id, one) for token_id, one in whole]
            if self._echoes:
                tokens = whole + tokens
        if self._logprobs is not None and tokens:
            for token_id, told in tokens:
                self._logprobs.add(token_id, told)
            fields["logprobs"] = self._logprobs.take()
        if self._awaits_prompt_ids:
            self._awaits_prompt_ids = False
            fields["prompt_token_ids"] = list(self._prompt_ids)
        if self._token_ids:
            fields["token_ids"], self._token_ids = self._token_ids, []
        return fields or None


def beside_of(wanted: ReplyFields, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Beside | None:
    """For one reply; None where its text is all that the client wants."""
    return None if wanted.is_text_alone else Beside(wanted, tokenizer, prompt_ids)


def _shown_logprobs(
    wanted: ReplyFields, names: TokenNames, tokenizer: Tokenizer, prompt_ids: Sequence[int]
) -> ShownLogprobs | None:
    if wanted.logprobs is None:
        return None
    if wanted.is_chat:
        return ChatLogprobs(names)
    before = () if wanted.echo else prompt_ids
    return CompletionLogprobs(names, tokenizer.detokenizer(before, skip_special_tokens=wanted.skip_special_tokens))


def shown(logprob: float) -> float:
    return max(logprob, LOGPROB_MIN)
