"""How a client wants tokens to be chosen, and when they end: the fields that become SamplingParams."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.repetition_rule import PATTERN_SIZE_MAX, RepetitionRule
from disaggregated.repetition_rule import TOKENS_MAX as REPETITION_TOKENS_MAX
from disaggregated.sampling_params import (
    BIAS_MAX,
    LOGPROB_TOKEN_IDS_MAX,
    PENALTY_MAX,
    SamplingParams,
    over_model_defaults,
)
from disaggregated.text import Tokenizer, bad_word_ids
from disaggregated.text.bad_words import BAD_WORDS_MAX
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.served_model import ServedModel

STOP_STRINGS_MAX: Final = 16
STOP_CHARACTERS_MAX: Final = 2048
"""Of one: with each token, what may still become it is compared with it from every place."""
STOP_TOKEN_IDS_MAX: Final = 64
LOGIT_BIASES_MAX: Final = 1024
TOKENS_MAX: Final = 2**31 - 1
TOP_K_MAX: Final = 2**31 - 1
REPETITIONS_MIN: Final = 2
REPETITION_PENALTY_MIN: Final = 0.01
"""It divides."""

SAMPLING_FIELDS: Final = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "stop",
        "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
        "bad_words", "allowed_token_ids", "logprob_token_ids", "repetition_detection",
    }
)  # fmt: skip


_SEEDS: Final = random.Random()
"""They are nobody's secret, and the system's own randomness costs a call of the kernel."""


def read_sampling(fields: Fields, model: ServedModel, *, max_tokens: int) -> SamplingParams:
    """All but what is told beside the tokens. `max_tokens` is what the client wants, or the default.

    Raises:
        InvalidRequest: names the field and its limit.
    """
    chosen = over_model_defaults(
        model.sampling_defaults,
        temperature=fields.number("temperature", low=0.0, high=2.0),
        top_p=fields.number("top_p", low=0.0, high=1.0),
        top_k=fields.integer("top_k", low=-1, high=TOP_K_MAX),
        min_p=fields.number("min_p", low=0.0, high=1.0),
    )
    vocab_size = model.tokenizer.vocab_size
    repetition = fields.number("repetition_penalty", low=REPETITION_PENALTY_MIN, high=PENALTY_MAX)
    return SamplingParams(
        **chosen,
        max_tokens=max_tokens,
        seed=read_seed(fields),
        stop_token_ids=_read_stop_token_ids(fields, model),
        min_tokens=min(fields.integer("min_tokens", low=0, high=TOKENS_MAX) or 0, max_tokens),
        presence_penalty=fields.number("presence_penalty", low=-2.0, high=2.0) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", low=-2.0, high=2.0) or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        logit_bias=_read_logit_bias(fields, vocab_size),
        allowed_token_ids=frozenset(_read_token_ids(fields, "allowed_token_ids", vocab_size, num_max=vocab_size)),
        bad_words=_read_bad_words(fields, model.tokenizer),
        logprob_token_ids=_read_logprob_token_ids(fields, vocab_size),
        repetition=_read_repetition(fields),
    )


def read_max_tokens(fields: Fields, *, low: int = 1) -> int | None:
    newer = fields.integer("max_completion_tokens", low=low, high=TOKENS_MAX)
    older = fields.integer("max_tokens", low=low, high=TOKENS_MAX)
    return older if newer is None else newer


def read_thinking_budget(fields: Fields) -> int | None:
    """None, which may be said as -1: a reply may reason for as long as it wants."""
    budget = fields.integer("thinking_token_budget", low=-1, high=TOKENS_MAX)
    return None if budget == -1 else budget


def read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(stops) > STOP_STRINGS_MAX:
        raise InvalidRequest(f"stop has {len(stops)} strings, the limit is {STOP_STRINGS_MAX}", param="stop")
    if not all(isinstance(stop, str) for stop in stops):
        raise wrong_type("stop", "a string or an array of strings", value)
    if not all(stops):
        raise InvalidRequest("stop: a string in it must not be empty", param="stop")
    if (longest := max(map(len, stops), default=0)) > STOP_CHARACTERS_MAX:
        raise InvalidRequest(
            f"stop: a string in it has {longest} characters, the limit is {STOP_CHARACTERS_MAX}", param="stop"
        )
    return tuple(stops)


def read_seed(fields: Fields) -> int:
    """Without one we choose it: a sequence must be able to go on elsewhere with the same tokens."""
    if fields.values.get("seed") is None:
        return _SEEDS.getrandbits(63)
    return (fields.integer("seed", low=-(2**63), high=2**64 - 1) or 0) % 2**64


def _read_stop_token_ids(fields: Fields, model: ServedModel) -> frozenset[int]:
    ids = _read_token_ids(fields, "stop_token_ids", model.tokenizer.vocab_size, num_max=STOP_TOKEN_IDS_MAX)
    eos = () if fields.flag("ignore_eos") else model.tokenizer.eos_token_ids
    return frozenset(ids) | frozenset(eos)


def _read_token_ids(fields: Fields, name: str, vocab_size: int, *, num_max: int) -> Sequence[int]:
    value = fields.get(name)
    ids = [] if value is None else value
    if not isinstance(ids, list):
        raise wrong_type(name, "an array of integers", value)
    if len(ids) > num_max:
        raise InvalidRequest(f"{name} has {len(ids)} entries, the limit is {num_max}", param=name)
    if any(type(token_id) is not int for token_id in ids):
        raise wrong_type(name, "an array of integers", value)
    if (odd := next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)) is not None:
        raise InvalidRequest(f"{name}: {odd} is not between 0 and {vocab_size - 1}", param=name)
    return ids


def _read_logprob_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """In the client's order, each once."""
    ids = _read_token_ids(fields, "logprob_token_ids", vocab_size, num_max=LOGPROB_TOKEN_IDS_MAX)
    asked = fields.get("logprobs")
    if ids and (asked is None or asked is False):
        raise InvalidRequest("logprob_token_ids is only allowed when logprobs is asked for", param="logprob_token_ids")
    return tuple(dict.fromkeys(ids))


