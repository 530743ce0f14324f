"""Tools as a Responses body lists them, in the form that chats have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import shown, wrong_type


def chat_tools(tools: object) -> list[dict[str, Any]]:
    """Functions only: what OpenAI runs on its own machines (web search, code, files) does not exist here.

    Raises:
        InvalidRequest: names the tool that is wrong.
    """
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array of tools", tools)
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _chat_tool(tool: object, name: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong_type(name, "an object", tool)
    if tool.get("type") != "function":
        raise InvalidRequest(f"{name}.type must be 'function', is {shown(tool.get('type'))}", param=f"{name}.type")
    function = {field: tool[field] for field in ("name", "description", "parameters", "strict") if tool.get(field)}
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{name}.name is missing", param=f"{name}.name")
    return {"type": "function", "function": function}


def chat_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> tuple[Any, list[Mapping[str, Any]]]:
    """The choice as chats spell it, and the tools that it leaves to choose from.

    Raises:
        InvalidRequest: it is of no kind that exists, or names a tool that was not given.
    """
    if isinstance(choice, str):
        return choice, list(tools)
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object", choice)
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}, list(tools)
        case "allowed_tools":
            return _allowed(choice, tools)
        case kind:
            raise InvalidRequest(
                f"tool_choice.type must be 'function' or 'allowed_tools', is {shown(kind)}", param="tool_choice"
            )


def _allowed(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"tool_choice.mode must be 'auto' or 'required', is {shown(mode)}", param="tool_choice")
    if not isinstance(allowed, list):
        raise wrong_type("tool_choice.tools", "an array of tools", allowed)
    names = [tool.get("name") if isinstance(tool, dict) else tool for tool in allowed]
    known = {tool["function"]["name"]: tool for tool in tools}
    if (odd := next((name for name in names if not isinstance(name, str) or name not in known), None)) is not None:
        raise InvalidRequest(f"tool_choice.tools: there is no tool {shown(odd)}", param="tool_choice")
    return mode, [known[name] for name in names]
