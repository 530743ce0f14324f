"""A model's chat template shows how it calls tools and reasons; the configuration may know better."""

from __future__ import annotations

import pytest
import tokenizers

from disaggregated.text import ChatTemplate, Tokenizer
from orchestrator.parsers.formats import TOOL_FORMATS, ReplyFormats
from orchestrator.parsers.reasoning import REASONING
from tests.unit.text.tiny_tokenizers import byte_level


def tokenizer_of(template: str, *, special: list[str] | None = None, added: list[str] | None = None) -> Tokenizer:
    backend: tokenizers.Tokenizer = byte_level()
    backend.add_special_tokens(special or [])
    backend.add_tokens(added or [])
    return Tokenizer(backend, chat_template=ChatTemplate(template, {}), eos_token_ids=())


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ tools }}<tool_call>{{ '</think>' }}", "hermes", "qwen3"),
        ("{{ tools }}<tool_call><function=x>", "qwen3_coder", None),
        ("{{ tools }}<tool_call>{{ '<arg_key>' }}", "glm45", None),
        ("{{ tools }}[TOOL_CALLS]{{ '[/THINK]' }}", "mistral", "mistral"),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "deepseek_v3", None),
        ("{{ tools }}<|python_tag|>", "llama3_json", None),
        ("{{ tools }}<|tool_calls_section_begin|>", "kimi_k2", None),
        ("{{ tools }}<|tool_call_start|>", "lfm2", None),
        ("{{ messages }}", "hermes", None),
    ],
)
def test_the_template_shows_the_models_ways(template: str, tools: str, reasoning: str | None) -> None:
    formats = ReplyFormats.choose("auto", "auto", tokenizer_of(template))
    assert formats.tools is TOOL_FORMATS[tools]
    assert formats.reasoning == (REASONING[reasoning] if reasoning else None)


def test_the_configuration_goes_before_the_template() -> None:
    tokenizer = tokenizer_of("{{ tools }}<tool_call></think>")
    formats = ReplyFormats.choose("mistral", "deepseek_r1", tokenizer)
    assert (formats.tools, formats.reasoning) == (TOOL_FORMATS["mistral"], REASONING["deepseek_r1"])
    neither = ReplyFormats.choose("none", "none", tokenizer)
    assert (neither.tools, neither.reasoning, neither.shown) == (None, None, frozenset())


def test_markers_that_are_special_tokens_are_shown_and_others_are_not() -> None:
    tokenizer = tokenizer_of("{{ tools }}[TOOL_CALLS]", special=["[TOOL_CALLS]", "[INST]"])
    formats = ReplyFormats.choose("auto", "auto", tokenizer)
    ids = tokenizer.encode("[INST]a[TOOL_CALLS]b", add_special_tokens=False)
    assert tokenizer.detokenizer(shown=formats.shown).push(ids) == "a[TOOL_CALLS]b"
    assert tokenizer.detokenizer().push(ids) == "ab"
    assert tokenizer.detokenizer(skip_special_tokens=False).push(ids) == "[INST]a[TOOL_CALLS]b"


def test_the_token_that_ends_reasoning_is_known_where_there_is_one() -> None:
    tokenizer = tokenizer_of("</think>", added=["</think>"])
    assert ReplyFormats.choose("auto", "auto", tokenizer).reasoning_end == (tokenizer.added_token_id("</think>"),)
    assert ReplyFormats.choose("auto", "auto", tokenizer_of("</think>")).reasoning_end == ()


def test_both_tags_are_known_as_tokens_however_many_these_are() -> None:
    tokenizer = tokenizer_of("</think>", added=["</think>"])
    formats = ReplyFormats.choose("auto", "auto", tokenizer)
    assert formats.thinking_end == formats.reasoning_end
    assert formats.thinking_begin == tuple(tokenizer.encode("<think>"))
    assert len(formats.thinking_begin) > 1
    assert ReplyFormats.choose("auto", "none", tokenizer).thinking_end == ()
