"""Bodies as coding agents send them, shortened: odd fields, odd tools, odd histories. Each names who sends the like."""

from __future__ import annotations

from typing import Any, Final

_PATH: Final[dict[str, Any]] = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
_COMMAND: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"cmd": {"type": "string"}, "timeout_ms": {"type": ["number", "null"]}},
    "required": ["cmd"],
    "additionalProperties": False,
}
_RUN: Final[dict[str, Any]] = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command.",
    "strict": False,
    "parameters": _COMMAND,
}
_CLOSE: Final[dict[str, Any]] = {
    "type": "function",
    "name": "close_agent",
    "description": "Ends it.",
    "strict": False,
    "parameters": _PATH,
}
_PATCH: Final[dict[str, Any]] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" /.+/'},
}
_READ: Final[dict[str, Any]] = {
    "type": "function",
    "function": {"name": "read_file", "description": "Reads.", "parameters": _PATH},
}
_CACHED: Final = {"type": "text", "text": "You edit files.", "cache_control": {"type": "ephemeral"}}


def _said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "id": f"msg_{role}", "role": role, "content": [{"type": "input_text", "text": text}]}


CODEX: Final[dict[str, Any]] = {
    "model": "fake",
    "stream": True,
    "input": [_said("developer", "You are a coding agent."), _said("developer", "<skills>"), _said("user", "Hello")],
    "tools": [
        _RUN,
        {"type": "namespace", "name": "multi_agent_v1", "description": "Sub-agents.", "tools": [_CLOSE]},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a20000-855d",
    "client_metadata": {"thread_id": "01a20000", "x-codex-turn-metadata": "{}"},
    "max_output_tokens": 8,
}

_CODEX_LATER: Final[dict[str, Any]] = {
    **CODEX,
    "instructions": "You are a coding agent.",
    "text": {"verbosity": "low"},
    "reasoning": {"effort": "medium", "summary": "auto"},
    "service_tier": "priority",
    "tools": [*CODEX["tools"], _PATCH],
    "input": [
        _said("user", "Fix it."),
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAA"},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "exec_command", "arguments": '{"cmd": "ls"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {
            "type": "function_call",
            "call_id": "c2",
            "namespace": "multi_agent_v1",
            "name": "close_agent",
            "arguments": '{"path": "x"}',
        },
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "closed"}]},
        {
            "type": "custom_tool_call",
            "call_id": "c3",
            "name": "apply_patch",
            "input": "*** Begin Patch\n",
            "status": "completed",
        },
        {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Fixed.", "annotations": []}],
        },
        _said("user", "Thanks."),
    ],
}

_HISTORY: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": [_CACHED]},
    {"role": "user", "content": [{"type": "text", "text": "Read a.py"}, {"type": "text", "text": "and b.py"}]},
    {
        "role": "assistant",
        "content": "",
        "refusal": None,
        "reasoning_content": "Both.",
        "annotations": [],
        "audio": None,
        "tool_calls": [
            {
                "id": "c1",
                "index": 0,
                "type": "function",
                "function": {"name": "read_file", "arguments": '{"path": "a.py"}'},
            },
            {"id": "c2", "index": 1, "type": "function", "function": {"name": "read_file", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "read_file", "content": [{"type": "text", "text": "import os"}]},
    {"role": "tool", "tool_call_id": "c2", "content": ""},
    {"role": "user", "content": "Go on."},
]

_CHAT: Final[dict[str, Any]] = {
    "model": "fake",
    "messages": _HISTORY,
    "tools": [_READ],
    "stream": True,
    "stream_options": {"include_usage": True},
}

ACCEPTED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "codex": ("/v1/responses", CODEX),
    "codex in the middle of its work": ("/v1/responses", _CODEX_LATER),
    "codex, of an older version": (
        "/v1/responses",
        {
            **CODEX,
            "tools": [_RUN, {"type": "web_search_preview"}],
            "truncation": "disabled",
            "stream_options": {"include_obfuscation": False},
        },
    ),
    "qwen code": ("/v1/chat/completions", {**_CHAT, "max_tokens": 8, "metadata": {"sessionId": "s", "promptId": "p"}}),
    "qwen code with a model that thinks": (
        "/v1/chat/completions",
        {**_CHAT, "max_tokens": 8, "enable_thinking": False, "vl_high_resolution_images": True, "temperature": 0},
    ),
    "opencode": (
        "/v1/chat/completions",
        {**_CHAT, "max_tokens": 8, "tool_choice": "auto", "reasoning_effort": "medium", "prompt_cache_key": "ses_1"},
    ),
    "cline and roo": (
        "/v1/chat/completions",
        {**_CHAT, "max_completion_tokens": 8, "parallel_tool_calls": False, "reasoning": {"effort": "high"}},
    ),
    "openrouter's clients": (
        "/v1/chat/completions",
        {
            **_CHAT,
            "max_tokens": 8,
            "provider": {"order": ["x"]},
            "transforms": ["middle-out"],
            "usage": {"include": True},
            "plugins": [],
            "models": ["fake"],
            "route": "fallback",
        },
    ),
    "claude code behind a proxy": (
        "/v1/chat/completions",
        {
            **_CHAT,
            "max_tokens": 8,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "u"},
            "context_management": {"edits": []},
            "output_config": {"effort": "high"},
            "tool_choice": {"type": "auto"},
        },
    ),
    "copilot": (
        "/v1/chat/completions",
        {
            **_CHAT,
            "max_tokens": 8,
            "n": 1,
            "top_p": 1,
            "intent": True,
            "snippy": {"enabled": False},
            "thinking_budget": 4000,
        },
    ),
    "aider": ("/v1/chat/completions", {**_CHAT, "max_tokens": 8, "tools": None, "extra_body": {}, "functions": None}),
    "continue.dev's completion": (
        "/v1/completions",
        {
            "model": "fake",
            "prompt": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
            "max_tokens": 8,
            "suffix": None,
            "stop": ["<|endoftext|>", "\n\n"],
            "raw": True,
            "keep_alive": 1800,
            "best_of": None,
            "logprobs": None,
        },
    ),
}
"""What each sends is answered."""

REFUSED: Final[dict[str, tuple[str, dict[str, Any], str]]] = {
    "codex with a tool that OpenAI runs": (
        "/v1/responses",
        {**CODEX, "tools": [{"type": "image_generation"}]},
        "tools[0].type",
    ),
    "codex with the shell of older models": (
        "/v1/responses",
        {**CODEX, "tools": [{"type": "local_shell"}]},
        "tools[0].type",
    ),
    "a call that only OpenAI could have made": (
        "/v1/responses",
        {**CODEX, "input": [{"type": "web_search_call", "id": "ws_1", "status": "completed"}]},
        "input[0].type",
    ),
    "a history that was made short elsewhere": (
        "/v1/responses",
        {**CODEX, "input": [{"type": "compaction", "encrypted_content": "x"}]},
        "input[0].type",
    ),
    "a screenshot": (
        "/v1/chat/completions",
        {**_CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
        "messages[0].content[0]",
    ),
    "a search in a chat": (
        "/v1/chat/completions",
        {**_CHAT, "tools": [{"type": "web_search", "name": "x"}]},
        "tools[0].type",
    ),
}
"""What cannot be answered here, and the field that says why."""
