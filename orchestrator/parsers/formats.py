"""Which way of calling tools, and of reasoning, a model has: by configured names, or by what its chat template shows.

A template shows the model how its earlier calls looked, so it has the markers in it that a reply will have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from disaggregated.config.parser_names import AUTO, NONE
from disaggregated.text import Tokenizer
from orchestrator.parsers import harmony
from orchestrator.parsers.call_ids import NewCallId, mistral_call_id, openai_call_id
from orchestrator.parsers.deltas import ReplyParser
from orchestrator.parsers.framed_calls import CallFrame, Schemas
from orchestrator.parsers.harmony import HarmonyMessages
from orchestrator.parsers.input_grammars import INPUT, TagFrame
from orchestrator.parsers.json_calls import JsonCalls
from orchestrator.parsers.marked_calls import DEEPSEEK, KIMI, MarkedCalls, MistralCalls
from orchestrator.parsers.pythonic_calls import PythonicCalls
from orchestrator.parsers.reasoning import REASONING, ReasoningTags
from orchestrator.parsers.tagged_calls import BEGIN, END, GlmCalls, MiniMaxCalls, QwenCoderCalls

_HERMES: Final = CallFrame((BEGIN,), (END,))
_MISTRAL: Final = CallFrame(("[TOOL_CALLS]",))
_LLAMA: Final = CallFrame()
_LLAMA_4: Final = CallFrame(("<|python_start|>",), ("<|python_end|>",))
_LFM: Final = CallFrame(("<|tool_call_start|>",), ("<|tool_call_end|>",))
_QWEN_CODER: Final = TagFrame(
    begin="<function=",
    name=("", ">"),
    input_begin=f"\n<parameter={INPUT}>\n",
    input_end=QwenCoderCalls.value_end,
    call_end="\n</function>",
)
_GLM: Final = TagFrame(
    begin=BEGIN,
    name=("", "\n"),
    input_begin=f"<arg_key>{INPUT}</arg_key>\n<arg_value>\n",
    input_end=GlmCalls.value_end,
    call_end=f"\n{END}",
)
_MINIMAX_M2: Final = TagFrame(
    begin="<invoke name=",
    name=('"', '">'),
    input_begin=f'\n<parameter name="{INPUT}">\n',
    input_end=MiniMaxCalls.value_end,
    call_end="\n</invoke>",
)
_GRANITE: Final = CallFrame(("<|tool_call|>", "<tool_call>"))


@dataclasses.dataclass(frozen=True, slots=True)
class ToolFormat:
    make: Callable[[Schemas, NewCallId], ReplyParser]
    markers: tuple[str, ...] = ()
    """Where a model's vocabulary has them as special tokens, they are shown to the parser all the same."""
    new_id: NewCallId = openai_call_id
    is_whole: bool = False
    """Its parser reads reasoning too, and replies without tools."""
    frame: CallFrame = CallFrame()
    """Where calls are JSON between markers."""
    tags: TagFrame | None = None
    """Where each argument stands between tags of its own."""


def _json(frame: CallFrame) -> ToolFormat:
    markers = (*frame.begin, *frame.end)
    return ToolFormat(lambda schemas, new_id: JsonCalls(frame, schemas, new_id), markers, frame=frame)


def _pythonic(frame: CallFrame) -> ToolFormat:
    return ToolFormat(lambda schemas, new_id: PythonicCalls(frame, schemas, new_id), (*frame.begin, *frame.end))


