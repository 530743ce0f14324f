"""How the next token is chosen. Everything a server needs to continue a sequence that another server began."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar
from disaggregated.peer_input import checked_number
from disaggregated.repetition_rule import RepetitionRule
from disaggregated.thinking_budget import ThinkingBudget
from disaggregated.v1 import control_pb2

STOP_TOKEN_IDS_MAX: Final = 4096
"""More than any model has, and a client may add."""
LOGPROBS_MAX: Final = 20
"""Likeliest tokens told for each one: what OpenAI's API allows."""
LOGPROB_TOKEN_IDS_MAX: Final = 128
"""Tokens that are asked for by their ids: vLLM's limit."""
BIASES_MAX: Final = 4096
BAD_WORDS_MAX: Final = 1024
BAD_WORD_TOKENS_MAX: Final = 64
PENALTY_MAX: Final = 100.0
BIAS_MAX: Final = 100.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Checked by the orchestrator, in the client's words; a server looks once more at what comes to it.

    The random number for the token at position `p` of a sequence (prompt included) depends on `(seed, p)` alone, and
    everything else on the tokens before it, so a sequence gives the same tokens wherever it is continued.
    """

    max_tokens: int
    """Tokens that may still be generated, at least 1."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int = 0
    """0 to 2**64 - 1."""
    stop_token_ids: frozenset[int] = frozenset()
    """EOS and the client's own. The one that is sampled is reported and ends the sequence."""
    min_tokens: int = 0
    """Stop tokens are not sampled before that many tokens."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken from it as often as it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in the prompt and in what was generated, and multiplies the negative."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), each id once."""
    allowed_token_ids: frozenset[int] = frozenset()
    """Only these are sampled; empty: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that are not generated: the last one is not sampled after the others."""
    logprobs: int | None = None
    """Tell how likely each token was, and so many of the likeliest; None: nothing of it."""
    logprob_token_ids: tuple[int, ...] = ()
    """With `logprobs`: how likely these were in each place is told instead of the likeliest; each id once."""
    prompt_logprobs: int | None = None
    """The same for the prompt from its second token on. All of it is computed then, whatever the prefix cache has."""
    num_emitted: int = 0
    """The last so many of the token ids given with a request were generated before, by another server: they count as
    generated for penalties and the grammar, but not for `max_tokens` and `min_tokens`."""
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None
    """How long the reply may reason; None: as long as it wants."""
    repetition: RepetitionRule | None = None
    """The sequence ends when it goes round in circles so; None: it may."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def needs_known_tokens(self) -> bool:
        """What is sampled next depends on which tokens came before by more than their logits."""
        return self.has_penalties or bool(self.bad_words) or self.grammar is not None or self.thinking is not None

    @property
    def edits_logits(self) -> bool:
        return self.needs_known_tokens or bool(self.logit_bias or self.allowed_token_ids)

    @property
    def takes_likeliest(self) -> bool:
        """Of the model's own logits."""
        return self.is_greedy and not self.edits_logits

    def after(self, num_tokens: int) -> SamplingParams:
        """What is left to do once `num_tokens`, at least one, have been generated elsewhere."""
        return self.but(
            max_tokens=self.max_tokens - num_tokens,
            min_tokens=max(0, self.min_tokens - num_tokens),
            num_emitted=self.num_emitted + num_tokens,
            prompt_logprobs=None,  # They came with the first token.
        )

    def but(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def to_proto(self) -> control_pb2.SamplingParams:
        message = control_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=sorted(self.stop_token_ids),
        )
        if any(_seldom_set(self)):
            for name in _SELDOM_SET:
                setattr(message, name, getattr(self, name))
        if self.logprobs is not None:
            message.logprobs = self.logprobs
            message.logprob_token_ids.extend(self.logprob_token_ids)
        if self.prompt_logprobs is not None:
            message.prompt_logprobs = self.prompt_logprobs
        if self.repetition is not None:
            message.repetition.CopyFrom(self.repetition.to_proto())
        if self.edits_logits:
            self._add_edits(message)
        return message

    def _add_edits(self, message: control_pb2.SamplingParams) -> None:
        """What few requests ask for."""
        message.bias_token_ids.extend([token_id for token_id, _ in self.logit_bias])
        message.biases.extend([bias for _, bias in self.logit_bias])
        message.allowed_token_ids.extend(sorted(self.allowed_token_ids))
        message.bad_words.extend(control_pb2.TokenSequence(token_ids=word) for word in self.bad_words)
        if self.grammar is not None:
            message.grammar.CopyFrom(self.grammar.to_proto())
        if self.thinking is not None:
            message.thinking.CopyFrom(self.thinking.to_proto())

    @classmethod
    def from_proto(cls, message: control_pb2.SamplingParams) -> SamplingParams:
        """Raises InvalidRequest for values that no orchestrator of ours sends."""
        _check(message)
        return cls(
            **{name: getattr(message, name) for name in _ALWAYS_THERE},
            **{name: getattr(message, name) for name in _MAY_BE_ABSENT if message.HasField(name)},
            repetition_penalty=message.repetition_penalty or 1.0,
            stop_token_ids=frozenset(message.stop_token_ids),
            logit_bias=tuple(zip(message.bias_token_ids, message.biases, strict=True)),
            logprob_token_ids=tuple(message.logprob_token_ids),
            allowed_token_ids=frozenset(message.allowed_token_ids),
            bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
            grammar=Grammar.from_proto(message.grammar) if message.HasField("grammar") else None,
            thinking=ThinkingBudget.from_proto(message.thinking) if message.HasField("thinking") else None,
            repetition=RepetitionRule.from_proto(message.repetition) if message.HasField("repetition") else None,
        )


