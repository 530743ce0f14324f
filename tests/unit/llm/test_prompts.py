"""What counts as a prompt, and which one a message names when it is none."""

from __future__ import annotations

from typing import Any

import pytest

from disaggregated.errors import InvalidRequest, PromptTooLong
from disaggregated.llm.prompts import PromptReader
from tests.support.byte_model import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture
def reader() -> PromptReader:
    return PromptReader(TOKENIZER, vocab_size=257, num_tokens_max=32)


@pytest.mark.parametrize(
    ("prompts", "texts", "num_tokens"),
    [
        ("ab", ["ab"], [2]),
        (["ab", "c"], ["ab", "c"], [2, 1]),
        ([5, 6, 7], [None], [3]),
        ((5, 6), [None], [2]),
        ([[5], [6, 7]], [None, None], [1, 2]),
        ([[5], "ab"], [None, "ab"], [1, 2]),
        ([], [], []),
    ],
)
def test_prompts_are_texts_or_token_ids_or_lists_of_them(
    reader: PromptReader, prompts: Any, texts: list[str | None], num_tokens: list[int]
) -> None:
    read = reader.read(prompts)
    assert [prompt.text for prompt in read] == texts
    assert [len(prompt.token_ids) for prompt in read] == num_tokens


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("", "prompts is empty"),
        (["ab", ""], r"prompts\[1\] is empty"),
        ([[]], r"prompts\[0\] is empty"),
        (7, "prompts must be text, token ids, or a list of either, is int"),
        ({"prompt": "ab"}, "prompts must be text, token ids, or a list of either, is dict"),
        (["ab", 7], r"prompts\[1\] must be text or token ids, is 7"),
        ([[1, "a"]], r"prompts\[0\] must be text or token ids"),
        ([1, True], r"prompts\[0\] must be text or token ids, is 1"),
        ([1, 257], "prompts: token id 257 is not between 0 and 256"),
        ([[1], [-1]], r"prompts\[1\]: token id -1 is not between 0 and 256"),
        (["ab", "\ud800"], r"the text is not valid Unicode"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(reader: PromptReader, prompts: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{says}"):
        reader.read(prompts)


def test_a_prompt_leaves_room_for_one_token(reader: PromptReader) -> None:
    assert len(reader.read([1] * 31)[0].token_ids) == 31
    with pytest.raises(PromptTooLong, match=r"prompts\[1\] has 32 tokens; with one token after it, 32 is the limit"):
        reader.read(["ab", "x" * 32])


def test_a_chat_goes_through_the_model_s_template(reader: PromptReader) -> None:
    [prompt] = reader.read_chats([{"role": "user", "content": "hi"}])
    assert prompt.text == "[user]hi[assistant]"
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    [prompt] = reader.read_chats([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert prompt.text == "[user]hi"


def test_several_chats_are_several_prompts(reader: PromptReader) -> None:
    chats = [[{"role": "user", "content": text}] for text in "ab"]
    assert [prompt.text for prompt in reader.read_chats(chats)] == ["[user]a[assistant]", "[user]b[assistant]"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must be a list of messages"),
        ("hi", r"messages\[0\]\[0\] must have a role"),
        ([[]], r"messages\[0\] must be a list of messages, is \[\]"),
        ([{"content": "hi"}], r"messages\[0\] must have a role"),
        ([[{"role": "user", "content": "a"}], [{"role": 3}]], r"messages\[1\]\[0\] must have a role"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_place(reader: PromptReader, messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{says}"):
        reader.read_chats(messages)
