"""What a caller may say about sampling, checked by name; the engine gets its own, complete form of it."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from disaggregated import sampling_params as engine_sampling
from disaggregated.errors import InvalidRequest
from disaggregated.llm.guided import GuidedDecodingParams
from disaggregated.text import Tokenizer, bad_word_ids

NUM_SEQUENCES_MAX: Final = 128
_INTEGER_MAX: Final = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """
    Raises:
        InvalidRequest: a ValueError that names the field and its bound.
    """

    n: int = 1
    """Sequences for each prompt; they differ in their seeds."""
    temperature: float | None = None
    """0 is greedy. None, here and below: what the model's generation_config.json says, else no restriction."""
    top_p: float | None = None
    top_k: int | None = None
    """0 and -1 are off."""
    min_p: float | None = None
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs; None: another one each time."""
    max_tokens: int | None = 16
    """None: until the model stops, or its longest sequence is reached."""
    min_tokens: int = 0
    """Nothing stops a sequence before that many tokens."""
    stop: str | Sequence[str] | None = None
    """Strings before which the text ends."""
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    """Go on after the model's own end of text."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that was generated before."""
    frequency_penalty: float = 0.0
    """Taken from it as often as it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in the prompt and in what was generated, and multiplies the negative."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of tokens; -100 forbids one, 100 enforces it."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these are sampled."""
    bad_words: Sequence[str] | None = None
    """Not generated."""
    logprobs: int | None = None
    """Tell how likely each token was, and so many of the likeliest; None: nothing of it."""
    logprob_token_ids: Sequence[int] | None = None
    """With `logprobs`: tell how likely these were, at most 128, instead of the likeliest."""
    prompt_logprobs: int | None = None
    """The same for the prompt."""
    include_stop_str_in_output: bool = False
    """The text ends with what stopped it, not before it."""
    skip_special_tokens: bool = True
    guided_decoding: GuidedDecodingParams | None = None
    """What the text must match; None: any text."""

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1, NUM_SEQUENCES_MAX)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, -1, _INTEGER_MAX)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        _check_integer("max_tokens", self.max_tokens, 1, _INTEGER_MAX)
        _check_integer("min_tokens", self.min_tokens, 0, _INTEGER_MAX)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name))
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, engine_sampling.PENALTY_MAX)
        _check_integer("logprobs", self.logprobs, 0, engine_sampling.LOGPROBS_MAX)
        _check_integer("prompt_logprobs", self.prompt_logprobs, 0, engine_sampling.LOGPROBS_MAX)
        if not isinstance(self.guided_decoding, GuidedDecodingParams | None):
            raise _wrong("guided_decoding", "GuidedDecodingParams", self.guided_decoding)
        _check_strings("stop", self.stop)
        _check_strings("bad_words", self.bad_words)
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        _check_token_ids("allowed_token_ids", self.allowed_token_ids)
        _check_token_ids("logprob_token_ids", self.logprob_token_ids)
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequest("logprob_token_ids needs logprobs, which is None", param="logprob_token_ids")
        if (num_ids := len(self.logprob_token_ids or ())) > (limit := engine_sampling.LOGPROB_TOKEN_IDS_MAX):
            raise InvalidRequest(
                f"logprob_token_ids has {num_ids} entries, the limit is {limit}", param="logprob_token_ids"
            )
        _check_token_ids("logit_bias", None if self.logit_bias is None else list(self.logit_bias))
        for bias in (self.logit_bias or {}).values():
            _check_number("logit_bias", bias, -engine_sampling.BIAS_MAX, engine_sampling.BIAS_MAX)
        if self.n > 1 and self.temperature == 0.0:
            raise InvalidRequest(f"n is {self.n}, but at temperature 0 all sequences would be the same", param="n")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def for_engine(
        self, defaults: Mapping[str, float], *, tokenizer: Tokenizer, vocab_size: int, room: int
    ) -> list[engine_sampling.SamplingParams]:
        """One for each of the `n` sequences. `room` is how many tokens may follow the prompt, at least 1.

        Raises:
            InvalidRequest: a token id that the model does not have, or a bad word that is too long.
        """
        own = tuple(self.stop_token_ids or ())
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids"):
            ids = getattr(self, name) or ()
            if (odd := next((token for token in ids if token >= vocab_size), None)) is not None:
                raise InvalidRequest(f"{name}: {odd} is not between 0 and {vocab_size - 1}", param=name)
        max_tokens = room if self.max_tokens is None else min(self.max_tokens, room)
        first_seed = secrets.randbits(63) if self.seed is None else self.seed
        chosen = engine_sampling.over_model_defaults(
            defaults, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p
        )
        words = [self.bad_words] if isinstance(self.bad_words, str) else self.bad_words or ()
        bad_words = bad_word_ids(words, tokenizer)
        return [
            engine_sampling.SamplingParams(
                **chosen,
                max_tokens=max_tokens,
                seed=(first_seed + index) % 2**64,
                stop_token_ids=frozenset(own) | frozenset(() if self.ignore_eos else tokenizer.eos_token_ids),
                min_tokens=min(self.min_tokens, max_tokens),
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=tuple(sorted((self.logit_bias or {}).items())),
                allowed_token_ids=frozenset(self.allowed_token_ids or ()),
                bad_words=bad_words,
                logprobs=self.logprobs,
                logprob_token_ids=tuple(dict.fromkeys(self.logprob_token_ids or ())),
                prompt_logprobs=self.prompt_logprobs,
                grammar=None if self.guided_decoding is None else self.guided_decoding.as_grammar(),
            )
            for index in range(self.n)
        ]


def _wrong(name: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}, is {value!r}", param=name)


def _check_integer(name: str, value: int | None, low: int, high: int) -> None:
    if value is None and name not in ("n", "min_tokens"):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(name, "an integer", value)
    if not low <= value <= high:
        raise _wrong(name, f"between {low} and {high}", value)


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None and name in ("temperature", "top_p", "min_p"):
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise _wrong(name, "a number", value)
    if not low <= value <= high:
        raise _wrong(name, f"between {low:g} and {high:g}", value)


def _check_strings(name: str, value: object) -> None:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(each, str) for each in strings):
        raise _wrong(name, "a string or a list of strings", value)
    if not all(strings):
        raise _wrong(name, "without an empty string", value)


def _check_token_ids(name: str, token_ids: object) -> None:
    if token_ids is None:
        return
    if not isinstance(token_ids, (list, tuple)) or any(type(token) is not int or token < 0 for token in token_ids):
        raise _wrong(name, "a list of token ids", token_ids)
