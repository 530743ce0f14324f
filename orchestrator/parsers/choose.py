"""What takes the replies to one request apart, and what grammar they have to follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.grammar import Grammar, GrammarKind
from disaggregated.thinking_budget import ThinkingBudget
from orchestrator.parsers.call_ids import NewCallId
from orchestrator.parsers.deltas import ReplyParser
from orchestrator.parsers.forced_calls import NamedCall, answer_or_calls, arguments_schema, calls_schema
from orchestrator.parsers.formats import ReplyFormats
from orchestrator.parsers.framed_calls import CallFrame, Schemas
from orchestrator.parsers.harmony import HarmonyMessages
from orchestrator.parsers.input_grammars import InputCall, InputGrammar, check_regular, free_or_calls
from orchestrator.parsers.json_calls import JsonCalls
from orchestrator.parsers.one_call import OneCall
from orchestrator.parsers.reasoning import ReasoningParser, ReasoningTags

MakeParser = Callable[[], ReplyParser]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Of one request."""

    schemas: Schemas | None = None
    """The tools that may be called; None: there are none."""
    inputs: Mapping[str, InputGrammar] = dataclasses.field(default_factory=dict)
    """Of these, what the input of custom ones has to be."""
    must_call: bool = False
    name: str = ""
    """With `must_call`: the one tool that has to be called."""
    is_strict: bool = False
    """With `must_call`: keywords of the schemas that a grammar cannot enforce are refused."""
    is_parallel: bool = True
    separates_reasoning: bool = True
    shows_reasoning: bool = True
    thinking_tokens_max: int | None = None
    """Of reasoning, after which it is ended; None: as many as the model wants."""
    grammar: Grammar | None = None
    """That the client asks for itself; a call may take its place, or must."""

    @property
    def input(self) -> InputGrammar | None:
        """What the whole reply has to be, where it is the input of a custom tool that the client named."""
        return self.inputs.get(self.name) if self.must_call else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPlan:
    make_parser: MakeParser | None = None
    """None: all text is content."""
    grammar: Grammar | None = None
    may_end_anywhere: bool = False
    """A parser may have had enough after any token."""
    shown: frozenset[int] = frozenset()
    """Special tokens whose text the parser has to see."""
    thinking: ThinkingBudget | None = None


def plan_reply(wanted: Wanted, formats: ReplyFormats, prompt_tail: str, *, continued: str | None = None) -> ReplyPlan:
    """`prompt_tail` is the end of the prompt's text: a template may open or close the reasoning there. `continued` is
    the text of the message that the reply goes on from.

    Raises:
        InvalidRequest: names the tool whose input cannot be kept to its grammar, or why reasoning cannot be bounded.
    """
    _check_bounded(wanted, formats)
    grammar = _grammar(wanted, formats)
    if formats.tools is not None and formats.tools.is_whole:
        # A message that goes on is in the channel that the grammar is for.
        return _harmony_plan(wanted, formats, grammar, () if continued is not None else formats.reasoning_end)
    begins_within = formats.reasoning is not None and (
        formats.reasoning.opens(prompt_tail)
        if continued is None
        else formats.reasoning.is_left_open(continued, prompt_tail)
    )
    if grammar is not None and begins_within:
        # Where the end of the reasoning is no single token nothing tells the grammar when to begin: then at once.
        grammar = dataclasses.replace(grammar, starts_after=formats.reasoning_end)
        begins_within = bool(formats.reasoning_end)
    make = _with_reasoning(wanted, formats.reasoning, begins_within, _call_parser(wanted, formats))
    return ReplyPlan(
        make_parser=make,
        grammar=grammar,
        may_end_anywhere=make is not None and not wanted.is_parallel,
        shown=frozenset() if make is None else formats.shown,
        thinking=_thinking(wanted, formats, grammar, begins_within=begins_within),
    )


def _check_bounded(wanted: Wanted, formats: ReplyFormats) -> None:
    has_tags = bool(formats.thinking_end) and not (formats.tools is not None and formats.tools.is_whole)
    if wanted.thinking_tokens_max is not None and not has_tags:
        raise InvalidRequest(
            "thinking_token_budget: this model has no tag that ends its reasoning (reasoning_parser says which it has)",
            param="thinking_token_budget",
        )


def _thinking(
    wanted: Wanted, formats: ReplyFormats, grammar: Grammar | None, *, begins_within: bool
) -> ThinkingBudget | None:
    """None too for a reply that is kept to a grammar from its first token on: it does not reason."""
    if wanted.thinking_tokens_max is None or (grammar is not None and not grammar.starts_after):
        return None
    return ThinkingBudget(wanted.thinking_tokens_max, formats.thinking_begin, formats.thinking_end, begins_within)


def _harmony_plan(
    wanted: Wanted, formats: ReplyFormats, grammar: Grammar | None, starts_after: tuple[int, ...]
) -> ReplyPlan:
    if grammar is not None:
        grammar = dataclasses.replace(grammar, starts_after=starts_after)
    make_forced = _call_parser(wanted, formats) if wanted.must_call else None

    def make() -> ReplyParser:
        parser = HarmonyMessages(
            formats.new_call_id,
            then=None if make_forced is None else make_forced(),
            separates_reasoning=wanted.separates_reasoning or wanted.must_call,
            shows_reasoning=wanted.shows_reasoning,
        )
        return parser if wanted.is_parallel else OneCall(parser)

    return ReplyPlan(make_parser=make, grammar=grammar, may_end_anywhere=not wanted.is_parallel, shown=formats.shown)


def _with_reasoning(
    wanted: Wanted, tags: ReasoningTags | None, begins_within: bool, make_calls: MakeParser | None
) -> MakeParser | None:
    if tags is None or not (wanted.separates_reasoning or wanted.must_call):
        return make_calls

    def make() -> ReplyParser:
        then = None if make_calls is None else make_calls()
        return ReasoningParser(tags, begins_within=begins_within, then=then, is_shown=wanted.shows_reasoning)

    return make


def _grammar(wanted: Wanted, formats: ReplyFormats) -> Grammar | None:
    if wanted.schemas is None:
        return wanted.grammar
    if wanted.input is not None:
        return wanted.input.alone()
    check_regular(wanted.inputs)
    if not wanted.must_call:
        return _grammar_of_free_calls(wanted, wanted.schemas, formats)
    if wanted.name:
        schema = arguments_schema(wanted.schemas[wanted.name])
    else:
        schema = calls_schema(wanted.schemas, is_parallel=wanted.is_parallel)
    if not wanted.is_strict:
        schema["x-guidance"] = {"lenient": True}
    return Grammar(GrammarKind.JSON_SCHEMA, orjson.dumps(schema).decode())


def _grammar_of_free_calls(wanted: Wanted, schemas: Schemas, formats: ReplyFormats) -> Grammar | None:
    if formats.tools is None:
        return wanted.grammar
    frame = formats.tools.frame if formats.calls_are_text else CallFrame()
    if wanted.grammar is not None:
        return answer_or_calls(wanted.grammar, schemas, frame, is_parallel=wanted.is_parallel) or wanted.grammar
    if not wanted.inputs:
        return None
    tags = formats.tools.tags if formats.calls_are_text else None
    grammar = free_or_calls(schemas, wanted.inputs, frame, tags)
    if grammar is None:
        raise InvalidRequest(
            f"tools: the grammar of {next(iter(wanted.inputs))!r} cannot be enforced within this model's own way of "
            "calling; ask for a call with tool_choice (required, or the tool's name), or leave its format out",
            param="tools",
        )
    return grammar


def _call_parser(wanted: Wanted, formats: ReplyFormats) -> MakeParser | None:
    schemas, tools = wanted.schemas, formats.tools
    if schemas is None:
        return None
    if wanted.must_call:
        return _forced_call_parser(wanted, schemas, formats.new_call_id)
    if tools is None:
        return None
    if wanted.is_parallel:
        return lambda: tools.make(schemas, tools.new_id)
    return lambda: OneCall(tools.make(schemas, tools.new_id))


def _forced_call_parser(wanted: Wanted, schemas: Schemas, new_id: NewCallId) -> MakeParser:
    if wanted.input is not None:
        return lambda: InputCall(wanted.name, new_id)
    if wanted.name:
        return lambda: NamedCall(wanted.name, new_id)
    return lambda: JsonCalls(CallFrame(), schemas, new_id, is_forced=True)
