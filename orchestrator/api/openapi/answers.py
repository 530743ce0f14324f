"""The answers that come back."""

from __future__ import annotations

from typing import Any, Final

from orchestrator.api.openapi.kinds import Schema, record, ref

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_REASON: Final = {"enum": ["stop", "length", "tool_calls", "function_call", "repetition"]}

_USAGE: Final = record({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}, "total_tokens")


def _choice(name: str, schema: Schema) -> Schema:
    fields = {"index": _COUNT, name: schema, "finish_reason": _REASON, "logprobs": {"type": ["object", "null"]}}
    return record(fields, *fields)


def _answer(kind: str, choice: Schema) -> Schema:
    fields = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _COUNT,
        "model": _TEXT,
        "choices": {"type": "array", "items": choice, "minItems": 1},
        "usage": _USAGE,
    }
    return record(fields, *fields)


_ITEM: Final = record({"type": {"enum": ["message", "reasoning", "function_call"]}, "id": _TEXT}, "type", "id")
_MODEL: Final = record({"id": _TEXT, "object": {"const": "model"}, "max_model_len": _COUNT}, "id", "object")

SCHEMAS: Final[dict[str, Any]] = {
    "Error": record(
        {
            "error": record(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                    "code": {"type": ["string", "null"]},
                },
                "message", "type", "param", "code",
            )
        },
        "error",
    ),
    "ChatCompletion": _answer(
        "chat.completion", _choice("message", record({"role": {"const": "assistant"}}, "role", "content"))
    ),
    "Completion": _answer("text_completion", _choice("text", _TEXT)),
    "Response": record(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "status": {"enum": ["completed", "incomplete", "in_progress", "failed"]},
            "model": _TEXT,
            "output": {"type": "array", "items": _ITEM},
            "usage": {"type": ["object", "null"]},
        },
        "id", "object", "status", "model", "output",
    ),
    "DeletedResponse": record({"id": _TEXT, "deleted": {"const": True}}, "id", "deleted"),
    "InputTokens": record({"object": _TEXT, "input_tokens": _COUNT}, "input_tokens"),
    "List": record({"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}}, "data"),
    "Models": record({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}, "data"),
    "Tokenized": record(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": {"type": "array", "items": _COUNT},
            "token_strs": {"type": ["array", "null"], "items": _TEXT},
        },
        "count", "max_model_len", "tokens",
    ),
    "Detokenized": record({"prompt": _TEXT}, "prompt"),
    "Object": {"type": "object"},
}  # fmt: skip

ERROR: Final = ref("Error")
