"""No documented parameter is unknown here: it is honoured, taken on purpose without an effect, or refused by name."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any, Final

import pytest
from openai.types import completion_create_params as completions
from openai.types import shared_params as shared
from openai.types.chat import chat_completion_stream_options_param as stream_options
from openai.types.chat import completion_create_params as chats
from openai.types.responses import function_tool_param, input_token_count_params, response_text_config_param
from openai.types.responses import response_create_params as responses

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields
from orchestrator.api.generation_fields import read_generation_fields
from orchestrator.api.known_fields import IGNORED, NEUTRAL, ONLY_OF_CHATS, TAKEN
from orchestrator.api.responses import body as of_responses
from orchestrator.api.responses.body import read_body
from tests.support.byte_model import byte_model

DOCUMENT: Final = (pathlib.Path(__file__).parents[3] / "docs" / "api.md").read_text()

VLLM: Final = """
    include_reasoning use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
    add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_prompt_text mm_payload return_mm_kwargs
    cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
    thinking_token_budget prompt_embeds best_of early_stopping guided_decoding_backend guided_json guided_regex
    guided_choice guided_grammar guided_whitespace_pattern logits_processors
"""
"""Beside OpenAI's, of chats and text completions."""
TENSORRT_LLM: Final = """
    prompt_token_ids prompt_token_ids_b64 thinking thinking_token_budget prompt_ignore_length best_of use_beam_search
    top_k top_p_min min_p repetition_penalty length_penalty early_stopping stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens lora_request echo
    add_generation_prompt add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs
    disaggregated_params conversation_params cache_salt priority agent_hierarchy mm_processor_kwargs
    return_context_logits detokenize response_format
"""

KNOWN: Final = TAKEN | IGNORED | set(NEUTRAL)
KNOWN_OF_RESPONSES: Final = KNOWN | of_responses.OWN | set(of_responses.NOT_HERE) | set(of_responses.OF_CHATS)

NESTED: Final[dict[str, tuple[Any, str]]] = {
    "reasoning": (shared.Reasoning, "effort | summary context mode generate_summary"),
    "text": (response_text_config_param.ResponseTextConfigParam, "format | verbosity"),
    "stream_options": (
        stream_options.ChatCompletionStreamOptionsParam, "include_usage | include_obfuscation",
    ),
    "function": (shared.FunctionDefinition, "name description parameters strict |"),
    "tool": (
        function_tool_param.FunctionToolParam,
        "type name description parameters strict | async allowed_callers defer_loading output_schema",
    ),
    "json_schema": (shared.response_format_json_schema.JSONSchema, "schema strict | name description"),
}  # fmt: skip
"""Members of objects: those that count, and those that change nothing here."""


@pytest.mark.parametrize(
    ("parameters", "known"),
    [
        (chats.CompletionCreateParamsBase.__annotations__, KNOWN),
        (completions.CompletionCreateParamsBase.__annotations__, KNOWN),
        (responses.ResponseCreateParamsBase.__annotations__, KNOWN_OF_RESPONSES),
        (input_token_count_params.InputTokenCountParams.__annotations__, KNOWN_OF_RESPONSES),
        (dict.fromkeys(VLLM.split()), KNOWN),
        (dict.fromkeys(TENSORRT_LLM.split()), KNOWN),
    ],
    ids=["chats", "text completions", "responses", "input tokens", "vllm", "tensorrt-llm"],
)
def test_every_parameter_is_known(parameters: Mapping[str, Any], known: set[str]) -> None:
    assert set(parameters) <= known


@pytest.mark.parametrize("name", NESTED)
def test_every_member_of_an_object_is_known(name: str) -> None:
    typed, told = NESTED[name]
    assert set(typed.__annotations__) == set(told.replace("|", "").split())


def test_a_parameter_is_in_one_table_only() -> None:
    assert not TAKEN & IGNORED
    assert not (TAKEN | IGNORED) & set(NEUTRAL)
    assert TAKEN >= ONLY_OF_CHATS


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_does_not_exist_is_refused_by_name_and_what_asks_for_nothing_is_taken(name: str) -> None:
    for value in (*NEUTRAL[name], None):
        read_generation_fields(Fields({name: value}), byte_model(), max_tokens_default=5)
    with pytest.raises(InvalidRequest, match=f"^{name} is not supported") as caught:
        read_generation_fields(Fields({name: "odd"}), byte_model(), max_tokens_default=5)
    assert caught.value.param == name


@pytest.mark.parametrize("name", of_responses.NOT_HERE)
def test_responses_refuse_by_name_too(name: str) -> None:
    for value in (*of_responses.NOT_HERE[name], None):
        read_body(Fields({"input": "x", name: value}), ())
    with pytest.raises(InvalidRequest) as caught:
        read_body(Fields({"input": "x", name: ["odd"]}), ())
    assert caught.value.param == name


def test_what_means_nothing_is_named() -> None:
    def unknown(values: dict[str, Any], *, is_chat: bool) -> tuple[str, ...]:
        return read_generation_fields(Fields(values), byte_model(), max_tokens_default=5, is_chat=is_chat).unknown

    assert unknown({"prompt": "x", "temprature": 1}, is_chat=True) == ("prompt", "temprature")
    assert unknown({"messages": [], "enable_thinking": True, "user": "u"}, is_chat=False) == (
        "messages",
        "enable_thinking",
    )


@pytest.mark.parametrize("name", sorted({*IGNORED, *NEUTRAL, *of_responses.NOT_HERE}))
def test_what_is_not_honoured_is_documented(name: str) -> None:
    assert re.search(rf"`{name}(`|:)", DOCUMENT)


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_what_is_honoured_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCUMENT
