"""Loading a tokenizer from a directory, and text to ids."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import transformers

from disaggregated.errors import InvalidRequest, ModelUnavailable
from disaggregated.model_files import resolve
from disaggregated.text import Tokenizer
from tests.unit.text import tiny_tokenizers

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def bundled() -> Path:
    return resolve("smollm2-135m-instruct", weights=False).path


def test_ids_equal_transformers_own(bundled: Path) -> None:
    ours, theirs = Tokenizer.load(bundled), transformers.AutoTokenizer.from_pretrained(bundled, model_max_length=10**9)
    for text in topics.values():
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_bundled_model_ends_replies_at_end_of_turn(bundled: Path) -> None:
    tokenizer = Tokenizer.load(bundled)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.vocab_size == 49152
    assert tokenizer.has_chat_template


def test_one_tokenizer_serves_many_threads(bundled: Path) -> None:
    tokenizer = Tokenizer.load(bundled)
    texts = list(topics.values())[:24]
    expected = [tokenizer.encode(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == expected


def test_text_that_is_no_unicode_is_the_clients_mistake(bundled: Path) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode") as caught:
        Tokenizer.load(bundled).encode("abc\ud83d", param="prompt")
    assert caught.value.param == "prompt"


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    backend = tiny_tokenizers.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path, backend))
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode("a")) == 1


TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": TEMPLATE, "bos_token": "<s>"},
        {"chat_template": TEMPLATE, "bos_token": {"content": "<s>", "lstrip": False}},
        {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}],
         "bos_token": "<s>"},
    ],
)  # fmt: skip
def test_a_chat_template_is_found_in_each_of_its_spellings(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level(), config)
    assert Tokenizer.load(folder).render_chat(CHAT) == "<s>Hi"


def test_a_template_file_goes_before_the_one_in_the_config(tmp_path: Path) -> None:
    folder = tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level(), {"chat_template": "old"})
    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(folder).render_chat(CHAT) == "new"


def test_a_model_without_a_chat_template_says_what_it_can_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path, tiny_tokenizers.byte_level()))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template; use /v1/completions") as caught:
        tokenizer.render_chat(CHAT)
    assert caught.value.param == "messages"


def test_a_directory_without_a_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no tokenizer\.json; save one with transformers"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Nothing"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelUnavailable, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)
