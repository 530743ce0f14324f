"""A chat that goes on from its last message ends where transformers' own rendering of it ends."""

from __future__ import annotations

from typing import Any, Final

import pytest
import transformers

from disaggregated.errors import InvalidRequest
from disaggregated.model_files import resolve
from disaggregated.text import ChatTemplate, Tokenizer

USER: Final[dict[str, Any]] = {"role": "user", "content": "Write a poem."}
TEMPLATES: Final = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]\n{% endfor %}",
    "trims the left": "{% for m in messages %}{{ m['content'].lstrip('\\n') }}[end]{% endfor %}after",
    "thinks": "{% for m in messages %}{{ '<think></think>' if loop.last }}{{ m.content.split('</think>')[-1] }}."
    "{% endfor %}",
}
TEXTS: Final = (
    "Roses are",
    "Roses are ",
    "\n\nRoses are\n",
    "",
    " ",
    "[end]",
    "ü 😀",
    "{{ 7 * 7 }}",
    "<think>Hm.</think>Roses",
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return transformers.AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct", weights=False).path)


def rendered_by(theirs: Any, messages: list[dict[str, Any]], template: str | None) -> str | None:
    """None: transformers finds no place to go on from."""
    try:
        return str(
            theirs.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
        )
    except ValueError:
        return None


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_prompt_ends_where_transformers_ends_it(theirs: Any, template: str, text: str) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    expected = rendered_by(theirs, messages, template)
    ours = ChatTemplate(template, {})
    if expected is None:
        with pytest.raises(InvalidRequest, match="does not show the last message as it is"):
            ours.render(messages, add_generation_prompt=False, continue_final_message=True)
        return
    assert ours.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_the_bundled_model_s_too(theirs: Any, text: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": text}]
    tokenizer = Tokenizer.load(resolve("smollm2-135m-instruct", weights=False).path)
    ours = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == rendered_by(theirs, messages, None)
    assert tokenizer.encode(ours, False) == theirs.encode(ours, add_special_tokens=False)


def test_parts_of_text_go_on_from_the_last_one() -> None:
    parts = [{"type": "text", "text": "Roses"}, {"type": "text", "text": "are"}]
    template = ChatTemplate(TEMPLATES["plain"], {})
    rendered = template.render(
        [{"role": "assistant", "content": parts}], add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == "[assistant]Roses\nare"


def test_the_mark_in_a_client_s_own_text_is_text() -> None:
    mark = "THE_MESSAGE_GOES_ON_HERE "
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    template = ChatTemplate(TEMPLATES["plain"], {})
    rendered = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == f"[user]{mark}[end]\n[assistant]{mark}"


def test_a_template_that_shows_the_message_twice_is_cut_at_the_last_one() -> None:
    template = ChatTemplate(
        "{{ messages[-1].content }}|{{ messages[-1].content | trim }}|{{ messages[-1].content }}.", {}
    )
    rendered = template.render(
        [{"role": "assistant", "content": "x "}], add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == "x |x |x "


def test_tools_that_a_template_does_not_know_are_told_all_the_same() -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    rendered = ChatTemplate(TEMPLATES["plain"], {}).render(
        [USER, {"role": "assistant", "content": "I will"}],
        tools=[tool],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert rendered.startswith("[system]You may call")
    assert rendered.endswith("[assistant]I will")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (USER, "the last message must be the assistant's, its role is 'user'"),
        ({"role": "assistant"}, "the last message has no content to go on from"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "the last message has tool calls",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_by_name(last: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        ChatTemplate("{% for m in messages if m.content %}{{ m.content }}{% endfor %}", {}).render(
            [USER, last], add_generation_prompt=False, continue_final_message=True
        )
    assert refused.value.param == "continue_final_message"


def test_a_template_that_leaves_the_message_out_is_told_of() -> None:
    with pytest.raises(InvalidRequest, match="does not show the last message as it is"):
        ChatTemplate("{{ messages[0].content }}", {}).render(
            [USER, {"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
        )
