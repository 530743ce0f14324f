"""A Responses body, checked and translated to the body of the chat that means the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields, shown, wrong_type
from orchestrator.api.known_fields import shown_as_json
from orchestrator.api.responses.input_items import Message, messages_of
from orchestrator.api.responses.tools import OfferedTools, chat_tool_choice, offered_tools

METADATA_MAX: Final = 16
OUTPUT_TOKENS_MAX: Final = 2**31 - 1
TOP_LOGPROBS_MAX: Final = 20

OF_CHATS: Final[Mapping[str, str]] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "functions": "tools",
    "function_call": "tool_choice",
    "logprobs": "include and top_logprobs",
}
"""Fields of chats that have another name here; they are refused with that name."""

TRUNCATIONS: Final = ("disabled", "auto")

NOT_HERE: Final[Mapping[str, tuple[Any, ...]]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "access_programs": (),
    "image": (),
    "personality": (),
    "previous_input_messages": (),
    "enable_response_messages": (False,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_prompt_text": (False,),
    "background_options": (),
}
"""Refused by name, unless the value asks for nothing."""

INCLUDES: Final = frozenset(
    {
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
        "message.output_text.logprobs",
    }
)
"""All but the last are about things that no answer has here."""
INCLUDES_MAX: Final = 64

OWN: Final = frozenset(
    {
        "input", "instructions", "previous_response_id", "max_output_tokens", "max_tool_calls", "text", "reasoning",
        "include", "store", "metadata", "tools", "tool_choice", "top_logprobs", "stream_options", "truncation",
    }
)  # fmt: skip
"""Read here. Every other field is the chat's."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesBody:
    chat: dict[str, Any]
    conversation: Sequence[Message]
    """Everything that was said, without the instructions, which are not handed on to later requests."""
    input_items: Any
    stores: bool
    tools: OfferedTools
    echo: dict[str, Any]
    """What the answer repeats of the request."""

    @property
    def is_cut_to_fit(self) -> bool:
        return bool(self.echo["truncation"] == "auto")


def read_body(fields: Fields, before: Sequence[Message]) -> ResponsesBody:
    """`before`: the conversation until `previous_response_id`.

    Raises:
        InvalidRequest: names the field that is wrong, or does not exist here.
    """
    _refuse(fields)
    if fields.get("input") is None:
        raise InvalidRequest("input is missing", param="input")
    conversation = messages_of(fields.get("input"), "input", before=before)
    echo = _read_echo(fields)
    tools = offered_tools(fields.get("tools", []))
    choice, left = chat_tool_choice(fields.get("tool_choice", "auto"), tools)
    text, reasoning = _read_text(fields), _read_reasoning(fields)
    chat = {
        **{name: value for name, value in fields.values.items() if name not in OWN},
        "messages": _with_instructions(echo["instructions"], conversation),
        "max_completion_tokens": echo["max_output_tokens"],
        "response_format": _response_format(text["format"]),
        "reasoning_effort": reasoning["effort"],
        **({"tools": left, "tool_choice": choice} if tools.chat or choice not in ("auto", "none") else {}),
        **_read_logprobs(fields),
        **_stream_options(fields),
    }
    return ResponsesBody(
        chat=chat,
        conversation=conversation,
        input_items=fields.get("input"),
        stores=echo["store"],
        tools=tools,
        echo={**echo, "reasoning": reasoning, "text": text},
    )


def _read_echo(fields: Fields) -> dict[str, Any]:
    """What an answer repeats as it was said, or as it is where nothing was said."""
    return {
        "instructions": fields.text("instructions"),
        "max_output_tokens": fields.integer("max_output_tokens", low=1, high=OUTPUT_TOKENS_MAX),
        "max_tool_calls": fields.integer("max_tool_calls", low=0, high=OUTPUT_TOKENS_MAX),
        "metadata": _read_metadata(fields),
        "parallel_tool_calls": fields.flag("parallel_tool_calls", default=True),
        "previous_response_id": fields.text("previous_response_id"),
        "store": fields.flag("store", default=True),
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": fields.get("tools", []),
        "top_logprobs": fields.integer("top_logprobs", low=0, high=TOP_LOGPROBS_MAX),
        "truncation": _read_truncation(fields),
    }


