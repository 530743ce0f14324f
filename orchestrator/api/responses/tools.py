"""Tools as a Responses body lists them, in the form that chats have them, and back.

A chat knows functions and custom tools. A function of a namespace is one whose name begins with it: the model calls it
as it calls all others, and the call is told in the words of the tool that the client gave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.custom_tools import read_custom_tool
from orchestrator.api.fields import shown, wrong_type
from orchestrator.api.tools import TOOLS_MAX

SEPARATOR: Final = "."
"""Between a namespace and the name of its function."""
_LEFT_OUT: Final = ("web_search", "web_search_preview")
"""Coding agents offer it unasked, and every model may do without it. Whatever else OpenAI runs on its own machines is
refused: who offers it has something there that the answer would need."""
_KNOWN: Final = "function, custom or namespace"


@dataclasses.dataclass(frozen=True, slots=True)
class ClientTool:
    """How the client knows what the model calls by one name."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class OfferedTools:
    chat: Sequence[Mapping[str, Any]] = ()
    special: Mapping[str, ClientTool] = dataclasses.field(default_factory=dict)
    """By the names that the model knows; all others are plain functions."""
    left_out: Sequence[str] = ()
    """What the model is not told of, as the answer's header names it."""

    def called(self, name: str) -> ClientTool:
        return self.special.get(name) or ClientTool(name)


def offered_tools(tools: object) -> OfferedTools:
    """
    Raises:
        InvalidRequest: names the tool that is wrong, or of a kind that does not exist here.
    """
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array of tools", tools)
    if len(tools) > TOOLS_MAX:
        raise InvalidRequest(f"tools has {len(tools)} tools, the limit is {TOOLS_MAX}", param="tools")
    chat: list[Mapping[str, Any]] = []
    special: dict[str, ClientTool] = {}
    left_out = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise wrong_type(where, "an object", tool)
        kind = tool.get("type")
        if isinstance(kind, str) and kind.startswith(_LEFT_OUT):
            left_out.append(f"{where}.{kind}")
            continue
        for name, client_tool, chat_tool in _functions(tool, where):
            chat.append(chat_tool)
            if client_tool != ClientTool(name):
                special[name] = client_tool
    return OfferedTools(chat, special, left_out)


def _functions(tool: Mapping[str, Any], where: str) -> Iterator[tuple[str, ClientTool, Mapping[str, Any]]]:
    """What one tool is to the model: the name, what the client calls it, and the function."""
    if tool.get("type") != "namespace":
        yield _function(tool, where, None)
        return
    namespace, members = _name(tool, where), tool.get("tools")
    if not isinstance(members, list):
        raise wrong_type(f"{where}.tools", "an array of tools", members)
    for index, member in enumerate(members):
        if not isinstance(member, dict):
            raise wrong_type(f"{where}.tools[{index}]", "an object", member)
        yield _function(member, f"{where}.tools[{index}]", namespace)


def _function(tool: Mapping[str, Any], where: str, namespace: str | None) -> tuple[str, ClientTool, Mapping[str, Any]]:
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        raise InvalidRequest(
            f"{where}.type must be {_KNOWN}, is {shown(kind)}: nothing is run here", param=f"{where}.type"
        )
    name = _name(tool, where)
    client_tool = ClientTool(name, namespace, kind == "custom")
    members = ("description", "format") if client_tool.is_custom else ("description", "parameters", "strict")
    told = {field: tool[field] for field in members if tool.get(field)}
    if client_tool.is_custom:
        read_custom_tool(tool, where)  # Here, for what is wrong with it is told by its place in the client's own list.
    name = chat_name(name, namespace)
    return name, client_tool, {"type": kind, kind: {"name": name, **told}}


def chat_name(name: str, namespace: str | None) -> str:
    """By which the model knows it."""
    return name if namespace is None else f"{namespace}{SEPARATOR}{name}"


def _name(tool: Mapping[str, Any], where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str):
        raise InvalidRequest(f"{where}.name is missing", param=f"{where}.name")
    return name


def chat_tool_choice(choice: object, tools: OfferedTools) -> tuple[Any, list[Mapping[str, Any]]]:
    """The choice as chats spell it, and the tools that it leaves to choose from.

    Raises:
        InvalidRequest: it is of no kind that exists, or names a tool that was not given.
    """
    if isinstance(choice, str):
        return choice, list(tools.chat)
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object", choice)
    match choice.get("type"):
        case "function" | "custom":
            return {"type": "function", "function": {"name": choice.get("name")}}, list(tools.chat)
        case "allowed_tools":
            return _allowed(choice, tools)
        case kind:
            raise InvalidRequest(
                f"tool_choice.type must be 'function', 'custom' or 'allowed_tools', is {shown(kind)}",
                param="tool_choice",
            )


def _allowed(choice: Mapping[str, Any], tools: OfferedTools) -> tuple[str, list[Mapping[str, Any]]]:
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"tool_choice.mode must be 'auto' or 'required', is {shown(mode)}", param="tool_choice")
    if not isinstance(allowed, list):
        raise wrong_type("tool_choice.tools", "an array of tools", allowed)
    names = [tool.get("name") if isinstance(tool, dict) else tool for tool in allowed]
    known = {tool[tool["type"]]["name"]: tool for tool in tools.chat}
    if (odd := next((name for name in names if not isinstance(name, str) or name not in known), None)) is not None:
        raise InvalidRequest(f"tool_choice.tools: there is no tool {shown(odd)}", param="tool_choice")
    return mode, [known[name] for name in names]
