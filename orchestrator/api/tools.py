"""`tools` and `tool_choice` of a chat: which functions and custom tools the model may call, and whether it must.

The API before tools (`functions`, `function_call`) means the same thing with one call at most.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import orjson

from disaggregated.errors import InvalidRequest
from disaggregated.structured.json_schema import DEPTH_MAX, is_deeper, schema_text
from orchestrator.api.custom_tools import PARAMETERS, read_custom_tool
from orchestrator.api.fields import Fields, shown, wrong_type
from orchestrator.parsers.input_grammars import InputGrammar

TOOLS_MAX: Final = 512
_NAME: Final = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_CHOICES: Final[Mapping[str, Literal["none", "auto", "required"]]] = {
    "none": "none", "auto": "auto", "required": "required", "any": "required"
}  # fmt: skip
"""Mistral's clients say "any"."""
_CHOICES_OF_ANTHROPIC: Final = [{"type": name} for name in _CHOICES]

NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    tools: Sequence[Mapping[str, Any]]
    """As templates know them: {"type": "function", "function": {"name", "description", "parameters"}}."""
    schemas: Mapping[str, Mapping[str, Any]]
    """Of those that may be called: name and JSON schema of the arguments."""
    must_call: bool = False
    name: str = ""
    """With `must_call`: the only one that may be called, and exactly once; "": any."""
    is_strict: bool = False
    """What of a schema cannot be enforced is an error, and not only a wish."""
    is_parallel: bool = True
    """Several calls in one reply are welcome."""
    is_legacy: bool = False
    inputs: Mapping[str, InputGrammar] = dataclasses.field(default_factory=dict)
    """Of custom tools among those that may be called: what their input has to be, where the client says so."""

    def closed(self) -> ToolUse:
        """For a grammar, which is a little stricter than a schema: what is not named is not allowed."""
        schemas = {name: schema_text(schema, f"{name}.parameters") for name, schema in self.schemas.items()}
        return dataclasses.replace(self, schemas={name: orjson.loads(text) for name, text in schemas.items()})


def read_tools(fields: Fields, *, has_grammar: bool = False) -> ToolUse | None:
    """None: the model is not told of any tool, and its reply is text.

    has_grammar: a grammar is going to say what calls look like, even where none has to be made.

    Raises:
        InvalidRequest: names the tool or the choice that is wrong.
    """
    is_parallel = fields.flag("parallel_tool_calls", default=True)
    tools, choice = fields.get("tools"), fields.get("tool_choice")
    functions, function_call = fields.get("functions"), fields.get("function_call")
    if functions is not None and functions != []:
        if tools:
            raise InvalidRequest("functions is the older name of tools: give only one of them", param="functions")
        wrapped = _wrapped_functions(functions)
        use = _tool_use(_checked(wrapped, "functions"), function_call, "function_call", is_legacy=True)
    else:
        use = _tool_use(_checked(tools, "tools"), choice, "tool_choice", is_legacy=False)
        use = use and dataclasses.replace(use, is_parallel=is_parallel)
    return use.closed() if use is not None and (use.must_call or has_grammar) else use


def refuse_tools(fields: Fields) -> None:
    """Raises InvalidRequest where a text completion asks for calls, which only a chat can be told of."""
    for name in ("tools", "functions"):
        if fields.get(name):
            raise InvalidRequest(f"{name}: only /v1/chat/completions takes them", param=name)


def _wrapped_functions(functions: object) -> object:
    if not isinstance(functions, list):
        raise wrong_type("functions", "an array of functions", functions)
    return [{"type": "function", "function": function} for function in functions]


@dataclasses.dataclass(frozen=True, slots=True)
class _Tool:
    told: Mapping[str, Any]
    """As the template gets it."""
    is_strict: bool
    input: InputGrammar | None = None
    """Of a custom tool whose input has to be of one."""

    @property
    def name(self) -> str:
        return str(self.told["function"]["name"])

    @property
    def schema(self) -> Mapping[str, Any]:
        schema: Mapping[str, Any] = self.told["function"]["parameters"]
        return schema if self.input is None else self.input.schema()


def _checked(tools: object, param: str) -> list[_Tool]:
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise wrong_type(param, "an array of tools", tools)
    if len(tools) > TOOLS_MAX:
        raise InvalidRequest(f"{param} has {len(tools)} tools, the limit is {TOOLS_MAX}", param=param)
    checked = [_checked_tool(tool, f"{param}[{index}]") for index, tool in enumerate(tools)]
    names: set[str] = set()
    for index, tool in enumerate(checked):
        if tool.name in names:
            raise InvalidRequest(f"{param}[{index}] is the second one called {tool.name!r}", param=f"{param}[{index}]")
        names.add(tool.name)
    return checked


