"""The fields that chat and text completions share: how to sample, when to stop, how to answer."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.sampling_params import SamplingParams, over_model_defaults
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.served_model import ServedModel

STOP_STRINGS_MAX: Final = 16
STOP_TOKEN_IDS_MAX: Final = 64
TOKENS_MAX: Final = 2**31 - 1
TOP_K_MAX: Final = 2**31 - 1

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
    "use_beam_search": (False,),
    "continue_final_message": (False,),
    "disaggregated_params": (),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "cache_salt": ("",),
}
"""Parameters that do not exist here yet, and the values that ask for nothing; any other value is refused by name."""

IGNORED: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning",
        "stream_reasoning",
        "verbosity",
        "prediction",
        "web_search_options",
        "stream_options",
        "spaces_between_special_tokens",
        "request_id",
        "allowed_openai_params",
        "extra_body",
        "provider",
        "transforms",
        "session_id",
        "conversation_id",
        "conversation_params",
    }
)
"""Sent by ordinary clients and coding agents, without an effect on tokens here: taken silently. Some say
whose turn it is, or where it goes."""

TAKEN: Final = frozenset(
    {
        "model", "prompt", "messages", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens",
        "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "stream", "priority",
        "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "separate_reasoning",
        "include_reasoning", "reasoning_effort", "thinking", "enable_thinking", "chat_template",
        "return_token_ids", "chat_template_kwargs", "add_generation_prompt", "add_special_tokens",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFields:
    sampling: SamplingParams
    """`max_tokens` is what the client wants; the prompt and the servers' limit may leave less."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    priority: int
    unknown: tuple[str, ...]
    """Fields that mean nothing here; the answer's header names them."""


def read_generation_fields(fields: Fields, model: ServedModel, *, max_tokens_default: int) -> GenerationFields:
    """
    Raises:
        InvalidRequest: names the field that is wrong, or not supported yet.
    """
    _refuse_unsupported(fields)
    stream = fields.flag("stream")
    stop = read_stop(fields)
    return GenerationFields(
        sampling=_read_sampling(fields, model, max_tokens_default),
        stop=stop,
        stream=stream,
        include_usage=_read_include_usage(fields, stream=stream),
        return_token_ids=fields.flag("return_token_ids"),
        priority=fields.integer("priority", low=-(2**31), high=2**31) or 0,
        unknown=tuple(name for name in fields.values if not (name in TAKEN or name in IGNORED or name in NEUTRAL)),
    )


def _refuse_unsupported(fields: Fields) -> None:
    for name, value in fields.values.items():
        neutral = NEUTRAL.get(name)
        if neutral is None or value is None or any(_is_same(value, allowed) for allowed in neutral):
            continue
        hint = f"; only {_shown(neutral[0])} is" if neutral else ""
        raise InvalidRequest(f"{name} is not supported yet{hint}", param=name)


def _is_same(value: object, allowed: object) -> bool:
    """0 is not false here."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _read_sampling(fields: Fields, model: ServedModel, max_tokens_default: int) -> SamplingParams:
    max_tokens = _read_max_tokens(fields) or max_tokens_default
    chosen = over_model_defaults(
        model.sampling_defaults,
        temperature=fields.number("temperature", low=0.0, high=2.0),
        top_p=fields.number("top_p", low=0.0, high=1.0),
        top_k=fields.integer("top_k", low=-1, high=TOP_K_MAX),
        min_p=fields.number("min_p", low=0.0, high=1.0),
    )
    return SamplingParams(
        **chosen,
        max_tokens=max_tokens,
        seed=_read_seed(fields),
        stop_token_ids=_read_stop_token_ids(fields, model),
        min_tokens=min(fields.integer("min_tokens", low=0, high=TOKENS_MAX) or 0, max_tokens),
    )


def _read_max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", low=1, high=TOKENS_MAX)
    older = fields.integer("max_tokens", low=1, high=TOKENS_MAX)
    return older if newer is None else newer


def _read_seed(fields: Fields) -> int:
    """Without one we choose it: a sequence must be able to go on elsewhere with the same tokens."""
    seed = fields.integer("seed", low=-(2**63), high=2**64 - 1)
    return secrets.randbits(63) if seed is None else seed % 2**64


def read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(stops) > STOP_STRINGS_MAX:
        raise InvalidRequest(f"stop has {len(stops)} strings, the limit is {STOP_STRINGS_MAX}", param="stop")
    if not all(stops):
        raise InvalidRequest("a stop string must not be empty", param="stop")
    return tuple(stops)


def _read_stop_token_ids(fields: Fields, model: ServedModel) -> frozenset[int]:
    value = fields.get("stop_token_ids")
    ids = [] if value is None else value
    if not isinstance(ids, list) or any(type(token_id) is not int for token_id in ids):
        raise wrong_type("stop_token_ids", "an array of integers", value)
    if len(ids) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest(
            f"stop_token_ids has {len(ids)} entries, the limit is {STOP_TOKEN_IDS_MAX}", param="stop_token_ids"
        )
    vocab_size = model.tokenizer.vocab_size
    if (odd := next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)) is not None:
        raise InvalidRequest(f"stop_token_ids: {odd} is not between 0 and {vocab_size - 1}", param="stop_token_ids")
    eos = () if fields.flag("ignore_eos") else model.tokenizer.eos_token_ids
    return frozenset(ids) | frozenset(eos)


def _read_include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.mapping("stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    return Fields(options).flag("include_usage")
