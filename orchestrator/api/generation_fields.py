"""The fields that chat and text completions share: how to sample, when to stop, how to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from disaggregated.sampling_params import SamplingParams
from orchestrator.api.fields import Fields
from orchestrator.api.reply_fields import REPLY_FIELDS, ReplyFields, read_reply_fields
from orchestrator.api.sampling_fields import SAMPLING_FIELDS, TOKENS_MAX, read_max_tokens, read_sampling, read_stop
from orchestrator.api.structured import STRUCTURED, grammar_of
from orchestrator.served_model import ServedModel

CACHE_SALT_CHARACTERS_MAX: Final = 256

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "suffix": ("",),
    "guided_whitespace_pattern": (),
    "modalities": (["text"],),
    "audio": (),
    "use_beam_search": (False,),
    "beam_width": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "no_repeat_ngram_size": (0,),
    "top_p_min": (0,),
    "prompt_ignore_length": (0,),
    "logits_processors": ([],),
    "return_hidden_states": (False,),
    "prompt_embeds": (),
    "lora_request": (),
    "lora_path": (),
    "stop_regex": (),
    "continue_final_message": (False,),
    "disaggregated_params": (),
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
        "guided_decoding_backend",
    }
)
"""Sent by ordinary clients and coding agents, without an effect on tokens here: taken silently. Some say
whose turn it is, or where it goes."""

TAKEN: Final = SAMPLING_FIELDS | REPLY_FIELDS | frozenset(STRUCTURED) | frozenset(
    {
        "model", "prompt", "messages", "stream", "priority", "tools", "tool_choice", "parallel_tool_calls",
        "functions", "function_call", "separate_reasoning", "include_reasoning", "reasoning_effort", "thinking",
        "enable_thinking", "chat_template", "chat_template_kwargs", "add_generation_prompt", "add_special_tokens",
        "cache_salt", "truncate_prompt_tokens",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFields:
    sampling: SamplingParams
    """`max_tokens` is what the client wants; the prompt and the servers' limit may leave less."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    reply: ReplyFields
    priority: int
    cache_salt: str
    """Prompts are found in a cache only by requests with the same one."""
    truncate_prompt_tokens: int | None
    """Of a longer prompt, only so many of the last tokens count."""
    unknown: tuple[str, ...]
    """Fields that mean nothing here; the answer's header names them."""


def read_generation_fields(
    fields: Fields, model: ServedModel, *, max_tokens_default: int, is_chat: bool = True
) -> GenerationFields:
    """
    Raises:
        InvalidRequest: names the field that is wrong, or not supported yet.
    """
    _refuse_unsupported(fields)
    stream = fields.flag("stream")
    reply = read_reply_fields(fields, is_chat=is_chat, stream=stream)
    max_tokens = read_max_tokens(fields, low=0 if reply.drops_tokens else 1)
    max_tokens = max_tokens_default if max_tokens is None else max(max_tokens, 1)
    sampling = dataclasses.replace(read_sampling(fields, model, max_tokens=max_tokens), grammar=grammar_of(fields))
    return GenerationFields(
        sampling=reply.applied_to(sampling),
        stop=read_stop(fields),
        stream=stream,
        include_usage=_read_include_usage(fields, stream=stream),
        reply=reply,
        priority=fields.integer("priority", low=-(2**31), high=2**31) or 0,
        cache_salt=_read_cache_salt(fields),
        truncate_prompt_tokens=fields.integer("truncate_prompt_tokens", low=1, high=TOKENS_MAX),
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


def _read_cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt") or ""
    if len(salt) > CACHE_SALT_CHARACTERS_MAX:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters, the limit is {CACHE_SALT_CHARACTERS_MAX}", param="cache_salt"
        )
    return salt


def _read_include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.mapping("stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    return Fields(options).flag("include_usage")