def _read_repetition(fields: Fields) -> RepetitionRule | None:
    """vLLM's; a largest pattern of 0 tokens, which is the default, asks for nothing."""
    members = fields.nested("repetition_detection")
    largest = members.integer("max_pattern_size", low=0, high=PATTERN_SIZE_MAX) or 0
    smallest = members.integer("min_pattern_size", low=0, high=largest) or 1
    count = members.integer("min_count", low=0, high=REPETITION_TOKENS_MAX) or 0
    if largest == 0:
        return None
    name = "repetition_detection.min_count"
    if count < REPETITIONS_MIN:
        raise InvalidRequest(f"{name} must be at least {REPETITIONS_MIN}, is {count}", param=name)
    rule = RepetitionRule(smallest, largest, count)
    if rule.num_tokens > REPETITION_TOKENS_MAX:
        raise InvalidRequest(
            f"{name} times max_pattern_size must be at most {REPETITION_TOKENS_MAX}, is {rule.num_tokens}", param=name
        )
    return rule


def _read_logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """An object from token ids, which JSON has as strings, to what is added to their logits."""
    biases = fields.mapping("logit_bias") or {}
    if len(biases) > LOGIT_BIASES_MAX:
        raise InvalidRequest(
            f"logit_bias has {len(biases)} entries, the limit is {LOGIT_BIASES_MAX}", param="logit_bias"
        )
    found = {_token_id_of(key, vocab_size): _checked_bias(key, value) for key, value in biases.items()}
    return tuple(sorted(found.items()))


def _token_id_of(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
        raise InvalidRequest(
            f"logit_bias: {key[:40]!r} is not a token id between 0 and {vocab_size - 1}", param="logit_bias"
        )
    return int(key)


def _checked_bias(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type("logit_bias", f"from token ids to numbers, but of token {key[:40]}", value)
    if not -BIAS_MAX <= value <= BIAS_MAX:
        raise InvalidRequest(
            f"logit_bias of token {key} must be between {-BIAS_MAX:g} and {BIAS_MAX:g}, is {value}", param="logit_bias"
        )
    return float(value)


def _read_bad_words(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    value = fields.get("bad_words")
    words = [] if value is None else [value] if isinstance(value, str) else value
    is_list = isinstance(words, list)
    if not is_list or not all(isinstance(word, str) for word in words[:BAD_WORDS_MAX]):
        raise wrong_type("bad_words", "an array of strings", value)
    return bad_word_ids(words, tokenizer)
