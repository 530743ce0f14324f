"""What a body asks for beside its prompt is read once, and each request still gets what it asked for."""

from __future__ import annotations

from typing import Any

import pytest

from disaggregated.errors import InvalidRequest
from orchestrator.api import forms
from orchestrator.api.chat import ChatForm
from orchestrator.api.fields import Fields
from orchestrator.api.forms import OF_ONE_REQUEST, Forms
from tests.support.byte_model import byte_model

MESSAGES = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
OWN = {
    "seed": 9,
    "user": "u",
    "metadata": {"a": "b"},
    "request_id": "r",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "session_id": "s",
    "conversation_id": "c",
    "conversation_params": {"conversation_id": "c"},
}


@pytest.fixture
def chats() -> Forms:
    return Forms(byte_model(), is_chat=True)


def body(**fields: Any) -> Fields:
    return Fields({"model": "m", "messages": MESSAGES, **fields})


def test_the_same_fields_are_read_once(chats: Forms) -> None:
    fields = {"temperature": 0.5, "tools": [TOOL], "max_tokens": 3}
    assert chats.of(body(**fields)) is chats.of(body(**fields))


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.6}, {"max_tokens": 4}, {"stream": True}, {"tools": []}, {"stop": "x"}, {"cache_salt": "s"}],
)
def test_a_field_that_differs_makes_another_form(chats: Forms, change: dict[str, Any]) -> None:
    fields = {"temperature": 0.5, "tools": [TOOL], "max_tokens": 3}
    assert chats.of(body(**fields)) is not chats.of(body(**fields | change))


def test_every_field_of_one_request_has_an_example_here() -> None:
    assert OWN.keys() == OF_ONE_REQUEST


@pytest.mark.parametrize("name", sorted(OF_ONE_REQUEST))
def test_what_a_request_has_of_its_own_changes_nothing_else(chats: Forms, name: str) -> None:
    with_it, without_it = body(**{name: OWN[name]}), body()
    seedless = {"seed": 0}
    forms_of_both = [Forms(byte_model(), is_chat=True).of(each).fields for each in (with_it, without_it)]
    assert forms_of_both[0].sampling.but(**seedless) == forms_of_both[1].sampling.but(**seedless)
    for part in ("stop", "stream", "include_usage", "reply", "priority", "cache_salt", "unknown"):
        assert getattr(forms_of_both[0], part) == getattr(forms_of_both[1], part)
    read = [ChatForm.read(each, grammar=None, allows_template=False) for each in (with_it, without_it)]
    assert read[0] == read[1]
    assert chats.of(with_it) is chats.of(without_it)


def test_a_field_that_is_wrong_is_told_each_time(chats: Forms) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="temperature must be at most 2"):
            chats.of(body(temperature=3))


def test_chats_and_completions_have_forms_of_their_own(chats: Forms) -> None:
    completions = Forms(byte_model(), is_chat=False)
    assert completions.of(body()).fields.sampling.max_tokens == forms.COMPLETION_TOKENS_DEFAULT
    assert chats.of(body()).fields.sampling.max_tokens > forms.COMPLETION_TOKENS_DEFAULT


def test_prompts_of_any_kind_share_a_form(chats: Forms) -> None:
    assert chats.of(body()) is chats.of(body(messages=[{"role": "user", "content": "another"}]))
    completions = Forms(byte_model(), is_chat=False)
    assert completions.of(body(prompt="a")) is completions.of(body(prompt=[1, 2]))


def test_text_that_is_no_unicode_is_read_and_not_kept(chats: Forms) -> None:
    odd = body(cache_salt="half \ud83d")
    assert chats.of(odd).fields.cache_salt == "half \ud83d"
    assert chats.of(odd) is not chats.of(odd)