TOOL_FORMATS: Final[Mapping[str, ToolFormat]] = {
    "hermes": _json(_HERMES),
    "llama3_json": _json(_LLAMA),
    "granite": _json(_GRANITE),
    "mistral": ToolFormat(
        lambda schemas, new_id: MistralCalls(_MISTRAL, schemas, new_id),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        mistral_call_id,
    ),
    "deepseek_v3": ToolFormat(lambda _, new_id: MarkedCalls(DEEPSEEK, new_id), DEEPSEEK.markers),
    "kimi_k2": ToolFormat(lambda _, new_id: MarkedCalls(KIMI, new_id), KIMI.markers),
    "pythonic": _pythonic(CallFrame()),
    "llama4_pythonic": _pythonic(_LLAMA_4),
    "lfm2": _pythonic(_LFM),
    "qwen3_coder": ToolFormat(QwenCoderCalls, (BEGIN, END), tags=_QWEN_CODER),
    "minimax_m2": ToolFormat(MiniMaxCalls, ("<minimax:tool_call>", "</minimax:tool_call>"), tags=_MINIMAX_M2),
    "minimax": _json(CallFrame(("<tool_calls>",), ("</tool_calls>",))),
    "harmony": ToolFormat(lambda _, new_id: HarmonyMessages(new_id), harmony.MARKERS, is_whole=True),
    "glm45": ToolFormat(GlmCalls, (BEGIN, END, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"), tags=_GLM),
}
"""By the names that `tool_parser` takes."""

_SHOWN_IN_TEMPLATES: Final = (
    (harmony.FINAL_HEADER, "harmony"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm45"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|python_start|>", "llama4_pythonic"),
    ("<tool_calls>", "minimax"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
    ("<|tool_call|>", "granite"),
    ("[func_name1(", "pythonic"),
)
"""In this order, since some have the marker of another one too."""

_TAGS_IN_TEMPLATES: Final = (
    ("</think>", "qwen3"),
    ("[/THINK]", "mistral"),
    ("</seed:think>", "seed_oss"),
    ("<|END_THINKING|>", "command_a"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplyFormats:
    """Of one served model."""

    tools: ToolFormat | None
    """None: tool calls stay text."""
    reasoning: ReasoningTags | None
    shown: frozenset[int] = frozenset()
    """Special tokens whose text the parsers have to see."""
    reasoning_end: tuple[int, ...] = ()
    """The tokens that end reasoning, where they are always the same: what a grammar may wait for."""
    thinking_begin: tuple[int, ...] = ()
    thinking_end: tuple[int, ...] = ()
    """The two tags as tokens; none where reasoning is not between tags."""
    calls_are_text: bool = True
    """Not so where the markers of calls are special tokens: to a grammar these are no text."""

    @property
    def new_call_id(self) -> NewCallId:
        return self.tools.new_id if self.tools else openai_call_id

    @classmethod
    def choose(cls, tool_parser: str, reasoning_parser: str, tokenizer: Tokenizer) -> ReplyFormats:
        """By names from the configuration, "auto" and "none" among them. A model without a sign of its own way is told
        to call as Hermes does."""
        template = tokenizer.chat_template_source
        tool_name = _detected(tool_parser, template, _SHOWN_IN_TEMPLATES) or "hermes"
        reasoning_name = _detected(reasoning_parser, template, _TAGS_IN_TEMPLATES)
        tools = None if tool_name == NONE else TOOL_FORMATS[tool_name]
        reasoning = None if reasoning_name in ("", NONE) else REASONING[reasoning_name]
        markers = [*(tools.markers if tools else ()), *((reasoning.begin, reasoning.end) if reasoning else ())]
        return cls(
            tools=tools,
            reasoning=reasoning,
            shown=tokenizer.special_ids_of(markers),
            reasoning_end=_reasoning_end(tools, reasoning, tokenizer),
            thinking_begin=_tag_ids(reasoning.begin, tokenizer) if reasoning else (),
            thinking_end=_tag_ids(reasoning.end, tokenizer) if reasoning else (),
            calls_are_text=not tokenizer.special_ids_of(tools.markers if tools else ()),
        )


def _reasoning_end(tools: ToolFormat | None, reasoning: ReasoningTags | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    if tools is not None and tools.is_whole:
        is_marked = tokenizer.added_token_id(harmony.CHANNEL) is not None
        return tuple(tokenizer.encode(harmony.FINAL_HEADER, add_special_tokens=False)) if is_marked else ()
    end_id = tokenizer.added_token_id(reasoning.end) if reasoning else None
    return () if end_id is None else (end_id,)


def _tag_ids(tag: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(tag, add_special_tokens=False))


TEXT_ONLY: Final = ReplyFormats(tools=None, reasoning=None)


def _detected(name: str, template: str, signs: tuple[tuple[str, str], ...]) -> str:
    if name != AUTO:
        return name
    return next((found for sign, found in signs if sign in template), "")