def _read_truncation(fields: Fields) -> str:
    truncation = fields.text("truncation") or TRUNCATIONS[0]
    if truncation not in TRUNCATIONS:
        raise InvalidRequest(f"truncation must be disabled or auto, is {shown(truncation)}", param="truncation")
    return truncation


def _stream_options(fields: Fields) -> dict[str, Any]:
    """The last event of a response always counts tokens."""
    fields.nested("stream_options").flag("include_obfuscation")
    return {"stream_options": {"include_usage": True}} if fields.get("stream") is True else {}


def _refuse(fields: Fields) -> None:
    for name, instead in OF_CHATS.items():
        if fields.get(name) is not None:
            raise InvalidRequest(f"{name} is not a field of responses; use {instead}", param=name)
    for name, neutral in NOT_HERE.items():
        if (value := fields.get(name)) is not None and value not in neutral:
            hint = f"; only {shown_as_json(neutral[0])} is" if neutral else ""
            raise InvalidRequest(f"{name} is not supported here{hint}", param=name)


def _with_instructions(instructions: str | None, conversation: Sequence[Message]) -> Sequence[Message]:
    """Templates want one system message at most: what a client put at the beginning is joined, and to it."""
    num_leading = next(
        (index for index, message in enumerate(conversation) if message["role"] not in ("system", "developer")),
        len(conversation),
    )
    texts = [] if instructions is None else [instructions]
    texts += [message["content"] for message in conversation[:num_leading]]
    return [{"role": "system", "content": "\n\n".join(texts)}, *conversation[num_leading:]] if texts else conversation


def _read_text(fields: Fields) -> dict[str, Any]:
    text = fields.nested("text")
    verbosity, wanted = text.text("verbosity"), text.mapping("format")
    if verbosity not in (None, "low", "medium", "high"):
        raise InvalidRequest("text.verbosity must be low, medium or high", param="text.verbosity")
    return {"format": wanted or {"type": "text"}, "verbosity": verbosity or "medium"}


def _response_format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """As chats spell it: what is beside the type here is under `json_schema` there."""
    match wanted.get("type"):
        case "text" | "json_object" as kind:
            return {"type": kind}
        case "json_schema":
            inner = {name: wanted[name] for name in ("name", "description", "schema", "strict") if name in wanted}
            return {"type": "json_schema", "json_schema": inner}
        case kind:
            raise InvalidRequest(
                f"text.format.type must be text, json_object or json_schema; is {shown(kind)}", param="text.format.type"
            )


def _read_reasoning(fields: Fields) -> dict[str, Any]:
    reasoning = fields.nested("reasoning")
    return {"effort": reasoning.text("effort"), "summary": reasoning.text("summary")}


def _read_logprobs(fields: Fields) -> dict[str, Any]:
    include = fields.get("include", [])
    if not isinstance(include, list):
        raise wrong_type("include", "an array of strings", include)
    if len(include) > INCLUDES_MAX:
        raise InvalidRequest(f"include has {len(include)} strings, the limit is {INCLUDES_MAX}", param="include")
    if (odd := next((name for name in include if not isinstance(name, str) or name not in INCLUDES), None)) is not None:
        raise InvalidRequest(f"include: there is no {shown(odd)}", param="include")
    if "message.output_text.logprobs" not in include:
        return {}
    return {"logprobs": True, "top_logprobs": fields.integer("top_logprobs", low=0, high=TOP_LOGPROBS_MAX) or 0}


def _read_metadata(fields: Fields) -> Mapping[str, Any]:
    metadata = fields.mapping("metadata") or {}
    if len(metadata) > METADATA_MAX:
        raise InvalidRequest(f"metadata has {len(metadata)} entries, the limit is {METADATA_MAX}", param="metadata")
    if odd := next((name for name, value in metadata.items() if not isinstance(value, str)), None):
        raise wrong_type(f"metadata.{odd[:80]}", "a string", metadata[odd])
    return metadata
