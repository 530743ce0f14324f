"""Reasoning is told apart from the answer, wherever its first tag was written."""

from __future__ import annotations

import pytest

from orchestrator.parsers import CallArguments, CallStart, Content, Delta, Reasoning
from orchestrator.parsers.formats import TOOL_FORMATS
from orchestrator.parsers.reasoning import REASONING, ReasoningParser
from tests.unit.parsers.pieces import fixed_id, one_reading

TAGS = REASONING["qwen3"]


def read(text: str, *, begins_within: bool = False, is_shown: bool = True) -> list[Delta]:
    return one_reading(lambda: ReasoningParser(TAGS, begins_within=begins_within, then=None, is_shown=is_shown), text)


@pytest.mark.parametrize(
    ("text", "begins_within", "deltas"),
    [
        ("<think>\nHm, 2.\n</think>\n\nTwo.", False, [Reasoning("Hm, 2."), Content("Two.")]),
        ("Hm, 2.\n</think>\n\nTwo.", True, [Reasoning("Hm, 2."), Content("Two.")]),
        ("<think>\nHm, 2.\n</think>\n\nTwo.", True, [Reasoning("Hm, 2."), Content("Two.")]),
        ("<think>\n\n</think>\n\nTwo.", False, [Content("Two.")]),
        ("Two, I <think> so.", False, [Content("Two, I <think> so.")]),
        ("\n Two.", False, [Content("\n Two.")]),
        ("<think>Hm, <thin", False, [Reasoning("Hm, <thin")]),
        ("Hm, </thi", True, [Reasoning("Hm, </thi")]),
        ("<thin", False, [Content("<thin")]),
        ("</think>", True, []),
        ("", True, []),
    ],
)
def test_reasoning_and_answer_are_told_apart(text: str, begins_within: bool, deltas: list[Delta]) -> None:
    assert read(text, begins_within=begins_within) == deltas


def test_reasoning_that_nobody_wants_to_see_is_left_out() -> None:
    assert read("<think>Hm.</think>Two.", is_shown=False) == [Content("Two.")]


def test_calls_are_looked_for_behind_the_reasoning_only() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    deltas = one_reading(
        lambda: ReasoningParser(TAGS, begins_within=True, then=TOOL_FORMATS["hermes"].make({"f": {}}, fixed_id)),
        f"I could {call}.</think>\n\n{call}",
    )
    assert deltas == [Reasoning(f"I could {call}."), CallStart(0, "id", "f"), CallArguments(0, "{}")]


def test_reasoning_is_given_on_as_it_comes() -> None:
    parser = ReasoningParser(TAGS, begins_within=True, then=None)
    assert parser.push("Hm") == [Reasoning("Hm")]
    assert parser.push(", so") == [Reasoning(", so")]


@pytest.mark.parametrize(
    ("name", "tail", "opens"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "<｜Assistant｜>", True),
        ("deepseek_r1", "<｜Assistant｜><think>\n\n</think>\n", False),
        ("mistral", "[/INST][THINK]", True),
    ],
)
def test_the_end_of_the_prompt_tells_whether_reasoning_is_open(name: str, tail: str, opens: bool) -> None:
    assert REASONING[name].opens(tail) is opens