_SELDOM_SET: Final = ("top_k", "min_p", "min_tokens", "presence_penalty", "frequency_penalty", "num_emitted")
"""Most requests leave them all at 0."""
_seldom_set: Final = operator.attrgetter(*_SELDOM_SET)
_ALWAYS_THERE: Final = ("max_tokens", "temperature", "top_p", "seed", *_SELDOM_SET)
_MAY_BE_ABSENT: Final = ("logprobs", "prompt_logprobs")


def _check(message: control_pb2.SamplingParams) -> None:
    checked_number(message.temperature, "temperature", low=0.0)
    checked_number(message.top_p, "top_p", low=0.0, high=1.0)
    checked_number(message.min_p, "min_p", low=0.0, high=1.0)
    checked_number(message.presence_penalty, "presence_penalty", low=-PENALTY_MAX, high=PENALTY_MAX)
    checked_number(message.frequency_penalty, "frequency_penalty", low=-PENALTY_MAX, high=PENALTY_MAX)
    checked_number(message.repetition_penalty, "repetition_penalty", low=0.0, high=PENALTY_MAX)
    for bias in message.biases:
        checked_number(bias, "logit_bias", low=-BIAS_MAX, high=BIAS_MAX)
    if len(message.biases) != len(message.bias_token_ids):
        raise InvalidRequest("logit_bias has tokens without a bias", param="logit_bias")
    longest_word = max((len(word.token_ids) for word in message.bad_words), default=1)
    for name, count, limit in (
        ("stop_token_ids", len(message.stop_token_ids), STOP_TOKEN_IDS_MAX),
        ("logit_bias", len(message.biases), BIASES_MAX),
        ("bad_words", len(message.bad_words), BAD_WORDS_MAX),
        ("bad_words' tokens", longest_word, BAD_WORD_TOKENS_MAX),
        ("logprobs", message.logprobs, LOGPROBS_MAX),
        ("logprob_token_ids", len(message.logprob_token_ids), LOGPROB_TOKEN_IDS_MAX),
        ("prompt_logprobs", message.prompt_logprobs, LOGPROBS_MAX),
    ):
        if count > limit:
            raise InvalidRequest(f"there are {count} {name}, {limit} are allowed", param=name.split("'")[0])
    if not all(word.token_ids for word in message.bad_words):
        raise InvalidRequest("bad_words: a word without tokens", param="bad_words")


def over_model_defaults(
    defaults: Mapping[str, float],
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
) -> dict[str, Any]:
    """The four fields of SamplingParams that a model has defaults for: what is None here is the model's, and where it
    has none the whole distribution at temperature 1. A `top_k` below 0 is off, as 0 is."""
    top_p = defaults.get("top_p", 1.0) if top_p is None else top_p
    top_k = int(defaults.get("top_k", 0)) if top_k is None else max(0, top_k)
    if top_p == 0.0:
        top_p, top_k = 1.0, 1  # the smallest nucleus there is: the likeliest token alone
    return {
        "temperature": defaults.get("temperature", 1.0) if temperature is None else temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": defaults.get("min_p", 0.0) if min_p is None else min_p,
    }
