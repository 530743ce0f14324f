"""The fields that chat and text completions share: how to sample, when to stop, how to answer."""

from __future__ import annotations

import dataclasses
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.sampling_params import SamplingParams
from orchestrator.api.fields import Fields
from orchestrator.api.known_fields import refuse_unsupported, unknown_fields
from orchestrator.api.reply_fields import ReplyFields, read_reply_fields
from orchestrator.api.sampling_fields import read_max_tokens, read_sampling, read_stop
from orchestrator.api.structured import grammar_of
from orchestrator.api.truncation import Truncation, read_truncation
from orchestrator.served_model import ServedModel

CACHE_SALT_CHARACTERS_MAX: Final = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFields:
    sampling: SamplingParams
    """`max_tokens` is what the client wants; the prompt and the servers' limit may leave less."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    counts_always: bool
    """Every event of a stream tells the counts so far."""
    reply: ReplyFields
    priority: int
    cache_salt: str
    """Prompts are found in a cache only by requests with the same one."""
    truncation: Truncation | None
    unknown: tuple[str, ...]
    """Fields that mean nothing here; the answer's header names them."""


def read_generation_fields(
    fields: Fields, model: ServedModel, *, max_tokens_default: int, is_chat: bool = True
) -> GenerationFields:
    """
    Raises:
        InvalidRequest: names the field that is wrong, or not supported yet.
    """
    refuse_unsupported(fields)
    if not is_chat and fields.values.get("thinking_token_budget") not in (None, -1):
        raise InvalidRequest("thinking_token_budget is for chats: texts do not reason", param="thinking_token_budget")
    stream = fields.flag("stream")
    reply = read_reply_fields(fields, is_chat=is_chat, stream=stream)
    options = _read_stream_options(fields, stream=stream)
    max_tokens = read_max_tokens(fields, low=0 if reply.drops_tokens else 1)
    max_tokens = max_tokens_default if max_tokens is None else max(max_tokens, 1)
    sampling = read_sampling(fields, model, max_tokens=max_tokens).but(grammar=grammar_of(fields))
    return GenerationFields(
        sampling=reply.applied_to(sampling),
        stop=read_stop(fields),
        stream=stream,
        include_usage=options.flag("include_usage"),
        counts_always=options.flag("continuous_usage_stats"),
        reply=reply,
        priority=fields.integer("priority", low=-(2**31), high=2**31 - 1) or 0,
        cache_salt=_read_cache_salt(fields),
        truncation=read_truncation(fields),
        unknown=unknown_fields(fields, is_chat=is_chat),
    )


def _read_cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt") or ""
    if len(salt) > CACHE_SALT_CHARACTERS_MAX:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters, the limit is {CACHE_SALT_CHARACTERS_MAX}", param="cache_salt"
        )
    return salt


def _read_stream_options(fields: Fields, *, stream: bool) -> Fields:
    if fields.mapping("stream_options") is not None and not stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    options = fields.nested("stream_options")
    options.flag("include_obfuscation")  # OpenAI's padding against who listens in; TLS is for that here.
    return options
