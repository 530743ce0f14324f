"""Every parameter that clients of OpenAI, vLLM and TensorRT-LLM know: honoured, taken without an effect, or refused.

One that is in no table is a typing mistake, or some agent's own: the answer's header names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields
from orchestrator.api.reply_fields import REPLY_FIELDS
from orchestrator.api.sampling_fields import SAMPLING_FIELDS
from orchestrator.api.structured import STRUCTURED

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
    "disaggregated_params": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "prompt_token_ids": (),
    "prompt_token_ids_b64": (),
    "moderation": (),
    "watermarking": (),
    "vllm_xargs": ({},),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "mm_payload": (),
    "return_mm_kwargs": (False,),
    "return_token_offsets": (False,),
    "return_context_logits": (False,),
    "routed_experts_prompt_start": (0,),
    "detokenize": (True,),
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
        "prompt_cache_options",
        "client_metadata",
        "stream_interval",
        "agent_hierarchy",
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
        "enable_thinking", "thinking_token_budget", "chat_template", "chat_template_kwargs", "add_generation_prompt",
        "continue_final_message", "add_special_tokens", "cache_salt", "truncate_prompt_tokens", "truncation_side",
        "documents",
    }
)  # fmt: skip

ONLY_OF_CHATS: Final = frozenset(
    {
        "messages", "tool_choice", "parallel_tool_calls", "function_call", "separate_reasoning", "include_reasoning",
        "reasoning_effort", "thinking", "enable_thinking", "chat_template", "chat_template_kwargs", "documents",
        "add_generation_prompt", "continue_final_message", "top_logprobs", "return_prompt_text",
    }
)  # fmt: skip
"""In a text completion they mean nothing, and are named as unknown."""
ONLY_OF_COMPLETIONS: Final = frozenset({"prompt"})


def refuse_unsupported(fields: Fields) -> None:
    """Raises InvalidRequest for a parameter that asks for what does not exist here."""
    for name, value in fields.values.items():
        neutral = NEUTRAL.get(name)
        if neutral is None or value is None or any(_is_same(value, allowed) for allowed in neutral):
            continue
        hint = f"; only {shown_as_json(neutral[0])} is" if neutral else ""
        raise InvalidRequest(f"{name} is not supported yet{hint}", param=name)


def unknown_fields(fields: Fields, *, is_chat: bool) -> tuple[str, ...]:
    """That mean nothing in such a request."""
    elsewhere = ONLY_OF_COMPLETIONS if is_chat else ONLY_OF_CHATS
    return tuple(name for name in fields.values if name in elsewhere or name not in _KNOWN)


_KNOWN: Final = TAKEN | IGNORED | frozenset(NEUTRAL)


def _is_same(value: object, allowed: object) -> bool:
    """0 is not false here."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def shown_as_json(value: object) -> str:
    return orjson.dumps(value).decode()
