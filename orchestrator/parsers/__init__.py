"""A reply's text, taken apart: content, reasoning, tool calls.

text pieces ──ReplyParser──▶ deltas ──Shape──▶ a client's JSON

Parsers are pure: pieces of text in, deltas out, and however the text was cut, the joined deltas are the same. They live
in the orchestrator and see the text that `ChoiceText` lets through, so the loss of a server never reaches them.
"""

from orchestrator.parsers.deltas import (
    Call,
    CallArguments,
    CallStart,
    Content,
    Delta,
    Reasoning,
    ReplyParser,
    calls_of,
    content_of,
    joined,
    reasoning_of,
)

__all__ = [
    "Call",
    "CallArguments",
    "CallStart",
    "Content",
    "Delta",
    "Reasoning",
    "ReplyParser",
    "calls_of",
    "content_of",
    "joined",
    "reasoning_of",
]
