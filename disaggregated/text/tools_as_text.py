"""Tools for models whose chat template knows of none: told in the system message, called and answered in plain text.

The way of calling is the one that Hermes models use, since more models have seen it than any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

_PREAMBLE: Final = """You may call functions to help with the user's request. These are the functions, as JSON schemas:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as one JSON object between two tags, once for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages of system, user and assistant only. Their content is text, their arguments are objects."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    preamble = _PREAMBLE.format(tools="\n".join(_json(tool.get("function", tool)) for tool in tools))
    if plain and plain[0].get("role") == "system":
        return [{**plain[0], "content": f"{plain[0].get('content') or ''}\n\n{preamble}"}, *plain[1:]]
    return [{"role": "system", "content": preamble}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    said = [message["content"]] if message.get("content") else []
    texts = [f"<tool_call>\n{_json(_call(call))}\n</tool_call>" for call in calls]
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join([*said, *texts])}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return {"name": function.get("name"), "arguments": function.get("arguments", {})}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
