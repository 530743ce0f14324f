"""Chat templates render what transformers renders, and cannot do anything else."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import transformers

from disaggregated.errors import InvalidRequest, ModelUnavailable
from disaggregated.model_files import resolve
from disaggregated.text import ChatTemplate, Tokenizer, chat_template
from disaggregated.text.chat_messages import template_messages

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What's <1 & 2>?"}],
    [
        {"role": "user", "content": "  spaces  \n"},
        {"role": "assistant", "content": "Ja, schön 😀"},
        {"role": "user", "content": "{{ 7 * 7 }}"},
    ],
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It's <hot>?", "parameters": {"a": ["ü"]}}}
]

TEMPLATES = {
    "whitespace rules": "{% for m in messages %}\n  {%- if true %}\n    {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "tools as JSON": "{% if tools %}{{ tools | tojson }}\n{{ tools | tojson(indent=2) }}{% endif %}{{ bos_token }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}|{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "the prompt for a reply": "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<assistant>{% endif %}",
    "keyword of the client": "{{ 'think' if enable_thinking is defined and enable_thinking else 'act' }}",
    "date": "{{ strftime_now('%Y-%m') }}",
}


@pytest.fixture(scope="module")
def bundled() -> Path:
    return resolve("smollm2-135m-instruct", weights=False).path


@pytest.fixture(scope="module")
def reference(bundled: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(bundled)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
def test_the_bundled_template_renders_as_in_transformers(
    bundled: Path, reference: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    tokenizer = Tokenizer.load(bundled)
    ours = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    theirs = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert ours == theirs
    ids = reference.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert tokenizer.encode(ours, add_special_tokens=False) == ids


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_any_template_renders_as_in_transformers(reference: Any, source: str, messages: list[dict[str, Any]]) -> None:
    tools = TOOLS if "tools" in source else None
    theirs = reference.apply_chat_template(
        messages, chat_template=source, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    template = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    ours = template.render(messages, tools=tools, template_kwargs={"enable_thinking": True})
    assert ours == theirs


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, {}).render(messages)


def test_what_the_template_raises_is_told_to_the_client() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('The first role must be user') }}{% endif %}"
    with pytest.raises(InvalidRequest, match="refuses this: The first role must be user") as caught:
        render(source, [{"role": "assistant", "content": ""}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ 'a' + messages[0].content }}{{ tools }}", [{"role": "assistant", "tool_calls": [{}]}]),
        ("{{ messages[0].content.x.y }}", [{"role": "user", "content": "a"}]),
        ("{{ 1 // (messages | length - 1) }}", [{"role": "user", "content": "a"}]),
        ("{{ messages[0] | tojson }}", [{"role": "user", "content": {1, 2}}]),
        ("{{ strftime_now(messages) }}", [{"role": "user", "content": "a"}]),
    ],
)
def test_messages_that_a_template_stumbles_over_are_the_clients_mistake(
    source: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source, messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for _ in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_get_out_of_its_sandbox(source: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(InvalidRequest):
        render(source, messages)
    assert messages == [{"role": "user", "content": "a"}]


def test_a_client_cannot_replace_the_messages_by_a_keyword() -> None:
    messages = [{"role": "user", "content": "a"}]
    rendered = ChatTemplate("{{ messages[0].content }}", {}).render(messages, template_kwargs={"messages": [{}]})
    assert rendered == "a"


def test_a_damaged_template_is_found_at_start() -> None:
    with pytest.raises(ModelUnavailable, match="chat template is damaged: line 2: "):
        ChatTemplate("{% for m in messages %}\n{% endif %}", {})


def test_dates_are_todays() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]) == str(datetime.datetime.now().year)


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb\nc"


@pytest.mark.parametrize(
    ("part", "member", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "", "must be text, is 'image_url'"),
        ({"type": "text"}, ".text", "must be a string, is null"),
        ({"type": "refusal", "refusal": 5}, ".refusal", "must be a string, is a number"),
        (3, "", "must be text, is a number"),
    ],
)
def test_a_part_that_is_no_text_is_named(part: Any, member: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        render("{{ messages }}", [{"role": "system", "content": ""}, {"role": "user", "content": ["a", part]}])
    assert caught.value.param == f"messages[1].content[1]{member}"
    assert str(caught.value).startswith(caught.value.param)


def tool_call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [('{"a": "é"}', '{"a": "é"}'), ({"a": 1}, '{"a": 1}'), ("not JSON", '"not JSON"'), ("[1]", '"[1]"')],
)
def test_arguments_of_tool_calls_are_encoded_once(arguments: Any, rendered: str) -> None:
    message = tool_call(arguments)
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [message]) == rendered
    assert message == tool_call(arguments)


@pytest.mark.parametrize("role", ["user", "assistant", "system", "developer"])
def test_a_message_of_a_role_and_a_text_is_shown_as_one_with_more_fields_is(role: str) -> None:
    plain = {"role": role, "content": "Hello"}
    longer = {**plain, "name": None, "reasoning_content": None}
    (shown,), (expected,) = template_messages([plain]), template_messages([longer])
    assert shown == expected
    assert shown is not plain, "a template's messages are its own"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}{{ loop.first }}{{ loop.index }}{{ loop.last }}{{ m.role }}{% endfor %}",
            "True1Trueuser",
        ),
        ("{{ messages[0].items is mapping }}{{ messages[0].items() | length }}", "False3"),
        ("{{ messages[0].missing is defined }}{{ messages[0].get('missing', 1) }}", "False1"),
        ("{% for m in messages %}{{ loop.previtem is defined }}{{ loop.cycle('a', 'b') }}{% endfor %}", "Falsea"),
    ],
)
def test_entries_and_attributes_are_found_as_jinja_finds_them(source: str, text: str) -> None:
    message = {"role": "user", "content": "hello", "items": "an entry"}
    for environment in (chat_template._environment(), jinja2.sandbox.ImmutableSandboxedEnvironment()):
        assert environment.from_string(source).render(messages=[message]) == text