def _checked_tool(tool: object, where: str) -> _Tool:
    """The Responses API writes the function's fields into the tool itself."""
    if not isinstance(tool, dict):
        raise wrong_type(where, "an object", tool)
    if tool.get("type") == "custom":
        return _checked_custom(tool, where)
    if tool.get("type", "function") != "function":
        raise InvalidRequest(
            f"{where}.type must be 'function' or 'custom', is {shown(tool['type'])}: no other tools are run here",
            param=f"{where}.type",
        )
    function = tool.get("function", tool if "name" in tool else None)
    where = f"{where}.function"
    if not isinstance(function, dict):
        raise wrong_type(where, "an object", function)
    name = _checked_name(function, where)
    description, parameters, strict = (function.get(field) for field in ("description", "parameters", "strict"))
    if not isinstance(description, str | None):
        raise wrong_type(f"{where}.description", "a string", description)
    if not isinstance(parameters, dict | None):
        raise wrong_type(f"{where}.parameters", "a JSON schema (an object)", parameters)
    if not isinstance(strict, bool | None):
        raise wrong_type(f"{where}.strict", "true or false", strict)
    if parameters and is_deeper(parameters, DEPTH_MAX):
        raise InvalidRequest(
            f"{where}.parameters is nested deeper than {DEPTH_MAX} levels", param=f"{where}.parameters"
        )
    told = {"name": name, "description": description or "", "parameters": parameters or NO_PARAMETERS}
    return _Tool({"type": "function", "function": told}, bool(strict))


def _checked_custom(tool: Mapping[str, Any], where: str) -> _Tool:
    custom = tool.get("custom")
    if not isinstance(custom, dict):
        raise wrong_type(f"{where}.custom", "an object", custom)
    name, read = _checked_name(custom, f"{where}.custom"), read_custom_tool(custom, f"{where}.custom")
    told = {"name": name, "description": read.description, "parameters": PARAMETERS}
    return _Tool({"type": "function", "function": told}, is_strict=False, input=read.input())


def _checked_name(function: Mapping[str, Any], where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.name must be 1 to 128 letters, digits, or _ . : / -; is {shown(name)}", param=f"{where}.name"
        )
    return name


def _tool_use(tools: Sequence[_Tool], choice: object, param: str, *, is_legacy: bool) -> ToolUse | None:
    by_name = {tool.name: tool for tool in tools}
    mode, names = _read_choice(choice, param, is_legacy=is_legacy)
    if not tools and mode in ("required", "named"):
        raise InvalidRequest(f"{param} asks for a call, but there are no tools to call", param=param)
    if missing := [name for name in names if name not in by_name]:
        raise InvalidRequest(f"{param} names {shown(missing[0])}, which is not among the tools", param=param)
    if not tools or mode == "none":
        return None
    callable_tools = [by_name[name] for name in names] if names else tools
    return ToolUse(
        tools=[tool.told for tool in tools],
        schemas={tool.name: tool.schema for tool in callable_tools},
        must_call=mode != "auto",
        name=names[0] if mode == "named" else "",
        is_strict=all(tool.is_strict for tool in callable_tools),
        is_parallel=not is_legacy,
        is_legacy=is_legacy,
        inputs={tool.name: tool.input for tool in callable_tools if tool.input is not None},
    )


def _read_choice(choice: object, param: str, *, is_legacy: bool) -> tuple[str, list[str]]:
    """ "none", "auto", "required" or "named", and the tools that it names."""
    if choice is None:
        return "auto", []
    if isinstance(choice, str) and choice in _CHOICES:
        return _CHOICES[choice], []
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        mode, tools = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
        if mode in ("auto", "required") and isinstance(tools, list):
            return mode, [_chosen_name(tool, param) for tool in tools]
        raise InvalidRequest(f"{param}.allowed_tools must have a mode (auto or required) and tools", param=param)
    if isinstance(choice, dict) and choice in _CHOICES_OF_ANTHROPIC:
        return _CHOICES[choice["type"]], []
    if isinstance(choice, dict):
        return "named", [_chosen_name({"function": choice} if is_legacy else choice, param)]
    known = "none, auto, required or an object that names a function"
    raise InvalidRequest(f"{param} must be {known}, is {shown(choice)}", param=param)


def _chosen_name(choice: object, param: str) -> str:
    function = choice.get("function", choice.get("custom", choice)) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{param} must name a function: {_EXAMPLE}", param=param)
    return name


_EXAMPLE: Final = '{"type": "function", "function": {"name": "…"}}'
