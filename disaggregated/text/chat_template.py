"""Messages to one prompt, by the template that comes with the model.

Templates are written for transformers, so they get the environment they know from there: the same whitespace rules,
filters and functions. They come from the internet, so they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import meta, nodes
from jinja2.parser import Parser

from disaggregated.errors import InvalidRequest, ModelUnavailable
from disaggregated.text.chat_messages import template_messages
from disaggregated.text.continued import OpenEnd, check_goes_on
from disaggregated.text.tools_as_text import tools_as_text


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelUnavailable if `source` is not a template at all."""
        self.source = source
        self.special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            # A plain copy of jinja2's chain of mappings, which it walks key by key for each rendering.
            self._template.globals = dict(self._template.globals)
            variables = meta.find_undeclared_variables(environment.parse(source))
            self._knows_tools = "tools" in variables or "tool_calls" in source
        except jinja2.TemplateSyntaxError as error:
            raise ModelUnavailable(f"the chat template is damaged: line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """The prompt. `template_kwargs` are the client's own, such as `enable_thinking`.

        Tools that the template knows nothing of are told in the system message. With `continue_final_message`, and
        without a generation prompt, the prompt ends with the text of the last message, which is the assistant's.

        Raises InvalidRequest(param="continue_final_message") if there is nothing to go on from, and
        InvalidRequest(param="messages") if the template refuses the messages or stumbles over their shape, or
        takes longer than `timeout_s`: for templates of strangers, and on a thread.
        """
        if continue_final_message:
            check_goes_on(messages[-1])
        shown = template_messages(messages)
        if not self._knows_tools:
            shown, tools = tools_as_text(shown, tools), None
        end = OpenEnd(shown) if continue_final_message else None
        variables = {
            **self.special_tokens,
            **(template_kwargs or {}),
            "messages": end.messages if end else shown,
            "tools": list(tools) if tools else None,
            "documents": (template_kwargs or {}).get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with _deadline(timeout_s) if timeout_s is not None else _NO_DEADLINE:
                rendered = self._rendered(variables)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses this: {error.message}", param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error
        return end.cut(rendered) if end else rendered

    def _rendered(self, variables: dict[str, Any]) -> str:
        """As `Template.render` does it, which also rewrites tracebacks that nobody would see here."""
        template = self._template
        return "".join(template.root_render_func(template.new_context(variables)))


_NO_DEADLINE: Final = contextlib.nullcontext()


@contextlib.contextmanager
def _deadline(timeout_s: float) -> Iterator[None]:
    """A template becomes Python code, whose every line is a moment at which it can be stopped."""
    end_s = time.monotonic() + timeout_s

    def trace(frame: types.FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end_s:
            raise jinja2.TemplateError(f"it takes longer than {timeout_s:g} s")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Nor can a template ask for numbers or texts that fill the memory, while it is compiled or while it runs."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As the sandbox finds it, but at once where what it finds is safe for what it is: the entries of messages, and
        where a loop stands. Nearly all that templates ask for is one of the two."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]
        if type(obj) is jinja2.runtime.LoopContext and attribute in _OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            sizes = [len(side) if isinstance(side, Sized) else abs(side) for side in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > _REPEATED_MAX:
                raise jinja2.TemplateRuntimeError(f"{operator} is not for that much")
        return super().call_binop(context, operator, left, right)


_OF_DICTS: Final = frozenset(dir(dict))
"""Attributes of dictionaries: a template gets these, and not entries of the same name."""
_OF_LOOPS: Final = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0"})
_REPEATED_MAX: Final = 100_000
"""Characters that one multiplication of a text may make."""


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; serving just prints them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, nothing is escaped for HTML: models have not seen `\\u0027`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
